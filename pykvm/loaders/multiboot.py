"""Multiboot 1 images: ELF files, and any file whose header says where it goes (the "a.out kludge").

Source: Multiboot Specification version 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3 (boot information).
"""

from __future__ import annotations

from struct import Struct, pack, unpack_from

from pykvm.errors import GuestImageError
from pykvm.loaders.handover import Room, text_bytes
from pykvm.loaders.image import ImageInfo, Segment
from pykvm.memorymap import RAM, memory_map
from pykvm.units import MIB, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.loaders.elf import Headers
    from pykvm.loaders.handover import Handover
    from pykvm.memory import GuestMemory

__all__ = ["MAGIC", "find", "hand_over", "peek"]

MAGIC = b"\x02\xb0\xad\x1b"  # 0x1BADB002, little-endian
SEARCH = 8192  # bytes of the file that the header must be in
LOADER_MAGIC = 0x2BADB002  # EAX at the start
LOADER_NAME = b"pykvm\0"

ALIGN_MODULES, MEMORY_INFO, VIDEO_MODE, ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16  # of the header's flags
_KNOWN = ALIGN_MODULES | MEMORY_INFO | VIDEO_MODE
_REQUIRED = 0xFFFF

_MEMORY, _CMDLINE, _MODS, _ELF, _MMAP, _NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 5, 1 << 6, 1 << 9  # of the information's flags
_INFO_SIZE = 116
_MMAP_ENTRY = Struct("<IQQI")
_SECTION = {32: Struct("<IIIIIIIIII"), 64: Struct("<IIQQQQIIQQ")}
_MOST_SECTIONS = 1024
SHT_NULL, SHT_NOBITS = 0, 8


def find(data: bytes) -> int | None:
    """File offset of the header: the magic, 4-byte aligned in the first 8192 bytes, with a checksum that is right. Else None."""
    at = data.find(MAGIC, 0, SEARCH)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= min(len(data), SEARCH) and sum(unpack_from("<III", data, at)) & 0xFFFFFFFF == 0:
            return at
        at = data.find(MAGIC, at + 1, SEARCH)
    return None


def peek(data: bytes, path: str, headers: Headers | None, why: str) -> ImageInfo:
    """Check the header and say what goes where. ``headers``: those of an ELF file, whose note counts too."""
    at = find(data)
    if at is None:
        near = data.find(MAGIC, 0, SEARCH)
        broken = f"; the magic at {near:#x} is not aligned to 4 bytes, cut off, or its checksum is wrong" if near >= 0 else ""
        raise GuestImageError(path, None, f"it has no multiboot header in its first {SEARCH} bytes{broken}")
    flags = unpack_from("<I", data, at + 4)[0]
    if flags & _REQUIRED & ~_KNOWN:
        bits = ", ".join(str(n) for n in range(16) if flags & ~_KNOWN & 1 << n)
        why = f"its multiboot header requires what the specification (0.6.96) does not know: flags {flags:#x}, bit {bits}"
        raise GuestImageError(path, at, why)
    if flags & VIDEO_MODE:
        why = f"its multiboot header requires a video mode (flags {flags:#x}, bit 2), and this machine has no display: clear the bit"
        raise GuestImageError(path, at, why)
    note = {} if headers is None else headers.note
    format = "flat" if headers is None else f"ELF{headers.bits}"
    if flags & ADDRESSES:
        segment, entry = _from_addresses(data, path, at)
        return ImageInfo(path, format, "protected", entry, [segment], note, why=why, protocol="multiboot", headers=headers)
    if headers is None:
        why = "it has a multiboot header but is no ELF file, and the header has no load addresses (flags bit 16)"
        raise GuestImageError(path, at, why)
    if headers.entry >> 32:
        raise GuestImageError(path, 24, f"its entry, {headers.entry:#x}, is beyond 4 GiB, and multiboot starts in 32-bit mode")
    return ImageInfo(path, format, "protected", headers.entry, headers.segments, note, why=why, protocol="multiboot", headers=headers)


