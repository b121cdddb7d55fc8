"""Live migration of real guests: they go on as if nothing had happened; and whatever goes wrong, one copy runs, never two."""

import gc
import os
import random
import socket
import threading
from time import sleep

import pytest

import pykvm
from pykvm import MigrationError
from pykvm.cli.migrate import PHASES
from pykvm.state import migrate as source
from pykvm.state import stream as wire
from pykvm.state.compat import Host
from pykvm.state.migrate import Migration
from pykvm.state.stream import Stream
from tests.conftest import TIME_SCALE, TIMEOUT
from tests.kvm.moving import (
    CONSOLE,
    COUNTER,
    PASSES,
    PATIENCE,
    Link,
    Receiving,
    Running,
    exit_code,
    goes_on,
    move,
    until,
    walker,
)


@pytest.fixture(autouse=True)
def as_slow_as_the_host(monkeypatch):
    """A destination in an emulated host takes its time."""
    monkeypatch.setattr(source, "STANDING", source.STANDING * TIME_SCALE)


@pytest.fixture
def machine():
    """A guest that waits at its turnstile, half way, and writes memory all the time."""
    with walker(PASSES // 2) as machine:
        running = Running(machine)
        until(lambda: len(machine.console.data) == PASSES // 2)
        yield machine
        machine.stop()
        if machine.group.paused and machine.moved_to is None:
            machine.resume()
        running.thread.join(TIMEOUT)


@pytest.mark.slow
def test_two_guests_move_at_once():
    """Each to a place of its own; and back to one process, where both end."""
    from concurrent.futures import ThreadPoolExecutor

    with walker(PASSES // 2) as one, walker(PASSES // 2) as other, ThreadPoolExecutor() as pool:
        machines, running = (one, other), [Running(one), Running(other)]
        pairs = [socket.socketpair() for _ in machines]
        theirs = [Receiving(b) for _, b in pairs]
        reports = list(pool.map(move, machines, [a for a, _ in pairs]))
        assert all(report["rounds"] for report in reports)
        for there, run in zip(theirs, running, strict=True):
            assert run.end().reason == "migrated"
            result = there.wait().running.end()
            assert (result.console, result.exit_code) == (CONSOLE, exit_code())
            there.close()


def test_it_is_the_guest_that_it_should_be():
    with walker(PASSES) as machine:
        result = machine.run(TIMEOUT)
        assert (result.console, result.exit_code) == (CONSOLE, exit_code())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"irqchip": "kernel"},
        pytest.param({"irqchip": "split"}, marks=pytest.mark.slow),
        pytest.param({"loop": "python"}, marks=pytest.mark.slow),
    ],
)
def test_a_guest_moves(options):
    with walker(PASSES // 2, **options) as machine:
        running = Running(machine)
        until(lambda: machine.console.data)
        link = Link()
        there = Receiving(link.destination)
        report = move(machine, link.source)
        here = running.end()
        assert here.reason == "migrated"
        assert machine.moved_to == "there"
        result = there.wait().running.end()
        assert (result.console, result.exit_code) == (CONSOLE, exit_code())
        assert here.console == CONSOLE[: len(here.console)]
        assert report["bytes"] == link.carried[0]
        assert report["downtime"] == pytest.approx(sum(report["last"][what] for what in PHASES))
        assert report["pages"] >= 1024 and report["zeros"] > 0
        with pytest.raises(pykvm.ConfigError, match="has moved to there"):
            machine.run(1)
        with pytest.raises(pykvm.ConfigError, match="has moved to there"):
            machine.resume()
        there.close()
        link.close()


@pytest.mark.slow
def test_output_on_its_way_moves_once():
    """What the native loop has collected, and nobody has seen yet."""
    code = pykvm.asm("sti; mov ecx, 20000; mov al, 'x'; 1: out 0xe9, al; dec ecx; jnz 1b; out 0xf4, al", bits=64, org=0x100000)
    printed = [bytearray(), bytearray()]
    with pykvm.Machine(code, mode="long", memory="2M", entry=0x100000, on_output=printed[0].extend) as machine:
        running = Running(machine)
        a, b = socket.socketpair()
        there = Receiving(b, prepare=lambda machine: None, on_output=printed[1].extend)
        move(machine, a)
        assert running.end().reason == "migrated"
        assert there.wait().running.end().console == "x" * 20000
        assert len(printed[0]) + len(printed[1]) == 20000
        there.close()


@pytest.mark.parametrize("name", ["smp_user", "ipi", "lapic_timer", "pic_pit", "tsc_deadline", "xsave_live"])
@pytest.mark.slow
def test_gallery_guests_move_at_a_random_moment(name, system):
    """Two vCPUs, interrupts, vector registers: they end as without a move."""
    from tests.kvm.test_gallery import note_of, skip_unless_met

    skip_unless_met(name, system)
    note = note_of(name)
    with pykvm.Machine(name) as machine:
        whole = machine.run(TIMEOUT)
    for attempt in range(20):
        with pykvm.Machine(name) as machine:
            machine.pause()
            running = Running(machine)
            resume = machine.resume
            resume()
            sleep(random.Random(attempt).random() * 0.003 / (attempt + 1))  # it ends soon: each attempt is more careful
            machine.group.hold(TIMEOUT)
            machine.resume = lambda resume=resume, machine=machine: (resume(), machine.group.hold(TIMEOUT))
            a, b = socket.socketpair()
            there = Receiving(b, prepare=lambda machine: None)
            try:
                move(machine, a)
            except MigrationError as error:
                assert "not running" in str(error)
                there.wait()
                machine.stop()
                running.thread.join(TIMEOUT)
                continue
            assert running.end().reason == "migrated"
            result = there.wait().running.end()
            there.close()
            assert (result.reason, result.exit_code, result.console) == (whole.reason, whole.exit_code, whole.console)
            assert note.get("console", "") in result.console
            return
    pytest.fail("the guest was faster than twenty moves")


@pytest.mark.slow
def test_there_and_back_again(machine):
    """From one machine to the next, five times; the last one ends."""
    machines = [machine]
    for hop in range(5):
        a, b = socket.socketpair()
        there = Receiving(b, most=PASSES // 2 + 2 * hop)
        move(machines[-1], a, f"hop {hop}")
        machines.append(there.wait().machine)
        assert goes_on(there.machine)
    assert sum(m.moved_to is None for m in machines) == 1
    last = machines[-1]
    last.bus.pio.find(0x50, 1).device.most = PASSES
    result = there.running.end()
    assert (result.console, result.exit_code) == (CONSOLE, exit_code())
    for moved in machines[1:]:
        moved.close()


@pytest.mark.slow
def test_what_the_host_writes_moves_too(machine):
    """While rounds are on their way, through write() and through a view."""
    view = machine.memory.view(0x300000, 8)
    a, b = socket.socketpair()
    there = Receiving(b, most=PASSES // 2)
    rounds = []

    def write(progress):
        if progress.phase == "copying":
            rounds.append(progress.round)
            view[0] = len(rounds)
            machine.memory.write_u64(0x310000, len(rounds))

    Migration(machine, a, "there", on_progress=write).run()
    there.wait()
    assert rounds
    assert there.machine.memory.read_u8(0x300000) == len(rounds)
    assert there.machine.memory.read_u64(0x310000) == len(rounds)
    there.close()


WRITER = """
        sti
        mov rbx, {pace}             # TSC units from one page to the next
round:  mov rdi, 0x200000
page:   inc qword ptr [rdi]
        rdtsc
        shl rdx, 32
        or rax, rdx
        lea rcx, [rax + rbx]
1:      rdtsc
        shl rdx, 32
        or rax, rdx
        cmp rax, rcx
        jb 1b
        add rdi, 4096
        cmp rdi, 0x400000
        jb page
        jmp round
"""


@pytest.mark.slow
def test_a_guest_that_writes_too_fast_is_slowed(monkeypatch):
    """It writes up to 100 MB/s, round and round in 2 MiB; the wire takes 5 MB/s, and what is left at the end shall take 30 ms."""
    sending = Stream.send

    def slowly(stream, kind, head=b"", body=b"", *rest):
        sleep(len(body) / 5e6)
        sending(stream, kind, head, body, *rest)

    monkeypatch.setattr(Stream, "send", slowly)
    monkeypatch.setattr(source, "REST", 0.0)
    monkeypatch.setattr(source, "FEW_PAGES", 0)
    with pykvm.Machine("halt") as machine:
        khz = machine.vcpu.get_tsc_khz() or 1_000_000
    code = pykvm.asm(WRITER.format(pace=khz // 25), bits=64, org=0x100000)
    with pykvm.Machine(code, mode="long", memory="4M", entry=0x100000) as machine:
        running = Running(machine)
        a, b = socket.socketpair()
        there = Receiving(b, prepare=lambda machine: None)
        report = move(machine, a, downtime=0.03)
        assert running.end().reason == "migrated"
        there.wait()
        shares = [row["slowed"] for row in report["rounds"]]
        assert shares == sorted(shares)
        assert report["slowed"] > 0  # it would not have come to an end else
        assert report["last"]["pages"] < 512
        before = there.machine.memory.read(COUNTER, 1 << 21)
        until(lambda: there.machine.memory.read(COUNTER, 1 << 21) != before)  # and it runs there
        there.close()


@pytest.mark.slow
def test_a_round_limit(machine, monkeypatch):
    monkeypatch.setattr(source, "FEW_PAGES", -1)
    monkeypatch.setattr(source, "MOST_ROUNDS", 3)
    monkeypatch.setattr(Migration, "_fits", lambda *_: False)
    view = machine.memory.view_slot(machine.memory.slots[0])
    a, b = socket.socketpair()
    there = Receiving(b)
    with pytest.raises(MigrationError, match="4096 KiB of memory are under numpy views"):
        move(machine, a)
    assert "gives up" in str(there.wait().error)
    assert goes_on(machine)
    del view


# --- what goes wrong ----------------------------------------------------------------------------------------------------


class Attempt:
    """One move over a link that is cut somewhere: ``outcome`` is "done", "failed" or "uncertain". Never do two copies run."""

    def __init__(self, machine, direction, offset):
        link = Link(**{direction: offset})
        self.direction, self.offset = direction, offset
        self.there = there = Receiving(link.destination, most=PASSES // 2)
        migration = Migration(machine, link.source, "there", patience=PATIENCE)
        try:
            migration.run()
            self.outcome = "done"
        except MigrationError as error:
            self.outcome = "uncertain" if error.uncertain else "failed"
        link.close()
        there.wait()
        # What each side has handed to its socket; the last 32 bytes are COMMIT, or RUNNING, where it came to that.
        self.sent = migration.stream.sent if direction == "forward" else there.incoming.stream.sent
        if self.outcome == "failed":
            assert there.machine is None and there.error is not None
            assert not machine.group.paused and goes_on(machine)
            return
        assert machine.group.paused  # for ever, unless somebody decides
        before = machine.memory.read(0x200000, 48 * 4096)
        if there.machine is not None:
            assert goes_on(there.machine)
        assert machine.memory.read(0x200000, 48 * 4096) == before

    def check(self):
        """Only a cut within the last frame may leave it open."""
        if self.outcome == "done":
            assert self.offset >= self.sent and self.there.machine is not None
        elif self.outcome == "uncertain":
            assert self.offset >= self.sent - 32
            assert (self.there.machine is None) == (self.direction == "forward")


def measured(machine):
    """The bytes of a whole move, in both directions, up to READY: it is given up then."""
    link = Link()
    there = Receiving(link.destination, most=PASSES // 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "send_at_once", lambda stream, kind: False)
        with pytest.raises(MigrationError, match="went away when it was ready"):
            move(machine, link.source)
    assert "gives up" in str(there.wait().error)
    link.close()
    return link.carried


def cut_everywhere(forward, backward):
    """Cut at these offsets; returns the attempts."""
    attempts = []
    machine = running = None
    for direction, offset in [("forward", n) for n in forward] + [("backward", n) for n in backward]:
        if machine is None:
            machine = walker(PASSES // 2)
            running = Running(machine, timeout=600)
            until(lambda m=machine: len(m.console.data) == PASSES // 2)
        attempt = Attempt(machine, direction, offset)
        attempts.append(attempt)
        attempt.check()
        attempt.there.close()
        if attempt.outcome == "uncertain" and attempt.there.machine is None:
            machine.resume()  # somebody has looked, and decided
            assert goes_on(machine)
        elif attempt.outcome != "failed":
            machine.stop()
            running.thread.join(TIMEOUT)
            machine.close()
            machine = None
    if machine is not None:
        machine.bus.pio.find(0x50, 1).device.most = PASSES
        result = running.end()
        assert (result.console, result.exit_code) == (CONSOLE, exit_code())  # after all that
        machine.close()
    return [attempt.outcome for attempt in attempts]


@pytest.mark.slow
def test_the_wire_is_cut(machine):
    total, _ = measured(machine)
    rng = random.Random(7)
    outcomes = cut_everywhere([0, 31, 40, *(rng.randrange(total // 2) for _ in range(8))], [0, 32, 70])
    assert set(outcomes) == {"failed"}


@pytest.mark.slow
def test_the_wire_is_cut_at_200_random_places(machine):
    total, back = measured(machine)
    rng = random.Random(11)
    forward = [rng.randrange(total) for _ in range(120)] + [rng.randrange(total - 600, total + 100) for _ in range(40)]
    outcomes = cut_everywhere(forward, [rng.randrange(back + 60) for _ in range(40)])
    assert len(outcomes) == 200
    assert outcomes.count("failed") > 100


def test_the_answer_is_lost(machine, monkeypatch):
    """COMMIT arrives, RUNNING does not: the guest runs there, and stays paused here until somebody decides."""
    sending = Stream.send

    def lose(stream, kind, *rest):
        if kind == wire.RUNNING:
            raise MigrationError("lost")
        sending(stream, kind, *rest)

    monkeypatch.setattr(Stream, "send", lose)
    a, b = socket.socketpair()
    there = Receiving(b, most=PASSES // 2)
    migration = Migration(machine, a, "there")
    with pytest.raises(MigrationError, match=r"no answer came .* resume it if, and only if, it does not run there") as caught:
        migration.run()
    assert caught.value.uncertain
    assert migration.progress.phase == "uncertain"
    assert not migration.cancel()
    there.wait()
    assert goes_on(there.machine)
    assert machine.group.paused and machine.moved_to is None
    assert machine.save().vcpus[0]["regs"]  # its state is still here
    there.close()
    machine.resume()  # as somebody who knows that it is gone there would
    assert goes_on(machine)


class FakeDestination:
    """Follows the protocol up to a point, and does nothing then."""

    def __init__(self, sock, until_kind):
        from threading import Thread

        self.stream, self._until = Stream(sock, patience=5), until_kind
        Thread(target=self._work, daemon=True).start()

    def _work(self):
        try:
            self.stream.receive(wire.HELLO)
            self.stream.receive(wire.STATE)
            if self._until == wire.WELCOME:
                return
            self.stream.send_fields(wire.WELCOME, notes=[])
            while True:
                frame = self.stream.receive(wire.PAGES, wire.ROUND, wire.STATE)
                if frame.kind == wire.PAGES:
                    self.stream.body_into(frame, [memoryview(bytearray(frame.size))])
                elif frame.kind == self._until or frame.kind == wire.STATE:
                    return
                else:
                    self.stream.send(wire.ROUND_DONE)
        except MigrationError:
            pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("until_kind", "why"),
    [(wire.WELCOME, "sends no WELCOME"), (wire.ROUND, "sends no ROUND_DONE"), (wire.READY, "sends no READY")],
)
def test_a_destination_that_stalls(machine, monkeypatch, until_kind, why):
    monkeypatch.setattr(source, "STANDING", 0.3)
    a, b = socket.socketpair()
    fake = FakeDestination(b, until_kind)
    with pytest.raises(MigrationError, match=why):
        move(machine, a, patience=0.3)
    assert goes_on(machine)
    fake.stream.close()


@pytest.mark.slow
def test_a_destination_that_reads_nothing(machine):
    a, b = socket.socketpair()
    b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with pytest.raises(MigrationError, match="takes no more of"):
        move(machine, a, patience=0.3)
    assert goes_on(machine)
    b.close()


def test_a_source_that_stalls():
    a, b = socket.socketpair()
    there = Receiving(b, patience=0.3)
    there.wait()
    assert "sends no HELLO: nothing for 0.3 seconds" in str(there.error)
    stream = Stream(a)
    with pytest.raises(MigrationError, match="refuses: the other side sends no HELLO"):
        stream.receive(wire.WELCOME)
    stream.close()


@pytest.mark.slow
def test_another_version(machine, monkeypatch):
    a, b = socket.socketpair()
    there = Receiving(b)
    header = Stream._header

    def newer(stream, kind, *rest):
        if kind not in (wire.HELLO, wire.STATE):
            return header(stream, kind, *rest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wire, "VERSION", 2)
            return header(stream, kind, *rest)

    monkeypatch.setattr(Stream, "_header", newer)
    with pytest.raises(MigrationError, match=r"refuses: the other side speaks version 2 .* this one version 1"):
        move(machine, a)
    assert goes_on(machine)
    there.wait()


@pytest.fixture
def poor(monkeypatch):
    """Destinations whose KVM has no SSE2."""
    asked = Host.of.__func__

    def of(cls, system):
        host = asked(cls, system)
        host.features = [name for name in host.features if name != "sse2"]
        return host

    monkeypatch.setattr(Host, "of", classmethod(of))
    monkeypatch.setattr("pykvm.state.restore.boot_id", lambda: "another host's")


def test_a_guest_that_the_destination_cannot_run(machine, poor):
    """It is refused by name, and before any of its memory moves."""
    a, b = socket.socketpair()
    there = Receiving(b)
    migration = Migration(machine, a, "there")
    with pytest.raises(MigrationError, match="refuses: this host cannot run it: CPUID feature sse2"):
        migration.run()
    assert migration.rounds == []
    assert goes_on(machine)
    assert "sse2" in str(there.wait().error)


@pytest.mark.slow
def test_a_state_that_is_none(machine, monkeypatch):
    """The destination says what is wrong with it, and the guest goes on."""
    asked = machine.save

    def save():
        state = asked()
        return state.replace(machine={**state.machine, "irqchip": "abacus"})

    monkeypatch.setattr(machine, "save", save)
    a, b = socket.socketpair()
    there = Receiving(b)
    with pytest.raises(MigrationError, match=r"refuses: vcpus\[0\]\.lapic: it does not go with irqchip abacus"):
        move(machine, a)
    assert goes_on(machine)
    assert there.wait().machine is None


@pytest.mark.slow
def test_moves_leave_nothing_behind(machine, monkeypatch):
    """Neither those that come to an end nor those that do not: no fd, no thread, no mapping of the guest's size."""

    def everything():
        gc.collect()
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), threading.active_count(), len(maps.readlines())

    def once(fail):
        with walker(PASSES // 2) as other, pytest.MonkeyPatch.context() as patch:
            running = Running(other)
            a, b = socket.socketpair()
            there = Receiving(b, most=PASSES // 2)
            if fail:
                patch.setattr(Stream, "send_at_once", lambda stream, kind: False)
                with pytest.raises(MigrationError):
                    move(other, a)
                other.stop()
            else:
                move(other, a)
            running.thread.join(TIMEOUT)
            there.wait().close()

    for fail in (True, False):
        once(fail)  # modules, and pools of threads and memory
    fds, threads, maps = everything()
    for i in range(10):
        once(i % 2)
    now = everything()
    assert now[:2] == (fds, threads)
    assert now[2] < maps + 10


@pytest.mark.slow
def test_cancel_at_any_moment(machine):
    for phase in ("copying", "stopped"):
        a, b = socket.socketpair()
        there = Receiving(b)
        migration = Migration(machine, a, "there")
        sending = migration.stream.send

        def send(kind, *rest, migration=migration, phase=phase, sending=sending):
            if migration.progress.phase == phase:
                assert migration.cancel()
            sending(kind, *rest)

        migration.stream.send = send
        with pytest.raises(MigrationError, match=r"^cancelled$"):
            migration.run()
        assert migration.progress.phase == "failed"
        assert there.wait().machine is None
        assert goes_on(machine)


def test_a_machine_that_does_not_run():
    with walker(1) as machine:
        a, b = socket.socketpair()
        there = Receiving(b)
        with pytest.raises(MigrationError, match="not running"):
            move(machine, a)
        assert there.wait().error is not None


@pytest.mark.slow
def test_a_guest_that_ends_first(machine, monkeypatch):
    a, b = socket.socketpair()
    there = Receiving(b)

    def end(progress):
        if progress.phase == "copying":
            machine.stop()

    with pytest.raises(MigrationError, match="just ended"):
        Migration(machine, a, "there", on_progress=end).run()
    assert there.wait().machine is None


def test_a_device_that_is_not_there(machine):
    """It is refused by its place, before memory moves."""
    a, b = socket.socketpair()
    there = Receiving(b, prepare=lambda machine: None)
    migration = Migration(machine, a, "there")
    with pytest.raises(MigrationError, match="refuses: the guest has devices that there are none of here: port 0x50"):
        migration.run()
    assert migration.rounds == []
    assert goes_on(machine)
    assert there.wait().machine is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ioeventfd", "coalesced", "irqfd"])
def test_what_a_guest_has_had_made_by_hypercall_moves(name, system):
    """Doorbells, coalesced pages and irqfds are made again where the guest goes, at whatever moment it moves."""
    test_gallery_guests_move_at_a_random_moment(name, system)
