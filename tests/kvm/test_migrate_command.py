"""pykvm run --control, receive, migrate and control, as processes: a guest moves with its console; either side may be killed."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import TIMEOUT
from tests.kvm.moving import until

pytestmark = pytest.mark.slow
PYKVM = [sys.executable, "-m", "pykvm"]


def heed_ctrl_c():
    """Whoever started pytest in the background made it, and its children, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start():
    """start(*arguments) -> a process with pipes; all are gone at the end."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [*PYKVM, *arguments], preexec_fn=heed_ctrl_c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def pykvm(*arguments):
    done = subprocess.run([*PYKVM, *arguments], capture_output=True, text=True, timeout=3 * TIMEOUT)
    return done.returncode, done.stdout, done.stderr


def read(process, size):
    data = b""
    while len(data) < size:
        piece = process.stdout.read(size - len(data))
        assert piece, process.stderr.read().decode()
        data += piece
    return data.decode()


@pytest.fixture
def echo(start, tmp_path):
    """The guest "echo", which answers each letter with the capital one, and its control socket."""
    path = str(tmp_path / "control")
    process = start("run", "echo", "--control", f"unix:{path}", "--timeout", str(4 * TIMEOUT))
    until(lambda: pykvm("control", path, "status")[0] == 0)
    return process, path


@pytest.fixture
def there(start, tmp_path):
    """Somebody who receives, and where."""
    path = str(tmp_path / "there")
    process = start("receive", f"unix:{path}", "--timeout", str(4 * TIMEOUT))
    assert process.stderr.readline() == f"pykvm: waiting at unix:{path} for a guest\n".encode()
    return process, path


def test_a_guest_moves_with_its_console(echo, there):
    (source, control), (destination, where) = echo, there
    source.stdin.write(b"abc")
    assert read(source, 3) == "ABC"
    status, out, err = pykvm("migrate", control, "--to", f"unix:{where}", "--json")
    assert status == 0, err
    report = json.loads(out)["report"]
    assert report["memory"] == 2 << 20 and report["rounds"]
    assert "round 1" in err or not err
    out, err = source.communicate(timeout=TIMEOUT)
    assert (source.returncode, out) == (0, b"\n")
    assert b"has moved to unix:" in err
    assert not os.path.exists(control) and not os.path.exists(where)
    destination.stdin.write(b"def\n")
    out, err = destination.communicate(timeout=TIMEOUT)
    assert (destination.returncode, out) == (0, b"DEF\n"), err


def test_the_report_for_a_person(echo, there):
    status, out, err = pykvm("migrate", echo[1], "--to", f"unix:{there[1]}", "--downtime", "50ms")
    assert status == 0, err
    assert "stood still for" in out and "goal 50 ms" in out
    assert "dirty after" in out


def test_a_paused_guest_moves_and_waits_there(echo, there, start, tmp_path):
    """Where nobody could resume it, it is refused, and stays paused where it was."""
    (source, control), (destination, where) = echo, there
    assert pykvm("control", control, "pause")[0] == 0
    status, _, err = pykvm("migrate", control, "--to", f"unix:{where}")
    assert status == 75 and "start `pykvm receive` with --control" in err
    assert destination.wait(TIMEOUT) == 75
    assert pykvm("control", control, "status")[1].startswith("paused: ")
    other = str(tmp_path / "control there")
    destination = start("receive", f"unix:{where}", "--control", f"unix:{other}", "--timeout", str(4 * TIMEOUT))
    destination.stderr.readline()
    status, out, err = pykvm("migrate", control, "--to", f"unix:{where}")
    assert status == 0 and "it was paused, and is so there" in out, err
    assert source.wait(TIMEOUT) == 0
    destination.stdin.write(b"there\n")
    until(lambda: pykvm("control", other, "status")[1].startswith("paused: "))
    assert pykvm("control", other, "resume")[0] == 0
    out, err = destination.communicate(timeout=TIMEOUT)
    assert (destination.returncode, out) == (0, b"THERE\n"), err
    assert b"the guest came paused: pykvm control" in err


def test_the_destination_is_killed(echo, there, start):
    """While it is stopped amid the move; the guest goes on where it was, and moves with the next attempt."""
    (source, control), (destination, where) = echo, there
    os.kill(destination.pid, signal.SIGSTOP)
    moving = start("migrate", control, "--to", f"unix:{where}")
    until(lambda: "migration" in json.loads(pykvm("control", control, "status", "--json")[1]))
    destination.kill()
    out, err = moving.communicate(timeout=TIMEOUT)
    assert moving.returncode == 75, err
    assert b"the connection broke" in err or b"closed the connection" in err
    source.stdin.write(b"still\n")
    out, err = source.communicate(timeout=TIMEOUT)
    assert (source.returncode, out) == (0, b"STILL\n"), err


def test_the_source_is_killed(echo, there, start):
    """Nothing of the guest starts at the destination."""
    (source, control), (destination, where) = echo, there
    os.kill(destination.pid, signal.SIGSTOP)
    start("migrate", control, "--to", f"unix:{where}")
    until(lambda: "migration" in json.loads(pykvm("control", control, "status", "--json")[1]))
    source.kill()
    source.wait()
    os.kill(destination.pid, signal.SIGCONT)
    out, err = destination.communicate(timeout=TIMEOUT)
    assert (destination.returncode, out) == (75, b"")
    assert b"closed the connection" in err or b"connection broke" in err
    assert not os.path.exists(where)


def test_a_destination_that_stalls_and_ctrl_c(echo, there, start):
    (source, control), (destination, where) = echo, there
    os.kill(destination.pid, signal.SIGSTOP)
    status, out, err = pykvm("migrate", control, "--to", f"unix:{where}", "--patience", "0.5")
    assert status == 75 and "nothing for 0.5 seconds" in err
    moving = start("migrate", control, "--to", f"unix:{where}")  # its listener is still there, if it has not accepted yet
    until(lambda: moving.poll() is not None or '"connecting"' in pykvm("control", control, "status", "--json")[1])
    moving.send_signal(signal.SIGINT)
    out, err = moving.communicate(timeout=TIMEOUT)
    assert moving.returncode in (130, 64), err
    source.stdin.write(b"still\n")
    out, err = source.communicate(timeout=TIMEOUT)
    assert (source.returncode, out) == (0, b"STILL\n"), err


def test_ctrl_c_at_the_source(echo, there, start):
    """Its run ends, and a move that was on its way with it."""
    (source, control), (destination, where) = echo, there
    os.kill(destination.pid, signal.SIGSTOP)
    moving = start("migrate", control, "--to", f"unix:{where}")
    until(lambda: "migration" in json.loads(pykvm("control", control, "status", "--json")[1]))
    source.send_signal(signal.SIGINT)
    _, err = source.communicate(timeout=TIMEOUT)
    assert source.returncode == 130, err
    assert b"interrupted" in err and b"no migration: the guest" in err and b"moved" not in err
    _, err = moving.communicate(timeout=TIMEOUT)
    assert moving.returncode == 75, err
    os.kill(destination.pid, signal.SIGCONT)
    out, err = destination.communicate(timeout=TIMEOUT)
    assert (destination.returncode, out) == (75, b""), err


def test_control(echo):
    source, control = echo
    status, out, _ = pykvm("control", control, "status")
    assert status == 0 and out.startswith("running: ")
    assert pykvm("control", control, "pause")[0] == 0
    source.stdin.write(b"x")
    assert pykvm("control", f"unix:{control}", "status")[1].startswith("paused: ")
    assert pykvm("control", control, "resume")[0] == 0
    assert read(source, 1) == "X"
    assert pykvm("control", control, "quit")[0] == 0
    _, err = source.communicate(timeout=TIMEOUT)
    assert source.returncode == 0 and b"ended from the control socket" in err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["control", "/nowhere", "status"], "no machine answers at /nowhere"),
        (["control", "/nowhere", "fly"], "unknown command 'fly'"),
        (["control", "/nowhere", "snapshot"], "needs a directory"),
        (["control", "/nowhere", "pause", "now"], "one word too many"),
        (["control", "/nowhere", "migrate"], "pykvm migrate /nowhere --to"),
        (["migrate", "/nowhere"], "where to?"),
        (["migrate", "/nowhere", "--to", "tcp:host:1"], "give unix:PATH"),
        (["migrate", "/nowhere", "--to", "unix:/x"], "no machine answers"),
        (["migrate", "/nowhere", "--to", "unix:/x", "--downtime", "soon"], "is not a time"),
        (["receive", "/somewhere"], "give unix:PATH"),
        (["receive", "unix:/no/such/directory"], "No such file or directory"),
        (["receive", "unix:" + "x" * 200], "at most 107 bytes"),
        (["run", "hello", "--control", "unix:/tmp/x", "--gdb"], "--gdb and --control: choose one"),
        (["gdb", "hello", "--control", "unix:/tmp/x"], "--gdb and --control: choose one"),
        (["receive", "unix:/tmp/x", "--wait"], "--wait is about gdb"),
        (["run", "hello", "--control", "/tmp/x"], "--control '/tmp/x': give unix:PATH"),
        (["run", "hello", "--control", "unix:/no/such/directory"], "No such file or directory"),
    ],
)
def test_mistakes(arguments, why):
    status, out, err = pykvm(*arguments)
    assert (status, out) == (64, ""), err
    assert why in err and err.count("\n") == 1


def test_nobody_comes(tmp_path):
    status, _, err = pykvm("receive", f"unix:{tmp_path / 'there'}", "--within", "0.2")
    assert status == 75 and "no guest came in 0.2 seconds" in err
    assert not os.path.exists(tmp_path / "there")
