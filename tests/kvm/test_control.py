"""Run control: steps, breakpoints, watchpoints, the same on every host whatever its KVM_SET_GUEST_DEBUG can do (pykvm/debug/control.py)."""

from threading import Thread

import pytest

import pykvm
from pykvm import ConfigError, GuestMemoryError, Machine
from pykvm.debug.control import Control
from tests.conftest import TIMEOUT

MODES = {"real": 16, "protected": 32, "long": 64, "user": 64}


def snippet(source, mode, **options):
    """Control of a machine for a few instructions of assembly, and where they start."""
    org = 0x7C00 if mode == "real" else 0x100000
    machine = Machine(pykvm.asm(source, bits=MODES[mode], org=org), mode=mode, memory="2M", **options)
    return machine, Control(machine), org


def length(source, mode):
    return len(pykvm.asm(source, bits=MODES[mode]))


def at(machine, name):
    found = machine.symbols().address(name)
    assert found is not None
    return found


# --- steps ------------------------------------------------------------------------------------------------------------

WAYS = "xor eax, eax; jz 1f; ud2; 1: mov ecx, 2; 2: loop 2b; call 3f; jmp 4f; 3: ret; 4: out 0x90, al; in al, 0x90; inc eax; nop"


@pytest.mark.parametrize("mode", MODES)
def test_steps_follow_branches(mode):
    """Each instruction once, LOOP to itself too, an access to a port that nobody claims as one step."""
    machine, control, start = snippet(WAYS, mode)
    with machine:
        text = "xor eax, eax; jz .+4; ud2; mov ecx, 2; loop .; call .+9; jmp .+3; ret; out 0x90, al; in al, 0x90; inc eax"
        parts = text.split("; ")
        offsets = [start]
        for part in parts:
            offsets.append(offsets[-1] + length(part, mode))
        xor, jz, _, mov, loop, call, jmp, ret, out, in_, inc, nop = offsets
        seen = [xor] + [control.step(timeout=TIMEOUT).rip for _ in range(11)]
        assert [hex(s) for s in seen] == [hex(s) for s in (xor, jz, mov, loop, loop, call, ret, jmp, out, in_, inc, nop)]
        assert control.get("rax") & 0xFF == 0  # IN gave 0xff, and INC has made it 0


def test_a_step_into_a_handler_and_back():
    """An exception is one step, to the first instruction of its handler; IRETQ leads where the handler has said."""
    with Machine("page_fault") as machine:
        control = Control(machine)
        handler, after = at(machine, "handler"), at(machine, "after_read")
        seen = [control.step(timeout=TIMEOUT).rip for _ in range(40)]
        assert handler in seen
        assert seen[seen.index(handler) + 1] == handler + 1  # pop rax
        assert after in seen
        stopped = control.cont(TIMEOUT)
        assert (stopped.reason, stopped.code) == ("exit", 0)
        assert machine.console.text == "two page faults, both as expected\n"


