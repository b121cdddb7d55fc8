"""Walks through both levels, in real guests: what KVM_TRANSLATE says, why accesses fail, `pykvm walk`."""

import json

import pytest

import pykvm
from pykvm import Machine
from pykvm.cli import main
from pykvm.debug.translate import Translator, host_page
from pykvm.errors import ConfigError
from pykvm.x86.paging import RW, US, P, PageTableBuilder
from pykvm.x86.regs import CR4
from tests.conftest import TIMEOUT

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30
ODD = 0x123456789000


@pytest.fixture(scope="module")
def two_level():
    with Machine("walk_two_level") as machine:
        machine.run(TIMEOUT)
        yield machine


@pytest.fixture
def halted():
    with Machine(pykvm.asm("hlt", bits=64, org=0x100000), mode="long", memory="4M") as machine:
        yield machine


def tables(machine, base=0x200000):
    """Tables of our own, which the vCPU then uses."""
    builder = PageTableBuilder(machine.memory, base, 0x300000)
    builder.map(0, 0, 2 * M2)
    sregs = machine.vcpu.get_sregs()
    sregs.cr3 = builder.cr3
    machine.vcpu.set_sregs(sregs)
    return builder


def test_both_levels(two_level):
    found = two_level.walk(ODD + 0x123)
    assert [e.level for e in found.entries] == ["PML4", "PDPT", "PD", "PT"]
    assert [e.index for e in found.entries] == [36, 209, 179, 393]
    slot = two_level.memory.slots[0]
    assert (found.slot, found.hva) == (slot, slot.hva + found.gpa)
    assert two_level.memory.read_u32(found.gpa) == 0x600DF00D
    assert all(found.entry_hva(e) == slot.hva + e.gpa for e in found.entries)
    text = found.explain()
    assert "PML4[ 36]" in text and f"hva {found.hva:#x}" in text and "hpa" in text
    again = two_level.vcpu.walk(ODD + 0x123)
    assert (again.gpa, again.hva) == (found.gpa, found.hva)


def test_host_physical(two_level):
    """Two addresses in a page are as far apart in the host's memory, or the reason is said."""
    here, there = two_level.walk(ODD).host, two_level.walk(ODD + 0x800).host
    if here.hpa is None:
        assert "not permitted" in here.why
    else:
        assert there.hpa - here.hpa == 0x800 and here.hpa % K4 == 0
    assert host_page(0x1000).hpa is None  # nothing is mapped there
    assert "no host" in two_level.walk(0xD0000000).host.why


