"""The dirty log of a real guest, and of its host, page by page."""

import pytest

import pykvm
from pykvm.state.dirtylog import DirtyLog
from pykvm.vm import VM

LOOP = """
        mov rdi, 0x800000
next:   mov [rdi], al
        add rdi, 0x2000             # every other page, eight of them
        cmp rdi, 0x810000
        jb next
        out 0xf4, al
"""
GUESTS = list(range(0x800, 0x810, 2))  # the pages it writes


@pytest.fixture
def machine():
    with pykvm.Machine(pykvm.asm(LOOP, bits=64, org=0x100000), mode="long", memory="16M", entry=0x100000) as machine:
        yield machine


def drain(log):
    """The pages that the log gives out, less the guest's page tables, whose accessed bits the CPU sets, and its code: with EPT or NPT, KVM
    maps a page writable when the guest first reads or executes it, and counts it as written then."""
    log.look()
    pages = []
    for slot, bitmap, first, end in log.chunks():
        pages += [slot.gpa // 4096 + p for p in range(first, end) if int(bitmap[p // 64]) >> p % 64 & 1]
    return [page for page in pages if page > 0x100]


@pytest.mark.parametrize("manual", [True, False])
def test_what_guest_and_host_write(machine, monkeypatch, manual):
    if not manual:
        asked = VM.check_extension
        monkeypatch.setattr(VM, "check_extension", lambda vm, cap: 0 if "MANUAL_DIRTY" in cap else asked(vm, cap))
    elif not machine.vm.check_extension("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"):
        pytest.skip("this host's KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    for _ in range(2):  # the second log starts afresh
        with DirtyLog(machine.vm, machine.memory) as log:
            assert log.manual == manual
            assert log.look() == 4096  # at first, all are
            assert drain(log) == list(range(0x101, 4096))
            assert log.look() == 0
            machine.memory.write(0x200FFF, b"ab")
            view = machine.memory.view(0x700000, 1)
            assert machine.run(timeout=5).exit_code == 0
            restart(machine)
            assert drain(log) == [0x200, 0x201, 0x700, *GUESTS]
            assert drain(log) == [0x700]  # the view is still there
            del view
            assert drain(log) == [0x700]  # what it wrote before it went
            assert log.look() == 0
            assert machine.run(timeout=5).exit_code == 0
            restart(machine)
            assert drain(log) == GUESTS


def test_pages_stay_dirty_until_they_are_given_out(machine):
    with DirtyLog(machine.vm, machine.memory) as log:
        drain(log)
        machine.run(timeout=5)
        assert log.look() == log.look() >= len(GUESTS)
        assert drain(log) == GUESTS


def restart(machine):
    regs = machine.vcpu.get_regs()
    regs.rip = 0x100000
    machine.vcpu.set_regs(regs)


def test_slots_that_come_go_and_move(machine):
    with DirtyLog(machine.vm, machine.memory) as log:
        drain(log)
        assert log.look() == 0
        machine.move_slot(machine.memory.slots[0])
        assert log.look() == 4096  # other host memory, of which nothing is known
        drain(log)
        machine.run(timeout=5)
        restart(machine)
        machine.memory.write(0x300000, b"x")
        assert drain(log) == sorted([*GUESTS, 0x300])
        slot = machine.add_memory(0x10000000, 0x3000)
        assert log.look() == 3
        assert drain(log) == [0x10000, 0x10001, 0x10002]
        machine.memory.write(0x10001000, b"x")
        assert drain(log) == [0x10001]
        machine.memory.write(0x10001000, b"x")
        machine.vm.remove_slot(slot)
        machine.memory.remove(slot)
        assert log.look() == 0


def test_the_vm_goes_first():
    machine = pykvm.Machine(pykvm.asm(LOOP, bits=64, org=0x100000), mode="long", memory="16M", entry=0x100000)
    with DirtyLog(machine.vm, machine.memory) as log:
        drain(log)
        machine.close()


def test_one_log_at_a_time(machine):
    with DirtyLog(machine.vm, machine.memory) as log:
        drain(log)
        with pytest.raises(pykvm.ConfigError, match="logged already"), DirtyLog(machine.vm, machine.memory):
            pass
        with pytest.raises(pykvm.ConfigError, match="logged already"):
            machine.checkpoint()
        machine.memory.write(0x300000, b"x")
        assert drain(log) == [0x300]  # the first one goes on
    machine.checkpoint()
    with pytest.raises(pykvm.ConfigError, match="the machine has a checkpoint"), DirtyLog(machine.vm, machine.memory):
        pass
    machine.memory.write(0x300000, b"y")
    machine.reset()
    assert machine.memory.read(0x300000, 1) == b"x"


def test_it_needs_its_slots(machine):
    slot = machine.memory.slots[0]
    with pytest.raises(pykvm.ConfigError, match="none of this VM's"):
        machine.vm.log_dirty_pages(pykvm.GuestMemory.of_size("64K").slots[0])
    with pytest.raises(pykvm.KvmError, match="KVM_GET_DIRTY_LOG"):
        machine.vm.get_dirty_log(slot, bytearray(512))  # no log is kept
