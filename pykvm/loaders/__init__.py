"""Images into guest memory: which format a file has, and what its loader needs to know before memory exists.

``peek()`` reads headers only, so that the note can say how much memory to make; ``load()`` then writes the segments.
Files are hostile: everything is checked before the first byte is written, and every complaint is a GuestImageError.
"""

from __future__ import annotations

from pykvm.errors import GuestImageError
from pykvm.loaders import elf, flat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.loaders.image import BootState, ImageInfo
    from pykvm.memory import GuestMemory

__all__ = ["load", "peek"]


def peek(data: bytes, path: str = "image", mode: str = "auto") -> ImageInfo:
    """What ``data`` is: ELF by its magic, else a flat binary. ``mode`` other than "auto" overrides the image's own."""
    if not data:
        raise GuestImageError(path, None, "the file is empty: a guest image has code in it")
    return elf.peek(data, path, mode) if data[:4] == elf.MAGIC else flat.peek(data, path, mode)


def load(info: ImageInfo, data: bytes, memory: GuestMemory, entry: int | None = None) -> BootState:
    """Write the image into ``memory``; ``entry`` overrides where it starts (gpa)."""
    from pykvm.loaders.image import place

    return place(info, data, memory, entry)
