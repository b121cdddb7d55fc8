"""Bytes for guest memory whose address is not known yet: pointers in them and checksums wait for it."""

from __future__ import annotations

__all__ = ["Blob"]


class Blob:
    """``data``; ``pointers`` are (offset, size, blob pointed into), with the offset in there as the value; ``checksums`` are
    (offset of the byte, start, length): all bytes of the stretch add up to 0."""

    def __init__(self, name: str, align: int = 16) -> None:
        self.name, self.align = name, align
        self.data = bytearray()
        self.pointers: list[tuple[int, int, Blob]] = []
        self.checksums: list[tuple[int, int, int]] = []
        self.gpa: int | None = None

    def append(self, data: bytes, align: int = 1) -> int:
        """Add bytes; returns their offset."""
        self.data += bytes(-len(self.data) % align)
        offset = len(self.data)
        self.data += data
        return offset

    def point(self, offset: int, size: int, target: Blob, at: int = 0) -> None:
        """The ``size`` bytes at ``offset`` will hold the gpa of byte ``at`` of ``target``."""
        self.data[offset : offset + size] = at.to_bytes(size, "little")
        self.pointers.append((offset, size, target))

    def checksum(self, offset: int, start: int, length: int) -> None:
        """The byte at ``offset`` will make [start, start + length) add up to 0."""
        self.data[offset] = 0
        self.checksums.append((offset, start, length))

    def resolved(self) -> bytes:
        """The bytes as they are in memory, when ``gpa`` is known of every blob that is pointed into."""
        data = bytearray(self.data)
        for offset, size, target in self.pointers:
            assert target.gpa is not None
            value = int.from_bytes(data[offset : offset + size], "little") + target.gpa
            data[offset : offset + size] = value.to_bytes(size, "little")
        for offset, start, length in self.checksums:
            data[offset] = -sum(data[start : start + length]) & 0xFF
        return bytes(data)

    def __repr__(self) -> str:
        where = "nowhere yet" if self.gpa is None else f"gpa {self.gpa:#x}"
        return f"<Blob {self.name}: {len(self.data)} bytes, {where}>"
