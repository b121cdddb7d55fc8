"""Page tables: the walk, written here once, and a builder for 4-level tables.

The walk takes registers and memory, no KVM: the explainer, the debugger and tests share it. It covers no paging, 32-bit
(with 4 MiB pages), PAE, 4-level and 5-level paging. Not modelled: protection keys, SMEP, SMAP, and CPUs with fewer than
52 physical address bits. Sources: SDM vol. 3 chapter 4 (4.3 32-bit, 4.4 PAE, 4.5 4- and 5-level, 4.7 faults); APM
vol. 2 chapter 5.
"""

from __future__ import annotations

from _struct import iter_unpack, pack

from pykvm.errors import ConfigError, GuestMemoryError
from pykvm.units import PAGE_SIZE
from pykvm.x86.regs import CR0, CR4, EFER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class TableMemory(Protocol):
        """Where page tables are read from."""

        def read(self, gpa: int, size: int) -> bytes:
            """Bytes at ``gpa``; raises GuestMemoryError."""

    class WritableMemory(TableMemory, Protocol):
        """Where page tables are built."""

        def write(self, gpa: int, data: bytes) -> None:
            """Write at ``gpa``; raises GuestMemoryError."""


__all__ = ["Entry", "PageTableBuilder", "Walk", "walk"]

P, RW, US, PWT, PCD, A, D, PS, G = (1 << n for n in range(9))
NX = 1 << 63
HALF = 1 << 47  # 4-level paging: addresses below it, and as many at the top
ADDRESS = 0x000F_FFFF_FFFF_F000
_FLAGS = (
    ("P", P), ("RW", RW), ("US", US), ("PWT", PWT), ("PCD", PCD), ("A", A), ("D", D), ("PS", PS), ("G", G), ("NX", NX),
)  # fmt: skip
_PAE_HIGH = 0x7FF0_0000_0000_0000  # bits 62 to 52: free for software in 4-level paging, reserved in PAE
_PDPTE_RESERVED = 0xFFF0_0000_0000_01E6  # of PAE's own PDPT entries (SDM vol. 3 table 4-8)
_NAMES = ("PT", "PD", "PDPT", "PML4", "PML5")


class Entry:
    """One entry met on a walk: its table's ``level`` (``"PML4"`` ...), ``index``, its ``gpa`` and its raw ``value``."""

    __slots__ = ("gpa", "index", "level", "value")

    def __init__(self, level: str, index: int, gpa: int, value: int) -> None:
        self.level, self.index, self.gpa, self.value = level, index, gpa, value

    @property
    def flags(self) -> str:
        """The bits that are set, by name."""
        return " ".join(name for name, bit in _FLAGS if self.value & bit) or "-"

    def __repr__(self) -> str:
        return f"<{self.level}[{self.index}] at {self.gpa:#x} = {self.value:#018x} {self.flags}>"


class Walk:
    """A translation: ``entries`` from the root down, then ``gpa`` and ``page_size``, or ``fault``, why there is none.

    ``page_size`` is in bytes, 0 when paging is off. ``writable``, ``user``, ``executable`` are what all levels together
    allow.
    """

    __slots__ = ("entries", "executable", "fault", "gpa", "gva", "page_size", "user", "writable")

    def __init__(self, gva: int) -> None:
        self.gva = gva
        self.entries: list[Entry] = []
        self.gpa: int | None = None
        self.page_size = 0
        self.fault = ""
        self.writable = self.user = self.executable = True

    def denies(self, *, write: bool = False, user: bool = False, fetch: bool = False, wp: bool = True) -> str:
        """Why an access fails, or an empty string: not mapped, or a right that is missing (SDM vol. 3 section 4.6)."""
        if self.fault:
            return self.fault
        if user and not self.user:
            return "the page is for the supervisor only (U/S = 0)"
        if write and not self.writable and (user or wp):
            return "the page is read-only (R/W = 0)"
        if fetch and not self.executable:
            return "the page is not executable (NX = 1)"
        return ""

    def explain(self) -> str:
        """The walk as lines, one a level."""
        lines = [f"gva {self.gva:#x}"]
        for e in self.entries:
            lines.append(f"  {e.level:>4}[{e.index:>3}] at gpa {e.gpa:#x}: {e.value:#018x}  {e.flags}")
        if self.gpa is not None:
            can = "".join(f", {'' if yes else 'not '}{what}" for yes, what in self._rights())
            rights = ("user" if self.user else "supervisor") + can
            size = f"{self.page_size >> 10} KiB page, {rights}" if self.page_size else "paging is off"
            lines.append(f"  -> gpa {self.gpa:#x} ({size})")
        else:
            lines.append(f"  -> {self.fault}")
        return "\n".join(lines)

    def _rights(self) -> tuple[tuple[bool, str], ...]:
        return (self.writable, "writable"), (self.executable, "executable")

    def __repr__(self) -> str:
        to = f"gpa {self.gpa:#x}" if self.gpa is not None else self.fault
        return f"<Walk gva {self.gva:#x} -> {to}>"


