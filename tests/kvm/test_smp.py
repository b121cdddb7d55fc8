"""Several vCPUs: started, paused, kicked, stopped and found halted as one; whatever ends one ends all, and nothing is left behind."""

import gc
import os
import signal
import threading
import time

import pytest

import pykvm
from pykvm import GuestCrash, Machine
from tests.conftest import FEW, TIME_SCALE, TIMEOUT, Running

AP_PAGE = 0x7000
COUNTERS = 0x8000  # of vCPU 0 and vCPU 1, four bytes each
START = """
    mov edi, 0xfee00000
    mov dword ptr [edi + 0xf0], 0x1ff       # the APIC is enabled
    mov dword ptr [edi + 0x300], 0xc4500    # INIT to all others
    mov dword ptr [edi + 0x300], 0xc4607    # start-up IPI, page 0x7000
"""
COUNT = f"sti; 9: inc dword ptr [{COUNTERS}]; jmp 9b"  # interrupts on: see probe.interruptible_with_if_clear()
AP_COUNT = f"mov bx, {COUNTERS}; sti; 9: inc dword ptr [bx + 4]; jmp 9b"
SPIN = "sti; 9: pause; jmp 9b"


def smp(bsp, ap, *, start=START, **options):
    """vCPU 0 in flat protected mode starts the others, which run ``ap`` in real mode at AP_PAGE."""
    options = {"mode": "protected", "memory": "2M", "cpus": 2, **options}
    machine = Machine(pykvm.asm(start + bsp, bits=32, org=0x100000), **options)
    machine.memory.write(AP_PAGE, pykvm.asm(ap, bits=16))
    return machine


def counters(machine):
    return machine.memory.read_u32(COUNTERS), machine.memory.read_u32(COUNTERS + 4)


