"""What goes wrong with a host ends in an error that says so and shows the last console lines: never in silence, never with success."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pykvm.errors import HostError
from pykvm.hosts import boot

HOST_RUN = [sys.executable, "-m", "pykvm", "host", "run", "--cpu", "amd"]


def test_kernel_panic():
    with pytest.raises(HostError, match="panicked") as caught, boot("amd", append="rdinit=/nowhere"):
        pass
    assert "Kernel panic" in caught.value.console


def test_no_end_marker_because_the_agent_died():
    with boot("amd") as host, pytest.raises(HostError, match="the agent ended") as caught:
        host.run(["sh", "-c", "kill -9 $(pidof python3); sleep 100"], timeout=120)
    assert "pykvm-host: the agent ended" in caught.value.console


def test_a_full_disk_then_an_emulator_that_dies():
    with boot("amd") as host:
        exchange = host.folder / "exchange.img"
        exchange.rename(host.folder / "aside")
        exchange.symlink_to("/dev/full")
        with pytest.raises(HostError, match="No space left"):
            host.put(__file__)
        exchange.unlink()
        (host.folder / "aside").rename(exchange)
        assert host.run(["true"]).returncode == 0
        os.kill(emulators(str(host.folder))[0], signal.SIGKILL)
        with pytest.raises(HostError, match=r"QEMU ended|closed the serial line"):
            host.run(["true"], timeout=60)


def test_a_command_that_never_ends_is_killed():
    done = subprocess.run([*HOST_RUN, "--timeout", "2", "--", "sleep", "1000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 124
    assert "sleep 1000 was still running after 2 s" in done.stderr


def test_the_emulator_goes_when_pykvm_is_killed(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([*HOST_RUN, "--", "sleep", "1000"], env=env, stderr=subprocess.DEVNULL)
    wait_until(lambda: emulators(str(tmp_path)))
    process.kill()
    process.wait()
    wait_until(lambda: not emulators(str(tmp_path)))


def emulators(folder):
    """The pids of emulators whose command line names ``folder``."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if words[0].startswith((b"qemu-system", b"bochs")) and folder.encode() in b" ".join(words):
            found.append(int(pid))
    return found


def wait_until(condition):
    """Up to two minutes: that is patience, not an assertion about speed."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came true")
