"""All that page tables map, as ranges and as a tree; bounded, since a guest's tables may point anywhere, at themselves too.

Which entries count is what ``x86.paging.walk`` says: one that would make a walk fail maps nothing, and is counted as malformed.
"""

from __future__ import annotations

from struct import unpack

from pykvm.errors import GuestMemoryError
from pykvm.units import format_size
from pykvm.x86.paging import ADDRESS, NX, PS, RW, US, P
from pykvm.x86.regs import CR0, CR4, EFER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pykvm.x86.paging import TableMemory

__all__ = ["Mapping", "Node", "PageTables", "page_tables", "paging_name", "tree"]

MAX_ENTRIES = 1 << 20  # present entries looked at: about a second, and 4 GiB in pages of 4 KiB
MAX_TABLES = 1 << 15  # each is read, empty or not
MAX_RANGES = 1 << 16
_NAMES = ("PT", "PD", "PDPT", "PML4", "PML5")
_PAE_HIGH = 0x7FF0_0000_0000_0000
_PDPTE_RESERVED = 0xFFF0_0000_0000_01E6


def paging_name(cr0: int, cr4: int, efer: int) -> str:
    """ "off", "32-bit", "PAE", "4-level" or "5-level"."""
    if not cr0 & CR0.PG:
        return "off"
    if efer & EFER.LMA:
        return "5-level" if cr4 & CR4.LA57 else "4-level"
    return "PAE" if cr4 & CR4.PAE else "32-bit"


def rights_text(writable: bool, user: bool, executable: bool) -> str:
    """``"rwx user"``, with ``-`` for what is not allowed; supervisor pages say nothing."""
    return f"r{'w' if writable else '-'}{'x' if executable else '-'}{' user' if user else ''}"


class Mapping:
    """``size`` bytes at ``gva`` that lead to as many at ``gpa``, in pages of ``page_size``, with one set of rights."""

    __slots__ = ("executable", "gpa", "gva", "page_size", "size", "user", "writable")

    def __init__(self, gva: int, gpa: int, size: int, page_size: int, writable: bool, user: bool, executable: bool) -> None:
        self.gva, self.gpa, self.size, self.page_size = gva, gpa, size, page_size
        self.writable, self.user, self.executable = writable, user, executable

    @property
    def rights(self) -> str:
        """``"rw-"``, ``"r-x user"``."""
        return rights_text(self.writable, self.user, self.executable)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in ("gva", "gpa", "size", "page_size", "writable", "user", "executable")}

    def __repr__(self) -> str:
        return f"<Mapping {self}>"

    def __str__(self) -> str:
        pages = f"{format_size(self.size)} in {format_size(self.page_size)} pages"
        return f"{self.gva:#018x}-{self.gva + self.size - 1:#018x} -> gpa {self.gpa:#x}  {pages}  {self.rights}"


class Node:
    """A line of the tree: ``count`` entries of a table from ``index`` on that lead to one run of pages, or one entry and what is below."""

    __slots__ = ("children", "count", "depth", "gpa", "gva", "index", "kind", "level", "page_size", "rights", "value")

    def __init__(self, depth: int, level: str, index: int, gva: int, value: int, kind: str, gpa: int, page_size: int, rights: str) -> None:
        self.depth, self.level, self.index, self.gva, self.value = depth, level, index, gva, value
        self.kind, self.gpa, self.page_size, self.rights = kind, gpa, page_size, rights
        self.count = 1
        self.children: list[Node] = []


