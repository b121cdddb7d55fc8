"""What all formats come down to: segments at guest physical addresses, an entry, a mode; and putting them in memory."""

from __future__ import annotations

from pykvm.errors import ConfigError, GuestImageError
from pykvm.platform import GDT_GPA, MMIO_HOLE, MMIO_HOLE_END, PAGE_TABLES_END, PAGE_TABLES_GPA
from pykvm.units import MIB, PAGE_SIZE, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.memory import GuestMemory

__all__ = ["BootState", "ImageInfo", "Segment", "place"]


class Segment:
    """``filesz`` bytes of the file from ``offset`` go to ``gpa``; up to ``memsz`` bytes follow as zeros."""

    __slots__ = ("filesz", "gpa", "header", "memsz", "offset")

    def __init__(self, gpa: int, offset: int, filesz: int, memsz: int, header: int | None = None) -> None:
        self.gpa, self.offset, self.filesz, self.memsz = gpa, offset, filesz, memsz
        self.header = header  # file offset of what describes it, for messages

    def __repr__(self) -> str:
        where = f"{self.filesz} bytes from file offset {self.offset:#x}"
        return f"<Segment gpa {self.gpa:#x}-{self.gpa + self.memsz - 1:#x}, {where}>"


class ImageInfo:
    """An image before it is loaded.

    ``format``: "ELF32", "ELF64" or "flat"; ``mode``, ``entry`` (gpa), ``segments``, and ``note``, key to value.
    """

    __slots__ = ("entry", "format", "mode", "note", "path", "segments")

    def __init__(self, path: str, format: str, mode: str, entry: int, segments: list[Segment], note: dict[str, str]) -> None:
        self.path, self.format, self.mode, self.entry = path, format, mode, entry
        self.segments, self.note = segments, note

    def __repr__(self) -> str:
        what = f"{self.mode} mode, entry {self.entry:#x}, {len(self.segments)} segments"
        return f"<ImageInfo {self.path}: {self.format}, {what}>"


class BootState:
    """What ``x86.modes`` needs to start a guest: ``entry`` (gpa), ``mode`` by name, general ``registers`` by name."""

    __slots__ = ("entry", "mode", "registers")

    def __init__(self, entry: int, mode: str, registers: dict[str, int] | None = None) -> None:
        self.entry, self.mode, self.registers = entry, mode, registers or {}

    def __repr__(self) -> str:
        return f"<BootState {self.mode} mode at {self.entry:#x}>"


# What the modes lay out in guest memory before the start (x86/modes.py): an image there would be overwritten.
_TABLES = {
    "protected": ((GDT_GPA, GDT_GPA + PAGE_SIZE),),
    "long": ((GDT_GPA, GDT_GPA + PAGE_SIZE), (PAGE_TABLES_GPA, PAGE_TABLES_END)),
    "user": ((GDT_GPA, PAGE_TABLES_END),),
}
_LARGEST = 1 << 42  # bytes of RAM that a message still proposes


def place(info: ImageInfo, data: bytes, memory: GuestMemory, entry: int | None = None) -> BootState:
    """Check every segment against the file, the memory and the others; then write them.

    ``entry``: a gpa to start at instead of the image's own. Raises GuestImageError, and ConfigError for such an
    ``entry`` outside RAM; in both cases nothing has been written.
    """
    placed: list[Segment] = []
    for segment in info.segments:
        _check(info, segment, data, memory)
        for other in placed:
            if segment.gpa < other.gpa + other.memsz and other.gpa < segment.gpa + segment.memsz:
                why = f"two segments overlap at gpa {max(segment.gpa, other.gpa):#x}: link them apart"
                raise GuestImageError(info.path, segment.header, why)
        placed.append(segment)
    if entry is not None and not memory.contains(entry, 1):
        ram = format_size(memory.size)
        raise ConfigError(f"the entry, gpa {entry:#x}, is outside the guest's {ram} of RAM: check --entry and --memory")
    if entry is None and not any(0 <= info.entry - s.gpa < s.memsz for s in placed):
        why = f"the entry, gpa {info.entry:#x}, is in none of its segments: link it with one, or give --entry"
        raise GuestImageError(info.path, None, why)
    for segment in placed:
        memory.write(segment.gpa, data[segment.offset : segment.offset + segment.filesz])
        memory.clear(segment.gpa + segment.filesz, segment.memsz - segment.filesz)
    return BootState(info.entry if entry is None else entry, info.mode)


def _check(info: ImageInfo, segment: Segment, data: bytes, memory: GuestMemory) -> None:
    start, end = segment.gpa, segment.gpa + segment.memsz
    if segment.offset + segment.filesz > len(data):
        last = segment.offset + segment.filesz
        why = f"a segment ends at file offset {last:#x}, but the file has {len(data):#x} bytes: it is truncated"
        raise GuestImageError(info.path, segment.header, why)
    if not memory.contains(start, segment.memsz):
        why = f"it needs gpa {start:#x}-{end - 1:#x}, outside the guest's {format_size(memory.size)} of RAM"
        raise GuestImageError(info.path, segment.header, f"{why}: {_advice(start, end, memory.size)}")
    for low, high in _TABLES.get(info.mode, ()):
        if start < high and low < end:
            why = f"it needs gpa {start:#x}-{end - 1:#x}, but {info.mode} mode has tables at {low:#x}-{high - 1:#x}"
            raise GuestImageError(info.path, segment.header, f"{why}: link it at 1 MiB or above")


def _advice(start: int, end: int, have: int) -> str:
    """What to do about an image that reaches outside RAM."""
    if end > MMIO_HOLE and start < MMIO_HOLE_END:
        return f"link it outside {MMIO_HOLE:#x}-{MMIO_HOLE_END - 1:#x}, where devices are"
    need = end if end <= MMIO_HOLE else end - (MMIO_HOLE_END - MMIO_HOLE)
    size = MIB
    while size < need:
        size *= 2
    return f"use --memory {format_size(size)}" if have < size <= _LARGEST else "link it where the guest has RAM"
