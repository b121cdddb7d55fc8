"""Page tables as ranges: every paging mode, merged, bounded against hostile tables, and what the walk says of the same."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.debug import pagetables
from pykvm.debug.pagetables import page_tables, tree
from pykvm.errors import GuestMemoryError
from pykvm.x86.paging import NX, PS, RW, US, P, PageTableBuilder, walk
from pykvm.x86.regs import CR0, CR4, EFER

K4, M2, M4, G1 = 1 << 12, 1 << 21, 1 << 22, 1 << 30
LONG = {"cr0": CR0.PE | CR0.PG, "cr4": CR4.PAE, "efer": EFER.LME | EFER.LMA | EFER.NXE}
LA57 = {**LONG, "cr4": CR4.PAE | CR4.LA57}
PAE = {"cr0": CR0.PE | CR0.PG, "cr4": CR4.PAE, "efer": EFER.NXE}
TWO = {"cr0": CR0.PE | CR0.PG, "cr4": CR4.PSE, "efer": 0}


class Memory:
    def __init__(self, size=1 << 16):
        self.ram = bytearray(size)

    def read(self, gpa, size):
        if gpa < 0 or gpa + size > len(self.ram):
            raise GuestMemoryError(gpa, size)
        return bytes(self.ram[gpa : gpa + size])

    def write(self, gpa, data):
        self.ram[gpa : gpa + len(data)] = data

    def put(self, table, index, value, width=8):
        self.write(table + index * width, value.to_bytes(width, "little"))


def rows(tables):
    return [(m.gva, m.gpa, m.size, m.page_size, m.rights) for m in tables]


@pytest.fixture
def ram():
    return Memory()


def test_pages_are_merged_into_ranges(ram):
    builder = PageTableBuilder(ram, 0x1000, 0xF000)
    builder.map(0, 0, 16 * M2)
    builder.map(0x1234_5678_9000, 0x5000, 2 * K4, page_size=K4, user=True, nx=True)
    builder.map(0x1234_5678_B000, 0x7000, K4, page_size=K4, writable=False, user=True)
    builder.map((1 << 64) - G1, 0, G1, page_size=G1)
    found = page_tables(ram, cr3=builder.cr3, **LONG)
    assert rows(found) == [
        (0, 0, 16 * M2, M2, "rwx"),
        (0x1234_5678_9000, 0x5000, 2 * K4, K4, "rw- user"),
        (0x1234_5678_B000, 0x7000, K4, K4, "r-x user"),
        ((1 << 64) - G1, 0, G1, G1, "rwx"),
    ]
    assert (found.paging, found.cut, found.malformed) == ("4-level", "", 0)
    assert found.find(0x1234_5678_A000).gpa == 0x5000
    assert found.find(0x1234_5678_C000) is None
    assert "2M pages" in str(found)
    assert found.as_dict()["ranges"][0]["size"] == 16 * M2
    assert "0x00001234" in found._repr_html_()


def test_other_modes(ram):
    ram.put(0x1000, 1, 0x00400000 | P | RW | PS, 4)
    ram.put(0x1000, 2, 0x2000 | P | RW | US, 4)
    ram.put(0x2000, 5, 0x7000 | P | US, 4)
    found = page_tables(ram, cr3=0x1000, **TWO)
    assert rows(found) == [(M4, M4, M4, M4, "rwx"), (2 * M4 + 5 * K4, 0x7000, K4, K4, "r-x user")]
    assert found.paging == "32-bit"
    ram.put(0x3000, 3, 0x4000 | P)
    ram.put(0x4000, 1, M2 | P | RW | PS | NX)
    found = page_tables(ram, cr3=0x3000, **PAE)
    assert rows(found) == [(3 * G1 + M2, M2, M2, M2, "rw-")]
    for level, table in enumerate((0x5000, 0x6000, 0x7000, 0x8000)):
        ram.put(table, 511 if level == 0 else 1, table + 0x1000 | P | RW)
    ram.put(0x9000, 0, 0xA000 | P)
    found = page_tables(ram, cr3=0x5000, **LA57)
    assert rows(found) == [((1 << 64) - (1 << 48) + (1 << 39) + G1 + M2, 0xA000, K4, K4, "r-x")]
    assert found.paging == "5-level"
    off = page_tables(ram, cr0=CR0.PE, cr3=0x1000, cr4=0, efer=0)
    assert (off.paging, len(off)) == ("off", 0)


def test_malformed_entries_map_nothing(ram):
    ram.put(0x1000, 0, 0x2000 | P)
    ram.put(0x2000, 0, 0x3000 | P)
    ram.put(0x3000, 0, M2 | 0x2000 | P | PS)  # reserved bits of a large page
    ram.put(0x3000, 1, 0xFFFF_F000 | P)  # a table in a hole
    ram.put(0x1000, 1, P | PS)  # PS at the top
    found = page_tables(ram, cr3=0x1000, **LONG)
    assert (rows(found), found.malformed) == ([], 2)
    ram.put(0x1000, 2, 0x2000 | P | NX)
    assert page_tables(ram, cr3=0x1000, **{**LONG, "efer": EFER.LMA}).malformed >= 3


@pytest.mark.parametrize("flags", [P | RW, P | RW | US])
def test_tables_that_lead_to_themselves_end(ram, monkeypatch, flags):
    monkeypatch.setattr(pagetables, "MAX_ENTRIES", 50_000)
    for i in range(512):
        ram.put(0x1000, i, 0x1000 | flags)
    start = time.monotonic()
    for mode in (LONG, LA57):
        found = page_tables(ram, cr3=0x1000, **mode)
        assert found.cut
        assert found.entries <= 50_000
        roots, count = tree(ram, cr3=0x1000, **mode, limit=100)
        assert roots and count.cut
    assert time.monotonic() - start < 60


def test_ranges_are_bounded(ram):
    ram.put(0x1000, 0, 0x2000 | P)
    ram.put(0x2000, 0, 0x3000 | P)
    ram.put(0x3000, 0, 0x4000 | P)
    for i in range(512):
        ram.put(0x4000, i, 0x8000 | P)
    found = page_tables(ram, cr3=0x1000, **LONG, limit=100)
    assert len(found) == 100
    assert "100" in found.cut and found.cut in str(found)


def test_the_tree(ram):
    builder = PageTableBuilder(ram, 0x1000, 0xF000)
    builder.map(0, 0, 4 * M2)
    builder.map(0x4000_0000, 0x3000, K4, page_size=K4)
    roots, count = tree(ram, cr3=builder.cr3, **LONG)
    assert [(n.level, n.kind) for n in roots] == [("PML4", "table")]
    first, second = roots[0].children
    assert [(n.level, n.count, n.gpa) for n in first.children] == [("PD", 4, 0)]
    assert second.children[0].children[0].gpa == 0x3000
    assert not count.cut


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, 15), st.integers(0, 0xFFF), st.booleans()), max_size=40),
    st.sampled_from(["4", "5", "pae", "2"]),
)
def test_the_walk_says_the_same(entries, kind):
    """Random entries in a few tables: each range's ends translate as it says, and so do a table's other entries, to nothing."""
    ram = Memory()
    mode = {"4": LONG, "5": LA57, "pae": PAE, "2": TWO}[kind]
    width = 4 if kind == "2" else 8
    for index, where, flags, nx in entries:
        ram.put(0x1000 * (1 + where % 5), index if where % 3 else index % 4, where << 12 | flags | (NX if nx and width == 8 else 0), width)
    found = page_tables(ram, cr3=0x1000, **mode, limit=300)
    for m in found.ranges[:100]:
        for offset in (0, m.size - 1, m.size // 2):
            w = walk(ram, m.gva + offset, cr3=0x1000, **mode)
            assert (w.gpa, w.page_size) == (m.gpa + offset, m.page_size)
            assert (w.writable, w.user, w.executable) == (m.writable, m.user, m.executable)
    for m in found.ranges[:50]:
        for gva in (m.gva - 1, m.gva + m.size):
            if 0 <= gva < (1 << 64 if width == 8 and kind != "pae" else 1 << 32) and not found.cut:
                other = found.find(gva)
                w = walk(ram, gva, cr3=0x1000, **mode)
                assert w.gpa == (None if other is None else other.gpa + gva - other.gva)
