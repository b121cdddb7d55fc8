"""Machine and run loop: time limits, stops, exceptions, devices that come and go."""

import os
import signal
import threading
import time

import pytest

import pykvm
from pykvm import GuestCrash, Machine, probe
from tests.conftest import TIMEOUT

SPIN = "sti; 1: jmp 1b"  # interrupts on: see test_time_limit_ends_a_guest_with_interrupts_off


def flat(source, bits=16, **options):
    """A machine for a snippet: real mode, or 64-bit code in long or user mode."""
    mode = {16: "real", 32: "protected", 64: "long"}[bits]
    org = 0x7C00 if bits == 16 else 0x100000
    return Machine(pykvm.asm(source, bits=bits, org=org), mode=options.pop("mode", mode), **{"memory": "2M", **options})


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.shadow
@pytest.mark.parametrize(
    ("source", "mode"), [(SPIN, "long"), ("1: jmp 1b", "user"), ("1: vmmcall; jmp 1b", "long"), ("1: vmcall; jmp 1b", "long")]
)
def test_time_limit_ends_guests_that_never_exit(source, mode, loop):
    with flat(source, 64, mode=mode, loop=loop) as machine:
        result = machine.run(0.05)
        assert result.reason == "timeout"
        assert result.exits == {}
        assert result.explanation


@pytest.mark.shadow
def test_time_limit_ends_a_guest_with_interrupts_off(loop):
    """VT-x and AMD-V exit for the host's interrupts whatever the guest's RFLAGS.IF is."""
    if not probe.interruptible_with_if_clear():
        pytest.skip("this host leaves a guest with RFLAGS.IF clear uninterrupted: a fault of its emulation of VT-x")
    with flat("1: jmp 1b", 64, loop=loop) as machine:
        assert machine.run(0.02).reason == "timeout"


def test_run_goes_on_after_a_time_limit():
    with flat("sti; mov dword ptr [0x9f000], 0; 1: inc qword ptr [0x9f008]; cmp dword ptr [0x9f000], 0; je 1b; hlt", 64) as machine:
        assert machine.run(0.02).reason == "timeout"
        assert machine.memory.read_u64(0x9F008) > 0
        machine.memory.write_u32(0x9F000, 1)
        assert machine.run(TIMEOUT).reason == "halted"


def test_stop_from_another_thread(loop):
    with flat(SPIN, 64, loop=loop) as machine:
        timer = threading.Timer(0.02, machine.stop)
        timer.start()
        assert machine.run(TIMEOUT).reason == "stopped"
        timer.join()


def test_kick_before_the_run_is_not_lost():
    with flat(SPIN, 64) as machine:
        machine.vcpu.kick()
        assert machine.vcpu.run(TIMEOUT) == pykvm.Intr(kicked=True)


def test_kick_from_another_thread():
    with flat(SPIN, 64) as machine:
        timer = threading.Timer(0.02, machine.vcpu.kick)
        timer.start()
        assert machine.vcpu.run(TIMEOUT) == pykvm.Intr(kicked=True)
        timer.join()


def test_bare_run_time_limit():
    with flat(SPIN, 64) as machine:
        assert machine.vcpu.run(0.01) == pykvm.Intr(timed_out=True)


def test_ctrl_c_ends_the_run(loop):
    with flat(SPIN, 64, loop=loop) as machine:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            machine.run(TIMEOUT)
        timer.join()
        assert machine.run(0.02).reason == "timeout"  # and it can go on


