"""The image as a file that gdb reads by itself (vFile packets, GDB manual section E.7 "Host I/O Packets").

There is one file, the image, from memory: no path of the client's ever reaches the host's file system.
"""

from __future__ import annotations

from struct import pack

from pykvm.debug.gdb.packets import PACKET_SIZE, escape, parse_hex

__all__ = ["ImageFile"]

_ENOENT, _EBADF, _EINVAL, _ENOSYS = 2, 9, 22, 88  # of File-I/O, section E.13
_MODE = 0o100444
_LIMIT = 64


class ImageFile:
    """``data`` under the absolute ``path``; answers what follows ``vFile:``."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.data = path, data
        self._open: set[int] = set()

    def answer(self, request: bytes) -> bytes:
        """The reply to one request; an error for what is none."""
        name, _, rest = request.partition(b":")
        arguments = rest.split(b",")
        match name:
            case b"setfs":
                return b"F0"
            case b"open":
                return self._opened(arguments)
            case b"close":
                fd = parse_hex(arguments[0])
                if fd not in self._open:
                    return _error(_EBADF)
                self._open.discard(fd)
                return b"F0"
            case b"pread":
                return self._pread(arguments)
            case b"fstat":
                if parse_hex(arguments[0]) not in self._open:
                    return _error(_EBADF)
                return b"F40;" + escape(self._stat())
            case b"readlink":
                return _error(_ENOENT)
        return b"" if name not in (b"pwrite", b"unlink") else _error(_ENOSYS)

    def _opened(self, arguments: list[bytes]) -> bytes:
        try:
            path = bytes.fromhex(arguments[0].decode("ascii"))
        except (ValueError, UnicodeDecodeError):
            return _error(_EINVAL)
        flags = parse_hex(arguments[1]) if len(arguments) > 1 else None
        if path != self.path.encode(errors="surrogateescape"):
            return _error(_ENOENT)
        if flags != 0 or len(self._open) >= _LIMIT:  # O_RDONLY
            return _error(_EINVAL)
        fd = next(n for n in range(1, _LIMIT + 2) if n not in self._open)
        self._open.add(fd)
        return b"F%x" % fd

    def _pread(self, arguments: list[bytes]) -> bytes:
        numbers = [parse_hex(a) for a in arguments]
        if len(numbers) != 3 or None in numbers:
            return _error(_EINVAL)
        fd, count, offset = (n or 0 for n in numbers)
        if fd not in self._open:
            return _error(_EBADF)
        data = self.data[offset : offset + min(count, PACKET_SIZE // 2 - 32)]
        return b"F%x;" % len(data) + escape(data)

    def _stat(self) -> bytes:
        """struct stat as the protocol has it, big endian (section E.13.6.2)."""
        return pack(">7I3Q3I", 0, 0, _MODE, 1, 0, 0, 0, len(self.data), 512, -(-len(self.data) // 512), 0, 0, 0)


def _error(number: int) -> bytes:
    return b"F-1,%x" % number
