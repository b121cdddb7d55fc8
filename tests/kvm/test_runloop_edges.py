"""The run loop where things meet: kicks with threads, forks and signals; stops and exceptions with answers and tables; both loops."""

import gc
import os
import signal
import threading
import time

import pytest

import pykvm
from pykvm import ConfigError, GuestCrash, KvmError, Machine, exits
from pykvm.abi import lib
from pykvm.bus import Bus, Native
from pykvm.records import RecordRing
from pykvm.runner import Runner
from tests.conftest import TIMEOUT

SPIN = "sti; 1: jmp 1b"
BASE = 0x100000


def flat(source, **options):
    """A machine for 32-bit code at BASE."""
    return Machine(pykvm.asm(source, bits=32, org=BASE), mode="protected", memory="2M", **options)


def after(source):
    """The address behind some code."""
    return BASE + len(pykvm.asm(source, bits=32, org=BASE))


class Log:
    """A device that notes its name and what is written, and answers 0x42."""

    def __init__(self, log, name="device"):
        self.log, self.name = log, name

    def write(self, offset, size, value):
        self.log.append((self.name, offset, value))

    def read(self, offset, size):
        return 0x42


class Interrupt(Exception):
    """What a signal handler raises."""


@pytest.fixture
def alarm():
    """SIGALRM raises Interrupt."""

    def handler(number, frame):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# --- signals, threads, forks ------------------------------------------------------------------------------------------


def test_a_signal_handler_that_raises_leaves_a_bare_vcpu_free(alarm):
    with flat(SPIN) as machine:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupt):
            machine.vcpu.run(TIMEOUT)
        assert machine.vcpu.native.tid == 0
        assert machine.vcpu.run(0.02) == exits.Intr(timed_out=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # anywhere: in a destructor too
def test_a_signal_handler_may_raise_anywhere_in_a_run(alarm):
    with flat("1: out 0x80, al; hlt; jmp 1b") as machine:
        raised = 0
        for i in range(1500):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + i % 300 * 1e-6)
                try:
                    machine.runner.run()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                raised += 1
            assert machine.vcpu.native.tid == 0
        assert raised