def walk(memory: TableMemory, gva: int, *, cr0: int, cr3: int, cr4: int, efer: int) -> Walk:
    """Translate ``gva`` as the CPU would under these control registers. Never raises: a table in a hole is a fault."""
    result = Walk(gva)
    if not cr0 & CR0.PG:
        result.gpa = gva & 0xFFFFFFFF
        return result
    if efer & EFER.LMA:
        levels = 5 if cr4 & CR4.LA57 else 4
        top = 12 + 9 * levels
        sign = gva >> top - 1
        if sign not in (0, (1 << 65 - top) - 1):
            result.fault = f"the address is not canonical (bits 63 to {top - 1} differ)"
            return result
        return _descend(memory, result, cr3 & ADDRESS, levels, 9, 8, bool(efer & EFER.NXE))
    if cr4 & CR4.PAE:
        return _walk_pae(memory, result, cr3 & 0xFFFF_FFE0, bool(efer & EFER.NXE))
    return _descend(memory, result, cr3 & 0xFFFF_F000, 2, 10, 4, False, large=bool(cr4 & CR4.PSE))


def _walk_pae(memory: TableMemory, result: Walk, table: int, nxe: bool) -> Walk:
    """PAE: four PDPT entries of their own kind, without R/W and U/S, then two levels of 8-byte entries."""
    index = result.gva >> 30 & 3
    entry = _fetch(memory, result, "PDPT", index, table + 8 * index, 8)
    if entry is None:
        return result
    if entry & _PDPTE_RESERVED:
        result.fault = f"reserved bits are set in the PDPT entry ({entry & _PDPTE_RESERVED:#x})"
        return result
    return _descend(memory, result, entry & ADDRESS, 2, 9, 8, nxe)


def _fetch(memory: TableMemory, result: Walk, level: str, index: int, gpa: int, width: int) -> int | None:
    """Read one entry; None, with the fault noted, when it is not there or not present."""
    try:
        value = int.from_bytes(memory.read(gpa, width), "little")
    except GuestMemoryError:
        result.fault = f"the {level} entry at gpa {gpa:#x} lies where the guest has no memory"
        return None
    result.entries.append(Entry(level, index, gpa, value))
    if not value & P:
        result.fault = f"the {level} entry is not present (P = 0)"
        return None
    return value


def _descend(memory: TableMemory, result: Walk, table: int, levels: int, bits: int, width: int, nxe: bool, large: bool = True) -> Walk:
    """Down from ``table`` through tables of 2**bits entries of ``width`` bytes; ``large``: PS means something."""
    for level in range(levels - 1, -1, -1):
        shift = 12 + bits * level
        index = result.gva >> shift & (1 << bits) - 1
        name = _NAMES[level]
        value = _fetch(memory, result, name, index, table + width * index, width)
        if value is None:
            return result
        result.writable &= bool(value & RW)
        result.user &= bool(value & US)
        if width == 8 and value & NX:
            if not nxe:
                result.fault = f"bit 63 of the {name} entry is reserved while EFER.NXE is 0"
                return result
            result.executable = False
        if levels == 2 and width == 8 and value & _PAE_HIGH:
            result.fault = f"reserved bits are set in the {name} entry ({value & _PAE_HIGH:#x})"
            return result
        if level == 0 or (value & PS and large and level <= 2):
            return _leaf(result, value, shift, width, level)
        if value & PS and width == 8:
            result.fault = f"bit 7 of the {name} entry is reserved"
            return result
        table = value & (ADDRESS if width == 8 else 0xFFFF_F000)
    return result


def _leaf(result: Walk, value: int, shift: int, width: int, level: int) -> Walk:
    size = 1 << shift
    if width == 4 and level:  # PSE-36: bits 20 to 13 are address bits 39 to 32
        base = value & 0xFFC0_0000 | (value >> 13 & 0xFF) << 32
        if value & 1 << 21:
            result.fault = "bit 21 of the PD entry is reserved"
            return result
    else:
        base = value & ADDRESS & ~(size - 1)
        reserved = value & ADDRESS & (size - 1) & ~(1 << 12)  # bit 12 of a large page is PAT
        if level and reserved:
            result.fault = f"reserved bits are set in the {_NAMES[level]} entry ({reserved:#x})"
            return result
    result.page_size = size
    result.gpa = base | result.gva & (size - 1)
    return result


