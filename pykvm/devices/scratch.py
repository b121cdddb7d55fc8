"""Scratch registers: a few bytes that keep what is written, where every access exits. Guests and benchmarks practise on them.

At ports 0xE0-0xE7 (the first four as in QEMU's pc-testdev) and at gpa 0xD0000000.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Scratch"]


class Scratch:
    """``length`` bytes, little-endian; what an access has beyond the end reads as ones and is not written."""

    name = "scratch"

    def __init__(self, length: int) -> None:
        self.bytes = bytearray(length)

    def read(self, offset: int, size: int) -> int:
        """The bytes at ``offset``."""
        return int.from_bytes(self.bytes[offset : offset + size].ljust(size, b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep them."""
        data = value.to_bytes(size, "little")[: max(0, len(self.bytes) - offset)]
        self.bytes[offset : offset + len(data)] = data

    def save(self) -> dict[str, Any]:
        """The bytes, without the zeros at the end."""
        return {"version": 1, "bytes": bytes(self.bytes).rstrip(b"\0").hex()}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        from pykvm.devices.saved import Saved

        data = Saved(state, self.name, 1).bytes("bytes", len(self.bytes))
        self.bytes[:] = data.ljust(len(self.bytes), b"\0")
