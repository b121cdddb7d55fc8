"""The debug exit at port 0xF4 (QEMU's isa-debug-exit): the value written ends the run with that code."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DebugExit"]


class DebugExit:
    """Calls ``stop("exit", value)`` for a write of any size."""

    name = "debug exit"

    def __init__(self, stop: Callable[[str, int | None], object]) -> None:
        self.stop = stop

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest is done, with code ``value``."""
        self.stop("exit", value)