def until(condition):
    """Wait for another thread's doing."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


def both_move(machine):
    before = counters(machine)
    until(lambda: all(now != then for now, then in zip(counters(machine), before, strict=True)))


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_all_vcpus_start(irqchip, loop):
    with smp(
        "sti; 1: pause; cmp dword ptr [0x8000], 3; jne 1b; mov al, 5; out 0xf4, al",
        "mov bx, 0x8000; lock inc dword ptr [bx]; 1: hlt; jmp 1b",
        cpus=4,
        irqchip=irqchip,
        loop=loop,
    ) as machine:
        result = machine.run(TIMEOUT)
        assert (result.reason, result.exit_code) == ("exit", 5)
        assert result.exits == {"IO": 1}


@pytest.mark.parametrize("name", ["sipi", "ipi", "spinlock", "smp_user"])
def test_the_gallery_with_a_split_irqchip(name, loop):
    with Machine(name, irqchip="split", loop=loop) as machine:
        result = machine.run(TIMEOUT)
        assert result.exit_code == 0
        assert result.exits == {"IO": len(result.console) + 1}


def test_what_all_print_arrives(loop):
    """Devices are asked by one vCPU at a time."""
    write = "mov ecx, 200; 1: mov al, '{0}'; out 0xe9, al; mov dx, 0x3f8; out dx, al; loop 1b; "
    done = f"sti; 1: pause; cmp dword ptr [{COUNTERS}], 0; je 1b; out 0xf4, al"
    with smp(
        write.format("a") + done, write.format("b") + f"mov bx, {COUNTERS}; mov dword ptr [bx], 1; 1: hlt; jmp 1b", loop=loop
    ) as machine:
        result = machine.run(TIMEOUT)
        assert sorted(result.console) == ["a"] * 400 + ["b"] * 400
        assert result.exits == {"IO": 801}


# --- halted -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_cli_hlt_ends_as_halted(irqchip, cpus, loop):
    """HLT does not exit with an in-kernel APIC; vCPUs that wait for INIT are idle too."""
    with Machine(pykvm.asm("cli; hlt", bits=16), mode="real", entry=0, memory="64K", cpus=cpus, irqchip=irqchip, loop=loop) as machine:
        result = machine.run(TIMEOUT)
        assert (result.reason, result.exit_code) == ("halted", 0)
        assert "HLT" not in result.exits


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_all_have_to_halt(irqchip, loop):
    with smp("1: hlt; jmp 1b", "cli; 1: hlt; jmp 1b", irqchip=irqchip, loop=loop) as machine:
        assert machine.run(TIMEOUT).reason == "halted"
    for bsp, ap in [("1: hlt; jmp 1b", AP_COUNT), (COUNT, "1: hlt; jmp 1b")]:
        with smp(bsp, ap, irqchip=irqchip, loop=loop) as machine:
            assert machine.run(0.2 * TIME_SCALE).reason == "timeout"
            assert any(counters(machine))


# --- pausing ----------------------------------------------------------------------------------------------------------


def test_nothing_moves_while_paused(loop):
    with smp(COUNT, AP_COUNT, loop=loop) as machine, Running(machine) as run:
        for _ in range(3):
            both_move(machine)
            machine.pause()
            at = counters(machine)
            time.sleep(0.05 * TIME_SCALE)
            assert counters(machine) == at
            assert all(vcpu.get_mp_state() == 0 for vcpu in machine.vcpus)  # and who paused may look at the vCPUs
            machine.resume()
        both_move(machine)
    assert run.result.reason == "stopped"


@pytest.mark.parametrize("cpus", [1, 2])
def test_the_time_limit_waits_while_paused(cpus, loop):
    limit = 0.1 * TIME_SCALE
    with smp(COUNT, AP_COUNT, cpus=cpus, irqchip="kernel", loop=loop) as machine:
        machine.pause()
        with Running(machine, limit) as run:
            time.sleep(3 * limit)
            assert run.thread.is_alive()
            assert counters(machine) == (0, 0)
            machine.resume()
            run.thread.join(TIMEOUT)
        assert run.result.reason == "timeout"
        assert counters(machine)[0] > 0


def test_stop_ends_a_paused_run(loop):
    with smp(COUNT, AP_COUNT, loop=loop) as machine:
        with Running(machine) as run:
            both_move(machine)
            machine.pause()
            at = counters(machine)
            machine.stop("enough")
        assert run.result.reason == "enough"
        assert counters(machine) == at
        machine.resume()
        with Running(machine) as run:
            both_move(machine)
        assert run.result.reason == "stopped"


def test_a_stop_that_the_run_outruns_does_not_end_the_next_one():
    """stop() goes from vCPU to vCPU; the run may end before it has come to the last."""
    with smp(COUNT, AP_COUNT) as machine:
        last = machine.runners[-1]
        stop = last.stop

        def late(*arguments):
            if arguments:  # machine.stop(), not what ends the others
                time.sleep(0.1 * TIME_SCALE)
            stop(*arguments)

        last.stop = late
        for reason in ("first", "second"):
            with Running(machine) as run:
                both_move(machine)
                machine.stop(reason)
            assert run.result.reason == reason


def test_a_device_cannot_pause_its_machine():
    class Pauses:
        def write(self, offset, size, value):
            machine.pause()

    with smp(COUNT, "mov dx, 0x300; out dx, al") as machine:
        machine.add_device(Pauses(), port=0x300)
        with pytest.raises(pykvm.ConfigError, match="another thread"):
            machine.run(TIMEOUT)


# --- kicked, stopped, crashed -----------------------------------------------------------------------------------------


def test_a_kick_of_all_ends_nothing(loop):
    with smp(COUNT, AP_COUNT, loop=loop) as machine, Running(machine) as run:
        for _ in range(20):
            both_move(machine)
            for vcpu in machine.vcpus:
                vcpu.kick()
        both_move(machine)
        assert run.thread.is_alive()
    assert run.result.reason == "stopped"


def test_time_limit_and_on_again(loop):
    with smp(COUNT, AP_COUNT, loop=loop) as machine:
        for _ in range(3):
            at = counters(machine)
            result = machine.run(0.2 * TIME_SCALE)
            assert result.reason == "timeout"
            assert result.explanation
            assert counters(machine) > at
        assert result.exits == {}


def test_a_crash_of_one_stops_all(loop):
    """vCPU 1: #GP without an IDT, in protected mode."""
    crash = "lidtd cs:[1f]; mov eax, cr0; or al, 1; mov cr0, eax; mov ax, 0x1230; mov ds, ax; 1: .word 0; .long 0"
    before = threading.active_count()
    with smp(SPIN, crash, loop=loop) as machine:
        with pytest.raises(GuestCrash, match="triple fault") as caught:
            machine.run(TIMEOUT)
        assert "vCPU 1" in str(caught.value.explanation)
        assert caught.value.result.exits == {"SHUTDOWN": 1}
        assert threading.active_count() == before


