"""The memory map that guests are told: RAM without the PC's holes, and what is reserved."""

import struct
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pykvm import GuestMemory
from pykvm.memorymap import RAM, RESERVED, Region, e820, memory_map
from pykvm.units import GIB, KIB, MIB

FIRMWARE = [Region(0, 0x9FC00, RAM), Region(0x9FC00, 0x400, RESERVED), Region(0xE0000, 0x20000, RESERVED)]
KVM = Region(0xFEFFC000, 0x1004000, RESERVED)


def test_a_small_machine():
    with GuestMemory.of_size("128M") as memory:
        assert memory_map(memory) == [*FIRMWARE, Region(MIB, 127 * MIB, RAM), KVM]


def test_ram_goes_on_above_4_gib():
    with GuestMemory.of_size(0xC0000000 + 256 * MIB) as memory:
        assert memory_map(memory) == [*FIRMWARE, Region(MIB, 0xC0000000 - MIB, RAM), KVM, Region(4 * GIB, 256 * MIB, RAM)]


def test_less_than_a_mib():
    with GuestMemory.of_size("64K") as memory:
        assert memory_map(memory) == [Region(0, 64 * KIB, RAM), KVM]


def test_rom_is_reserved():
    with GuestMemory.of_size("2M") as memory:
        memory.add(0xD0000000, 64 * KIB, readonly=True)
        memory.add(0xFFF00000, 64 * KIB, readonly=True)  # firmware
        assert memory_map(memory)[-2:] == [Region(0xD0000000, 64 * KIB, RESERVED), KVM]


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 64), st.booleans()), max_size=5))
def test_regions_are_sorted_and_apart(slots):
    with GuestMemory() as memory:
        end = 0
        for pages, size, readonly in slots:
            gpa = end + pages % 0x400 * 4096
            memory.add(gpa, size * 4096, readonly=readonly)
            end = gpa + size * 4096
        regions = memory_map(memory)
        assert all(region.size > 0 for region in regions)
        for one, other in pairwise(regions):
            assert one.gpa + one.size <= other.gpa
        assert all(memory.contains(region.gpa, region.size) for region in regions if region.type == RAM)
        assert len(e820(regions)) == 20 * len(regions)


def test_e820_entries_have_20_bytes():
    assert struct.unpack("<QQI", e820([Region(0x100000, 0x7F00000, RAM)])) == (0x100000, 0x7F00000, 1)