@pytest.mark.parametrize("mode", MODES)
def test_many_steps_are_as_many_single_ones(mode):
    machine, control, _ = snippet(WAYS, mode)
    with machine:
        seen = [control.step(timeout=TIMEOUT).rip for _ in range(11)]
    for count in (3, 5):
        machine, control, _ = snippet(WAYS, mode)
        with machine:
            got = [control.step(timeout=TIMEOUT, count=count).rip for _ in range(11 // count)]
            assert got == seen[count - 1 :: count]


def test_many_steps_go_through_handlers_and_devices():
    with Machine("page_fault") as machine:
        control = Control(machine)
        seen = [control.step(timeout=TIMEOUT).rip for _ in range(48)]
    with Machine("page_fault") as machine:
        control = Control(machine)
        assert [control.step(timeout=TIMEOUT, count=6).rip for _ in range(8)] == seen[5::6]
        stopped = control.step(timeout=TIMEOUT, count=1 << 40)
        assert (stopped.reason, stopped.code) == ("exit", 0)
        assert machine.console.text == "two page faults, both as expected\n"


def test_many_steps_see_a_handler_that_comes_to_be():
    """The IDT is written by plain moves; the very next instruction faults."""
    source = """
        lea rax, [rip + handler]
        lidt [rip + pointer]
        mov edi, 0x180000 + 6 * 16
        mov [rdi], ax
        mov dword ptr [rdi + 2], 0x8e000010
        shr rax, 16
        mov [rdi + 6], ax
        mov ecx, 1
        ud2
        mov al, 1
        out 0xf4, al
    handler:
        mov al, 7
        out 0xf4, al
        .balign 16
    pointer: .word 0xfff
        .quad 0x180000
    """
    machine, control, _ = snippet(source, "long")
    with machine:
        stopped = control.step(timeout=TIMEOUT, count=9)
        assert machine.memory.read(stopped.rip, 4) == b"\xb0\x07\xe6\xf4"
        stopped = control.step(timeout=TIMEOUT, count=100)
        assert (stopped.reason, stopped.code) == ("exit", 7)


def test_many_steps_end_where_they_are_told():
    source = "mov ecx, 12; 1: inc rax; dec ecx; jnz 1b; nop; mov ebx, 0xd0200000; mov [rbx], eax; mov al, 3; out 0xf4, al"
    machine, control, start = snippet(source, "long")
    with machine:
        inside = (start + 5, start + 12)
        stopped = control.step(timeout=TIMEOUT, count=4)
        assert stopped.rip == start + 5
        stopped = control.step(timeout=TIMEOUT, count=1 << 40, within=inside)
        assert (stopped.reason, stopped.rip, control.get("rax")) == ("step", start + 12, 12)
    machine, control, start = snippet(source, "long")
    with machine:
        control.add_breakpoint(start + 10)
        for i in range(1, 4):
            stopped = control.step(timeout=TIMEOUT, count=1000)
            assert (stopped.reason, stopped.rip, control.get("rax")) == ("breakpoint", start + 10, i)
        control.detach()
        stopped = control.step(timeout=TIMEOUT, count=1 << 40)
        assert (stopped.reason, stopped.code) == ("exit", 3)
        assert machine.bus.unclaimed == {("mmio", 0xD0200000, 4, True): 1}


def test_many_steps_are_interrupted():
    machine, control, _ = snippet("1: inc rax; jmp 1b", "long")
    with machine:
        assert control.step(timeout=0.05, count=1 << 60).reason == "timeout"
        stopped = []
        thread = Thread(target=lambda: stopped.append(control.step(count=1 << 60)))
        thread.start()
        while not control.interrupt():
            pass
        thread.join(TIMEOUT)
        assert [s.reason for s in stopped] == ["interrupted"]


def test_a_step_of_mmio_and_of_hlt():
    machine, control, start = snippet("mov ebx, 0xd0200000; mov [rbx], eax; mov eax, [rbx]; hlt; nop", "long")
    with machine:
        seen = [control.step(timeout=TIMEOUT) for _ in range(4)]
        assert [s.rip - start for s in seen] == [5, 7, 9, 10]
        assert [s.reason for s in seen] == ["step", "step", "step", "halted"]
        assert control.get("rax") == 0xFFFFFFFF


def test_steps_to_cpl3_and_back():
    with Machine("ring3") as machine:
        control = Control(machine)
        levels = set()
        for _ in range(80):
            stopped = control.step(timeout=TIMEOUT)
            assert stopped.reason == "step"
            levels.add(control.view().cpl)
        assert levels == {0, 3}
        assert control.cont(TIMEOUT).code == 0


# --- breakpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_breakpoint(mode, hardware):
    """Before the instruction, each time round; the guest's memory shows nothing of it, and its ports hear nothing."""
    source = "mov dx, 0xf4; mov ecx, 3; 1: inc eax; dec ecx; jnz 1b; mov al, 7; out dx, al"
    machine, control, start = snippet(source, mode)
    with machine:
        where = start + length("mov dx, 0xf4; mov ecx, 3", mode)
        before = machine.memory.read(start, 32)
        control.add_breakpoint(where, hardware=hardware)
        for i in range(3):
            stopped = control.cont(TIMEOUT)
            assert (stopped.reason, stopped.rip) == ("breakpoint", where)
            assert (control.get("rax"), control.get("rcx")) == (i, 3 - i)
            assert machine.memory.read(start, 32) == before
        control.remove_breakpoint(where)
        stopped = control.cont(TIMEOUT)
        assert (stopped.reason, stopped.code) == ("exit", 7)
        assert not machine.bus.unclaimed


@pytest.mark.parametrize("access", ["read", "access"])
def test_watchpoints_for_reads(access):
    """After the instruction that has read there, or written, whichever way this host sees it; what only computes an address is none."""
    source = """
        mov edi, 0x180000
        lea rax, [rdi]
        mov dword ptr [rdi + 64], 1
        mov ebx, [rdi]
    one:
        push rbx
        cmp dword ptr [rdi - 4], 5
        add qword ptr [rdi - 4], 0
    two:
        mov rsp, rdi
        pop rax
    three:
        mov al, 0
        out 0xf4, al
    """
    machine, control, start = snippet(source, "long")
    with machine:
        code = machine.memory.read(start, 64)
        places = [start + code.index(after) for after in (b"\x53", b"\x48\x89\xfc", b"\xb0\x00")]
        control.add_watchpoint(0x180000, 4, access)
        seen = []
        while (stopped := control.cont(TIMEOUT)).reason == "watchpoint":
            seen.append(stopped.rip)
            assert stopped.watchpoint.access == access
        assert (stopped.reason, stopped.code) == ("exit", 0)
        assert seen == places


def test_breakpoints_on_neighbours_and_on_out():
    machine, control, start = snippet("mov al, 'x'; mov dx, 0x3f8; out dx, al; nop; out 0xf4, al", "long")
    with machine:
        out = start + length("mov al, 'x'; mov dx, 0x3f8", "long")
        for where in (out, out + 1, out + 2):
            control.add_breakpoint(where)
        assert [control.cont(TIMEOUT).rip for _ in range(3)] == [out, out + 1, out + 2]
        assert control.cont(TIMEOUT).reason == "exit"
        assert machine.console.text == "x"


def test_breakpoints_where_there_is_nothing():
    machine, control, _ = snippet("nop", "long")
    with machine:
        with pytest.raises(ConfigError, match="no breakpoint at"):
            control.remove_breakpoint(0x100000)
        with pytest.raises(ConfigError, match="unknown register 'raxx'; did you mean rax"):
            control.get("raxx")
        with pytest.raises(ConfigError, match=r"gva 0x5000000000: the .* entry is not present"):
            control.read(0x5000000000, 1)
        with pytest.raises(GuestMemoryError):
            control.read_physical(0x5000000, 1)


# --- watchpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["protected", "user"])
def test_watchpoint(mode):
    """After the instruction that has written, by whatever this host has for it."""
    machine, control, start = snippet("mov eax, 5; mov dword ptr [0x180000], eax; nop; mov ebx, 0x180002; mov byte ptr [ebx], 1; nop", mode)
    with machine:
        control.add_watchpoint(0x180000, 4)
        stopped = control.cont(TIMEOUT)
        assert (stopped.reason, stopped.old, stopped.new) == ("watchpoint", bytes(4), b"\5\0\0\0")
        assert stopped.rip == start + length("mov eax, 5; mov dword ptr [0x180000], eax", mode)
        assert control.cont(TIMEOUT).new == b"\5\0\1\0"


# --- memory, registers, going on --------------------------------------------------------------------------------------


def test_edited_code_runs():
    """At CPL3 too, where the pvm host runs code natively from a shadow of the guest's page tables."""
    machine, control, start = snippet("1: nop; jmp 1b; nop", "user")
    with machine:
        assert control.cont(0.05).reason == "timeout"
        control.write(start, pykvm.asm("mov al, 9; out 0xf4, al", bits=64, org=start))
        control.set("rip", start)
        assert control.cont(TIMEOUT).code == 9


def test_edited_page_tables_hold():
    """The host maps a page of the guest's elsewhere: the guest reads the other one from then on."""
    source = "mov rbx, 0x180000; mov al, [rbx]; out 0x90, al; mov al, [rbx]; out 0xf4, al"
    machine, control, start = snippet(source, "user")
    with machine:
        machine.memory.write(0x180000, b"\1")
        machine.memory.write(0x181000, b"\2")
        control.add_breakpoint(start + length("mov rbx, 0x180000; mov al, [rbx]; out 0x90, al", "user"))
        assert control.cont(TIMEOUT).reason == "breakpoint"
        entry = control.view().walk(0x180000).entries[-1]
        assert entry.level == "PT"
        control.write_physical(entry.gpa, (entry.value + 0x1000).to_bytes(8, "little"))
        assert control.cont(TIMEOUT).code == 2


def test_registers():
    machine, control, _ = snippet("mov eax, 0x1234; movd xmm3, eax; fld1; out 0xf4, al", "user")
    with machine:
        control.set("xmm5", 1 << 127 | 9)
        assert control.cont(TIMEOUT).reason == "exit"
        assert (control.get("xmm3"), control.get("xmm5")) == (0x1234, 1 << 127 | 9)
        assert control.get("st0") == 0x3FFF8000000000000000
        assert control.get("ftag") == 0x3FFF
        control.set("rbx", 77)
        assert control.get("rbx") == 77
        assert control.get("mxcsr") == 0x1F80


def test_interrupt_from_another_thread():
    machine, control, start = snippet("sti; 1: jmp 1b", "long")
    with machine:
        assert not control.interrupt()  # nothing runs
        stops = []
        thread = Thread(target=lambda: stops.append(control.cont(TIMEOUT)))
        thread.start()
        while not control.interrupt():
            pass
        thread.join()
        assert stops[0].reason == "interrupted"
        assert control.step(timeout=TIMEOUT).rip == start + 1


def test_two_vcpus_stop_together():
    with Machine("spinlock") as machine:
        control = Control(machine)
        with pytest.raises(ConfigError, match="waits for INIT and SIPI"):
            control.step(1)
        count = at(machine, "count")
        control.add_breakpoint(count)
        cpus = {control.cont(TIMEOUT).cpu, control.cont(TIMEOUT).cpu}
        assert cpus == {0, 1}
        control.remove_breakpoint(count)
        before = control.get("rip", 0)
        control.step(1, TIMEOUT)
        assert control.get("rip", 0) == before
        assert control.cont(TIMEOUT).code == 0
        assert machine.console.text.startswith("with the lock 4000 of 4000")


def test_a_crash_is_explained():
    with Machine("triple_fault") as machine:
        control = Control(machine)
        stopped = control.cont(TIMEOUT)
        assert stopped.reason == "crash"
        assert "triple fault" in control.explain(stopped)