@pytest.mark.slow
def test_a_signal_during_the_creation_of_a_vm_is_no_error(system):
    """KVM_CREATE_VM gives EINTR for any signal that comes while it waits for the mm's locks."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 3e-4, 3e-4)
        for _ in range(300):
            system.create_vm().close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_kicks_while_the_vcpu_closes(system):
    done, vcpus = threading.Event(), []

    def kicker():
        while not done.is_set():
            for vcpu in vcpus[-1:]:
                vcpu.kick()

    threads = [threading.Thread(target=kicker) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with system.create_vm() as vm:
                vcpus.append(vm.create_vcpu())
                vcpus[-1].close()
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.slow
def test_only_one_thread_gets_a_vcpu():
    with flat("hlt") as machine:
        native, end, wrong = machine.vcpu.native, time.monotonic() + 0.3, []

        def run():
            while time.monotonic() < end:
                if lib.pykvm_begin(native, 0, 0) == 0:
                    if native.tid != threading.get_native_id():
                        wrong.append(native.tid)
                    lib.pykvm_end(native)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_end_in_another_thread_ends_nothing():
    with flat(SPIN) as machine:
        thread = threading.Thread(target=machine.run, args=(TIMEOUT,))
        thread.start()
        while not machine.vcpu.native.tid:
            pass
        lib.pykvm_end(machine.vcpu.native)
        with pytest.raises(ConfigError):
            machine.vcpu.close()
        machine.stop()
        thread.join()


def test_time_limits_in_one_thread_after_another():
    with flat(SPIN) as machine:
        for _ in range(3):
            reasons = []
            thread = threading.Thread(target=lambda to=reasons: to.append(machine.run(0.02).reason))
            thread.start()
            thread.join(TIMEOUT)
            assert reasons == ["timeout"]


@pytest.mark.slow
def test_a_timer_is_not_taken_for_that_of_an_earlier_thread_with_the_same_id():
    path = "/proc/sys/kernel/ns_last_pid"
    if not os.access(path, os.W_OK):
        pytest.skip(f"{path} cannot be written: thread ids cannot be chosen")
    with flat(SPIN) as machine:
        ids, reasons = [], []

        def first():
            ids.append(threading.get_native_id())
            machine.run(0.01)

        def second():
            if threading.get_native_id() == ids[0]:
                reasons.append(None)
                reasons[0] = machine.run(0.01).reason

        thread = threading.Thread(target=first)
        thread.start()
        thread.join()
        for _ in range(1000):
            with open(path, "w") as file:
                file.write(str(ids[0] - 1))
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(TIMEOUT)
            if reasons:
                break
        else:
            pytest.skip("the thread id did not come again")
        if thread.is_alive():
            machine.vcpu.kick()
            machine.stop()
            thread.join()
        assert reasons == ["timeout"]


def test_a_forked_child_keeps_its_own_timer():
    """Timers are not inherited, but a child's own may have the number of its parent's."""
    with flat(SPIN) as machine:
        machine.run(0.01)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with flat(SPIN) as own:
                    own.run(0.01)
                    machine.close()
                    status = 0 if own.run(0.01).reason == "timeout" else 2
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_tick_during_a_session_within_a_device_is_not_lost():
    with flat(SPIN) as outer, flat(SPIN) as inner:
        native = outer.vcpu.native
        assert lib.pykvm_begin(native, 20_000_000, 10**12) == 0
        try:
            assert isinstance(inner.vcpu.run(0.1), exits.Intr)
            assert native.run.immediate_exit == 1
        finally:
            lib.pykvm_end(native)
        assert outer.vcpu.run(0.02) == exits.Intr(timed_out=True)


def test_a_run_from_within_a_device_of_the_same_machine_is_refused(loop):
    log = []

    class Nested(Log):
        def write(self, offset, size, value):
            with pytest.raises(KvmError):
                machine.run(0.01)
            super().write(offset, size, value)

    with flat("out 0x90, al; out 0x90, al; hlt", loop=loop) as machine:
        machine.add_device(Nested(log), port=0x90)
        assert machine.run(TIMEOUT).reason == "halted"
        assert len(log) == 2


@pytest.mark.parametrize("limit", [float("inf"), 1e12, 1e300])
def test_time_limits_beyond_any_clock(limit):
    with flat("hlt; hlt") as machine:
        assert machine.run(limit).reason == "halted"
        assert machine.vcpu.run(limit) == exits.Hlt()


# --- stops and exceptions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("insn", ["in al, dx", "mov al, [ebx]"])
@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_device_that_stops_the_run_has_answered(insn, which, loop):
    before = "mov dx, 0x300; mov ebx, 0xd1000000"
    each = f"mov al, 7; {insn}; out 0x90, al"
    log = []

    class Stopper(Log):
        reads = 0

        def read(self, offset, size):
            self.reads += 1
            if self.reads == which:
                machine.stop()
            return 0x42

    with flat("; ".join([before, each, each, each, "hlt"]), loop=loop) as machine:
        device = Stopper(log)
        machine.add_device(device, port=0x300)
        machine.add_device(device, gpa=0xD1000000)
        machine.add_device(Log(log), port=0x90, native=Native.append(bytearray()))
        assert machine.run(TIMEOUT).reason == "stopped"
        assert machine.insn_rip() == after("; ".join([before, *[each] * (which - 1), "mov al, 7"]))
        machine.bus.pio.remove(machine.bus.pio.find(0x90, 1))
        machine.add_device(Log(log), port=0x90)
        assert machine.run(TIMEOUT).reason == "halted"
        assert device.reads == 3
        assert [value for _, _, value in log[-(4 - which) :]] == [0x42] * (4 - which)


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_stop_leaves_rip_alike_however_often_the_register_was_met(which, loop):
    with flat("; ".join(["out 0x90, al"] * 3 + ["hlt"]), loop=loop) as machine:

        class Stopper:
            writes = 0

            def write(self, offset, size, value):
                self.writes += 1
                if self.writes == which:
                    machine.stop()

        machine.add_device(Stopper(), port=0x90)
        assert machine.run(TIMEOUT).reason == "stopped"
        assert machine.insn_rip() == BASE + 2 * (which - 1)
        assert machine.run(TIMEOUT).reason == "halted"


def test_a_stop_by_a_device_leaves_no_kick_behind():
    with flat("out 0xf4, al; hlt") as machine:
        assert machine.run(TIMEOUT).reason == "exit"
        assert machine.vcpu.run(TIMEOUT) == exits.Hlt()


def test_strict_answers_the_read_that_it_stops_at():
    with flat("mov al, 7; mov al, [0xd1000000]; out 0x90, al; hlt", strict=True) as machine:
        log = []
        machine.add_device(Log(log), port=0x90)
        with pytest.raises(GuestCrash):
            machine.run(TIMEOUT)
        machine.run(TIMEOUT)
        assert log == [("device", 0, 0xFF)]


def test_an_access_that_met_an_exception_goes_to_who_claims_it_by_then(loop):
    class Broken:
        def write(self, offset, size, value):
            raise RuntimeError("broken")

    log = []
    with flat("mov dx, 0x300; mov al, 5; out dx, al; hlt", loop=loop) as machine:
        broken = machine.add_device(Broken(), port=0x300)
        with pytest.raises(RuntimeError):
            machine.run(TIMEOUT)
        machine.bus.pio.remove(broken)
        machine.add_device(Log(log, "wrong"), port=0x10)
        machine.add_device(Log(log, "right"), port=0x300)
        assert machine.run(TIMEOUT).reason == "halted"
        assert log == [("right", 0, 5)]


def test_a_sink_may_change_the_bus(loop):
    """The exit that waits in the stash meanwhile was named after the old table."""
    log = []

    class Sink:
        def extend(self, data):
            if len(machine.bus.pio.ranges) == ranges:
                machine.add_device(Log(log, "new"), port=0x20)

    class Output:
        def write(self, offset, size, value):
            Sink().extend(b"")

    with flat("mov dx, 0x300; out dx, al; mov dx, 0x310; mov al, 2; out dx, al; hlt", loop=loop) as machine:
        machine.add_device(Output(), port=0x300, native=Native.append(Sink()))
        machine.add_device(Log(log, "wrong"), port=0x308)
        machine.add_device(Log(log, "right"), port=0x310)
        machine.add_device(Log(log, "far"), port=0x318)
        ranges = len(machine.bus.pio.ranges)
        assert machine.run(TIMEOUT).reason == "halted"
        assert log == [("right", 0, 2)]


@pytest.mark.slow
def test_too_many_ranges_leave_the_others_as_they_were(loop):
    log = []
    with flat("mov dx, 0x1000; out dx, al; mov dx, 0x4000; out dx, al; hlt", loop=loop) as machine:
        machine.add_device(Log(log, "last"), port=0x4000)
        with pytest.raises(ConfigError):
            for port in range(0x1000, 0x1000 + 1025):
                machine.add_device(Log(log, hex(port)), port=port)
        assert machine.run(TIMEOUT).reason == "halted"
        assert [name for name, *_ in log] == ["0x1000", "last"]


# --- records, and bare runs of a machine's vCPU -----------------------------------------------------------------------


def test_both_loops_record_the_same_values():
    """The native loop comes back once more to have its sinks emptied, with a read that waits for its answer."""
    source = "mov al, 1; out 0xe9, al; mov dx, 0x300; in al, dx; out 0xe9, al; mov edi, 0x110000; mov ecx, 2; rep insb; hlt"
    seen = []
    for loop in ("python", "native"):
        records = []
        with flat(source, loop=loop, stats=True) as machine:
            machine.add_device(Log([]), port=0x300)
            machine.runner.on_records = lambda ring, to=records: to.extend(
                (r.reason, r.qualifier, r.value, r.size, r.count, r.is_write, r.rip, r.tsc_handled > 0) for r in ring.drain()
            )
            machine.run(TIMEOUT)
        seen.append(records)
    assert seen[0] == seen[1]
    assert all(handled for *_, handled in seen[0])
    assert [value for _, at, value, *_ in seen[0] if at == 0x300] in ([0x42] * 2, [0x42] * 3)


def test_a_ring_that_nobody_empties_is_an_error():
    with flat("1: out 0x80, al; jmp 1b") as machine:
        runner = Runner(machine.vcpu, machine.bus, "native", RecordRing(16))
        with pytest.raises(ConfigError, match="on_records"):
            runner.run(TIMEOUT)


@pytest.mark.slow
def test_bare_runs_go_on_when_the_ring_is_full():
    with flat("xor eax, eax; 1: inc eax; out 0x80, al; jmp 1b", stats=True) as machine:
        assert [machine.vcpu.run(TIMEOUT).value for _ in range(4200)] == [i & 0xFF for i in range(1, 4201)]


def test_bare_runs_show_what_the_native_loop_would_carry_out():
    with flat("mov al, 1; out 0xe9, al; out 0xf4, al; mov al, 2; out 0xe9, al; out 0xe9, al; hlt", loop="native") as machine:
        machine.run(TIMEOUT)
        assert [machine.vcpu.run(TIMEOUT) for _ in range(3)] == [*[exits.IoOut(0xE9, 1, b"\2")] * 2, exits.Hlt()]
        assert machine.console.data == b"\1"


def test_what_a_runner_lent_lives_as_long_as_the_vcpu():
    with flat("1: out 0x80, al; hlt; jmp 1b") as machine:
        ring = RecordRing(64)
        runner = Runner(machine.vcpu, Bus(), "native", ring)
        runner.on_records = lambda ring: None
        runner.run(TIMEOUT)
        at = ring.cdata
        del runner, ring
        gc.collect()
        assert machine.vcpu.native.ring == at
        assert machine.vcpu.lent is not None


def test_two_runners_of_one_vcpu():
    log = []
    with flat("1: mov dx, 0x300; out dx, al; mov dx, 2; out dx, al; hlt; jmp 1b", stats=True) as machine:
        machine.add_device(Log(log, "first"), port=0x300)
        machine.run(TIMEOUT)
        bus = Bus()
        for port in (1, 2, 0x300):
            bus.pio.add(port, 1, Log(log, f"second {port:#x}"))
        Runner(machine.vcpu, bus).run(TIMEOUT)
        machine.run(TIMEOUT)
    assert [name for name, *_ in log] == ["first", "second 0x300", "second 0x2", "first"]


def test_statistics_of_a_guest_that_uses_all_ports_stay_small(loop):
    with flat("mov edx, 0x400; 1: in al, dx; inc edx; cmp edx, 0x800; jne 1b; hlt", stats=True, loop=loop) as machine:
        rows = machine.run(TIMEOUT).stats
        assert sum(row.count for row in rows) == 1025
        assert len(rows) < 600
        assert rows[0].name == "IO in elsewhere"


# --- insn_rip ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "insn", "exits_before", "number"),
    [
        ("mov edi, 0xd1000000; mov ecx, 3; mov [0x110000], eax", "rep stosb", 0, 3),
        ("mov edi, 0xd1000000; mov esi, 0x110000; mov ecx, 2; mov [0x110000], eax", "rep movsd", 0, 2),
        ("mov edi, 0xd1000ffc; mov ecx, 2; std; mov [0x110000], eax", "rep stosd", 0, 2),
        ("mov ebx, 0xd1000000; mov edi, 0xd1000100; mov ecx, 2; mov [ebx], eax", "rep stosd", 1, 2),
        ("mov esp, 0xd1001000", "push eax", 0, 1),
        ("mov dx, 0x300; mov al, 0x66", "out dx, al", 0, 1),
        ("mov dx, 0x300; mov al, 0xf3", "out dx, al", 0, 1),
        ("mov dx, 0x300; nop", "out dx, ax", 0, 1),
        ("mov dx, 0x300; mov esi, 0x110000; mov al, 1; out dx, al", "outsb", 1, 1),
        ("mov dx, 0x300; mov esi, 0x110000; mov ecx, 2", "cs rep outsb", 0, 2),
    ],
)
def test_insn_rip_of_less_common_instructions(before, insn, exits_before, number):
    with flat(f"{before}; {insn}; hlt") as machine:
        for _ in range(exits_before):
            machine.vcpu.run(TIMEOUT)
            assert machine.insn_rip() != after(before)
        for _ in range(number):
            if isinstance(machine.vcpu.run(TIMEOUT), exits.Hlt):
                break  # elements of a REP OUTS may come in one exit
            assert machine.insn_rip() == after(before)


class Constant:
    """What Native.constant() promises, in Python."""

    VALUE = 0x8877665544332211

    def read(self, offset, size):
        return self.VALUE & ((1 << 8 * size) - 1)

    def write(self, offset, size, value):
        pass


@pytest.mark.parametrize("at", [0xD0200FF8, 0xD0200FFD, 0xD0200FFF])
def test_a_constant_is_the_same_in_both_loops_also_across_a_page_end(at):
    """KVM makes 3 + 5 bytes of an 8-byte access that crosses a page."""
    seen = []
    for loop in ("python", "native"):
        code = pykvm.asm(f"mov ebx, {at}; mov rax, [rbx]; mov [rbx], rax; mov [0x9f000], rax; hlt", bits=64, org=0x100000)
        with Machine(code, mode="long", memory="2M", loop=loop) as machine:
            machine.add_device(Constant(), gpa=0xD0200000, length=0x2000, native=pykvm.Native.constant(Constant.VALUE))
            result = machine.run(TIMEOUT)
            seen.append((machine.memory.read_u64(0x9F000), result.exits))
    assert seen[0] == seen[1]
    assert seen[0][0] & 0xFF == 0x11


def test_a_child_forked_by_a_device_cannot_go_on():
    class Forks:
        child = 0

        def write(self, offset, size, value):
            Forks.child = os.fork()

    with flat("out 0x90, al; hlt") as machine:
        machine.add_device(Forks(), port=0x90)
        status = 1
        try:
            assert machine.run(TIMEOUT).reason == "halted"
        except KvmError as error:
            status = 0 if "forked" in str(error) else 2
        finally:
            if not Forks.child:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(Forks.child, 0)[1]) == 0
