"""Nothing is left behind: fds, mappings, threads and memory, after many VMs and after constructions that fail halfway."""

import gc
import os
import resource
from contextlib import contextmanager

import pytest

import pykvm
from pykvm import GuestMemory, Hlt, Machine, System, asm, mode_named
from pykvm.devices import rom
from pykvm.errors import KvmError, MemSlotError, PykvmError
from tests.conftest import FEW, TIME_SCALE

TIMEOUT = 20 * TIME_SCALE
MANY = max(10, int(os.environ.get("PYKVM_LEAK_VMS", "10000")))
GROWTH = 4 << 20  # bytes of RSS, from the first tenth to the end
COUNTS = [max(10, FEW), pytest.param(MANY, marks=pytest.mark.slow)]


def held():
    """What this process holds: fds by name, lines of its memory map, threads."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        lines = len(maps.readlines())
    return {"fds": sorted(os.listdir("/proc/self/fd")), "mappings": lines, "threads": len(os.listdir("/proc/self/task"))}


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def bare():
    with System() as system, GuestMemory.of_size("64K") as ram, system.create_vm() as vm:
        vm.add_memory(ram)
        ram.write(0x1000, asm("hlt", bits=16))
        vcpu = vm.create_vcpu()
        mode_named("real").apply(vcpu, ram, 0x1000)
        assert vcpu.run(TIMEOUT) == Hlt()


def machine():
    with Machine("halt") as made:
        assert made.run(TIMEOUT).reason == "halted"


def dropped():
    """Nobody closes it: the collector does. (A machine is a cycle: its devices know it.)"""
    assert Machine("halt").run(TIMEOUT).reason == "halted"


@pytest.mark.parametrize("number", COUNTS)
@pytest.mark.parametrize("make", [bare, machine, dropped])
def test_many_in_one_process(make, number):
    for _ in range(10):  # what is made once: imports, caches, the kick signal
        make()
    before = held()
    first = 0
    for i in range(number):
        make()
        if i + 1 == number // 10:
            gc.collect()
            first = resident()
    after = held()
    # The allocators' own arenas come and go; what a machine left behind would be there a hundred times or more.
    assert abs(after.pop("mappings") - before.pop("mappings")) < 5
    assert after == before
    assert resident() - first < GROWTH


def test_many_vms_of_one_system(system):
    """And many at the same time."""
    with GuestMemory.of_size("64K") as ram:
        ram.write(0x1000, asm("hlt", bits=16))
        before = held()
        vms = []
        for _ in range(20):
            vm = system.create_vm()
            vms.append(vm)
            vm.add_memory(ram)
            mode_named("real").apply(vm.create_vcpu(), ram, 0x1000)
        for vm in vms:
            assert vm.vcpus[0].run(TIMEOUT) == Hlt()
        assert len(held()["fds"]) == len(before["fds"]) + 40
        for vm in vms:
            vm.close()
        assert held() == before


# --- constructions that fail ------------------------------------------------------------------------------------------


@contextmanager
def fds_left(number):
    """Let this process open ``number`` more fds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(number + 1)]
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("left", "error", "message"),
    [
        (0, pykvm.GuestImageError, "cannot be read: Too many open files"),
        (1, KvmError, "KVM_CREATE_VM: Too many open files"),
        (2, KvmError, "KVM_CREATE_VCPU: Too many open files"),
    ],
)
def test_machine_without_enough_fds(left, error, message):
    machine()
    before = held()
    with fds_left(left), pytest.raises(error, match=message):
        Machine("halt")
    assert held() == before
    machine()


def test_bare_objects_without_enough_fds():
    bare()
    before = held()
    with fds_left(0), pytest.raises(pykvm.KvmUnavailableError, match="Too many open files"):
        bare()
    with fds_left(1), pytest.raises(KvmError, match="KVM_CREATE_VM"):
        bare()
    with fds_left(2), pytest.raises(KvmError, match="KVM_CREATE_VCPU"):
        bare()
    with fds_left(0), pytest.raises(pykvm.ConfigError, match="Too many open files"):
        GuestMemory.of_size("64K", "memfd")
    assert held() == before


@pytest.mark.parametrize(
    "part", ["load", "Console", "Bus", "Uart16550", "Runner", "KeyboardController", "Rom", "System.get_supported_cpuid", "VCPU.set_sregs"]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_anywhere_in_machine_closes_all(part, error, monkeypatch):
    def fails(*_, **__):
        raise error("on purpose")

    owner, _, name = part.rpartition(".")
    with Machine("rom_write") as made:
        made.run(TIMEOUT)
    before = held()
    where = getattr(pykvm, owner) if owner else next(m for m in (pykvm.machine, pykvm.pc, pykvm.start, rom) if hasattr(m, name))
    monkeypatch.setattr(where, name, fails)
    with pytest.raises(error):
        Machine("rom_write")
    monkeypatch.undo()
    assert held() == before


@pytest.mark.parametrize("image", [b"", b"\x7fELF" + bytes(60), b"\x7fELF", b"\xf4" * (3 << 20), "no such guest", "/"])
def test_a_bad_image_leaves_nothing(image):
    machine()
    before = held()
    with pytest.raises(pykvm.GuestImageError):
        Machine(image, memory="2M")
    assert held() == before


def test_a_system_that_was_given_stays_open(system):
    with Machine("halt", system=system) as made:
        made.run(TIMEOUT)
    with pytest.raises(PykvmError):
        Machine("halt", memory="4K", system=system)
    assert system.check_extension("KVM_CAP_NR_MEMSLOTS")


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_an_overlapping_slot_leaves_nothing(backing, tmp_path):
    with Machine("halt") as made:
        before = held()
        slots = made.memory.slots
        with pytest.raises(MemSlotError, match="overlaps"):
            made.add_memory(0, 0x1000, backing=backing)
        (tmp_path / "short").write_bytes(bytes(100))
        with pytest.raises(pykvm.ConfigError, match="100 bytes"):
            made.add_memory(0xC0000000, 0x1000, backing=tmp_path / "short")
        assert (held(), made.memory.slots) == (before, slots)
        assert made.run(TIMEOUT).reason == "halted"


def test_a_slot_that_kvm_refuses_leaves_nothing():
    """The memory object sees no overlap, but KVM does: a slot that it was given behind the object's back."""
    with Machine("halt") as made:
        made.vm.set_user_memory_region(400, 0, 0xC0000000, 0x1000, made.memory.slots[0].hva)
        before = held()
        slots = made.memory.slots
        with pytest.raises(KvmError, match=r"KVM_SET_USER_MEMORY_REGION: File exists"):
            made.add_memory(0xC0000000, 0x1000)
        assert (held(), made.memory.slots) == (before, slots)
        made.add_memory(0xC0001000, 0x1000)
        assert made.run(TIMEOUT).reason == "halted"


def test_slots_that_come_and_go_leave_nothing():
    with Machine("halt") as made:
        before = held()
        for _ in range(100):
            slot = made.add_memory(0xC0000000, 0x10000, backing="memfd")
            made.vm.remove_slot(slot)
            made.memory.remove(slot)
        assert held() == before
        assert made.run(TIMEOUT).reason == "halted"
