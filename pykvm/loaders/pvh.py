"""PVH images: ELF files with a note that names a 32-bit entry, such as Linux' vmlinux.

Source: Xen's docs/misc/pvh.pandoc (x86/HVM direct boot ABI) and xen/include/public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

from struct import Struct

from pykvm.errors import GuestImageError
from pykvm.loaders.handover import Room, text_bytes
from pykvm.loaders.image import ImageInfo
from pykvm.memorymap import memory_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.loaders.elf import Headers
    from pykvm.loaders.handover import Handover
    from pykvm.memory import GuestMemory

__all__ = ["hand_over", "peek"]

MAGIC, VERSION = 0x336EC578, 1
_START_INFO = Struct("<IIIIQQQQII")  # magic, version, flags, modules: count, table; command line, RSDP; memory map: table, entries
_MODULE = Struct("<QQQQ")  # gpa, size, gpa of its command line
_MEMORY_MAP = Struct("<QQII")  # gpa, size, type


def peek(data: bytes, path: str, headers: Headers | None, why: str) -> ImageInfo:
    """Start where the note says; the file's own entry does not count."""
    if headers is None:
        raise GuestImageError(path, None, "it is no ELF file, and PVH images are")
    if headers.pvh_entry is None:
        raise GuestImageError(path, None, "it has no PVH entry (an ELF note of name Xen and type 18, XEN_ELFNOTE_PHYS32_ENTRY)")
    if headers.pvh_entry >> 32:
        raise GuestImageError(path, headers.pvh_at, f"its PVH entry, {headers.pvh_entry:#x}, is beyond 4 GiB")
    return ImageInfo(
        path, f"ELF{headers.bits}", "protected", headers.pvh_entry, headers.segments, headers.note, why=why, protocol="pvh", headers=headers
    )


def hand_over(info: ImageInfo, data: bytes, memory: GuestMemory, handover: Handover) -> tuple[list[tuple[int, bytes]], dict[str, int]]:
    """What to write beside the image, as (gpa, bytes), and the registers at the entry.

    Modules go to pages above the image, hvm_start_info below 1 MiB when there is room.
    """
    room = Room(info, memory)
    modules = [(room.above(m.data, f"module {m.name}"), len(m.data), m.text) for m in handover.modules]
    regions = memory_map(memory)

    def build(base: int) -> bytes:
        block = bytearray(_START_INFO.size)

        def put(content: bytes) -> int:
            block.extend(bytes(-len(block) % 8))
            block.extend(content)
            return base + len(block) - len(content)

        entries = b"".join(_MODULE.pack(gpa, size, put(text_bytes(text)) if text else 0, 0) for gpa, size, text in modules)
        table = put(entries) if modules else 0
        line = put(text_bytes(handover.cmdline))
        map = put(b"".join(_MEMORY_MAP.pack(r.gpa, r.size, r.type, 0) for r in regions))
        _START_INFO.pack_into(block, 0, MAGIC, VERSION, 0, len(modules), table, line, handover.rsdp, map, len(regions), 0)
        return bytes(block)

    gpa = room.low(build)
    return room.pieces, {"rbx": gpa, "rsi": 0}
