"""Where an image comes from: the gallery, a file, or bytes. A file is sized before it is read."""

from __future__ import annotations

import os

from pykvm import gallery
from pykvm.errors import GuestImageError
from pykvm.units import format_size

__all__ = ["LARGEST_IMAGE", "read_image"]

LARGEST_IMAGE = 256 << 20  # bytes of a file; more RAM than that a bss gives


def read_image(image: str | os.PathLike[str] | bytes) -> tuple[bytes, str]:
    """(content, path) of a gallery name, a path (anything with a ``/``, or a file that exists) or the bytes themselves.

    Raises GuestImageError: no such guest or file, or one that is too large to be an image.
    """
    if isinstance(image, bytes):
        return image, "image"
    name = os.fspath(image)
    path = gallery.find(name) if isinstance(image, str) and "/" not in name and not os.path.isfile(name) else name
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= LARGEST_IMAGE:  # of a pipe or a device, 0: read on until it is too much
                data = file.read(LARGEST_IMAGE + 1)
                if len(data) <= LARGEST_IMAGE:
                    return data, path
                size = len(data)
    except OSError as error:
        raise GuestImageError(path, None, f"cannot be read: {error.strerror}") from None
    raise GuestImageError(path, None, f"it has {size} bytes or more; pykvm loads images of up to {format_size(LARGEST_IMAGE)}: is it one?")