class PageTableBuilder:
    """Builds 4-level tables in guest memory, taking table pages from [base, end).

    >>> builder = PageTableBuilder(ram, 0x9000, 0x9F000)
    >>> builder.map(0, 0, 16 << 20, page_size=2 << 20)
    >>> builder.cr3
    0x9000
    """

    def __init__(self, memory: WritableMemory, base: int, end: int) -> None:
        self._memory, self._next, self._end = memory, base, end
        self._tables: dict[int, bytearray] = {}  # gpa -> what the page will hold; written as a whole by each map()
        self._touched: set[int] = set()
        self.cr3 = self._new_table()

    def _new_table(self) -> int:
        gpa = self._next
        if gpa + PAGE_SIZE > self._end:
            raise ConfigError(
                f"the page tables do not fit below {self._end:#x}: give the guest more memory there, or map it with larger pages"
            )
        self._next += PAGE_SIZE
        self._tables[gpa] = bytearray(PAGE_SIZE)
        return gpa

    def map(
        self,
        gva: int,
        gpa: int,
        size: int,
        *,
        page_size: int = 2 << 20,
        user: bool = False,
        writable: bool = True,
        nx: bool = False,
    ) -> None:
        """Map ``size`` bytes at ``gva`` to ``gpa`` with pages of 4 KiB, 2 MiB or 1 GiB.

        Raises ConfigError: not aligned, not canonical, no room for the tables, or pages of another size are there.
        """
        level = {PAGE_SIZE: 0, 2 << 20: 1, 1 << 30: 2}.get(page_size)
        if level is None:
            raise ConfigError(f"a page has 4096, {2 << 20} or {1 << 30} bytes, not {page_size}")
        if gva % page_size or gpa % page_size or size % page_size:
            raise ConfigError(f"gva {gva:#x}, gpa {gpa:#x} and size {size:#x} must be multiples of {page_size:#x}")
        if size < 0 or not (0 <= gva <= HALF - size or (1 << 64) - HALF <= gva <= (1 << 64) - size):
            raise ConfigError(f"gva {gva:#x}, {size:#x} bytes: not canonical (with 4-level paging bits 63 to 47 agree)")
        if not 0 <= gpa <= (1 << 52) - size:
            raise ConfigError(f"gpa {gpa:#x}, {size:#x} bytes: a guest physical address has at most 52 bits")
        flags = P | (RW if writable else 0) | (US if user else 0) | (NX if nx else 0) | (PS if level else 0)
        self._touched.clear()
        while size:
            table = self._table_for(gva, level, user)
            index = gva >> 12 + 9 * level & 511
            count = min(512 - index, size // page_size)  # one table's worth at a time
            entries = range(gpa | flags, (gpa | flags) + count * page_size, page_size)
            part = slice(8 * index, 8 * (index + count))
            if level and any(self._tables[table][part]):
                self._refuse_tables(table, part, gva, level)
            self._tables[table][part] = pack(f"<{count}Q", *entries)
            self._touched.add(table)
            step = count * page_size
            gva, gpa, size = gva + step, gpa + step, size - step
        for table in self._touched:
            self._memory.write(table, bytes(self._tables[table]))

    def _refuse_tables(self, table: int, part: slice, gva: int, level: int) -> None:
        """A large page must not take the place of a table: what that maps would be lost."""
        for i, (entry,) in enumerate(iter_unpack("<Q", self._tables[table][part])):
            if entry & P and not entry & PS:
                raise ConfigError(f"gva {gva + (i << 12 + 9 * level):#x} is mapped by smaller pages already")

    def _table_for(self, gva: int, level: int, user: bool) -> int:
        """The table at ``level`` that covers ``gva``, with the tables above it."""
        table = self.cr3
        for above in range(3, level, -1):
            at = 8 * (gva >> 12 + 9 * above & 511)
            entry = int.from_bytes(self._tables[table][at : at + 8], "little")
            if entry & PS:
                raise ConfigError(f"gva {gva:#x} is mapped by a larger page already")
            if not entry & P:
                entry = self._new_table() | P | RW
                self._touched.add(entry & ADDRESS)
            if user:
                entry |= US
            self._tables[table][at : at + 8] = entry.to_bytes(8, "little")
            self._touched.add(table)
            table = entry & ADDRESS
        return table