class PageTables:
    """The mappings below one root, by rising gva. ``cut`` says why there may be more, or is empty.

    ``tables`` and ``entries``: how many were looked at; ``malformed``: entries that are present but make a walk fail.
    """

    def __init__(self, root: int, paging: str) -> None:
        self.root, self.paging = root, paging
        self.ranges: list[Mapping] = []
        self.tables = self.entries = self.malformed = 0
        self.cut = ""

    def find(self, gva: int) -> Mapping | None:
        """The mapping that holds ``gva``."""
        from bisect import bisect_right

        at = bisect_right(self.ranges, gva, key=lambda m: m.gva) - 1
        return self.ranges[at] if at >= 0 and gva - self.ranges[at].gva < self.ranges[at].size else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        about = {name: getattr(self, name) for name in ("root", "paging", "tables", "entries", "malformed")}
        return {**about, "cut": self.cut or None, "ranges": [m.as_dict() for m in self.ranges]}

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)

    def __repr__(self) -> str:
        return f"<PageTables at {self.root:#x}, {self.paging}: {len(self.ranges)} ranges{', cut' if self.cut else ''}>"

    def __str__(self) -> str:
        lines = [f"{self.paging} paging, root at gpa {self.root:#x}: {self.entries} entries in {self.tables} tables"]
        lines += [f"  {m}" for m in self.ranges]
        if self.malformed:
            lines.append(f"  {self.malformed} entries are malformed and map nothing")
        if self.cut:
            lines.append(f"  ... and more: {self.cut}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from pykvm.debug.html import page_tables_html

        return page_tables_html(self)


def page_tables(memory: TableMemory, *, cr0: int, cr3: int, cr4: int, efer: int, limit: int = MAX_RANGES) -> PageTables:
    """What the tables at ``cr3`` map under these control registers, at most ``limit`` ranges. Never raises: holes map nothing."""
    result = PageTables(cr3 & ADDRESS, paging_name(cr0, cr4, efer))
    last: Mapping | None = None
    for node in _visit(memory, result, cr0, cr3, cr4, efer):
        _, _, _, gva, _, kind, gpa, size, rights = node
        if kind != "page":
            continue
        if (
            last is not None
            and last.gva + last.size == gva
            and last.gpa + last.size == gpa
            and last.page_size == size
            and (last.writable, last.user, last.executable) == rights
        ):
            last.size += size
            continue
        if len(result.ranges) >= limit:
            result.cut = f"{limit} ranges are listed"
            break
        last = Mapping(gva, gpa, size, size, *rights)
        result.ranges.append(last)
    return result


def tree(memory: TableMemory, *, cr0: int, cr3: int, cr4: int, efer: int, limit: int = 2000) -> tuple[list[Node], PageTables]:
    """The tables as a tree of at most ``limit`` nodes, runs of pages as one; and the counts."""
    result = PageTables(cr3 & ADDRESS, paging_name(cr0, cr4, efer))
    roots: list[Node] = []
    path: list[Node] = []
    made = 0
    for depth, level, index, gva, value, kind, gpa, size, rights in _visit(memory, result, cr0, cr3, cr4, efer):
        del path[depth:]
        siblings = path[-1].children if path else roots
        text = rights_text(*rights)
        if kind == "page" and siblings:
            last = siblings[-1]
            if last.kind == "page" and last.index + last.count == index and last.gpa + last.count * size == gpa and last.rights == text:
                last.count += 1
                continue
        if made >= limit:
            result.cut = f"{limit} lines are shown"
            break
        made += 1
        node = Node(depth, level, index, gva, value, kind, gpa, size, text)
        siblings.append(node)
        if kind == "table":
            path.append(node)
    return roots, result


# (depth, level, index, gva, value, kind, gpa, page size, (writable, user, executable))
_Visit = tuple[int, str, int, int, int, str, int, int, tuple[bool, bool, bool]]


def _visit(memory: TableMemory, count: PageTables, cr0: int, cr3: int, cr4: int, efer: int) -> Iterator[_Visit]:
    """Each present entry, depth first. ``kind``: "table", "page" or "bad"."""
    if not cr0 & CR0.PG:
        return
    nxe = bool(efer & EFER.NXE)
    every = (True, True, True)
    if efer & EFER.LMA:
        levels = 5 if cr4 & CR4.LA57 else 4
        yield from _Tables(memory, count, 9, 8, levels, nxe, True).below(cr3 & ADDRESS, levels - 1, 0, 0, every)
    elif cr4 & CR4.PAE:
        tables = _Tables(memory, count, 9, 8, 2, nxe, True)
        for index in range(4):
            gva = index << 30
            entry = _read(memory, (cr3 & 0xFFFF_FFE0) + 8 * index, 8)
            value = int.from_bytes(entry, "little") if len(entry) == 8 else 0
            if value & P:
                count.entries += 1
                bad = bool(value & _PDPTE_RESERVED)
                count.malformed += bad
                yield 0, "PDPT", index, gva, value, "bad" if bad else "table", value & ADDRESS, 0, every
                if not bad:
                    yield from tables.below(value & ADDRESS, 1, gva, 1, every)
    else:
        tables = _Tables(memory, count, 10, 4, 2, False, bool(cr4 & CR4.PSE))
        yield from tables.below(cr3 & 0xFFFF_F000, 1, 0, 0, every)


class _Tables:
    """Tables of 2**bits entries of ``width`` bytes, ``levels`` deep."""

    def __init__(self, memory: TableMemory, count: PageTables, bits: int, width: int, levels: int, nxe: bool, large: bool) -> None:
        self.memory, self.count, self.bits, self.width = memory, count, bits, width
        self.levels, self.nxe, self.large = levels, nxe, large
        self.layout = f"<{1 << bits}{'Q' if width == 8 else 'I'}"

    def below(self, table: int, level: int, base: int, depth: int, rights: tuple[bool, bool, bool]) -> Iterator[_Visit]:
        """The present entries of ``table`` and what is below them."""
        count, width = self.count, self.width
        if count.tables >= MAX_TABLES:
            count.cut = f"{MAX_TABLES} tables were read"
            return
        count.tables += 1
        data = _read(self.memory, table, width << self.bits)
        shift = 12 + self.bits * level
        name = _NAMES[level]
        for index, value in enumerate(unpack(self.layout, data.ljust(width << self.bits, b"\0"))):
            if not value & P:
                continue
            if count.entries >= MAX_ENTRIES or count.cut:
                count.cut = count.cut or f"{MAX_ENTRIES} entries were looked at"
                return
            count.entries += 1
            gva = base | index << shift
            if depth == 0 and self.levels >= 4 and index & 1 << self.bits - 1:
                gva |= (1 << 64) - (1 << shift + self.bits)  # the upper half, sign extended
            here = (rights[0] and bool(value & RW), rights[1] and bool(value & US), rights[2] and not (width == 8 and value & NX))
            bad = width == 8 and bool((value & NX and not self.nxe) or (self.levels == 2 and value & _PAE_HIGH))
            leaf = level == 0 or bool(value & PS and self.large and level <= 2)
            gpa = self._page(value, shift, level) if leaf else value & (ADDRESS if width == 8 else 0xFFFF_F000)
            if bad or gpa is None or (not leaf and value & PS and width == 8):
                count.malformed += 1
                yield depth, name, index, gva, value, "bad", 0, 0, here
            elif leaf:
                yield depth, name, index, gva, value, "page", gpa, 1 << shift, here
            else:
                yield depth, name, index, gva, value, "table", gpa, 0, here
                yield from self.below(gpa, level - 1, gva, depth + 1, here)

    def _page(self, value: int, shift: int, level: int) -> int | None:
        """Where a page is; None when reserved bits are set."""
        size = 1 << shift
        if self.width == 4 and level:
            return None if value & 1 << 21 else value & 0xFFC0_0000 | (value >> 13 & 0xFF) << 32
        if level and value & ADDRESS & (size - 1) & ~(1 << 12):
            return None
        return value & (ADDRESS if self.width == 8 else 0xFFFF_F000) & ~(size - 1)


def _read(memory: TableMemory, gpa: int, size: int) -> bytes:
    """A table, or as much of it as there is memory for."""
    try:
        return memory.read(gpa, size)
    except GuestMemoryError:
        pass
    data = b""
    for at in range(gpa, gpa + size, 8):  # a table at the end of memory: rare, and small
        try:
            data += memory.read(at, 8)
        except GuestMemoryError:
            data += bytes(8)
    return data if any(data) else b""
