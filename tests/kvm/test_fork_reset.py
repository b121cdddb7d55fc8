"""Clones in one process, and resets to a checkpoint: nothing leaks from one to the other, nothing of what was done stays."""

import gc

import pytest

from pykvm import ConfigError, Machine, StateError, asm
from pykvm.units import PAGE_SIZE
from tests.conftest import TIMEOUT
from tests.kvm.states import copy, end, start, stop_at
from tests.kvm.test_leaks import held

# --- fork --------------------------------------------------------------------------------------------------------------

COUNTS = asm("1: inc dword ptr [0x200000]\n mov eax, [0x200000]\n out 0xf4, al\n jmp 1b", bits=64)


def test_a_fork_goes_on_by_itself():
    with Machine(COUNTS, mode="long", memory="4M") as parent:
        assert parent.run(TIMEOUT).exit_code == 1
        child = parent.fork()
        grandchild = child.fork()
        with child, grandchild:
            assert child.run(TIMEOUT).exit_code == 2
            assert child.run(TIMEOUT).exit_code == 3
            assert parent.memory.read_u32(0x200000) == 1
            assert grandchild.run(TIMEOUT).exit_code == 2
            parent.memory.write_u32(0x200000, 40)
            assert parent.run(TIMEOUT).exit_code == 41
            assert child.memory.read_u32(0x200000) == 3
            with parent.fork() as late:
                assert late.run(TIMEOUT).exit_code == 42


def test_forks_of_one_stop_share_their_memory():
    with Machine(COUNTS, mode="long", memory="4M") as parent:
        parent.run(TIMEOUT)
        with parent.fork():
            first = parent.shared
            with parent.fork() as again:
                assert parent.shared is first
                assert again.run(TIMEOUT).exit_code == 2
            parent.memory.write_u32(0x200000, 7)
            with parent.fork() as other:
                assert parent.shared is not first
                assert other.run(TIMEOUT).exit_code == 8
            kept = parent.shared
            parent.run(TIMEOUT)
            with parent.fork() as later:
                assert parent.shared is not kept
                assert later.run(TIMEOUT).exit_code == 9


def test_a_child_outlives_its_parent():
    with start("hello") as parent:
        stop_at(parent, 5)
        child = parent.fork()
    with child:
        assert end(child) == ("exit", 0, "Hello from long mode.\n")


@pytest.mark.parametrize("name", ["hello", "pic_pit", "ipi", "user_compute"])
def test_forks_of_gallery_guests(name):
    with start(name) as machine:
        assert stop_at(machine, 3)
        with machine.fork() as child:
            assert end(child)[:2] == ("exit", 0)
        assert end(machine)[:2] == ("exit", 0)


def test_clear_in_shared_memory():
    """Whole pages of anonymous memory are given back to the host; here that would bring the shared bytes back."""
    with Machine(COUNTS, mode="long", memory="4M") as parent:
        parent.run(TIMEOUT)
        with parent.fork() as child:
            for machine in (parent, child):
                machine.memory.clear(0x200000, 2 * PAGE_SIZE)
                assert machine.run(TIMEOUT).exit_code == 1


def test_forks_leak_nothing():
    def once():
        with Machine(COUNTS, mode="long", memory="4M") as parent:
            parent.run(TIMEOUT)
            for _ in range(3):
                parent.fork().close()
            parent.checkpoint()
            parent.run(TIMEOUT)
            parent.reset()

    once()
    gc.collect()
    before = held()
    for _ in range(3):
        once()
    gc.collect()
    assert held() == before


# --- reset -------------------------------------------------------------------------------------------------------------


def same(machine, state, memory):
    """Nothing differs from the state and the memory but clocks and counters."""
    paths = [d.path for d in state.diff(machine.save())]
    assert [p for p in paths if "].exits" not in p and not p.startswith(("vm.pit", "vm.pics"))] == []
    for slot, kept in zip(machine.memory.slots, memory.slots, strict=True):
        assert slot.map[:] == kept.map[:]


@pytest.mark.parametrize("name", ["hello", "user_compute", "mmio_rw", "echo", "page_fault", "exceptions", "pic_pit", "ipi", "smp_user"])
def test_a_guest_starts_over(name):
    with start(name) as machine:
        assert stop_at(machine, 3)
        machine.checkpoint()
        state, memory = machine.save(), copy(machine.memory)
        first = end(machine)
        for _ in range(2):
            machine.reset()
            same(machine, state, memory)
            assert end(machine) == first


def test_only_what_was_written_is_put_back():
    with Machine(COUNTS, mode="long", memory="4M") as machine:
        machine.run(TIMEOUT)
        checkpoint = machine.checkpoint()
        for _ in range(3):
            assert machine.run(TIMEOUT).exit_code == 2
            machine.reset()
            assert checkpoint.pages <= 6  # the counter's, and what paging marks as accessed
        machine.memory.write(0x300000, b"host")
        view = machine.memory.view(0x308000, 4)
        view[:] = 7
        machine.reset()
        assert machine.memory.read(0x300000, 4) == bytes(4)
        assert machine.memory.read(0x308000, 4) == bytes(4)