def test_a_device_exception_on_vcpu_1_reaches_the_caller(loop):
    class Fails:
        broken, threads = True, []

        def write(self, offset, size, value):
            self.threads.append(threading.current_thread().name)
            if self.broken:
                raise RuntimeError("not today")
            machine.stop("exit", value)

    before = threading.active_count()
    with smp(SPIN, "mov dx, 0x300; mov al, 7; out dx, al; 1: hlt; jmp 1b", loop=loop) as machine:
        device = Fails()
        machine.add_device(device, port=0x300)
        with pytest.raises(RuntimeError, match="not today"):
            machine.run(TIMEOUT)
        assert threading.active_count() == before
        device.broken = False
        assert machine.run(TIMEOUT).exit_code == 7  # the access is given to the device again
        assert device.threads == ["vCPU 1"] * 2


def test_ctrl_c_ends_the_run_of_all(loop):
    before = threading.active_count()
    with smp(COUNT, AP_COUNT, loop=loop) as machine:

        def interrupt():
            both_move(machine)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            machine.run(TIMEOUT)
        thread.join()
        assert threading.active_count() <= before  # a thread of an earlier test may have ended
        at = counters(machine)
        assert machine.run(0.2 * TIME_SCALE).reason == "timeout"  # and it can go on
        assert counters(machine) > at


