"""What belongs to what: no object that a program still has may lead to memory, or to a fd, that is gone."""

import gc
import mmap
import os
import resource

import pytest

import pykvm
from pykvm import GuestCrash, GuestMemory, Machine, System
from tests.conftest import TIMEOUT

PAGE = 4096


def churn():
    """Whatever was freed is used again."""
    gc.collect()
    return [bytearray(b"\xee" * n) for n in (64, 512, PAGE, 2 * PAGE, 8 * PAGE) for _ in range(50)]


def first_exit():
    """An exit whose machine nobody has any more."""
    with System() as system, GuestMemory.of_size("64K") as ram, system.create_vm() as vm:
        vm.add_memory(ram)
        ram.write(0x1000, pykvm.asm("in al, 0x42", bits=16))
        vcpu = vm.create_vcpu()
        pykvm.mode_named("real").apply(vcpu, ram, 0x1000)
        return vcpu.run(TIMEOUT)


def test_an_exit_outlives_its_vcpu():
    exit = first_exit()
    kept = churn()
    with pytest.raises(pykvm.ConfigError, match="closed"):
        exit.reply(1)
    del kept


def test_an_array_keeps_its_structure():
    with System() as system, system.create_vm() as vm:
        vcpu = vm.create_vcpu()
        arrays = [vcpu.get_sregs().interrupt_bitmap for _ in range(50)]
        kept = churn()
        assert [list(a) for a in arrays] == [[0, 0, 0, 0]] * 50
        fpu = vcpu.get_fpu()
        fpu.xmm[3][0] = 7
        assert fpu.xmm[3][0] == 7
        assert len(fpu.xmm) == 16
        assert fpu.xmm[3] != fpu.xmm[4]
        del kept


def test_a_vcpu_alone_keeps_its_vm():
    def vcpu_only(system, ram):
        vm = system.create_vm()
        vm.add_memory(ram)
        return vm.create_vcpu()

    with System() as system, GuestMemory.of_size("64K") as ram:
        vcpu = vcpu_only(system, ram)
        ram.write(0x1000, pykvm.asm("hlt", bits=16))
        pykvm.mode_named("real").apply(vcpu, ram, 0x1000)
        gc.collect()
        assert vcpu.run(TIMEOUT) == pykvm.Hlt()
        before = len(os.listdir("/proc/self/fd"))
        del vcpu
        assert len(os.listdir("/proc/self/fd")) == before - 2


@pytest.mark.parametrize("how", ["dropped", "closed", "removed"])
def test_kvm_never_has_memory_that_is_gone(how, system):
    """The guest would see whatever the host maps there next."""
    with system.create_vm() as vm:
        ram = GuestMemory()
        slot = ram.add(0, 16 * PAGE)
        ram.write(0x1000, pykvm.asm("mov al, [0x2000]; out 0x42, al", bits=16))
        ram.write(0x2000, b"m")
        vm.add_memory(ram)
        vcpu = vm.create_vcpu()
        pykvm.mode_named("real").apply(vcpu, ram, 0x1000)
        if how == "closed":
            ram.close()
        elif how == "removed":
            ram.remove(slot)
        vm.memory = None
        del ram, slot
        gc.collect()
        others = [mmap.mmap(-1, 16 * PAGE) for _ in range(20)]
        for other in others:
            other[:] = b"w" * (16 * PAGE)
        assert vcpu.run(TIMEOUT) == pykvm.IoOut(0x42, 1, b"m")


def test_slot_numbers_come_back(system):
    with GuestMemory.of_size("64K") as ram, system.create_vm() as vm:
        vm.add_memory(ram)
        for _ in range(200):
            slot = ram.add(0x100000, PAGE)
            vm.add_slot(slot)
            vm.remove_slot(slot)
            ram.remove(slot)
        assert slot.id == 1
        with GuestMemory() as more:
            more.add(0x200000, PAGE)
            vm.add_memory(more)  # a second GuestMemory of the same VM
            assert sorted(vm.handle.slots) == [0, 1]


def test_moved_slots_are_let_go_of():
    with Machine("slot_remap") as machine:
        seen = []
        monitored = machine.move_slot
        machine.move_slot = lambda slot: seen.append((slot, monitored(slot))) or seen[-1][1]
        assert machine.run(TIMEOUT).exit_code == 0
        assert len(seen) == 3
        assert all(old.hva != new.hva and old.map.closed for old, new in seen)
        assert list(machine.vm.handle.slots.values()) == list(machine.memory.slots)


def test_close_in_a_device_says_what_to_do():
    with Machine(pykvm.asm("out 0x42, al; hlt", bits=16, org=0x7C00), mode="real", memory="64K") as machine:

        class Closer:
            def write(self, offset, size, value):
                machine.close()

        claimed = machine.add_device(Closer(), port=0x42)
        with pytest.raises(pykvm.ConfigError, match=r"stop\(\) the run"):
            machine.run(TIMEOUT)
        machine.remove_device(claimed)
        assert machine.run(TIMEOUT).reason == "halted"  # nothing was closed


def test_a_large_bss_costs_nothing(tmp_path):
    """Fresh memory is zero already: clearing it gives pages back instead of touching them."""
    with GuestMemory.of_size("1G") as ram:
        ram.write(0x100000, b"x" * PAGE)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        ram.clear(0x100010, (1 << 30) - 0x100010)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100
        assert ram.read(0x100000, 32) == b"x" * 16 + bytes(16)


@pytest.mark.parametrize("size", [300 << 20, 64 << 30])
def test_an_image_that_is_too_large_is_not_read(size, tmp_path):
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.truncate(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with pytest.raises(pykvm.GuestImageError, match="up to 256M"):
        Machine(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000


def test_a_folder_is_no_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "halt").mkdir()
    with Machine("halt") as machine:  # the gallery's
        assert machine.run(TIMEOUT).reason == "halted"


def test_compatibility_mode_is_explained():
    """32-bit code in long mode: RIP at an exit, and the explainer."""
    source = """
        push 0x08
        lea rax, [rip + there]
        push rax
        retfq
        .code32
there:  nop
        out 0x42, al
        hlt
    """
    code = pykvm.asm(source, bits=64, org=0x100000)
    with Machine(code, mode="long", memory="2M", strict=True) as machine:
        with pytest.raises(GuestCrash, match=r"0x42") as caught:
            machine.run(TIMEOUT)
        assert "compatibility mode" in caught.value.explanation
        assert machine.memory.read(machine.insn_rip(), 2) == b"\xe6\x42"


def test_port_f8_belongs_to_user_mode_only():
    with Machine(pykvm.asm("mov al, 1; out 0xf8, al; hlt", bits=16, org=0x7C00), mode="real", memory="64K") as machine:
        assert machine.run(TIMEOUT).reason == "halted"