@pytest.mark.shadow
def test_what_kvm_translate_says(two_level):
    for mapping in two_level.vm.page_tables():
        for gva in (mapping.gva, mapping.gva + mapping.size // 2 + 5, mapping.gva + mapping.size - 1):
            assert two_level.vcpu.translate(gva) == two_level.walk(gva).gpa
    for gva in (0x1_0000_0000, ODD - 1, ODD + K4, 0xFFFF_FFFF_FFFF_F000):
        assert two_level.vcpu.translate(gva) is None
        assert two_level.walk(gva).gpa is None


@pytest.mark.parametrize("name", ["hello_real", "hello_prot", "hello", "user_compute"])
def test_every_mode(name):
    with Machine(name) as machine:
        for gva in (machine.boot.entry, machine.boot.entry + 3, 0x9000):
            found = machine.walk(gva)
            assert found.gpa == machine.vcpu.translate(gva)
            assert found.slot is machine.memory.slots[0]
        assert machine.walk(0).paging == {"long": "4-level", "user": "4-level"}.get(machine.info.mode, "off")


def test_access_rights(halted):
    builder = tables(halted)
    builder.map(G1, 0x100000, K4, page_size=K4, writable=False)
    builder.map(G1 + K4, 0x100000, K4, page_size=K4, user=True, nx=True)
    at, user_page = G1, G1 + K4
    walk = halted.walk
    assert not walk(at, "read").denied and not walk(at, "fetch").denied
    assert "R/W = 0 in the PT entry" in walk(at, "write").denied and walk(at, "write").error_code == 3
    assert "U/S = 0 in the PT entry" in walk(at, "read", user=True).denied and walk(at, "read", user=True).error_code == 5
    assert "NX = 1 in the PT entry" in walk(user_page, "fetch", user=True).denied
    assert walk(user_page, "fetch", user=True).error_code == 0x15
    assert not walk(user_page, "write", user=True).denied
    missing = walk(2 * G1, "write")
    assert "not present" in missing.denied and missing.error_code == 2
    assert "canonical" in walk(1 << 50, "read").denied and walk(1 << 50, "read").error_code is None
    with pytest.raises(ConfigError, match="read, write, fetch"):
        walk(at, "execute")


def test_smep_and_smap(halted):
    builder = tables(halted)
    builder.map(G1, 0x100000, K4, page_size=K4, user=True)
    sregs = halted.vcpu.get_sregs()
    sregs.cr4 |= CR4.SMEP | CR4.SMAP
    translator = Translator(halted.vcpu, halted.memory, sregs=sregs)
    assert "CR4.SMEP" in translator.walk(G1, "fetch").denied
    assert "CR4.SMAP" in translator.walk(G1, "write").denied
    assert not translator.walk(G1, "write", user=True).denied


def test_reserved_bits(halted):
    builder = tables(halted)
    builder.map(G1, 0x100000, K4, page_size=K4)
    entry = halted.walk(G1).entries[-1]
    halted.memory.write_u64(entry.gpa, 1 << 51 | P | RW)  # no CPU at hand has 52 address bits
    found = halted.walk(G1, "read")
    assert "reserved" in found.denied and "physical address bits" in found.denied
    assert found.error_code == 9
    assert halted.vcpu.translate(G1) is None


def test_large_pages(halted):
    builder = tables(halted)
    builder.map(1 << 40, 0, G1, page_size=G1)
    found = halted.walk((1 << 40) + 0x100123)
    assert (found.gpa, found.page_size) == (0x100123, G1)
    assert [(m.size, m.page_size) for m in halted.vm.page_tables()] == [(2 * M2, M2), (G1, G1)]


def test_page_tables_of_another_root(halted):
    other = PageTableBuilder(halted.memory, 0x240000, 0x300000)
    other.map(ODD, 0x5000, 3 * K4, page_size=K4)
    (mapping,) = halted.vm.page_tables(other.cr3)
    assert (mapping.gva, mapping.gpa, mapping.size) == (ODD, 0x5000, 3 * K4)


def test_a_device_is_named(two_level):
    found = two_level.walk(0xD0000010)
    assert (found.slot, found.hva, found.device) == (None, None, "scratch")
    assert "scratch" in found.explain()


def test_hostile_tables_are_cut(halted):
    for i in range(512):
        halted.memory.write_u64(0x200000 + 8 * i, 0x200000 | P | RW | US)
    found = halted.vm.page_tables(0x200000)
    assert found.cut and len(found) <= 1 << 16


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(capfd):
    assert main(["walk", "walk_two_level", f"{ODD + 5:#x}", "frame", "rsp", "--until", "port=0xf4", "--tables"]) == 0
    out, err = capfd.readouterr()
    assert "PDPT[209]" in out and "4K in 4K pages" in out
    assert "at port=0xf4" in err


def test_command_json(capfd):
    assert main(["walk", "hello", "puts", "--access", "write", "--user", "--json"]) == 1
    (found,) = json.loads(capfd.readouterr().out)["walks"]
    assert "U/S = 0" in found["denied"] and found["error_code"] == 7
    assert found["entries"][0]["level"] == "PML4" and "P" in found["entries"][0]["bits"]
    assert found["hva"] > 0


def test_command_stops_at_a_symbol(capfd):
    assert main(["walk", "hello", "--at", "puts", "rip"]) == 0
    out, err = capfd.readouterr()
    with Machine("hello") as machine:
        assert f"gva {machine.symbols().address('puts'):#x}" in out
    assert "at puts" in err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "no address"),
        (["nosuch"], "no symbol"),
        (["put"], "did you mean puts"),
        (["0x10000000000000000"], "64-bit"),
        (["0", "--at", "puts", "--until", "hlt"], "one place"),
        (["0", "--until", "nosuch=1"], "unknown key"),
        (["0", "--vcpu", "7"], "vCPUs 0 to 0"),
    ],
)
def test_command_says_what_is_wrong(capfd, words, why):
    assert main(["walk", "hello", *words]) == 64
    assert why in capfd.readouterr().err
