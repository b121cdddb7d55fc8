"""ACPI machine language, as much of it as a small DSDT needs: names, integers, strings, packages, buffers, scopes, devices, resources.

Each function gives bytes. Source: ACPI 6.5 section 20.2 (the grammar), 6.4 (resource descriptors).
"""

from __future__ import annotations

__all__ = ["buffer", "device", "eisa_id", "integer", "interrupt", "io_ports", "name", "package", "resources", "scope", "string"]


def _length(size: int) -> bytes:
    """PkgLength of a package of ``size`` bytes: the encoding counts itself (20.2.4)."""
    if size + 1 < 1 << 6:
        return bytes((size + 1,))
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes((extra << 6 | total & 0xF,)) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {size} bytes: at most 2**28 - 5 fit")


def _path(path: str) -> bytes:
    """A NameString of one segment, perhaps from the root: "\\\\_SB_", "COM1"."""
    root, segment = (b"\\", path[1:]) if path.startswith("\\") else (b"", path)
    return root + segment.ljust(4, "_").encode("ascii")


def integer(value: int) -> bytes:
    """An integer object, as short as can be."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    """A string object."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A hardware id such as "PNP0501" as the integer that stands for it (19.3.4)."""
    letters = [ord(c) - 0x40 for c in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def package(*items: bytes) -> bytes:
    """A package of up to 255 objects."""
    body = bytes((len(items),)) + b"".join(items)
    return b"\x12" + _length(len(body)) + body


def buffer(data: bytes) -> bytes:
    """A buffer with this content."""
    body = integer(len(data)) + data
    return b"\x11" + _length(len(body)) + body


def name(path: str, value: bytes) -> bytes:
    """Name(path, value)."""
    return b"\x08" + _path(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Scope(path) { terms }."""
    body = _path(path) + b"".join(terms)
    return b"\x10" + _length(len(body)) + body


def device(path: str, *terms: bytes) -> bytes:
    """Device(path) { terms }."""
    body = _path(path) + b"".join(terms)
    return b"\x5b\x82" + _length(len(body)) + body


def io_ports(base: int, length: int) -> bytes:
    """An IO descriptor: ``length`` ports at ``base``, nowhere else (6.4.2.5)."""
    return b"\x47\x01" + base.to_bytes(2, "little") * 2 + bytes((1, length))


def interrupt(irq: int) -> bytes:
    """An edge-triggered, active-high ISA interrupt (6.4.2.1)."""
    return b"\x22" + (1 << irq).to_bytes(2, "little")


def resources(*descriptors: bytes) -> bytes:
    """A resource template; 0 as its checksum means "not checked"."""
    return buffer(b"".join(descriptors) + b"\x79\x00")
