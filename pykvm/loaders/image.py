"""What all formats come down to: segments at guest physical addresses, an entry, a mode; and putting them in memory."""

from __future__ import annotations

from pykvm.errors import ConfigError, GuestImageError
from pykvm.platform import GDT_GPA, MMIO_HOLE, MMIO_HOLE_END, PAGE_TABLES_END, PAGE_TABLES_GPA
from pykvm.units import MIB, PAGE_SIZE, format_size, parse_address, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.loaders.elf import Headers
    from pykvm.memory import GuestMemory

__all__ = ["BootState", "ImageInfo", "Segment", "check", "write"]


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

    ``format``: "ELF32", "ELF64", "bzImage" or "flat", what the file is. ``protocol``: how it wants to be started, "" (as pykvm's own
    guests: registers of ``mode``, nothing else), "multiboot", "pvh", "linux" or "firmware". ``why``: how both were found, for people.
    ``mode``: the CPU mode that it starts in; ``entry`` (gpa), ``segments``, and ``note``, key to value. ``rom``: (gpa, size) of a read-only
    slot that it wants. ``headers``: what elf.read() found, None for a flat file.
    """

    __slots__ = ("entry", "format", "headers", "mode", "note", "path", "protocol", "rom", "segments", "why")

    def __init__(
        self,
        path: str,
        format: str,
        mode: str,
        entry: int,
        segments: list[Segment],
        note: dict[str, str],
        *,
        why: str,
        protocol: str = "",
        headers: Headers | None = None,
    ) -> None:
        self.path, self.format, self.mode, self.entry = path, format, mode, entry
        self.segments, self.note, self.why, self.protocol, self.headers = segments, note, why, protocol, headers
        self.rom: tuple[int, int] | None = None
        if "rom" in note:
            gpa, _, size = note["rom"].partition(":")
            self.rom = parse_address(gpa), parse_size(size)

    @property
    def kind(self) -> str:
        """Format and protocol in one: "ELF64", "flat", "multiboot (ELF32)"."""
        return f"{_TITLES[self.protocol]} ({self.format})" if self.protocol else self.format

    @property
    def start(self) -> str:
        """The name of the x86.modes.Mode that it starts in."""
        return self.protocol or self.mode

    def __repr__(self) -> str:
        what = f"{self.mode} mode, entry {self.entry:#x}, {len(self.segments)} segments"
        return f"<ImageInfo {self.path}: {self.kind}, {what}>"


_TITLES = {"multiboot": "multiboot", "pvh": "PVH", "linux": "Linux", "firmware": "firmware"}


class BootState:
    """What ``x86.modes`` needs to start a guest: ``entry`` (gpa), ``mode``, the name of a Mode, general ``registers`` by name."""

    __slots__ = ("entry", "mode", "registers")

    def __init__(self, entry: int, mode: str, registers: dict[str, int] | None = None) -> None:
        self.entry, self.mode, self.registers = entry, mode, registers or {}

    def __repr__(self) -> str:
        return f"<BootState {self.mode} mode at {self.entry:#x}>"


# What the modes lay out in guest memory before the start (x86/modes.py): an image there would be overwritten.
_TABLES = {
    "protected": ((GDT_GPA, GDT_GPA + PAGE_SIZE),),
    "linux": ((GDT_GPA, GDT_GPA + PAGE_SIZE),),
    "long": ((GDT_GPA, GDT_GPA + PAGE_SIZE), (PAGE_TABLES_GPA, PAGE_TABLES_END)),
    "user": ((GDT_GPA, PAGE_TABLES_END),),
}
_LARGEST = 1 << 42  # bytes of RAM that a message still proposes


def check(info: ImageInfo, data: bytes, memory: GuestMemory, entry: int | None = None) -> None:
    """Check every segment against the file, the memory and the others.

    ``entry``: a gpa to start at instead of the image's own. Raises GuestImageError, and ConfigError for such an
    ``entry`` outside RAM.
    """
    checked: list[Segment] = []
    for segment in info.segments:
        _check(info, segment, data, memory)
        for other in checked:
            if segment.gpa < other.gpa + other.memsz and other.gpa < segment.gpa + segment.memsz:
                why = f"two segments overlap at gpa {max(segment.gpa, other.gpa):#x}: link them apart"
                raise GuestImageError(info.path, segment.header, why)
        checked.append(segment)
    if entry is not None and not memory.contains(entry, 1):
        ram = format_size(memory.ram_size)
        raise ConfigError(f"the entry, gpa {entry:#x}, is outside the guest's {ram} of RAM: check --entry and --memory")
    if entry is None and not any(0 <= info.entry - s.gpa < s.memsz for s in checked):
        why = f"the entry, gpa {info.entry:#x}, is in none of its segments: link it with one, or give --entry"
        raise GuestImageError(info.path, None, why)


def write(info: ImageInfo, data: bytes, memory: GuestMemory) -> None:
    """Write the segments, which check() has found good."""
    for segment in info.segments:
        memory.write(segment.gpa, data[segment.offset : segment.offset + segment.filesz])
        memory.clear(segment.gpa + segment.filesz, segment.memsz - segment.filesz)


def _check(info: ImageInfo, segment: Segment, data: bytes, memory: GuestMemory) -> None:
    start, end = segment.gpa, segment.gpa + segment.memsz
    if segment.offset + segment.filesz > len(data):
        last = segment.offset + segment.filesz
        why = f"a segment ends at file offset {last:#x}, but the file has {len(data):#x} bytes: it is truncated"
        raise GuestImageError(info.path, segment.header, why)
    if not memory.contains(start, segment.memsz):
        why = f"it needs gpa {start:#x}-{end - 1:#x}, outside the guest's {format_size(memory.ram_size)} of RAM"
        raise GuestImageError(info.path, segment.header, f"{why}: {_advice(start, end, memory.ram_size)}")
    for low, high in _TABLES.get(info.start, ()):
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
