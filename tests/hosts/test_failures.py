"""What goes wrong with a host ends in an error that says so and shows the last console lines: never in silence, never with success.
What may come differently from boot to boot goes well all the same."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pykvm.errors import HostError
from pykvm.hosts import boot
from pykvm.hosts.emulators import Qemu

HOST_RUN = [sys.executable, "-m", "pykvm", "host", "run", "--cpu", "amd"]


def test_kernel_panic():
    with pytest.raises(HostError, match="panicked") as caught, boot("amd", append="rdinit=/nowhere"):
        pass
    assert "Kernel panic" in caught.value.console


def test_the_disks_have_each_others_names(monkeypatch):
    """As after a race of Linux's sd driver, which probes disks side by side: the root image is sdb, the exchange disk sda."""
    command = Qemu.command

    def swapped(self, model, plan):
        words = command(self, model, plan)
        at = [n for n, word in enumerate(words) if ",if=ide,index=" in word]
        assert len(at) == 2
        for n in at:
            words[n] = words[n].replace(",index=0", ",index=2").replace(",index=1", ",index=0").replace(",index=2", ",index=1")
        return words

    monkeypatch.setattr(Qemu, "command", swapped)
    with boot("amd") as host:
        assert host.run(["pykvm", "--version"]).returncode == 0


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


def test_emulator_and_folder_go_when_pykvm_is_killed(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([*HOST_RUN, "--", "sleep", "1000"], env=env, stderr=subprocess.DEVNULL)
    wait_until(lambda: emulators(str(tmp_path)))
    process.kill()
    process.wait()
    wait_until(lambda: not emulators(str(tmp_path)) and not os.listdir(tmp_path))


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
