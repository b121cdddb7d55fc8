"""The control socket of a running machine: what it answers, and that no client disturbs the guest."""

import json
import os
import random
import re
import socket
import stat
from threading import Thread

import pytest

import pykvm
from pykvm.state.remote import LONGEST_LINE, MOST_CLIENTS, ControlClient, ControlServer
from tests.conftest import TIMEOUT
from tests.kvm.moving import CONSOLE, PASSES, Receiving, Running, Turnstile, exit_code, goes_on, until, walker
from tests.kvm.test_sleep import BUTTON, sleeper, until_asleep

pytestmark = pytest.mark.slow


class Served:
    """A guest that runs, and its control socket."""

    def __init__(self, path):
        self.path = str(path)
        self.machine = walker(PASSES // 2)
        self.said = []
        self.server = ControlServer(self.machine, self.path, say=self.said.append)
        self.running = Running(self.machine)

    def ask(self, command, **arguments):
        with ControlClient(self.path) as client:
            return client.ask(command, **arguments)

    def raw(self, data):
        """The answers to these bytes, by a client that hangs up then."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(self.path)
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as file:
                return [json.loads(line) for line in file]

    def close(self):
        self.machine.stop()
        self.running.thread.join(TIMEOUT)
        self.server.close()
        self.machine.close()


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path / "control")
    yield served
    served.close()


def receive_at(path):
    """A destination that listens at ``path``, in a thread."""
    from pykvm.unixsocket import UnixListener

    box = []

    def work():
        with UnixListener(str(path)) as listener:
            box.append(None)
            sock, _ = listener.socket.accept()
        box.append(Receiving(sock, most=PASSES // 2).wait())

    thread = Thread(target=work, daemon=True)
    thread.start()
    until(lambda: box)

    def end():
        thread.join(TIMEOUT)
        return box[1]

    return end


def test_status_pause_resume_quit(served):
    until(lambda: len(served.machine.console.data) == PASSES // 2)
    status = served.ask("status")
    assert (status["status"], status["cpus"], status["memory"], status["console"]) == ("running", 1, 4 << 20, PASSES // 2)
    assert served.ask("pause") == {"ok": True, "status": "paused"}
    assert served.ask("pause")["ok"]
    assert served.ask("status")["status"] == "paused"
    before = served.machine.memory.read(0x200000, 4096)
    assert served.machine.memory.read(0x200000, 4096) == before
    assert served.ask("resume") == {"ok": True, "status": "running"}
    assert goes_on(served.machine)
    assert served.ask("quit") == {"ok": True}
    assert served.running.end().reason == "quit"
    assert served.ask("status")["status"] == "not running"


def test_only_its_owner_may_connect(served):
    assert stat.S_IMODE(os.stat(served.path).st_mode) == 0o600


def test_it_goes_with_the_machine(tmp_path):
    served = Served(tmp_path / "control")
    served.close()
    assert not os.path.exists(served.path)
    with pytest.raises(pykvm.ConfigError, match="was it started with --control"):
        served.ask("status")


def test_snapshot(served, tmp_path):
    """The guest goes on; so does its copy, from where it stood."""
    until(lambda: len(served.machine.console.data) == PASSES // 2)
    out = str(tmp_path / "snap")
    assert served.ask("snapshot", dir=out) == {"ok": True, "dir": out}
    assert goes_on(served.machine)
    with pykvm.Machine.restore(out) as copy:
        copy.add_device(Turnstile(PASSES), port=0x50)
        result = copy.run(TIMEOUT)
        assert (result.console, result.exit_code) == (CONSOLE, exit_code())
    served.ask("pause")
    served.ask("snapshot", dir=out)
    assert served.ask("status")["status"] == "paused"
    with pytest.raises(pykvm.ConfigError, match="no snapshot"):
        served.ask("snapshot", dir=str(tmp_path))
    served.ask("resume")
    assert goes_on(served.machine)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"hello", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[1]", "a JSON object such as"),
        (b"3", "a JSON object such as"),
        (b"{}", "a JSON object such as"),
        (b'{"command": 3}', "a JSON object such as"),
        (b'{"command": "fly"}', "unknown command 'fly': use one of status, pause"),
        (b'{"command": "status", "loud": 1}', "status takes no 'loud': it takes nothing"),
        (b'{"command": "migrate"}', "migrate needs 'to'"),
        (b'{"command": "migrate", "to": 3}', "migrate: to has the wrong type"),
        (b'{"command": "migrate", "to": "tcp:host"}', "give unix:PATH"),
        (b'{"command": "migrate", "to": "unix:/nowhere/at/all"}', "nobody receives at"),
        (b'{"command": "migrate", "to": "unix:/x", "downtime": -1}', "positive"),
        (b'{"command": "migrate", "to": "unix:/x", "downtime": true}', "wrong type"),
        (b'{"command": "migrate", "to": "unix:/x", "downtime": NaN}', "positive"),
        (b'{"command": "snapshot"}', "snapshot needs 'dir'"),
        (b'{"command": "cancel"}', "no migration is on its way"),
        (b"[" * 30000, "no JSON"),
    ],
)
def test_bad_lines(served, line, error):
    """Each gets its answer, and so does what comes after it."""
    answers = served.raw(line + b'\n\n{"command": "status"}\n')
    assert [answer["ok"] for answer in answers] == [False, True]
    assert error in answers[0]["error"]
    assert goes_on(served.machine)


def test_rubbish(served):
    """Whatever the lines are, each is answered, and none of them stops the guest."""
    rng = random.Random(3)
    words = [b"{", b"}", b'"command"', b":", b'"status"', b'"pau', b"null", b"1e999", b"\xff", b"\0", b"[", b'"to"', b",", b" ", b"\\u"]
    lines = [rng.randbytes(rng.randrange(1, 200)).replace(b"\n", b"") or b"x" for _ in range(150)]
    lines += [b"x" + b"".join(rng.choices(words, k=rng.randrange(1, 12))) for _ in range(150)]
    lines = [line for line in lines if line.strip()]
    answers = served.raw(b"\n".join(lines) + b"\n")
    assert [answer["ok"] for answer in answers] == [False] * len(lines)
    assert goes_on(served.machine)


def test_a_line_without_end(served):
    answers = served.raw(b"x" * (LONGEST_LINE + 5000))
    assert answers == [{"ok": False, "error": f"a line has at most {LONGEST_LINE} bytes"}]
    assert goes_on(served.machine)


def test_clients_that_stall_and_go(served):
    """One sends half a line and waits, one asks and never reads, many just connect; others are served."""
    clients = []
    for data in (b'{"comm', b'{"command": "status"}\n' * 2000, *[b""] * (MOST_CLIENTS - 4)):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(served.path)
        sock.sendall(data)
        clients.append(sock)
    assert served.ask("status")["ok"]
    assert goes_on(served.machine)
    for _ in range(2 * MOST_CLIENTS):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(served.path)
            clients.append(sock.dup())
    until(lambda: len(served.server._clients) == MOST_CLIENTS)
    for sock in clients:
        sock.close()
    until(lambda: not served.server._clients)
    assert served.ask("status")["ok"]


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path):
    path = str(tmp_path / "control")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)
    served = Served(path)
    with walker(1) as other, pytest.raises(pykvm.ConfigError, match="Address already in use"):
        ControlServer(other, path)
    assert served.ask("status")["ok"]
    served.close()
    (tmp_path / "control").write_text("a file of somebody's")
    with walker(1) as other, pytest.raises(pykvm.ConfigError, match="Address already in use"):
        ControlServer(other, path)
    assert (tmp_path / "control").read_text() == "a file of somebody's"


def test_migrate_and_wait(served, tmp_path):
    end = receive_at(tmp_path / "there")
    with ControlClient(served.path) as client:
        client.send("migrate", to=f"unix:{tmp_path / 'there'}", wait=True)
        answer = client.line()
        while "progress" in answer:
            answer = client.line()
    assert answer["ok"] and answer["report"]["to"] == f"unix:{tmp_path / 'there'}"
    assert served.running.end().reason == "migrated"
    status = served.ask("status")
    assert status["status"] == "ended" and status["migration"]["phase"] == "done"
    for command in ("pause", "resume"):
        with pytest.raises(pykvm.ConfigError, match="has moved to"):
            served.ask(command)
    there = end()
    there.machine.bus.pio.find(0x50, 1).device.most = PASSES
    result = there.running.end()
    assert (result.console, result.exit_code) == (CONSOLE, exit_code())
    there.close()
    assert served.said == []


def test_one_migration_at_a_time_and_cancel(served, tmp_path):
    """To a destination that accepts and says nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen(4)
        to = f"unix:{tmp_path / 'silent'}"
        assert served.ask("migrate", to=to)["ok"]
        for command, arguments in (("migrate", {"to": to}), ("pause", {}), ("resume", {})):
            with pytest.raises(pykvm.ConfigError, match="on its way to somewhere else"):
                served.ask(command, **arguments)
        assert served.ask("status")["migration"]["phase"] == "connecting"
        assert served.ask("cancel")["ok"]
        assert served.ask("status")["migration"]["error"] == "cancelled"
        assert served.said == ["no migration: cancelled"]
        assert goes_on(served.machine)
        assert served.ask("migrate", to=to)["ok"]  # another one may be tried
        served.ask("quit")
        assert served.running.end().reason == "quit"


def test_a_migration_that_fails_says_why_to_who_waits(served, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as rude:
        rude.bind(str(tmp_path / "rude"))
        rude.listen(1)
        with ControlClient(served.path) as client:
            client.send("migrate", to=f"unix:{tmp_path / 'rude'}", wait=True)
            sock, _ = rude.accept()
            sock.sendall(b"go away, whoever you are, nobody is at home")
            sock.close()
            answer = client.line()
            while "progress" in answer:
                answer = client.line()
    assert not answer["ok"] and not answer["uncertain"]
    assert "connection" in answer["error"] or "no pykvm migration" in answer["error"]
    assert goes_on(served.machine)


def test_the_client_that_asked_goes_and_the_migration_does_not(served, tmp_path):
    end = receive_at(tmp_path / "there")
    client = ControlClient(served.path)
    client.send("migrate", to=f"unix:{tmp_path / 'there'}", wait=True)
    client.close()
    assert served.running.end().reason == "migrated"
    there = end()
    assert goes_on(there.machine)
    there.close()


def test_a_paused_guest_migrates_and_arrives_paused(served, tmp_path):
    end = receive_at(tmp_path / "there")
    served.ask("pause")
    with ControlClient(served.path) as client:
        client.send("migrate", to=f"unix:{tmp_path / 'there'}", wait=True)
        answer = client.line()
        while "progress" in answer:
            answer = client.line()
    assert answer["ok"] and answer["report"]["paused"]
    assert served.running.end().reason == "migrated"
    there = end()
    with ControlServer(there.machine, str(tmp_path / "control there")), ControlClient(str(tmp_path / "control there")) as client:
        assert client.ask("status")["status"] == "paused"
        before = there.machine.memory.read(0x200000, 48 * 4096)
        assert there.machine.memory.read(0x200000, 48 * 4096) == before
        assert client.ask("resume")["status"] == "running"
        assert goes_on(there.machine)
    there.close()


def test_the_machine_ends_amid_a_migration(tmp_path):
    served = Served(tmp_path / "control")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen(1)
        assert served.ask("migrate", to=f"unix:{tmp_path / 'silent'}")["ok"]
        served.close()
    assert len(served.said) == 1
    assert re.fullmatch("no migration: the guest .* ended", served.said[0])


def test_uncertain_waits_for_a_decision(served, tmp_path, monkeypatch):
    from pykvm import MigrationError
    from pykvm.state import stream as wire
    from pykvm.state.stream import Stream

    sending = Stream.send

    def lose(stream, kind, *rest):
        if kind == wire.RUNNING:
            raise MigrationError("lost")
        sending(stream, kind, *rest)

    monkeypatch.setattr(Stream, "send", lose)
    end = receive_at(tmp_path / "there")
    served.ask("migrate", to=f"unix:{tmp_path / 'there'}")
    there = end()
    until(lambda: "error" in served.ask("status")["migration"])
    status = served.ask("status")
    assert status["migration"]["phase"] == "uncertain"
    assert status["status"] == "paused" and "no answer came" in status["migration"]["error"]
    assert goes_on(there.machine)
    assert "no answer came" in served.said[0]
    with pytest.raises(pykvm.ConfigError, match=r"may run at .* already: resume this one first"):
        served.ask("migrate", to="unix:/somewhere/else")
    served.ask("quit")
    assert served.running.end().reason == "quit"
    there.close()


def test_the_power_button(served, tmp_path):
    """A machine without one says so; one with it, which sleeps, is woken."""
    answer = served.raw(b'{"command": "power"}\n')[0]
    assert not answer["ok"] and "no power button" in answer["error"]
    with sleeper(None, enable=0) as machine:
        until_asleep(machine)
        running = Running(machine)
        with ControlServer(machine, str(tmp_path / "other")), ControlClient(str(tmp_path / "other")) as client:
            assert client.ask("power") == {"ok": True}
            assert running.end().exit_code == BUTTON
