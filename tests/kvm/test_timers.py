"""Clocks and timers of the guest: what they cost in exits, and that they stand still while the machine is paused."""

import time

import pytest

import pykvm
from pykvm import Machine
from tests.conftest import TIME_SCALE, TIMEOUT, Running

READING = 0x100800  # where the guest writes; 8 bytes
PAUSE = 0.3 * TIME_SCALE
# A guest that writes its kvmclock's nanoseconds to READING again and again, and counts the times that it has gone back behind that.
CLOCK = f"""
    mov rax, 0x100900 + 1; xor edx, edx; mov ecx, 0x4b564d01; wrmsr     # MSR_KVM_SYSTEM_TIME_NEW
    sti
again:
    mov esi, 0x100900
    mov edi, [rsi]
    rdtsc; shl rdx, 32; or rax, rdx
    sub rax, [rsi + 8]
    mov cl, [rsi + 28]; test cl, cl; js 1f
    shl rax, cl; jmp 2f
1:  neg cl; shr rax, cl
2:  mov edx, [rsi + 24]; mul rdx; shrd rax, rdx, 32
    add rax, [rsi + 16]
    test edi, 1; jnz again
    cmp edi, [rsi]; jne again
    cmp rax, [{READING}]; jae 3f
    inc dword ptr [{READING} + 8]
3:  mov [{READING}], rax
    jmp again
"""
# A guest whose LAPIC timer ticks each millisecond, its handler counting at READING; it halts in between.
TICKS = f"""
    lea rax, [rip + on_tick]; mov ebx, 0x100400                         # an IDT's gate 0x20
    mov [rbx + 0x200], ax; mov dword ptr [rbx + 0x202], 0x8e000010; shr rax, 16; mov [rbx + 0x206], ax
    lidt [rip + idtr]
    mov ebx, 0xfee00000
    mov dword ptr [rbx + 0xf0], 0x1ff; mov dword ptr [rbx + 0x3e0], 0xb
    mov dword ptr [rbx + 0x320], 0x20020; mov dword ptr [rbx + 0x380], 1000000
1:  sti; hlt; jmp 1b
on_tick:
    inc dword ptr [{READING}]
    mov dword ptr [rbx + 0xb0], 0
    iretq
idtr: .word 0x20f; .quad 0x100400
"""


def flat(source, **options):
    return Machine(pykvm.asm(source, org=0x100000), **{"mode": "long", "memory": "2M", "irqchip": "kernel", **options})


def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


@pytest.mark.parametrize("name", ["lapic_timer", "pic_pit"])
def test_ticks_make_no_exits(name, loop):
    with Machine(name, loop=loop) as machine:
        result = machine.run(TIMEOUT)
        assert result.exits == {"IO": len(result.console) + 1}


def test_the_lapic_timer_needs_no_pic(loop):
    with Machine("lapic_timer", irqchip="split", loop=loop) as machine:
        assert machine.run(TIMEOUT).exit_code == 0


@pytest.mark.parametrize("irqchip", ["none", "kernel", "split"])
def test_kvmclock_without_an_irqchip_too(irqchip, loop):
    with Machine("kvmclock", irqchip=irqchip, loop=loop) as machine:
        assert machine.run(TIMEOUT).exit_code == 0


def test_waiting_for_a_timer_is_not_halting(loop):
    """The one-shot timer takes longer than the halted guests' watch needs to find one."""
    late = TICKS.replace("0x20020", "0x20").replace("1000000", "100000000").replace("1:  sti; hlt; jmp 1b", "sti; hlt; out 0xf4, al; hlt")
    with flat("xor eax, eax;" + late, loop=loop) as machine:
        result = machine.run(TIMEOUT)
        assert result.reason == "exit"
        assert machine.memory.read_u32(READING) == 1
    deaf = late.replace("sti; hlt; out", "cli; hlt; out")  # with interrupts masked no timer wakes it
    with flat(deaf, loop=loop) as machine:
        assert machine.run(TIMEOUT).reason == "halted"


