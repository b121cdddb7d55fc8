"""The port that user mode's minimal kernel writes an exception's vector to (x86/modes.py): the run ends, and is explained."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ExceptionReport"]


class ExceptionReport:
    """``stop(reason, code)`` is called with "crash" and the vector."""

    name = "exception report"

    def __init__(self, stop: Callable[[str, int], object]) -> None:
        self.stop = stop

    def write(self, offset: int, size: int, value: int) -> None:
        """An exception has come."""
        self.stop("crash", value)
