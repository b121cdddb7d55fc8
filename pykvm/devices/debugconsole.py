"""The debug console at port 0xE9: every byte written is output, a read gives 0xE9 (as in Bochs and QEMU's isa-debugcon)."""

from __future__ import annotations

from pykvm.devices.once import Once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Sink(Protocol):
        """Where output goes."""

        def extend(self, data: bytes, /) -> object:
            """Take some bytes."""


__all__ = ["DebugConsole"]


class DebugConsole:
    """Adds every byte written to ``sink``; a wider write is that many bytes."""

    name = "debug console"

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._put = Once(sink.extend)

    def read(self, offset: int, size: int) -> int:
        """0xE9 tells a guest that the port is there."""
        return 0xE9

    def write(self, offset: int, size: int, value: int) -> None:
        """Output."""
        self._put(value.to_bytes(size, "little"))