def test_waiting_for_nothing_with_interrupts_on_is_not_halting(loop):
    with flat("1: sti; hlt; jmp 1b", loop=loop) as machine:
        assert machine.run(0.2 * TIME_SCALE).reason == "timeout"


def test_ticks_stop_while_paused(loop):
    with flat(TICKS, loop=loop) as machine, Running(machine) as run:
        for _ in range(3):
            at = machine.memory.read_u32(READING)
            until(lambda at=at: machine.memory.read_u32(READING) > at)
            machine.pause()
            at = machine.memory.read_u32(READING)
            time.sleep(0.05 * TIME_SCALE)
            assert machine.memory.read_u32(READING) == at
            machine.resume()
    assert run.result.reason == "stopped"


def first_reading(machine):
    """A moment, and a reading of the guest's clock that was taken after it."""
    machine.memory.write_u64(READING, 0)
    since = time.monotonic()
    until(lambda: machine.memory.read_u64(READING))
    return since, machine.memory.read_u64(READING)


def check_clock(machine, since, first, stood):
    """Now that the guest is not running: its clock has advanced, by no more than has passed less what it ``stood`` still."""
    passed = time.monotonic() - since
    last = machine.memory.read_u64(READING)
    assert last > first
    assert (last - first) / 1e9 <= (passed - stood) * 1.02 + PAUSE / 3
    assert machine.memory.read_u32(READING + 8) <= 1  # it never went back, but once when READING was set to 0 in between


def test_kvmclock_does_not_jump_over_a_pause(loop):
    with flat(CLOCK, loop=loop) as machine, Running(machine):
        since, first = first_reading(machine)
        machine.pause()
        paused, at = time.monotonic(), machine.memory.read_u64(READING)
        time.sleep(PAUSE)
        assert machine.memory.read_u64(READING) == at
        stood = time.monotonic() - paused
        machine.resume()
        until(lambda: machine.memory.read_u64(READING) > at)
        machine.pause()
        check_clock(machine, since, first, stood)


def test_kvmclock_does_not_jump_between_two_runs(loop):
    limit = PAUSE / 3
    with flat(CLOCK, loop=loop) as machine:
        since = time.monotonic()
        assert machine.run(limit).reason == "timeout"
        paused, first = time.monotonic(), machine.memory.read_u64(READING)
        time.sleep(PAUSE)
        stood = time.monotonic() - paused
        assert machine.run(limit).reason == "timeout"
        check_clock(machine, since, first, stood)


def test_kvmclock_does_not_jump_over_a_pause_that_began_before_the_run():
    with flat(CLOCK) as machine:
        since = time.monotonic()
        assert machine.run(PAUSE / 3).reason == "timeout"
        first = machine.memory.read_u64(READING)
        machine.pause()
        paused = time.monotonic()
        with Running(machine):
            time.sleep(PAUSE)
            stood = time.monotonic() - paused
            machine.resume()
            until(lambda: machine.memory.read_u64(READING) > first)
        check_clock(machine, since, first, stood)


def test_kvmclock_does_not_jump_over_a_pause_that_the_run_ends_in():
    with flat(CLOCK) as machine:
        with Running(machine):
            since, first = first_reading(machine)
            machine.pause()
            paused = time.monotonic()
            time.sleep(PAUSE)
        stood = time.monotonic() - paused
        machine.resume()
        assert machine.run(PAUSE / 3).reason == "timeout"
        check_clock(machine, since, first, stood)


def test_kvmclock_and_pausing_twice():
    with flat(CLOCK) as machine, Running(machine):
        since, first = first_reading(machine)
        machine.pause()
        paused, at = time.monotonic(), machine.memory.read_u64(READING)
        time.sleep(PAUSE)
        machine.pause()  # it is paused already
        stood = time.monotonic() - paused
        machine.resume()
        until(lambda: machine.memory.read_u64(READING) > at)
        machine.pause()
        check_clock(machine, since, first, stood)
