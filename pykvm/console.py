"""What a guest prints: bytes from the UART and the debug console, in order, bounded, and passed on as they come."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Console"]


class Console:
    """A bounded byte buffer: of more than ``limit`` bytes only the newest are kept, and ``dropped`` counts the others.

    ``on_output`` is called with each piece as it comes, once: when it raises, whoever adds the piece hears of it, and the piece is kept
    all the same.
    """

    __slots__ = ("data", "dropped", "limit", "on_output")

    def __init__(self, limit: int = 16 << 20, on_output: Callable[[bytes], object] | None = None) -> None:
        self.data = bytearray()
        self.dropped = 0
        self.limit = limit
        self.on_output = on_output

    def extend(self, data: bytes) -> None:
        """Add output."""
        self.data += data
        if len(self.data) > self.limit:
            excess = len(self.data) - self.limit // 2  # half at a time: trimming each byte would be quadratic
            del self.data[:excess]
            self.dropped += excess
        if self.on_output is not None:
            self.on_output(data)

    @property
    def text(self) -> str:
        """All that is kept, as text; what is no UTF-8 becomes U+FFFD."""
        return self.data.decode("utf-8", "replace")

    def __repr__(self) -> str:
        return f"<Console {len(self.data)} bytes>"
