"""What goes wrong while a guest moves: whatever it is, one copy runs, never two."""

import gc
import os
import random
import signal
import socket
import threading

import pytest

from pykvm import MigrationError
from pykvm.state import migrate as source
from pykvm.state import stream as wire
from pykvm.state.migrate import Migration
from pykvm.state.receive import Incoming
from pykvm.state.stream import Stream
from tests.conftest import TIMEOUT
from tests.kvm.moving import (
    CONSOLE,
    PASSES,
    PATIENCE,
    Link,
    Receiving,
    Running,
    Turnstile,
    exit_code,
    goes_on,
    half_way,
    move,
    until,
    walker,
)

pytestmark = pytest.mark.usefixtures("patient_source")


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
            commit_was_cut = self.direction == "forward" and self.offset < self.sent  # else it arrived whole, and the answer was lost
            assert (self.there.machine is None) == commit_was_cut


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


def test_the_wire_is_cut_at_a_few_places():
    """Amid HELLO, STATE and the first round's pages, and before and amid WELCOME. The 48 pages that the guest writes are not over yet."""
    assert set(cut_everywhere([0, 40, 5000, 150_000], [0, 40])) == {"failed"}


class Forked:
    """A process that does ``work()`` and nothing else; gone at the end at the latest. ``closed``: a socket that is not its own."""

    def __init__(self, work, closed):
        self.id = os.fork()
        if self.id == 0:
            try:
                closed.close()
                work()
            finally:
                os._exit(0)

    def kill(self):
        if self.id:
            os.kill(self.id, signal.SIGKILL)
            os.waitpid(self.id, 0)
            self.id = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


@pytest.mark.parametrize("when", ["copying", "ready"])
def test_the_destination_is_killed(when, patient_source, monkeypatch):
    """SIGKILL, amid the rounds or when it waits for COMMIT alone: the guest goes on where it was, and moves with the next attempt."""
    a, b = socket.socketpair()
    receive = Incoming(b, prepare=lambda machine: machine.add_device(Turnstile(PASSES), port=0x50)).take
    with Forked(receive, a) as child, half_way() as machine, monkeypatch.context() as patch:
        b.close()
        if when == "ready":
            at_once = Stream.send_at_once
            patch.setattr(Stream, "send_at_once", lambda stream, kind: (child.kill(), at_once(stream, kind))[1])
        migration = Migration(machine, a, "there", on_progress=lambda p: child.kill() if when == p.phase == "copying" else None)
        with pytest.raises(MigrationError, match="went away when it was ready" if when == "ready" else "connection"):
            migration.run()
        assert machine.handed_to is None and goes_on(machine)
        patch.undo()
        a, b = socket.socketpair()
        there = Receiving(b)
        move(machine, a)
        result = there.wait().running.end()
        assert (result.console, result.exit_code) == (CONSOLE, exit_code())
        there.close()


def test_the_source_is_killed(patient_source):
    """SIGKILL amid the rounds: nothing of the guest starts at the destination."""

    def source():
        with half_way() as machine:
            Migration(machine, a, "there", on_progress=lambda p: threading.Event().wait() if p.phase == "copying" else None).run()

    a, b = socket.socketpair()
    with Forked(source, b) as child:
        a.close()
        there = Receiving(b)
        until(lambda: there.incoming.machine is not None)
        child.kill()
    assert there.wait().machine is None
    assert "connection" in str(there.error)


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
