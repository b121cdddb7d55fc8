"""Firmware: a flat image that ends at 4 GiB, where a CPU starts after reset, with its last 128 KiB below 1 MiB too.

At 4 GiB it is a read-only slot whose writes vanish. The copy below 1 MiB is RAM: on a PC the chipset makes it writable on request (PAM),
and firmware that finds no such chipset writes to it all the same. An image of up to 256 KiB is below 1 MiB as a whole: it is
linked to run there, and on a PC copies the rest from below 4 GiB itself, when it has found the chipset. A larger one, most of which
could not be there anyway, has zeroed RAM at 0xC0000-0xDFFFF. An ELF file is taken too, when its segments lie in the last 16 MiB.
Sources: SDM vol. 3 section 10.1.4 (the first instruction); the ranges are those of any PC since the 386.
"""

from __future__ import annotations

from pykvm.errors import ConfigError, GuestImageError
from pykvm.loaders.image import ImageInfo, Segment
from pykvm.platform import FIRMWARE_END, RESET_VECTOR_GPA
from pykvm.units import MIB, PAGE_SIZE, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.loaders.elf import Headers
    from pykvm.loaders.handover import Handover
    from pykvm.memory import GuestMemory

__all__ = ["hand_over", "looks_like", "peek"]

LARGEST = 16 * MIB
MIRROR, WHOLE = 128 << 10, 256 << 10  # bytes that are below 1 MiB too; of an image that large all of them
_JUMPS = (0xEA, 0xE9, 0xEB)  # far, near and short: what firmware has at the reset vector


def looks_like(data: bytes) -> bool:
    """Whether a flat file may be firmware: whole 64 KiB, and a jump where the reset vector would be."""
    return len(data) % 0x10000 == 0 and len(data) <= LARGEST and data[-16] in _JUMPS


def peek(data: bytes, path: str, headers: Headers | None, why: str) -> ImageInfo:
    """Put its end at 4 GiB."""
    if headers is None:
        if len(data) > LARGEST:
            raise GuestImageError(path, None, f"it has {len(data)} bytes; firmware has at most {format_size(LARGEST)}")
        segments, note, format = [Segment(FIRMWARE_END - len(data), 0, len(data), len(data))], {}, "flat"
    else:
        segments, note, format = headers.segments, headers.note, f"ELF{headers.bits}"
    for s in segments:
        if not FIRMWARE_END - LARGEST <= s.gpa <= s.gpa + s.memsz <= FIRMWARE_END:
            why = (
                f"it has a segment at gpa {s.gpa:#x}-{s.gpa + s.memsz - 1:#x}: firmware lies in the last {format_size(LARGEST)} below 4 GiB"
            )
            raise GuestImageError(path, s.header, why)
    if not any(s.gpa <= RESET_VECTOR_GPA and s.gpa + s.filesz > RESET_VECTOR_GPA for s in segments):
        raise GuestImageError(path, None, f"it has nothing at gpa {RESET_VECTOR_GPA:#x}, where a CPU starts after reset")
    info = ImageInfo(path, format, "real", RESET_VECTOR_GPA, segments, note, why=why, protocol="firmware", headers=headers)
    base = min(s.gpa for s in segments) // PAGE_SIZE * PAGE_SIZE
    info.rom = base, FIRMWARE_END - base
    return info


def hand_over(info: ImageInfo, data: bytes, memory: GuestMemory, handover: Handover) -> tuple[list[tuple[int, bytes]], dict[str, int]]:
    """The copy below 1 MiB. Firmware gets neither a command line nor modules this way."""
    if handover.modules or handover.cmdline:
        raise ConfigError("firmware takes no --append and no --initrd: it asks fw_cfg for what it wants")
    assert info.rom is not None
    size = info.rom[1] if info.rom[1] <= WHOLE else MIRROR
    if not memory.contains(MIB - size, size):
        have = format_size(memory.ram_size)
        raise GuestImageError(info.path, None, f"firmware needs RAM up to 1 MiB: give --memory 1M or more, not {have}")
    end = bytearray(size)
    for s in info.segments:
        skip = max(0, FIRMWARE_END - size - s.gpa)  # what of it is not in the copy
        at = s.gpa + skip - (FIRMWARE_END - size)
        content = data[s.offset + skip : s.offset + s.filesz]
        end[at : at + len(content)] = content
    return [(MIB - size, bytes(end))], {}
