"""What a boot loader hands to a kernel beside the kernel: a command line and modules; and where in RAM these go."""

from __future__ import annotations

from pykvm.errors import ConfigError, GuestImageError
from pykvm.platform import BOOT_INFO_END, BOOT_INFO_GPA, CMDLINE_GPA, MMIO_HOLE
from pykvm.units import MIB, PAGE_SIZE, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pykvm.loaders.image import ImageInfo
    from pykvm.memory import GuestMemory

__all__ = ["Handover", "Module", "Room", "text_bytes"]

_LONGEST_TEXT = PAGE_SIZE  # bytes of a command line with its NUL
_MOST_MODULES = 64


class Module:
    """A file for the kernel: its bytes, the ``name`` that people know it by, and a command line of its own, ``text``."""

    __slots__ = ("data", "name", "text")

    def __init__(self, data: bytes, name: str = "module", text: str = "") -> None:
        self.data, self.name, self.text = data, name, text

    def __repr__(self) -> str:
        return f"<Module {self.name} {self.text!r}: {len(self.data)} bytes>"


class Handover:
    """``cmdline``, ``modules``, and ``rsdp``: the gpa of ACPI's root pointer, 0 when the platform has none."""

    __slots__ = ("cmdline", "modules", "rsdp")

    def __init__(self, cmdline: str = "", modules: Sequence[Module] = (), rsdp: int = 0) -> None:
        self.cmdline, self.modules, self.rsdp = cmdline, tuple(modules), rsdp
        if len(self.modules) > _MOST_MODULES:
            raise ConfigError(f"{len(self.modules)} modules; a guest gets at most {_MOST_MODULES}")

    def plain(self, info: ImageInfo) -> list[tuple[int, bytes]]:
        """For an image without a boot protocol: the command line in its page, as (gpa, bytes) to write. It can take nothing else."""
        if self.modules:
            raise ConfigError(f"{info.path} is {info.kind}, which takes no --initrd: multiboot, PVH and Linux images do")
        if not self.cmdline:
            return []
        for s in info.segments:
            if s.gpa < CMDLINE_GPA + PAGE_SIZE and s.gpa + s.memsz > CMDLINE_GPA:
                raise ConfigError(f"the image covers gpa {CMDLINE_GPA:#x}, where the command line goes: run it without --append")
        return [(CMDLINE_GPA, text_bytes(self.cmdline))]


def text_bytes(text: str) -> bytes:
    """A command line as its bytes and a NUL. Raises ConfigError: too long, or a NUL inside."""
    line = text.encode(errors="surrogateescape") + b"\0"  # as sys.argv has what is not UTF-8
    if len(line) > _LONGEST_TEXT:
        raise ConfigError(f"the command line has {len(line)} bytes; there is room for {_LONGEST_TEXT}")
    if line.index(0) != len(line) - 1:
        raise ConfigError("a command line ends at a NUL, and this one has one in it")
    return line


class Room:
    """Finds places in RAM below 4 GiB that neither the image nor anything placed before needs."""

    def __init__(self, info: ImageInfo, memory: GuestMemory) -> None:
        self.info, self.memory = info, memory
        self.taken = [(s.gpa, s.gpa + s.memsz) for s in info.segments]
        self.pieces: list[tuple[int, bytes]] = []  # (gpa, content), to be written

    def above(self, content: bytes, what: str) -> int:
        """Page-aligned, above the image and what was placed there before, and above 1 MiB; returns its gpa. ``what``, for messages."""
        top = self._top()
        gpa = self._find(len(content), top, MMIO_HOLE)
        if gpa is None:
            ram = format_size(self.memory.ram_size)
            why = f"there is no room for {what} ({len(content)} bytes) above gpa {top:#x} in the guest's {ram} of RAM: give more --memory"
            raise GuestImageError(self.info.path, None, why)
        return self._put(gpa, content)

    def low(self, build: Callable[[int], bytes]) -> int:
        """A block that ``build(gpa)`` makes, whose size does not depend on gpa: below 1 MiB, else above(); returns its gpa."""
        size = len(build(0))
        gpa = self._find(size, BOOT_INFO_GPA, BOOT_INFO_END)
        if gpa is not None:
            return self._put(gpa, build(gpa))
        gpa = self.above(bytes(size), "the boot information")
        self.pieces[-1] = gpa, build(gpa)
        return gpa

    def has(self, size: int) -> bool:
        """Whether above() would find room for ``size`` bytes."""
        return self._find(size, self._top(), MMIO_HOLE) is not None

    def _top(self) -> int:
        return max([MIB, *(end for _, end in self.taken if end <= MMIO_HOLE)])

    def _find(self, size: int, start: int, end: int) -> int | None:
        gpa = -(-start // PAGE_SIZE) * PAGE_SIZE
        for low, high in sorted(self.taken):
            if gpa < high and low < gpa + max(size, 1):
                gpa = -(-high // PAGE_SIZE) * PAGE_SIZE
        return gpa if gpa + size <= end and self.memory.contains(gpa, max(size, 1)) else None

    def _put(self, gpa: int, content: bytes) -> int:
        self.taken.append((gpa, gpa + len(content)))
        self.pieces.append((gpa, content))
        return gpa