def test_ctrl_c_while_the_threads_start(monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name == "vCPU 1":
            raise KeyboardInterrupt

    before = threading.active_count()
    with smp(COUNT, AP_COUNT) as machine:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        try:
            with pytest.raises(KeyboardInterrupt):
                machine.run(TIMEOUT)
            assert threading.active_count() == before
        finally:
            machine.stop()
            until(lambda: threading.active_count() == before)


# --- nothing is left --------------------------------------------------------------------------------------------------


def test_pin_gives_the_affinity_back(loop):
    class Where:
        seen = {}

        def write(self, offset, size, value):
            self.seen[value] = os.sched_getaffinity(0)

    before = os.sched_getaffinity(0)
    out = "mov dx, 0x300; mov al, {}; out dx, al; 1: hlt; jmp 1b"
    with smp(out.format(0), out.format(1), pin=True, loop=loop) as machine:
        where = Where()
        machine.add_device(where, port=0x300)
        assert machine.run(TIMEOUT).reason == "halted"
        cpus = sorted(before)
        assert where.seen == {i: {cpus[i % len(cpus)]} for i in range(2)}
    assert os.sched_getaffinity(0) == before
    with smp("mov dx, 0x300; out dx, al", SPIN, pin=True, loop=loop) as machine:
        machine.add_device(object.__new__(Raises), port=0x300)
        with pytest.raises(RuntimeError):
            machine.run(TIMEOUT)
    assert os.sched_getaffinity(0) == before


class Raises:
    def write(self, offset, size, value):
        raise RuntimeError


def held():
    gc.collect()
    return sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_many_runs_leave_nothing(irqchip, loop):
    exits = "sti; 1: mov al, 3; out 0xf4, al; jmp 1b"

    def once(runs):
        with smp(exits, SPIN, irqchip=irqchip, loop=loop) as machine:
            for _ in range(runs):
                assert machine.run(TIMEOUT).exit_code == 3

    once(1)
    before = held()
    once(min(FEW, 30))
    for _ in range(min(FEW, 30) // 5):
        once(1)
    assert held() == before


def test_init_and_sipi_before_any_lapic_is_enabled():
    """KVM was seen to lose them until some vCPU had written to its LAPIC."""
    source = """
        mov esi, offset ap
        mov edi, 0x8000
        mov ecx, 16
        rep movsb
        mov ebx, 0xfee00000
        mov dword ptr [ebx + 0x310], 0x01000000
        mov dword ptr [ebx + 0x300], 0x4500
        mov ecx, 1000
1:      dec ecx
        jnz 1b
        mov dword ptr [ebx + 0x310], 0x01000000
        mov dword ptr [ebx + 0x300], 0x4608
        sti
2:      pause
        cmp dword ptr [0x9000], 0
        je 2b
        mov al, [0x9000]
        out 0xf4, al
        hlt
ap:     .code16
        mov byte ptr [0x9000], 42
        hlt
    """
    with Machine(pykvm.asm(source, bits=32, org=0x100000), mode="protected", memory="2M", cpus=2) as machine:
        assert machine.run(TIMEOUT).exit_code == 42


def test_who_waits_in_a_device_holds_up_no_other_machine():
    """Threads take turns in Python; a turn is a hint, and one that lasts is taken away (native/turn.h)."""
    entered, done = threading.Event(), threading.Event()
    code = pykvm.asm("mov ecx, 300; 1: out 0x42, al; loop 1b; out 0xf4, al", bits=32, org=0x100000)
    waited = []

    class Waits:
        def write(self, offset, size, value):
            if not waited:
                entered.set()
                waited.append(done.wait(TIMEOUT))

    class Counts:
        count = 0

        def write(self, offset, size, value):
            self.count += 1

    with Machine(code, mode="protected") as slow, Machine(code, mode="protected") as quick:
        counts = Counts()
        slow.add_device(Waits(), port=0x42)
        quick.add_device(counts, port=0x42)
        with Running(slow) as other:
            assert entered.wait(TIMEOUT)
            quick.run(TIMEOUT)
            done.set()
            until(lambda: not other.thread.is_alive())
        assert waited == [True] and counts.count == 300
        assert other.result.reason == "exit"


# --- held back ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counting():
    """A guest that counts at 0x8000, in a thread; (machine, thread)."""
    code = pykvm.asm("sti; 1: inc qword ptr [0x8000]; jmp 1b", bits=64, org=0x100000)
    with pykvm.Machine(code, mode="long", memory="2M", entry=0x100000) as machine:
        thread = threading.Thread(target=lambda: machine.run(TIMEOUT, explain=False), daemon=True)
        thread.start()
        while not machine.memory.read_u64(0x8000):
            time.sleep(0.001)
        yield machine, thread
        machine.stop()
        thread.join()


def test_held_vcpus_do_not_run(counting):
    machine, _ = counting
    machine.group.hold(TIMEOUT)
    while not machine.group.waiting:
        time.sleep(0.001)
    before = machine.memory.read_u64(0x8000)
    assert not machine.group.paused
    machine.pause()
    assert machine.memory.read_u64(0x8000) == before
    machine.resume()  # ends a hold, too
    while machine.memory.read_u64(0x8000) == before:
        time.sleep(0.001)


def test_a_hold_ends_by_itself(counting):
    machine, _ = counting
    for _ in range(20):
        before = machine.memory.read_u64(0x8000)
        machine.group.hold(0.002)
        while machine.memory.read_u64(0x8000) == before:
            time.sleep(0.001)


def test_a_held_run_can_be_stopped(counting):
    machine, thread = counting
    machine.group.hold(TIMEOUT)
    machine.stop()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
