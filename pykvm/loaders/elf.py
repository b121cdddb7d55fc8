"""ELF32 and ELF64 executables: headers, load segments and the notes that pykvm knows, read with struct alone.

Symbols and DWARF are pyelftools' business (pykvm/symbols.py); starting a guest must not pay for importing it. Segments
go to their physical address (p_paddr); an entry that is a virtual address becomes the physical one of its segment, as GRUB does it.
Source: System V ABI, chapters 4 (object files) and 5 (program headers, notes).
"""

from __future__ import annotations

from _struct import Struct  # less to import at each start than struct is

from pykvm.errors import GuestImageError
from pykvm.loaders import note as notes
from pykvm.loaders.image import ImageInfo, Segment

__all__ = ["MAGIC", "Headers", "peek", "read"]

MAGIC = b"\x7fELF"
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF
XEN_NAME, XEN_ELFNOTE_PHYS32_ENTRY = b"Xen\0", 18
_EHDR = {1: Struct("<16xHHIIIIIHHHHHH"), 2: Struct("<16xHHIQQQIHHHHHH")}
_PHDR = {1: Struct("<IIIIIIII"), 2: Struct("<IIQQQQQQ")}
_NHDR = Struct("<III")
_MACHINE = {1: EM_386, 2: EM_X86_64}
_NOT_EXECUTABLE = {
    1: "a relocatable object: link it first (ld -T guests/guest.ld)",
    ET_DYN: "position independent: link it with -no-pie -static",
    4: "a core dump",
}
_SEGMENT_LIMIT = 128
_NOTES_LIMIT = 1 << 16  # bytes of notes in a segment; a guest's has some hundred


class Headers:
    """What an ELF file's headers say: ``bits`` (32 or 64), ``entry`` (gpa), ``segments``; the pykvm ``note``, key to value; and
    ``pvh_entry`` (gpa) with its file offset ``pvh_at``, None without a PVH note. ``sections`` is (offset, entry size, count, string index).
    """

    __slots__ = ("bits", "entry", "note", "pvh_at", "pvh_entry", "sections", "segments")

    def __init__(self, bits: int, entry: int, sections: tuple[int, int, int, int]) -> None:
        self.bits, self.entry, self.sections = bits, entry, sections
        self.segments: list[Segment] = []
        self.note: dict[str, str] = {}
        self.pvh_entry: int | None = None
        self.pvh_at: int | None = None


def peek(headers: Headers, path: str, mode: str, why: str) -> ImageInfo:
    """As a plain executable. Mode "auto": what the note says, else protected for ELF32 and long for ELF64."""
    own = headers.note.get("mode") or ("protected" if headers.bits == 32 else "long")
    chosen = own if mode == "auto" else mode
    return ImageInfo(path, f"ELF{headers.bits}", chosen, headers.entry, headers.segments, headers.note, why=why)


def read(data: bytes, path: str) -> Headers:
    """Read and check the headers. Raises GuestImageError."""
    if len(data) < 20:
        raise GuestImageError(path, None, f"the file has {len(data)} bytes: its ELF header is truncated")
    ei_class, ei_data = data[4], data[5]
    if ei_class not in _EHDR or ei_data != 1:
        why = f"ELF class {ei_class}, byte order {ei_data}: pykvm loads 32-bit and 64-bit little-endian files"
        raise GuestImageError(path, 4, why)
    header = _EHDR[ei_class]
    if len(data) < header.size:
        raise GuestImageError(path, None, f"the file has {len(data)} bytes: its ELF header is truncated")
    etype, machine, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = header.unpack_from(data)
    if machine not in (EM_386, EM_X86_64):
        raise GuestImageError(path, 18, f"it is for machine {machine}, not x86 ({EM_386} or {EM_X86_64})")
    if machine != _MACHINE[ei_class]:
        why = f"it is ELF{32 * ei_class} for machine {machine}: link it with -m elf_i386 or -m elf_x86_64"
        raise GuestImageError(path, 18, why)
    if etype != ET_EXEC:
        what = _NOT_EXECUTABLE.get(etype, f"ELF type {etype}")
        raise GuestImageError(path, 16, f"it is {what}; pykvm loads executables linked to fixed addresses (ET_EXEC)")
    headers = Headers(32 * ei_class, entry, (shoff, shentsize, shnum, shstrndx))
    _read_program_headers(headers, data, path, phoff, phentsize, phnum)
    return headers