def _from_addresses(data: bytes, path: str, at: int) -> tuple[Segment, int]:
    """The one segment, and the entry, of an image whose header has load addresses."""
    if at + 32 > len(data):
        raise GuestImageError(path, at, "its multiboot header is truncated: it says that load addresses follow (flags bit 16)")
    header, load, load_end, bss_end, entry = unpack_from("<5I", data, at + 12)
    offset = at - (header - load)
    if header < load or offset < 0:
        why = f"its multiboot header is at gpa {header:#x} and file offset {at:#x}: load_addr {load:#x} cannot be"
        raise GuestImageError(path, at + 16, why)
    filesz = load_end - load if load_end else len(data) - offset
    if filesz <= 0 or offset + filesz > len(data):
        why = f"its multiboot header wants {filesz:#x} bytes from file offset {offset:#x}; the file has {len(data):#x}"
        raise GuestImageError(path, at + 20, f"{why}: load_end_addr is wrong, or the file is truncated")
    memsz = bss_end - load if bss_end else filesz
    if memsz < filesz:
        why = f"in its multiboot header bss_end_addr {bss_end:#x} lies before the end of the data, {load + filesz:#x}"
        raise GuestImageError(path, at + 24, why)
    return Segment(load, offset, filesz, memsz, at), entry


def hand_over(info: ImageInfo, data: bytes, memory: GuestMemory, handover: Handover) -> tuple[list[tuple[int, bytes]], dict[str, int]]:
    """What to write beside the image, as (gpa, bytes), and the registers at the entry.

    Modules go to pages above the image, the information structure below 1 MiB when there is room. As QEMU and GRUB 1 do it, a command
    line begins with the name of its file.
    """
    room = Room(info, memory)
    modules = [(room.above(m.data, f"module {m.name}"), len(m.data), _line(m.name, m.text)) for m in handover.modules]
    sections = _sections(info, data, room)
    line = _line(info.path, handover.cmdline)
    regions = memory_map(memory)
    low, high = (next((r.size for r in regions if r.type == RAM and r.gpa == gpa), 0) for gpa in (0, MIB))

    def build(base: int) -> bytes:
        block = bytearray(_INFO_SIZE)

        def put(content: bytes) -> int:
            block.extend(bytes(-len(block) % 8))
            block.extend(content)
            return base + len(block) - len(content)

        flags = _MEMORY | _CMDLINE | _MODS | _MMAP | _NAME | (_ELF if sections is not None else 0)
        entries = b"".join(pack("<IIII", gpa, gpa + size, put(text), 0) for gpa, size, text in modules)
        fields = [flags, low >> 10, high >> 10, 0, put(line), len(modules), put(entries) if modules else 0]
        fields += [0, 0, 0, 0] if sections is None else [sections[1], sections[2], put(sections[0]), sections[3]]
        table = b"".join(_MMAP_ENTRY.pack(_MMAP_ENTRY.size - 4, r.gpa, r.size, r.type) for r in regions)
        fields += [len(table), put(table), 0, 0, 0, put(LOADER_NAME)]
        block[: 4 * len(fields)] = pack(f"<{len(fields)}I", *fields)
        return bytes(block)

    gpa = room.low(build)
    return room.pieces, {"rax": LOADER_MAGIC, "rbx": gpa, "rsi": 0}


def _line(path: str, text: str) -> bytes:
    return text_bytes(" ".join(filter(None, (path.rpartition("/")[2], text))))


def _sections(info: ImageInfo, data: bytes, room: Room) -> tuple[bytes, int, int, int] | None:
    """The section header table (as it is to be in memory, entries, their size, string table's index), or None without a sound one.

    Sections that no segment loads, such as the symbol table, are put above the modules, and the table says where.
    """
    if info.headers is None:
        return None
    offset, size, count, strings = info.headers.sections
    layout = _SECTION[info.headers.bits]
    if size != layout.size or not 0 < count <= _MOST_SECTIONS or strings >= count or offset + size * count > len(data):
        return None
    table = bytearray(data[offset : offset + size * count])
    loaded: list[tuple[int, bytes]] = []
    total = 0
    for at in range(0, size * count, size):
        _, kind, _, gva, start, length, *_ = layout.unpack_from(table, at)
        if gva or kind in (SHT_NULL, SHT_NOBITS) or not length:
            continue
        total += length
        if start + length > len(data) or total > len(data):
            return None
        loaded.append((at, data[start : start + length]))
    word = info.headers.bits // 8
    if not room.has(total + PAGE_SIZE * len(loaded)):
        return None  # a kernel can do without
    for at, content in loaded:
        gpa = room.above(content, "its sections")
        field = at + 8 + word  # sh_addr
        table[field : field + word] = gpa.to_bytes(word, "little")
    return bytes(table), count, size, strings
