"""Linux' 32-bit boot protocol: bzImage kernels, and whatever else has such a header, such as memtest86+.

Source: Linux' Documentation/arch/x86/boot.rst (setup header, "32-bit Boot Protocol") and zero-page.rst.
"""

from __future__ import annotations

from struct import pack_into, unpack_from

from pykvm.errors import ConfigError, GuestImageError
from pykvm.loaders.bzimage import is_bzimage, setup_size
from pykvm.loaders.handover import Room, text_bytes
from pykvm.loaders.image import ImageInfo, Segment
from pykvm.memorymap import e820, memory_map
from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.loaders.elf import Headers
    from pykvm.loaders.handover import Handover
    from pykvm.memory import GuestMemory

__all__ = ["hand_over", "peek"]

LOADED_HIGH, CAN_USE_HEAP = 1 << 0, 1 << 7  # of loadflags
OLDEST = 0x202  # the first protocol whose command line is a pointer
# Offsets in the zero page; the setup header has the same ones in the file.
_ACPI_RSDP, _E820_COUNT, _SETUP, _VERSION, _TYPE_OF_LOADER, _LOADFLAGS = 0x70, 0x1E8, 0x1F1, 0x206, 0x210, 0x211
_CODE32, _RAMDISK, _CMDLINE, _INITRD_MAX, _RELOCATABLE, _CMDLINE_SIZE = 0x214, 0x218, 0x228, 0x22C, 0x234, 0x238
_PREFERRED, _INIT_SIZE, _E820 = 0x258, 0x260, 0x2D0
_MOST_REGIONS = 128


def peek(data: bytes, path: str, headers: Headers | None, why: str) -> ImageInfo:
    """Check the setup header and say where the protected-mode part goes."""
    if not is_bzimage(data):
        raise GuestImageError(path, None, "it has no Linux setup header (55 aa at 0x1fe, HdrS at 0x202)")
    version, start = unpack_from("<H", data, _VERSION)[0], setup_size(data)
    if version < OLDEST or not data[_LOADFLAGS] & LOADED_HIGH:
        text = f"{version >> 8}.{version & 0xFF:02}"
        raise GuestImageError(path, _VERSION, f"it is a zImage, or its boot protocol {text} is older than 2.02: no loader for that")
    if start >= len(data):
        raise GuestImageError(path, _SETUP, f"what runs in protected mode would begin at {start:#x}, past the end: the file is truncated")
    size = len(data) - start
    gpa = unpack_from("<I", data, _CODE32)[0]
    need = size
    if version >= 0x20A:
        need = max(size, unpack_from("<I", data, _INIT_SIZE)[0])
        if data[_RELOCATABLE]:
            gpa = unpack_from("<Q", data, _PREFERRED)[0]
    if (gpa + need) >> 32:
        raise GuestImageError(path, _CODE32, f"it wants to be at gpa {gpa:#x}, beyond what 32-bit mode reaches")
    return ImageInfo(path, "bzImage", "protected", gpa, [Segment(gpa, start, size, need, _CODE32)], {}, why=why, protocol="linux")


def hand_over(info: ImageInfo, data: bytes, memory: GuestMemory, handover: Handover) -> tuple[list[tuple[int, bytes]], dict[str, int]]:
    """What to write beside the image, as (gpa, bytes), and the registers at the entry: the zero page is below 1 MiB, the initrd above."""
    version = unpack_from("<H", data, _VERSION)[0]
    room = Room(info, memory)
    line = text_bytes(handover.cmdline)
    most = unpack_from("<I", data, _CMDLINE_SIZE)[0] if version >= 0x206 else 255
    if len(line) - 1 > most:
        raise ConfigError(f"{info.path} takes a command line of at most {most} bytes, not {len(line) - 1}: shorten --append")
    if len(handover.modules) > 1:
        raise ConfigError("Linux takes one --initrd: put the archives behind each other in one file")
    initrd, length = 0, 0
    for module in handover.modules:
        initrd, length = room.above(module.data, f"initrd {module.name}"), len(module.data)
        last = unpack_from("<I", data, _INITRD_MAX)[0] if version >= 0x203 else 0x37FF_FFFF
        if initrd + length - 1 > last:
            raise GuestImageError(info.path, _INITRD_MAX, f"its initrd must end at gpa {last:#x} or below, and would be at {initrd:#x}")
    regions = memory_map(memory)[:_MOST_REGIONS]

    def build(base: int) -> bytes:
        page = bytearray(PAGE_SIZE)
        end = min(0x202 + data[0x201], _E820 - 0x40)  # the header ends where its own jump leads
        page[_SETUP:end] = data[_SETUP:end]
        page[_TYPE_OF_LOADER] = 0xFF  # none that has a number
        page[_LOADFLAGS] &= ~CAN_USE_HEAP
        pack_into("<I", page, _CODE32, info.entry)
        pack_into("<II", page, _RAMDISK, initrd, length)
        pack_into("<I", page, _CMDLINE, base + PAGE_SIZE)
        pack_into("<Q", page, _ACPI_RSDP, handover.rsdp)
        page[_E820_COUNT] = len(regions)
        table = e820(regions)
        page[_E820 : _E820 + len(table)] = table
        return bytes(page) + line

    return room.pieces, {"rsi": room.low(build), "rbp": 0, "rdi": 0, "rbx": 0}
