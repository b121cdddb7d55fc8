"""Images into guest memory: which format a file has, and what its loader needs to know before memory exists.

``peek()`` reads headers only, so that the note can say how much memory to make; ``load()`` then writes the segments, and what the image's
boot protocol wants beside them. Files are hostile: everything is checked before the first byte is written, and every complaint is a
GuestImageError.

Which format a file has, the first that holds:

1. what the caller insists on (``format``);
2. ``format=`` in its pykvm note: the note is the image's own word, whatever other headers it carries;
3. a pykvm note without it: an ELF executable of pykvm's own kind;
4. a multiboot header in the first 8192 bytes: multiboot (before PVH, as QEMU has it: an image with both was made for several loaders);
5. a Xen note with a PVH entry: PVH;
6. a Linux setup header: Linux' 32-bit boot protocol;
7. an ELF header: an executable, in protected mode (ELF32) or long mode (ELF64);
8. nothing of all this: a flat binary.

``ImageInfo.why`` says which it was.
"""

from __future__ import annotations

from pykvm.errors import ConfigError, GuestImageError
from pykvm.loaders import elf
from pykvm.loaders.image import BootState, check, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

    from pykvm.loaders.handover import Handover
    from pykvm.loaders.image import ImageInfo
    from pykvm.memory import GuestMemory

__all__ = ["FORMATS", "load", "peek"]

FORMATS = ("elf", "flat", "multiboot", "pvh", "linux", "firmware")
_MULTIBOOT_MAGIC = b"\x02\xb0\xad\x1b"  # here too, so that most starts need not import its loader


def peek(data: bytes, path: str = "image", mode: str = "auto", format: str = "auto") -> ImageInfo:
    """What ``data`` is. ``mode`` other than "auto" overrides the image's own; ``format``: "auto" or one of FORMATS."""
    if not data:
        raise GuestImageError(path, None, "the file is empty: a guest image has code in it")
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"unknown format {format!r}: use auto or one of {', '.join(FORMATS)}")
    is_elf = data[:4] == elf.MAGIC
    headers = elf.read(data, path) if is_elf and format != "flat" else None
    if format == "auto":
        format, why = _recognize(data, path, headers)
    else:
        why = "as the caller said"
    if format == "flat":
        from pykvm.loaders import flat

        return flat.peek(data, path, mode, why)
    if format == "elf":
        if headers is None:
            raise GuestImageError(path, None, "it is no ELF file: it does not begin with 7f 45 4c 46")
        return elf.peek(headers, path, mode, why)
    if mode != "auto":
        raise ConfigError(f"{path} is started as {format} says: --mode {mode} is for ELF files and flat binaries (--format elf or flat)")
    info: ImageInfo = _protocol(format).peek(data, path, headers, why)
    return info


def _recognize(data: bytes, path: str, headers: elf.Headers | None) -> tuple[str, str]:
    """(format, why)."""
    if headers is not None and headers.note:
        named = headers.note.get("format", "elf")
        if named not in FORMATS or named in ("flat", "linux"):
            raise GuestImageError(path, None, f"its pykvm note asks for format {named!r}: use elf, multiboot, pvh or firmware")
        return named, "its pykvm note says so" if "format" in headers.note else "it has a pykvm note"
    pvh = headers is not None and headers.pvh_entry is not None
    broken = ""
    if data.find(_MULTIBOOT_MAGIC, 0, 8192) >= 0:
        from pykvm.loaders import multiboot

        at = multiboot.find(data)
        if at is not None:
            also = "; it has a PVH entry too (--format pvh)" if pvh else ""
            return "multiboot", f"it has a multiboot header at file offset {at:#x}{also}"
        broken = "; it has multiboot's magic, but misaligned or with a wrong checksum"
    if headers is not None:
        if pvh:
            return "pvh", f"an ELF note names a PVH entry, gpa {headers.pvh_entry:#x}{broken}"
        mode = "protected" if headers.bits == 32 else "long"
        return "elf", f"it has an ELF header, but neither a pykvm note nor a multiboot header nor a PVH entry: {mode} mode{broken}"
    if data[0x202:0x206] == b"HdrS":
        from pykvm.loaders.bzimage import is_bzimage

        if is_bzimage(data):
            return "linux", f"it has a Linux setup header{broken}; --format pvh takes the vmlinux inside"
    return "flat", _why_flat(data) + broken


def _why_flat(data: bytes) -> str:
    why = "it has no header that pykvm knows (ELF, multiboot, Linux)"
    if len(data) >= 0x10000:
        from pykvm.loaders import firmware

        if firmware.looks_like(data):
            why += "; it looks like firmware: pykvm run --firmware starts it at the reset vector"
    return why


def _protocol(name: str) -> ModuleType:
    """The module of a boot protocol: peek() and hand_over()."""
    if name == "multiboot":
        from pykvm.loaders import multiboot

        return multiboot
    if name == "pvh":
        from pykvm.loaders import pvh

        return pvh
    if name == "linux":
        from pykvm.loaders import linux

        return linux
    from pykvm.loaders import firmware

    return firmware


def load(info: ImageInfo, data: bytes, memory: GuestMemory, entry: int | None = None, handover: Handover | None = None) -> BootState:
    """Write the image into ``memory``; ``entry`` overrides where it starts (gpa). ``handover``: command line and modules for it.

    Raises GuestImageError, and ConfigError for an ``entry`` outside RAM or a ``handover`` that the image cannot take; nothing has been
    written then.
    """
    check(info, data, memory, entry)
    registers: dict[str, int] = {}
    pieces: list[tuple[int, bytes]] = []
    if info.protocol:
        from pykvm.loaders.handover import Handover

        pieces, registers = _protocol(info.protocol).hand_over(info, data, memory, handover or Handover())
    elif handover is not None:
        pieces = handover.plain(info)
    write(info, data, memory)
    for gpa, content in pieces:
        memory.write(gpa, content)
    return BootState(info.entry if entry is None else entry, info.start, registers)