# Maps 0x400000 to itself or, through an entry that it writes, to 0x600000; reads through it either way.
REMAPS = """
    .set PD, 0x{pd:x}
    mov al, [0x400000]          # by the tables as they are
    out 0xe0, al
    mov rax, [PD + 8 * 2]
    add rax, 0x200000           # 2 MiB further on
    mov [PD + 8 * 2], rax
    mov rax, cr3
    mov cr3, rax
    mov al, [0x400000]
    out 0xf4, al
    hlt
"""


def page_directory(machine):
    """The gpa of the directory that maps the first GiB."""
    memory, cr3 = machine.memory, machine.vcpu.get_sregs().cr3
    pdpt = memory.read_u64(cr3 & ~0xFFF) & 0xFFFFFFFFFF000
    return memory.read_u64(pdpt) & 0xFFFFFFFFFF000


def test_page_tables_that_the_guest_has_changed():
    with Machine(b"\xf4", mode="long", memory="16M") as machine:
        directory = page_directory(machine)
    with Machine(asm(REMAPS.format(pd=directory), bits=64), mode="long", memory="16M") as machine:
        assert machine.memory.read_u64(directory + 16) & 0x80  # 2 MiB pages
        machine.memory.write_u8(0x400000, 4)
        machine.memory.write_u8(0x600000, 6)
        checkpoint = machine.checkpoint()
        for _ in range(4):
            assert machine.run(TIMEOUT).exit_code == 6
            machine.reset()
        assert checkpoint.flushes >= 4
        machine.memory.write_u8(0x400000, 5)
        machine.reset()
        assert machine.memory.read_u8(0x400000) == 4


# Other tables, at 0x700000, in pages that belong to none that are in use: changes an entry if it is told to, goes there and back.
EXCURSION = """
2:  mov byte ptr [0x703000], 1     # so that the first round sets all dirty bits
    cmp byte ptr [0x500000], 1
    jne 1f
    mov rax, 0x200000
    add [0x702000 + 8 * 2], rax
1:  mov rbx, cr3
    mov eax, 0x700000
    mov cr3, rax
    mov al, [0x400000]
    mov cr3, rbx
    out 0xf4, al
    jmp 2b
"""


@pytest.mark.shadow
@pytest.mark.parametrize("irqchip", ["none", "kernel"])
def test_page_tables_that_were_in_use_for_a_while(irqchip):
    """They are no tables at the checkpoint nor at the reset, yet what is remembered of them must go."""
    with Machine(asm(EXCURSION, bits=64), mode="long", memory="16M", irqchip=irqchip) as machine:
        memory = machine.memory
        directory = page_directory(machine)
        root = machine.vcpu.get_sregs().cr3 & ~0xFFF
        pdpt = memory.read_u64(root) & 0xFFFFFFFFFF000
        for here, there in ((root, 0x700000), (pdpt, 0x701000), (directory, 0x702000)):
            memory.write(there, memory.read(here, PAGE_SIZE))
        memory.write_u64(0x700000, memory.read_u64(root) - pdpt + 0x701000)
        memory.write_u64(0x701000, memory.read_u64(pdpt) - directory + 0x702000)
        memory.write_u8(0x400000, 4)
        memory.write_u8(0x600000, 6)
        assert machine.run(TIMEOUT).exit_code == 4  # which sets accessed and dirty bits
        machine.checkpoint()
        for change, seen in ((0, 4), (1, 6), (0, 4), (1, 6), (0, 4)):
            memory.write_u8(0x500000, change)
            assert machine.run(TIMEOUT).exit_code == seen
            machine.reset()


def test_page_tables_that_the_host_has_changed():
    """A user mode guest reads through an entry that the host moves: the reset undoes that, also where KVM keeps shadows of the tables."""
    code = asm("1: mov al, [0x400000]\n out 0xf4, al\n jmp 1b", bits=64)
    with Machine(code, mode="user", memory="16M") as machine:
        machine.memory.write_u8(0x400000, 4)
        machine.memory.write_u8(0x600000, 6)
        assert machine.run(TIMEOUT).exit_code == 4
        directory = page_directory(machine)
        entry = machine.memory.read_u64(directory + 16)
        machine.checkpoint()
        for _ in range(3):
            machine.memory.write_u64(directory + 16, entry + 0x200000)
            machine.run(TIMEOUT)
            machine.reset()
            assert machine.memory.read_u64(directory + 16) == entry
            assert machine.run(TIMEOUT).exit_code == 4
            machine.reset()


def test_what_cannot_be_put_back_is_refused():
    with Machine(COUNTS, mode="long", memory="4M") as machine:
        with pytest.raises(ConfigError, match="checkpoint"):
            machine.reset()
        machine.checkpoint()
        machine.checkpoint()  # another one
        slot = machine.add_memory(0xE0000000, PAGE_SIZE)
        with pytest.raises(StateError, match="slots"):
            machine.reset()
        assert slot.size == PAGE_SIZE
        from pykvm.state.dirtylog import DirtyLog

        with pytest.raises(ConfigError, match="logged"), DirtyLog(machine.vm, machine.memory):
            pass
