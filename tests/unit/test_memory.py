"""Guest memory without KVM: slots, checks, views."""

import gc
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm import ConfigError, GuestMemory, GuestMemoryError, MemSlotError
from pykvm.units import format_size, parse_address, parse_size


@pytest.fixture
def ram():
    with GuestMemory.of_size("64K") as memory:
        yield memory


def test_integers_are_little_endian(ram):
    ram.write_u64(8, 0x1122334455667788)
    assert ram.read(8, 3) == b"\x88\x77\x66"
    assert (ram.read_u8(8), ram.read_u16(8), ram.read_u32(8), ram.read_u64(8)) == (0x88, 0x7788, 0x55667788, 0x1122334455667788)
    ram.write_u8(8, 0x1FF)
    ram.write_u16(10, 0)
    ram.write_u32(12, -1)
    assert ram.read(8, 8) == b"\xff\x77\0\0\xff\xff\xff\xff"


@given(st.integers(-(1 << 64), 1 << 65), st.integers(-10, 1 << 40))
def test_every_access_is_inside_or_refused(gpa, size):
    with GuestMemory.of_size("64K") as memory:
        inside = size == 0 or (gpa >= 0 and size > 0 and gpa + size <= 65536)
        if inside:
            assert len(memory.read(gpa, size)) == size
        else:
            with pytest.raises(GuestMemoryError):
                memory.read(gpa, size)
        if size < 100_000:
            data = b"x" * max(size, 0)
            if size > 0 and not inside:
                with pytest.raises(GuestMemoryError):
                    memory.write(gpa, data)


def test_access_across_touching_slots_and_into_a_hole():
    with GuestMemory() as memory:
        memory.add(0, 4096)
        memory.add(4096, 4096)
        memory.add(16384, 4096)
        memory.write(4090, b"0123456789ab")
        assert memory.read(4090, 12) == b"0123456789ab"
        with pytest.raises(GuestMemoryError):
            memory.write(8190, b"abcd")
        assert memory.read(8190, 2) == b"\0\0"  # all or nothing
        with pytest.raises(GuestMemoryError, match="leaves <MemSlot 1"):
            memory.read(8190, 4)
        with pytest.raises(GuestMemoryError, match="no memory slot"):
            memory.read(12288, 1)


def test_overlap_names_the_other_slot():
    with GuestMemory() as memory:
        memory.add(0x1000, 0x3000)
        with pytest.raises(MemSlotError, match=r"0x3000-0x3fff overlaps <MemSlot 0: gpa 0x1000-0x3fff"):
            memory.add(0x3000, 0x1000)
        assert len(memory.slots) == 1


@pytest.mark.parametrize(("gpa", "size"), [(0, 0), (0, -4096), (1, 4096), (0, 4097), (-4096, 4096), (1 << 52, 4096), (0, 1 << 60)])
def test_impossible_slots(gpa, size):
    with GuestMemory() as memory, pytest.raises(ConfigError):
        memory.add(gpa, size)


def test_memory_above_the_hole():
    with GuestMemory.of_size("4G") as memory:
        assert [(s.gpa, s.size) for s in memory.slots] == [(0, 3 << 30), (4 << 30, 1 << 30)]
        memory.write_u32((5 << 30) - 4, 7)
        assert memory.read_u32((5 << 30) - 4) == 7
        assert memory.size == 4 << 30


# --- views ------------------------------------------------------------------------------------------------------------


def test_view_is_the_memory(ram):
    view = ram.view(0x100, (2, 3), "u2")
    view[1, 2] = 0xABCD
    assert ram.read_u16(0x100 + 2 * 5) == 0xABCD
    ram.write_u16(0x100, 0x55)
    assert view[0, 0] == 0x55
    assert view.shape == (2, 3)
    assert ram.view_slot(ram.slots[0], "u8").shape == (8192,)


def test_view_outlives_its_memory():
    memory = GuestMemory.of_size("64K")
    memory.write_u32(0, 0x12345678)
    view = memory.view(0, 4, "u4")
    memory.close()
    gc.collect()
    assert view[0] == 0x12345678
    view[1] = 9
    assert view[1] == 9


@pytest.mark.parametrize(("gpa", "shape", "dtype"), [(0, 65537, "u1"), (65535, 1, "u2"), (0, (1 << 40, 1 << 40), "u1"), (-1, 1, "u1")])
def test_views_outside(ram, gpa, shape, dtype):
    with pytest.raises(GuestMemoryError):
        ram.view(gpa, shape, dtype)


