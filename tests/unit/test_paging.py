"""The page-table walk: every paging mode, every way to fail, and agreement with the builder."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import ConfigError, GuestMemoryError
from pykvm.x86.paging import NX, PS, RW, US, P, PageTableBuilder, walk
from pykvm.x86.regs import CR0, CR4, EFER

K4, M2, M4, G1 = 1 << 12, 1 << 21, 1 << 22, 1 << 30
LONG = {"cr0": CR0.PE | CR0.PG, "cr4": CR4.PAE, "efer": EFER.LME | EFER.LMA | EFER.NXE}


class Memory:
    """RAM at 0, as small as a test needs it."""

    def __init__(self, size=1 << 16, fill=0):
        self.ram = bytearray([fill]) * size

    def _check(self, gpa, size):
        if gpa < 0 or gpa + size > len(self.ram):
            raise GuestMemoryError(gpa, size)

    def read(self, gpa, size):
        self._check(gpa, size)
        return bytes(self.ram[gpa : gpa + size])

    def write(self, gpa, data):
        self._check(gpa, len(data))
        self.ram[gpa : gpa + len(data)] = data

    def put(self, table, index, value, width=8):
        self.write(table + index * width, value.to_bytes(width, "little"))


@pytest.fixture
def ram():
    return Memory()


def test_no_paging(ram):
    found = walk(ram, 0x1234, cr0=CR0.PE, cr3=0, cr4=0, efer=0)
    assert (found.gpa, found.page_size, found.entries, found.fault) == (0x1234, 0, [], "")
    assert "paging is off" in found.explain()


# --- the modes, each with tables written by hand ---------------------------------------------------------------------


def test_32_bit(ram):
    gva = 0xC0ABC123
    ram.put(0x1000, gva >> 22, 0x2000 | P | RW | US, 4)
    ram.put(0x2000, gva >> 12 & 1023, 0x12345000 | P | RW, 4)
    found = walk(ram, gva, cr0=CR0.PG | CR0.PE, cr3=0x1FFF, cr4=0, efer=0)
    assert (found.gpa, found.page_size) == (0x12345123, K4)
    assert [(e.level, e.index) for e in found.entries] == [("PD", gva >> 22), ("PT", gva >> 12 & 1023)]
    assert (found.writable, found.user, found.executable) == (True, False, True)


def test_32_bit_large_pages_need_pse(ram):
    registers = {"cr0": CR0.PG | CR0.PE, "cr3": 0x1000, "efer": 0}
    ram.put(0x1000, 1, 0x40_0000 * 5 | 3 << 13 | P | PS, 4)  # PSE-36: bits 39 to 32 of the page are 3
    found = walk(ram, M4 + 0x12345, **registers, cr4=CR4.PSE)
    assert (found.gpa, found.page_size) == ((3 << 32) + 5 * M4 + 0x12345, M4)
    assert "PT entry" in walk(ram, M4, **registers, cr4=0).fault  # PS is ignored: it points to a table
    ram.put(0x1000, 1, 1 << 21 | P | PS, 4)
    assert "bit 21" in walk(ram, M4, **registers, cr4=CR4.PSE).fault


def test_pae(ram):
    registers = {"cr0": CR0.PG | CR0.PE, "cr3": 0x1020, "cr4": CR4.PAE, "efer": EFER.NXE}
    ram.put(0x1020, 3, 0x2000 | P)
    ram.put(0x2000, 1, 0x3000 | P | RW | US)
    ram.put(0x2000, 2, 0x60_0000 | P | RW | US | PS | NX)
    ram.put(0x3000, 4, 0x1_2345_6000 | P | US)
    found = walk(ram, 3 * G1 + M2 + 4 * K4 + 7, **registers)
    assert (found.gpa, found.page_size, found.writable, found.user) == (0x1_2345_6007, K4, False, True)
    assert [e.level for e in found.entries] == ["PDPT", "PD", "PT"]
    large = walk(ram, 3 * G1 + 2 * M2 + 7, **registers)
    assert (large.gpa, large.page_size, large.executable) == (0x60_0007, M2, False)
    ram.put(0x1020, 3, 0x2000 | P | RW)
    assert "reserved bits are set in the PDPT entry (0x2)" in walk(ram, 3 * G1, **registers).fault
    ram.put(0x1020, 3, 0x2000 | P)
    ram.put(0x2000, 1, 0x3000 | P | 1 << 55)
    assert "reserved" in walk(ram, 3 * G1 + M2, **registers).fault


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize(("leaf", "size"), [(0, K4), (1, M2), (2, G1)])
def test_long_mode(ram, levels, leaf, size):
    names = ["PT", "PD", "PDPT", "PML4", "PML5"]
    indices = [3, 5, 7, 9, 11]
    gva = sum(indices[n] << 12 + 9 * n for n in range(levels)) + 0x123
    table = 0x1000
    for level in range(levels - 1, leaf, -1):
        ram.put(table, indices[level], table + 0x1000 | P | RW | US)
        table += 0x1000
    ram.put(table, indices[leaf], 7 * G1 | P | RW | US | (PS if leaf else 0) | 1 << 12 * bool(leaf) | 1 << 55)
    cr4 = CR4.PAE | (CR4.LA57 if levels == 5 else 0)
    found = walk(ram, gva, **{**LONG, "cr4": cr4}, cr3=0x1000)
    assert found.fault == ""
    assert (found.gpa, found.page_size) == (7 * G1 + gva % size, size)
    assert [e.level for e in found.entries] == names[leaf:levels][::-1]
    assert [e.index for e in found.entries] == indices[leaf:levels][::-1]
    assert found.denies(write=True, user=True, fetch=True) == ""


# --- how it fails ----------------------------------------------------------------------------------------------------


def test_canonical_addresses(ram):
    for gva in (1 << 47, (1 << 64) - (1 << 47) - 1, 1 << 63, 1 << 64, -1):
        assert "not canonical" in walk(ram, gva, **LONG, cr3=0).fault
    for gva in ((1 << 47) - 1, (1 << 64) - (1 << 47), (1 << 64) - 1):
        assert "not present" in walk(ram, gva, **LONG, cr3=0).fault
    la57 = {**LONG, "cr4": CR4.PAE | CR4.LA57}
    assert "not present" in walk(ram, 1 << 47, **la57, cr3=0).fault
    assert "not canonical" in walk(ram, 1 << 56, **la57, cr3=0).fault


@pytest.mark.parametrize("level", range(4))
def test_not_present_at_each_level(ram, level):
    tables = [0x1000, 0x2000, 0x3000, 0x4000]
    for i in range(level):
        ram.put(tables[i], 0, tables[i] + 0x1000 | P)
    found = walk(ram, 0, **LONG, cr3=0x1000)
    assert found.gpa is None
    assert found.fault == f"the {['PML4', 'PDPT', 'PD', 'PT'][level]} entry is not present (P = 0)"
    assert len(found.entries) == level + 1
    assert found.fault in found.explain()


def test_a_table_in_a_hole(ram):
    ram.put(0x1000, 0, 0x5555_0000_0000 | P)
    found = walk(ram, 0, **LONG, cr3=0x1000)
    assert found.gpa is None
    assert "the PDPT entry at gpa 0x555500000000 lies where the guest has no memory" in found.fault
    assert "PML4" in walk(ram, 0, **LONG, cr3=0xFFFF_F000).fault


@pytest.mark.parametrize(
    ("entries", "registers", "fault"),
    [
        ([PS | P], {}, "bit 7 of the PML4 entry is reserved"),
        ([0x2000 | P, PS | P | 1 << 13], {}, "reserved bits are set in the PDPT entry"),
        ([0x2000 | P, 0x3000 | P, PS | P | 1 << 20], {}, "reserved bits are set in the PD entry"),
        ([NX | 0x2000 | P], {"efer": EFER.LMA}, "bit 63 of the PML4 entry is reserved while EFER.NXE is 0"),
    ],
)
def test_reserved_bits(ram, entries, registers, fault):
    for i, entry in enumerate(entries):
        ram.put(0x1000 * (i + 1), 0, entry)
    found = walk(ram, 0, **{**LONG, **registers}, cr3=0x1000)
    assert found.gpa is None
    assert fault in found.fault


@pytest.mark.parametrize("restricted", range(4))
def test_every_level_must_allow(ram, restricted):
    for i in range(4):
        rights = NX if i == restricted else RW | US
        ram.put(0x1000 * (i + 1), 0, 0x1000 * (i + 2) | P | rights)
    found = walk(ram, 0, **LONG, cr3=0x1000)
    assert found.denies() == ""
    assert "U/S" in found.denies(user=True)
    assert "R/W" in found.denies(write=True)
    assert found.denies(write=True, wp=False) == ""
    assert "NX" in found.denies(fetch=True)
    assert "supervisor, not writable, not executable" in found.explain()


@settings(deadline=None)
@given(st.integers(), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.data())
def test_never_raises(seed, gva, cr3, data):
    ram = Memory()
    ram.ram = bytearray(Random(seed).randbytes(1 << 16))
    registers = {
        "cr0": CR0.PE | CR0.PG,
        "cr4": data.draw(st.sampled_from([0, CR4.PSE, CR4.PAE, CR4.PAE | CR4.LA57])),
        "efer": data.draw(st.sampled_from([0, EFER.NXE, EFER.LMA, EFER.LMA | EFER.NXE])),
    }
    found = walk(ram, gva, cr3=data.draw(st.sampled_from([cr3, cr3 & 0xFFFF])), **registers)
    assert (found.gpa is None) == bool(found.fault)
    assert len(found.entries) <= 5
    found.explain()
    repr(found)


# --- the builder -----------------------------------------------------------------------------------------------------


def builder(ram, base=0x1000, end=0x10000):
    return PageTableBuilder(ram, base, end)


@pytest.mark.parametrize("page_size", [K4, M2, G1])
def test_builds_what_the_walk_finds(page_size):
    ram = Memory(fill=0xFF)  # memory need not be clean
    tables = builder(ram)
    tables.map(3 * page_size, 5 * page_size, 2 * page_size, page_size=page_size, user=True, writable=False, nx=True)
    at = {**LONG, "cr3": tables.cr3}
    for offset in (0, 1, page_size - 1, page_size, 2 * page_size - 1):
        found = walk(ram, 3 * page_size + offset, **at)
        assert (found.gpa, found.page_size) == (5 * page_size + offset, page_size)
        assert (found.user, found.writable, found.executable) == (True, False, False)
    assert walk(ram, 3 * page_size - 1, **at).gpa is None
    assert walk(ram, 5 * page_size, **at).gpa is None


def test_four_gigabytes_take_six_pages(ram):
    tables = builder(ram, 0x1000, 0x7000)
    tables.map(0, 0, 4 * G1, page_size=M2)
    assert walk(ram, 4 * G1 - 1, **LONG, cr3=tables.cr3).gpa == 4 * G1 - 1
    with pytest.raises(ConfigError, match="do not fit below 0x7000"):
        tables.map(4 * G1, 4 * G1, M2, page_size=M2)


def test_user_pages_beside_kernel_pages(ram):
    tables = builder(ram)
    tables.map(0, 0, K4, page_size=K4)
    tables.map(K4, K4, K4, page_size=K4, user=True)
    assert walk(ram, 0, **LONG, cr3=tables.cr3).user is False
    assert walk(ram, K4, **LONG, cr3=tables.cr3).user is True


def test_the_upper_half(ram):
    tables = builder(ram)
    tables.map((1 << 64) - M2, 0, M2, page_size=M2)
    assert walk(ram, (1 << 64) - 1, **LONG, cr3=tables.cr3).gpa == M2 - 1


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((0, 0, K4), {"page_size": 8192}),
        ((1, 0, K4), {"page_size": K4}),
        ((0, K4, M2), {"page_size": M2}),
        ((0, 0, K4), {"page_size": M2}),
        ((0, 0, -K4), {"page_size": K4}),
        (((1 << 47) - K4, 0, 2 * K4), {"page_size": K4}),
        ((1 << 47, 0, K4), {"page_size": K4}),
        (((1 << 64) - K4, 0, 2 * K4), {"page_size": K4}),
        ((0, 1 << 52, K4), {"page_size": K4}),
    ],
)
def test_impossible_mappings(ram, arguments, options):
    with pytest.raises(ConfigError):
        builder(ram).map(*arguments, **options)


def test_page_sizes_do_not_overwrite_each_other(ram):
    tables = builder(ram)
    tables.map(0, 0, M2, page_size=M2)
    with pytest.raises(ConfigError, match="larger page"):
        tables.map(0, 0, K4, page_size=K4)
    tables.map(M2, 0, K4, page_size=K4)
    with pytest.raises(ConfigError, match="gva 0x200000 is mapped by smaller pages"):
        tables.map(0, 0, 2 * M2, page_size=M2)
    tables.map(0, M2, M2, page_size=M2)  # the same size again: the new mapping holds
    assert walk(ram, 0, **LONG, cr3=tables.cr3).gpa == M2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([K4, M2, G1]),
            st.integers(0, 1 << 35),
            st.integers(0, 1 << 39),
            st.integers(1, 3),
            st.booleans(),
            st.booleans(),
            st.booleans(),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_agreement_with_a_model(mappings):
    """The walk gives for every page what a dictionary says, and faults beside it."""
    ram = Memory(1 << 19)
    tables = PageTableBuilder(ram, 0, 1 << 19)
    model = {}
    for page_size, at, to, count, high, user, writable, nx in mappings:
        gva = at // page_size * page_size + (0xFFFF_8000_0000_0000 if high else 0)
        gpa = to // page_size * page_size
        wanted = range(gva, gva + count * page_size, page_size)
        if any(w < g + s and g < w + page_size for g, (s, *_) in model.items() for w in wanted):
            continue
        tables.map(gva, gpa, count * page_size, page_size=page_size, user=user, writable=writable, nx=nx)
        for i, page in enumerate(wanted):
            model[page] = (page_size, gpa + i * page_size, user, writable, not nx)
    for page, (page_size, gpa, *rights) in model.items():
        for offset in (0, page_size - 1):
            found = walk(ram, page + offset, **LONG, cr3=tables.cr3)
            assert (found.gpa, found.page_size) == (gpa + offset, page_size)
            assert [found.user, found.writable, found.executable] == rights
        for beside in (page - 1, page + page_size):
            if 0 <= beside < 1 << 64 and not any(g <= beside < g + s for g, (s, *_) in model.items()):
                assert walk(ram, beside, **LONG, cr3=tables.cr3).gpa is None