def test_the_application_keeps_its_signals():
    """Whichever real-time signals it takes, and when."""
    seen = []
    numbers = range(signal.SIGRTMIN, signal.SIGRTMAX)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with flat(SPIN, 64) as machine:
            machine.run(0.02)
            free = next(n for n in numbers if before[n] == signal.SIG_DFL)
            for number in numbers:
                if number != free:
                    signal.signal(number, lambda *_: seen.append(1))
            assert machine.run(0.02).reason == "timeout"
            assert seen == []
            os.kill(os.getpid(), signal.SIGRTMAX - 1)
            assert seen == [1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def test_time_limit_with_all_signals_blocked():
    every = set(signal.valid_signals()) - {signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
    try:
        with flat(SPIN, 64) as machine:
            assert machine.run(0.02).reason == "timeout"
        assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) >= every - {signal.SIGKILL, signal.SIGSTOP, 32, 33}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_run_in_another_thread_is_refused_while_one_runs():
    with flat(SPIN, 64) as machine:
        thread = threading.Thread(target=machine.run, args=(TIMEOUT,))
        thread.start()
        while not machine.vcpu.native.tid:
            time.sleep(0.001)
        with pytest.raises(pykvm.KvmError, match="another thread"):
            machine.vcpu.run(0.1)
        with pytest.raises(pykvm.ConfigError, match="running"):
            machine.vcpu.close()
        machine.stop()
        thread.join()


# --- devices ----------------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, answer=0):
        self.writes, self.reads, self.answer = [], [], answer

    def write(self, offset, size, value):
        self.writes.append((offset, size, value))

    def read(self, offset, size):
        self.reads.append((offset, size))
        return self.answer


def test_device_sees_offset_size_and_value(loop):
    with flat("mov dx, 0x300; mov eax, 0x11223344; out dx, al; inc dx; out dx, ax; inc dx; out dx, eax; hlt", loop=loop) as machine:
        device = Recorder()
        machine.add_device(device, port=0x300, length=8)
        machine.run(TIMEOUT)
        assert device.writes == [(0, 1, 0x44), (1, 2, 0x3344), (2, 4, 0x11223344)]


def test_wide_and_far_mmio(loop):
    source = "mov rbx, 0xd1000000; mov rax, 0x1122334455667788; mov [rbx], rax; mov rcx, [rbx + 0x1fff0]; mov [rbx + 8], rcx; hlt"
    with flat(source, 64, loop=loop) as machine:
        device = Recorder(answer=0xFEDCBA9876543210)
        machine.add_device(device, gpa=0xD1000000, length=0x20000)
        machine.run(TIMEOUT)
        assert device.reads == [(0x1FFF0, 8)]
        assert device.writes == [(0, 8, 0x1122334455667788), (8, 8, 0xFEDCBA9876543210)]


@pytest.mark.parametrize("place", ["read", "write"])
def test_device_exception_reaches_the_caller_and_the_run_goes_on(place, loop):
    class Fails(Recorder):
        broken = True

        def read(self, offset, size):
            if self.broken:
                raise RuntimeError("no answer")
            return super().read(offset, size)

        def write(self, offset, size, value):
            if self.broken and place == "write":
                raise RuntimeError("no")
            super().write(offset, size, value)

    source = "mov dx, 0x300; mov al, 7; out dx, al; in al, dx; out dx, al; hlt"
    with flat(source, loop=loop) as machine:
        device = Fails(answer=9)
        machine.add_device(device, port=0x300)
        with pytest.raises(RuntimeError):
            machine.run(TIMEOUT)
        assert machine.vcpu.get_regs().rdx & 0xFFFF == 0x300
        device.broken = False
        assert machine.run(TIMEOUT).reason == "halted"
        assert device.writes == [(0, 1, 7), (0, 1, 9)]


@pytest.mark.parametrize("answer", [None, "x", -1, 256, 1 << 70])
def test_a_device_that_answers_nonsense_is_named(answer, loop):
    with flat("mov dx, 0x300; in al, dx; hlt", loop=loop) as machine:
        machine.add_device(Recorder(answer), port=0x300, name="odd one")
        with pytest.raises((TypeError, OverflowError)) as caught:
            machine.run(TIMEOUT)
        assert "odd one" in "".join(getattr(caught.value, "__notes__", [])) + str(caught.value)


def test_a_device_added_while_running(loop):
    with flat("mov dx, 0x300; out dx, al; inc dx; in al, dx; out 0xf4, al", loop=loop) as machine:

        class Adder:
            def write(self, offset, size, value):
                machine.add_device(Recorder(5), port=0x301)

        machine.add_device(Adder(), port=0x300)
        assert machine.run(TIMEOUT).exit_code == 5


def test_rep_io_reaches_the_device_element_by_element(loop):
    source = "cld; mov si, 0x7c00; mov cx, 5; mov dx, 0x300; rep outsb; mov di, 0x9000; mov cx, 3; rep insw; hlt"
    with flat(source, loop=loop) as machine:
        device = Recorder(answer=0x1234)
        machine.add_device(device, port=0x300)
        code = machine.memory.read(0x7C00, 5)
        machine.run(TIMEOUT)
        assert bytes(value for _, _, value in device.writes) == code


def test_overlap_and_ram_are_refused():
    with Machine("hello") as machine:
        with pytest.raises(pykvm.DeviceOverlapError, match="UART"):
            machine.add_device(Recorder(), port=0x3F8)
        with pytest.raises(pykvm.ConfigError, match="inside"):
            machine.add_device(Recorder(), gpa=0x1000)


def test_unclaimed_accesses_are_counted_and_strict_stops():
    with flat("mov dx, 0x300; in al, dx; in al, dx; out 0xf4, al") as machine:
        result = machine.run(TIMEOUT)
        assert result.exit_code == 0xFF
        assert result.unclaimed == {("pio", 0x300, 1, False): 2}
    with flat("mov dx, 0x300; in al, dx; out 0xf4, al", strict=True) as machine, pytest.raises(GuestCrash, match="read from port 0x300"):
        machine.run(TIMEOUT)


@pytest.mark.parametrize(
    ("source", "reason"), [("mov al, 0xfe; out 0x64, al; hlt", "reset"), ("mov dx, 0xcf9; mov al, 6; out dx, al; hlt", "reset")]
)
def test_resets(source, reason):
    with flat(source) as machine:
        assert machine.run(TIMEOUT).reason == reason


def test_console_keeps_order_between_devices(loop):
    source = "mov dx, 0x3f8; mov al, 'a'; out dx, al; mov al, 'b'; out 0xe9, al; mov al, 'c'; out dx, al; mov al, 'd'; out 0xe9, al; hlt"
    with flat(source, loop=loop) as machine:
        assert machine.run(TIMEOUT).console == "abcd"


def test_statistics_count_every_exit(loop):
    with flat("mov cx, 5000; 1: out 0xe9, al; loop 1b; hlt", loop=loop, stats=True) as machine:  # more than a ring has room for
        result = machine.run(TIMEOUT)
        counts = {row.name: row.count for row in result.stats}
        assert counts == {"IO out 0xe9": 5000, "HLT": 1}
        assert all(row.kvm_median > 0 and row.kvm_total >= row.kvm_median for row in result.stats)
        assert result.exits == {"IO": 5000, "HLT": 1}
        assert len(result.console) == 5000


# --- explanations -----------------------------------------------------------------------------------------------------


@pytest.mark.shadow
def test_explanations():
    with Machine("triple_fault") as machine, pytest.raises(GuestCrash, match=r"triple fault.*IDT limit.* 0") as caught:
        machine.run(TIMEOUT)
    if probe.shutdown_keeps_registers():
        assert "`ud2` raises #UD" in caught.value.explanation
        assert "<_start>" in caught.value.explanation
        assert "walk of RIP" in caught.value.explanation
    assert caught.value.result.exits == {"SHUTDOWN": 1}
    with Machine("exec_hole") as machine, pytest.raises(GuestCrash, match=r"0xd0100000.*no memory"):
        machine.run(TIMEOUT)
    with Machine("spin") as machine:
        assert "jumps to itself" in machine.run(0.05).explanation


@pytest.mark.shadow
@pytest.mark.parametrize(
    ("source", "first_line"),
    [
        ("xor eax, eax; mov [rax], al", r"#PF .*`mov byte ptr \[rax\], al` at 0x100002 touched 0x0 .*not present, a write, from CPL3"),
        ("mov eax, 0x9000; mov al, [rax]", r"#PF .*touched 0x9000 .*rights forbid it, a read, from CPL3"),
        ("ud2", r"#UD .*`ud2`"),
        ("xor ecx, ecx; mov eax, 1; cdq; div ecx", r"#DE .*div ecx"),
        ("hlt", r"#GP .*`hlt`"),
        ("mov rax, 0x8000000000000000; jmp rax", r"#GP"),
        ("int3", r"#BP"),
    ],
)
def test_user_mode_exceptions_are_explained(source, first_line):
    with flat(source, 64, mode="user") as machine, pytest.raises(GuestCrash, match=first_line):
        machine.run(TIMEOUT)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "needs memory"),
        ({"memory": 4097}, "multiple of the page size"),
        ({"memory": "1000T"}, "more than this host has"),
        ({"memory": "4K"}, "RAM"),
        ({"mode": "virtual"}, "unknown mode"),
        ({"entry": 0x8000_0000}, "entry"),
        ({"loop": "rust"}, "unknown loop"),
        ({"append": "x" * 5000}, "command line"),
    ],
)
def test_bad_options_leave_nothing_open(options, message):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(pykvm.PykvmError, match=message):
        Machine("hello", **options)
    assert len(os.listdir("/proc/self/fd")) == before


def test_unknown_guest_names_the_nearest():
    with pytest.raises(pykvm.GuestImageError, match="did you mean hello"):
        Machine("helo")


def test_a_guest_that_strays_into_zeros_is_told_so():
    """Zeros are instructions: this one runs through them until a jump at their end leads back. A run past the limit of CS would be #GP."""
    with flat("sti; jmp 0x9000", memory="64K") as machine:
        machine.memory.write(0xFFF0, pykvm.asm("jmp 0x9000", bits=16, org=0xFFF0))
        assert any("holds only zeros" in machine.run(0.02).explanation for _ in range(3))  # chance may stop it at the jump


def test_backing():
    with Machine("hello", backing="memfd") as machine:
        assert machine.memory.slots[0].backing == "memfd"
        assert machine.run(TIMEOUT).exit_code == 0
