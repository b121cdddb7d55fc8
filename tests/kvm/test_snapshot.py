"""Snapshot files: written and read, damaged ones refused, kills at any moment, the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pykvm import ConfigError, Machine, StateError
from pykvm.state.snapshot import read_state
from tests.conftest import TIME_SCALE, TIMEOUT
from tests.kvm.states import end, start, stop_at


@pytest.fixture
def saved(tmp_path):
    with start("hello") as machine:
        assert stop_at(machine, 5)
        machine.snapshot(tmp_path / "snap")
    return tmp_path / "snap"


def test_it_goes_on(saved):
    before = {name: (saved / name).read_bytes() for name in ("state.json", "memory-0")}
    for verify in (True, False):
        with Machine.restore(saved, verify=verify) as machine:
            assert end(machine) == ("exit", 0, "Hello from long mode.\n")
    assert before == {name: (saved / name).read_bytes() for name in before}  # the guest's writes are its own
    assert os.stat(saved / "memory-0").st_blocks * 512 < os.stat(saved / "memory-0").st_size // 4  # zero pages take no room


def test_every_kind_of_slot_comes_back(tmp_path):
    for name in ("rom_write", "slot_remap", "ipi"):
        with start(name) as machine:
            assert stop_at(machine, 1)
            machine.snapshot(tmp_path / name)
        with Machine.restore(tmp_path / name) as machine:
            assert end(machine)[:2] == ("exit", 0), name


def test_a_new_one_takes_the_place_of_an_old_one(saved, tmp_path):
    first, _ = read_state(saved)
    with Machine.restore(saved) as old:  # which lives on, on files that are gone
        with start("halt") as machine:
            machine.snapshot(saved)
        assert read_state(saved)[0].machine["image"] != first.machine["image"]
        assert end(old)[1] == 0
    assert sorted(os.listdir(tmp_path)) == ["snap"]


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_is_no_snapshot_is_left_alone(what, tmp_path):
    place = tmp_path / "mine"
    if what == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "mine").write_text("mine")
    with start("halt") as machine, pytest.raises(ConfigError, match="no snapshot"):
        machine.snapshot(place)
    assert (place if what == "file" else place / "mine").read_text() == "mine"
    with pytest.raises(StateError, match="no snapshot"):
        Machine.restore(place)


def test_a_place_that_cannot_be_written(tmp_path):
    with start("halt") as machine, pytest.raises(StateError, match="cannot be written"):
        machine.snapshot(tmp_path / "nowhere" / "snap")


def damage(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0, 1, 20, 70, 400, 5000, -2])
def test_a_flipped_bit_in_the_state(saved, where):
    damage(saved / "state.json", where)
    with pytest.raises(StateError):
        Machine.restore(saved)


@pytest.mark.parametrize("where", [0x100000, 0x100010, 0x3FFFFF, 0x800000])
def test_a_flipped_bit_in_the_memory(saved, where):
    damage(saved / "memory-0", where)
    with pytest.raises(StateError, match=f"{where & ~0xFFFFF:#x} is wrong: it is damaged"):
        Machine.restore(saved)
    Machine.restore(saved, verify=False).close()  # who does not look does not see


@pytest.mark.parametrize("name", ["state.json", "memory-0"])
@pytest.mark.parametrize("left", [0, 0.5, 0.99])
def test_a_truncated_file(saved, name, left):
    size = os.stat(saved / name).st_size
    os.truncate(saved / name, int(size * left))
    with pytest.raises(StateError, match=r"truncated|no snapshot|first line"):
        Machine.restore(saved, verify=False)


def test_a_missing_file(saved):
    os.unlink(saved / "memory-0")
    with pytest.raises(StateError, match="memory-0"):
        Machine.restore(saved)


def test_a_later_format(saved):
    head, _, body = (saved / "state.json").read_bytes().partition(b"\n")
    about = json.loads(head) | {"pykvm snapshot": 2}
    (saved / "state.json").write_bytes(json.dumps(about).encode() + b"\n" + body)
    with pytest.raises(StateError, match="format 2, this pykvm knows 1"):
        Machine.restore(saved)


SAVER = """
import sys
from pykvm import Machine
a, b = Machine("hello"), Machine("halt", memory="8M")
print("ready", flush=True)
while True:
    for machine in (a, b):
        machine.memory.write_u32(0x200000 if machine is a else 0x100000, 1)
        machine.snapshot(sys.argv[1])
"""


@pytest.mark.slow
def test_kills_leave_a_whole_snapshot(tmp_path):
    """kill -9 at many moments: what is there can be restored each time, and nothing else stays for long."""
    place = tmp_path / "snap"
    with start("hello") as machine:
        machine.snapshot(place)
    images, delay, kills = set(), 0.001 * TIME_SCALE, 0
    while kills < 25 or len(images) < 2:  # on a busy machine it takes longer until the second one is there
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(place)], stdout=subprocess.PIPE)
        assert saver.stdout.readline() == b"ready\n"
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        with Machine.restore(place) as machine:
            images.add(os.path.basename(machine.info.path))
        kills += 1
        delay = delay + 0.007 * TIME_SCALE if kills < 25 else 2 * delay
        assert delay < 10 * TIMEOUT
    with start("halt") as machine:
        machine.snapshot(place)
    assert os.listdir(tmp_path) == ["snap"]


# --- the command line -------------------------------------------------------------------------------------------------


def pykvm(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pykvm", *map(str, arguments)], capture_output=True, text=True, timeout=6 * TIMEOUT, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_commands(tmp_path):
    place = tmp_path / "snap"
    done = pykvm("snapshot", "hello", "--at", 5, "--out", place)
    assert (done.returncode, done.stdout) == (0, "Hello\n")
    done = pykvm("resume", place)
    assert (done.returncode, done.stdout, done.stderr) == (0, " from long mode.\n", "")
    done = pykvm("resume", place, "--no-verify", "--json")
    assert json.loads(done.stdout)["console"] == "Hello from long mode.\n"
    assert "not verified" in done.stderr
    done = pykvm("snapshot", "spin", "--at", "0.05", "--out", place, "--json")
    assert json.loads(done.stdout)["memory"] > 0
    done = pykvm("resume", place, "--timeout", 0.1)
    assert done.returncode == 124
    damage(place / "state.json", 300)
    done = pykvm("resume", place)
    assert done.returncode == 65
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_commands_that_cannot_be(tmp_path):
    done = pykvm("snapshot", "hello", "--at", 500, "--out", tmp_path / "snap")
    assert done.returncode == 1
    assert "ended first" in done.stderr
    assert not (tmp_path / "snap").exists()
    assert pykvm("snapshot", "hello", "--at", 5).returncode == 64
    assert pykvm("snapshot", "hello", "--out", tmp_path / "snap").returncode == 64
    assert pykvm("resume", tmp_path / "snap").returncode == 65
