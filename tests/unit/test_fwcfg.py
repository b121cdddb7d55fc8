"""fw_cfg without KVM: the ports and DMA as QEMU's docs/specs/fw_cfg.rst has them, and what a hostile guest may try."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm import ConfigError, GuestMemory
from pykvm.devices.fwcfg import FwCfg

ACCESS = 0x1000  # where the tests put the access structure


@pytest.fixture
def ram():
    with GuestMemory.of_size("64K") as memory:
        memory.add(0x20000, 0x1000, readonly=True)
        yield memory


@pytest.fixture
def device(ram):
    return FwCfg(ram, cpus=3)


def item(device, selector, length):
    device.write(0, 2, selector)
    return bytes(device.read(1, 1) for _ in range(length))


def dma(device, control, length, address, at=ACCESS):
    """The control field afterwards."""
    device.memory.write(at, struct.pack(">IIQ", control, length, address))
    device.write(8, 4, int.from_bytes(at.to_bytes(4, "big"), "little"))
    return int.from_bytes(device.memory.read(at, 4), "big")


def test_items_through_the_port(device, ram):
    assert item(device, 0, 6) == b"QEMU\0\0"
    assert item(device, 1, 4) == b"\3\0\0\0"
    assert item(device, 3, 8) == ram.ram_size.to_bytes(8, "little")
    assert item(device, 5, 2) == item(device, 0xF, 2) == b"\3\0"
    assert item(device, 0x7777, 3) == b"\0\0\0"
    assert item(device, 0x4000, 4) == b"QEMU"  # the old write bit selects the same
    device.write(0, 2, 0)
    assert chr(device.read(0, 1)) == "Q"  # either port gives the next byte


def test_files_are_in_the_directory(device):
    device.add_file("opt/test/b", b"second")
    device.add_file("opt/test/a", b"first")
    device.add_file("opt/test/b", b"second, once more")
    directory = item(device, 0x19, 4 + 2 * 64)
    assert directory[:4] == b"\0\0\0\2"
    found = {}
    for at in (4, 68):
        size, selector, reserved, name = struct.unpack(">IHH56s", directory[at : at + 64])
        assert reserved == 0
        found[name.rstrip(b"\0").decode()] = item(device, selector, size)
    assert found == {"opt/test/a": b"first", "opt/test/b": b"second, once more"}
    assert list(found) == sorted(found)


@pytest.mark.parametrize("name", ["", "x" * 56, "a\0b"])
def test_names_that_cannot_be(device, name):
    with pytest.raises(ConfigError, match="1 to 55"):
        device.add_file(name, b"")


def test_dma_reads(device, ram):
    device.add_file("f", bytes(range(100)))
    ram.write(0x2000, b"\xff" * 200)
    assert dma(device, device.files["f"] << 16 | 8 | 2, 60, 0x2000) == 0
    assert ram.read(0x2000, 61) == bytes(range(60)) + b"\xff"
    assert dma(device, 4, 30, 0) == 0  # skip
    assert dma(device, 2, 20, 0x2000) == 0
    assert ram.read(0x2000, 21) == bytes(range(90, 100)) + bytes(10) + b"\x14"  # zeros behind the end
    assert dma(device, 2, 0, 1 << 60) == 0  # nothing goes nowhere


def test_dma_by_one_wide_write(device, ram):
    ram.write(ACCESS, struct.pack(">IIQ", 8 | 2, 4, 0x3000))
    device.write(4, 8, int.from_bytes(ACCESS.to_bytes(8, "big"), "little"))
    assert ram.read(0x3000, 4) == b"QEMU" and ram.read(ACCESS, 4) == bytes(4)


def test_the_high_half_counts_once(device, ram):
    device.write(4, 4, int.from_bytes((1).to_bytes(4, "big"), "little"))  # 4 GiB: nothing there
    ram.write(0x3000, b"none")
    assert dma(device, 8 | 2, 4, 0x3000) == 8 | 2  # not even looked at
    assert dma(device, 8 | 2, 4, 0x3000) == 0 and ram.read(0x3000, 4) == b"QEMU"


def test_the_address_register_reads_as_a_signature(device):
    assert device.read(4, 8).to_bytes(8, "little") == b"QEMU CFG"
    assert device.read(8, 4).to_bytes(4, "little") == b" CFG"


@pytest.mark.parametrize(
    ("control", "length", "address"),
    [(2, 4, 0x10000), (2, 0xFFFFFFFF, 0), (2, 4, 0xFFFE), (2, 4, (1 << 64) - 2), (2, 4, 0x20000), (2, 0x10001, 0), (16, 4, 0x2000)],
)
def test_dma_to_where_it_may_not_go_sets_the_error_bit(device, ram, control, length, address):
    before = ram.read(0x2000, 0x1000), ram.read(0x20000, 0x1000)
    assert dma(device, control, length, address) == 1
    assert (ram.read(0x2000, 0x1000), ram.read(0x20000, 0x1000)) == before


def test_a_structure_in_rom_or_nowhere_does_nothing(device, ram):
    ram.write(0x20000, struct.pack(">IIQ", 8 | 2, 4, 0x3000))
    for at in (0x20000, 0xFFF8, 0x8000_0000):
        device.write(8, 4, int.from_bytes(at.to_bytes(4, "big"), "little"))
    assert ram.read(0x3000, 4) == bytes(4)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, (1 << 64) - 1)), max_size=8),
    st.integers(0, 0x11000),
)
def test_any_dma_stays_in_ram(accesses, at):
    with GuestMemory.of_size("64K") as memory:
        memory.add(0x20000, 0x1000, readonly=True)
        device = FwCfg(memory)
        rom = memory.read(0x20000, 0x1000)
        for control, selector, length, address in accesses:
            if memory.is_writable(at, 16):
                result = dma(device, selector << 16 | control, length % 0x12000, address % 0x30000, at)
                if not address % 0x30000 < at + 16 <= address % 0x30000 + length % 0x12000 + 16:
                    assert result in (0, 1)
        assert memory.read(0x20000, 0x1000) == rom
