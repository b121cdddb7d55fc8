"""Output that leaves a device at most once.

When a device raises, the run loop gives it the same access again in the next run. What the guest prints must not come out twice then, nor
hold the guest up for ever when nobody takes it: whoever failed has had its chance.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Once"]


class Once:
    """Calls ``output(data)``; after that has raised, the same data coming again is the access's second turn, and is not passed on."""

    __slots__ = ("_failed", "_output")

    def __init__(self, output: Callable[[bytes], object]) -> None:
        self._output = output
        self._failed: bytes | None = None

    def __call__(self, data: bytes) -> None:
        if data == self._failed:
            self._failed = None
            return
        try:
            self._output(data)
        except BaseException:
            self._failed = data
            raise