def _read_program_headers(headers: Headers, data: bytes, path: str, phoff: int, phentsize: int, phnum: int) -> None:
    layout = _PHDR[headers.bits // 32]
    if phnum == PN_XNUM or phnum > _SEGMENT_LIMIT:
        raise GuestImageError(path, None, f"it has {phnum} program headers; a guest image has at most {_SEGMENT_LIMIT}")
    if phentsize < layout.size and phnum:
        raise GuestImageError(path, None, f"its program headers have {phentsize} bytes each, less than {layout.size}")
    virtual_entry = headers.entry
    for i in range(phnum):
        at = phoff + i * phentsize
        if at + layout.size > len(data):
            why = f"program header {i} would be at file offset {at:#x}, past the end: the file is truncated"
            raise GuestImageError(path, None, why)
        fields = layout.unpack_from(data, at)
        if headers.bits == 32:
            kind, offset, vaddr, paddr, filesz, memsz, _, _ = fields
        else:
            kind, _, offset, vaddr, paddr, filesz, memsz, _ = fields
        if kind not in (PT_LOAD, PT_NOTE):
            continue
        if offset + filesz > len(data):
            end = offset + filesz
            why = f"program header {i} wants bytes up to {end:#x}, but the file has {len(data):#x}: it is truncated"
            raise GuestImageError(path, at, why)
        if kind == PT_NOTE:
            _read_notes(headers, data, path, offset, filesz)
        elif memsz:
            if filesz > memsz:
                why = f"program header {i} has more bytes in the file ({filesz:#x}) than in memory ({memsz:#x})"
                raise GuestImageError(path, at, why)
            if paddr + memsz > 1 << 52:
                why = f"program header {i} ends at {paddr + memsz:#x}, beyond what a guest physical address can be"
                raise GuestImageError(path, at, why)
            if 0 <= virtual_entry - vaddr < memsz:
                headers.entry = virtual_entry - vaddr + paddr
            headers.segments.append(Segment(paddr, offset, filesz, memsz, at))
    if not headers.segments:
        raise GuestImageError(path, None, "it has no segment to load (no PT_LOAD program header)")


def _read_notes(headers: Headers, data: bytes, path: str, offset: int, size: int) -> None:
    """The pykvm note and the PVH entry among the notes of one segment."""
    if size > _NOTES_LIMIT:
        raise GuestImageError(path, offset, f"a segment has {size} bytes of notes, more than {_NOTES_LIMIT}")
    end = offset + size
    while offset + _NHDR.size <= end:
        namesz, descsz, kind = _NHDR.unpack_from(data, offset)
        name_at = offset + _NHDR.size
        desc_at = name_at + (namesz + 3 & ~3)
        if desc_at + descsz > end:
            raise GuestImageError(path, offset, "a note is larger than the segment that holds it")
        name = data[name_at : name_at + namesz]
        if kind == notes.TYPE and name == notes.NAME:
            headers.note.update(notes.parse(data[desc_at : desc_at + descsz], path, offset))
        elif kind == XEN_ELFNOTE_PHYS32_ENTRY and name == XEN_NAME:
            if descsz not in (4, 8):
                raise GuestImageError(path, offset, f"its PVH entry (a Xen note of type {kind}) has {descsz} bytes, not 4 or 8")
            headers.pvh_entry, headers.pvh_at = int.from_bytes(data[desc_at : desc_at + descsz], "little"), offset
        offset = desc_at + (descsz + 3 & ~3)
