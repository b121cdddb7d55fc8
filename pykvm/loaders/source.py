"""Where an image comes from: the gallery, a file, or bytes. A file is sized before it is read."""

from __future__ import annotations

import os

from pykvm import gallery
from pykvm.errors import GuestImageError
from pykvm.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.loaders.handover import Module

__all__ = ["LARGEST_IMAGE", "read_image", "read_module"]

_GZIP = b"\x1f\x8b"
LARGEST_IMAGE = 256 << 20  # bytes of a file; more RAM than that a bss gives


def read_image(image: str | os.PathLike[str] | bytes, format: str = "auto") -> tuple[bytes, str]:
    """(content, path) of a gallery name, a path (anything with a ``/``, or a file that exists) or the bytes themselves.

    A file packed with gzip is unpacked, as boot loaders do it. ``format`` "pvh" takes the vmlinux out of a Linux bzImage.
    Raises GuestImageError: no such guest or file, or one that is too large to be an image.
    """
    if isinstance(image, bytes):
        return image, "image"
    name = os.fspath(image)
    path = gallery.find(name) if isinstance(image, str) and "/" not in name and not os.path.isfile(name) else name
    data = _read(path)
    if data[:2] == _GZIP:
        data = _unpack(data, path)
    if format == "pvh" and data[0x202:0x206] == b"HdrS":
        from pykvm.loaders.bzimage import is_bzimage, vmlinux

        if is_bzimage(data):
            data = vmlinux(data, path, LARGEST_IMAGE)
    return data, path


def read_module(module: str | bytes) -> Module:
    """ "FILE", "FILE and a command line", or the bytes themselves. Raises GuestImageError."""
    from pykvm.loaders.handover import Module

    if isinstance(module, bytes):
        return Module(module)
    path, _, text = (module, "", "") if os.path.isfile(module) else module.partition(" ")
    return Module(_read(path), path, text)


def _unpack(data: bytes, path: str) -> bytes:
    import zlib

    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(data, LARGEST_IMAGE + 1)
    except zlib.error as error:
        raise GuestImageError(path, None, f"it begins as a gzip file does, but cannot be unpacked: {error}") from None
    if len(content) > LARGEST_IMAGE:
        raise GuestImageError(path, None, f"unpacked it has more than {format_size(LARGEST_IMAGE)}, the most that pykvm loads")
    if not unpacker.eof:
        raise GuestImageError(path, None, "it is a gzip file that is truncated")
    return content


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= LARGEST_IMAGE:  # of a pipe or a device, 0: read on until it is too much
                data = file.read(LARGEST_IMAGE + 1)
                if len(data) <= LARGEST_IMAGE:
                    return data
                size = len(data)
    except OSError as error:
        raise GuestImageError(path, None, f"cannot be read: {error.strerror}") from None
    raise GuestImageError(path, None, f"it has {size} bytes or more; pykvm loads images of up to {format_size(LARGEST_IMAGE)}: is it one?")