def test_odd_views(ram):
    assert ram.view(0, 0).size == 0
    with pytest.raises(ConfigError):
        ram.view(0, -1)
    with pytest.raises(ConfigError):
        ram.view(0, 1, np.dtype(object))


# --- backings ---------------------------------------------------------------------------------------------------------


def test_file_copy_on_write_and_shared(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"A" * 8192)
    with GuestMemory() as memory:
        memory.add(0, 4096, path, offset=4096)
        memory.write(0, b"B")
        assert memory.read(0, 2) == b"BA"
    assert path.read_bytes() == b"A" * 8192
    with GuestMemory() as memory:
        memory.add(0, 8192, path, shared=True)
        memory.write(0, b"B")
    assert path.read_bytes()[:2] == b"BA"


def test_readonly_file_gives_readonly_views(tmp_path):
    path = tmp_path / "rom"
    path.write_bytes(bytes(4096))
    with GuestMemory() as memory:
        memory.add(0, 4096, path, readonly=True)
        assert not memory.view(0, 4).flags.writeable
        with pytest.raises(GuestMemoryError, match=r"MemSlot 0.*readonly"):
            memory.write(0, b"x")
        memory.add(0x1000, 4096)
        with pytest.raises(GuestMemoryError):
            memory.write(0xFFF, b"xy")


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(4096))
    with GuestMemory() as memory:
        with pytest.raises(ConfigError, match="4096 bytes"):
            memory.add(0, 8192, path)
        with pytest.raises(ConfigError, match="offset"):
            memory.add(0, 4096, path, offset=1)
        with pytest.raises(ConfigError, match="No such file"):
            memory.add(0, 4096, tmp_path / "nowhere")
        with pytest.raises(ConfigError, match="unknown backing"):
            memory.add(0, 4096, "floppy")
        assert memory.slots == ()


def test_memfd_and_hugetlb():
    with GuestMemory() as memory:
        memory.add(0, 4096, "memfd")
        memory.write(0, b"abc")
        assert memory.read(0, 3) == b"abc"
        free = int(re.search(r"HugePages_Free: *(\d+)", Path("/proc/meminfo").read_text())[1])
        if free:
            memory.add(2 << 20, 2 << 20, "hugetlb")
        else:
            with pytest.raises(ConfigError, match="nr_hugepages"):
                memory.add(2 << 20, 2 << 20, "hugetlb")
        with pytest.raises(MemSlotError, match="2M"):
            memory.add(4 << 20, 4096, "hugetlb")


def test_nothing_leaks():
    def held():
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum(1 for _ in maps)

    for _ in range(3):
        before = held()
        for _ in range(50):
            with GuestMemory.of_size("1M") as memory:
                memory.add(16 << 20, mmap.PAGESIZE, "memfd")
                memory.write(0, b"x")
        after = held()
    assert after[0] == before[0]
    assert after[1] <= before[1] + 2


# --- units ------------------------------------------------------------------------------------------------------------


def test_sizes():
    assert [parse_size(s) for s in ("4096", "0x1000", "64K", "16M", "16MiB", "1.5G", 7)] == [
        4096,
        4096,
        65536,
        16 << 20,
        16 << 20,
        3 << 29,
        7,
    ]
    assert [parse_size(s) for s in ("100B", "2KB", "0x100B", "0xB", "0x1b", "0x10K", "0x10KB", "0x1GiB", "0xBB")] == [
        100,
        2048,
        0x100B,
        0xB,
        0x1B,
        16384,
        16384,
        1 << 30,
        0xBB,
    ]
    assert format_size(16 << 20) == "16M"
    assert format_size(4097) == "4097"
    for bad in ("", "M", "-1", "1.3", "12Q", "1e3"):
        with pytest.raises(ConfigError):
            parse_size(bad)
    assert parse_address("0x7c00") == 0x7C00
    for bad in ("", "-1", "x", str(1 << 64)):
        with pytest.raises(ConfigError):
            parse_address(bad)


def test_a_memfd_is_shared_with_who_has_its_fd():
    with GuestMemory.of_size("64K", "memfd") as memory:
        slot = memory.slots[0]
        other = mmap.mmap(slot.fd, slot.size)
        other[5:8] = b"abc"
        assert memory.read(5, 3) == b"abc"
        other.close()
    assert slot.fd == -1
