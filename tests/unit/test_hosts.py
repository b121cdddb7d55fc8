"""Emulated hosts without booting one: what is missing is named, with the way to get it; the cache; model lists; and, with a program
that plays the emulator and the agent in it, the session: who is taken for the agent, exit statuses, what is left when it is killed."""

import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pykvm.cli import main
from pykvm.errors import ConfigError, HostError
from pykvm.hosts import boot, debian, emulators, image, session, wire
from pykvm.hosts.cache import cached


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A PATH with nothing but the commands that are put there, and an empty cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "cache"))

    def add(name, script="exit 0"):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return add


@pytest.mark.parametrize(("cpu", "package"), [("amd", "qemu-system-x86"), ("intel", "bochs bochs-term bochsbios vgabios")])
def test_a_missing_emulator_is_named_with_its_packages(fake, cpu, package):
    with pytest.raises(HostError, match="sudo apt-get install") as caught, boot(cpu):
        pass
    assert package in str(caught.value)


def test_no_kernel_package(fake):
    for name in ("apt-get", "dpkg", "apt-cache"):
        fake(name)
    with pytest.raises(HostError, match="apt knows no linux-image-cloud-amd64: run sudo apt-get update"):
        debian.fetch()


def test_a_download_that_fails_says_why_and_leaves_nothing(fake, tmp_path):
    fake("dpkg")
    fake("apt-cache", "echo '  Depends: linux-image-6.1.0-1-cloud-amd64'")
    fake("apt-get", "echo 'E: Temporary failure resolving' >&2; exit 100")
    with pytest.raises(HostError, match=r"apt-get download .* failed \(E: Temporary failure resolving\): check the network"):
        debian.fetch()
    assert os.listdir(tmp_path / "cache") == []


def test_a_package_without_a_kernel(fake):
    fake("dpkg", "exit 0")
    fake("apt-cache", "echo '  Depends: linux-image-6.1.0-1-cloud-amd64'")
    fake("apt-get", ": > a.deb")
    with pytest.raises(HostError, match="holds no kernel: remove it and run pykvm host fetch"):
        debian.fetch()


def test_models_are_asked_for(fake):
    fake("qemu-system-x86_64", "printf 'x86 max  Enables all\\nx86 EPYC AMD EPYC\\nx86 Haswell Intel\\nx86 host  KVM\\n'")
    found = {m.name: m.virtualization for m in emulators.models()}
    assert found == {"max": "AMD-V, NPT", "EPYC": "AMD-V, NPT", "Haswell": "none in TCG"}
    assert emulators.model_named("EPYC")[1] == "EPYC"
    with pytest.raises(HostError, match="no hardware virtualization"):
        emulators.model_named("Haswell")
    with pytest.raises(HostError, match=r"no emulator offers the CPU model 'nosuch' \(Bochs not installed\)"):
        emulators.model_named("nosuch")


def test_paging_is_on_or_off():
    with pytest.raises(ConfigError, match="use on or off"), boot("amd", paging="maybe"):
        pass


def test_the_cache_shows_whole_entries_only(fake, tmp_path):
    def fails(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("entry", fails)
    assert os.listdir(tmp_path / "cache") == []
    made = cached("entry", lambda folder: (folder / "whole").write_text("x"))
    assert stat.S_ISREG((made / "whole").stat().st_mode)
    assert cached("entry", fails) == made


# --- which disk is which ----------------------------------------------------------------------------------------------


def test_disks_are_found_by_what_they_hold(tmp_path):
    """The kernel names them in the order in which it gets to know them, and that differs from boot to boot."""
    root = bytearray(8192)
    root[1024 + 0x38 : 1024 + 0x3A] = b"\x53\xef"  # ext4's magic, and its label: Linux Documentation/filesystems/ext4/super.rst
    root[1024 + 0x78 : 1024 + 0x88] = image.ROOT_LABEL.encode().ljust(16, b"\0")
    disks = {"root": bytes(root), "exchange": wire.exchange_header("secret").ljust(8192, b"\0"), "other": bytes(8192), "empty": b""}

    def found(*order):
        paths = [tmp_path / f"sd{letter}" for letter in "abcd"[: len(order)]]
        for path, name in zip(paths, order, strict=True):
            path.write_bytes(disks[name])
        script = image.FIND_DISKS + 'find_disks "$@" && echo "$root $exchange"'
        done = subprocess.run(["sh", "-c", script, "sh", *map(str, paths)], capture_output=True, text=True)
        assert done.stderr == ""
        return [order[paths.index(Path(word))] for word in done.stdout.split()] if done.returncode == 0 else None

    assert found("root", "exchange") == found("exchange", "root") == ["root", "exchange"]
    assert found("other", "exchange", "empty", "root") == ["root", "exchange"]
    assert found("root") is found("exchange") is found("root", "other") is None  # one has not appeared yet


def test_the_root_image_has_its_label(tmp_path, monkeypatch):
    made = []

    def run(command, **options):
        made.append(command)
        return SimpleNamespace(returncode=1, stderr="enough")

    for name in ("_copy_interpreter", "_copy_distributions", "_copy_libraries", "_copy"):
        monkeypatch.setattr(image, name, lambda *_: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **o: SimpleNamespace(stdout="") if command[0] == "busybox" else run(command))
    with pytest.raises(HostError, match="mke2fs cannot make the root image: enough"):
        image._make_root(tmp_path, {})
    assert made[0][made[0].index("-L") + 1] == image.ROOT_LABEL


# --- sessions with a program that plays the emulator ------------------------------------------------------------------

ACTOR = """#!{python}
import hashlib, os, re, socket, sys, time
from pykvm.hosts import wire

words = " ".join(sys.argv)
if "-f" in sys.argv:  # Bochs
    words += open(sys.argv[sys.argv.index("-f") + 1]).read()
port = int(re.search(r"(?:port=|127[.]0[.]0[.]1:)([0-9]+)", words)[1])
exchange = re.search(r"/[^ =,]*/exchange[.]img", words)[0]
role = os.environ["ROLE"]

def say(line, kind, value):
    line.sendall(wire.encode_json(kind, value))

def connect():
    return socket.create_connection(("127.0.0.1", port))

if role == "dies":
    sys.exit(3)
if role == "panic":
    open(os.path.join(os.path.dirname(exchange), "console.log"), "w").write("Kernel panic - not syncing: no reason")
if role == "strangers only":
    stranger = connect()
    say(stranger, wire.READY, dict(token="bochs", kernel="evil"))
if role in ("panic", "mute", "strangers only"):
    time.sleep(1000)
strangers = []
if role == "strangers":
    for token in ("bochs", "", None, 0, "0" * 32):
        strangers.append(connect())
        say(strangers[-1], wire.READY, dict(token=token, kernel="evil"))
    strangers.append(connect())
    say(strangers[-1], wire.RESULT, dict(status=0))
    strangers.append(connect())
    strangers[-1].sendall(b"noise")
    strangers.append(connect())
line = connect()
disk = open(exchange, "rb")
token = wire.token_of(disk.read(wire.INBOX))
say(line, wire.READY, dict(token=token, kernel="6.1.0"))
decoder = wire.Decoder()
while data := line.recv(65536):
    for kind, payload in decoder.feed(data):
        request = wire.decode_json(payload)
        if request.get("op") == "put":
            disk.seek(wire.INBOX)
            same = hashlib.sha256(disk.read(request["size"])).hexdigest() == request["sha256"]
            say(line, wire.RESULT, dict(status=0) if same else dict(error="damaged"))
        elif request.get("op") == "get":
            say(line, wire.RESULT, dict(error="FileNotFoundError: " + request["path"]))
        elif request.get("command") == ["sleep"]:
            pass
        else:
            line.sendall(wire.encode(wire.STDOUT, token.encode()))
            say(line, wire.RESULT, dict(status=int(request["command"][0])))
"""
STAGE = """
import sys
from types import SimpleNamespace
from pathlib import Path
from pykvm.hosts import session
session.fetch = lambda: SimpleNamespace(image=Path({kernel!r}), version="6.1.0")
session.root_image = lambda: Path({kernel!r})
session.initramfs = lambda kernel: Path({kernel!r})
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """``stage(role)``: both emulators are a program that plays that role; kernel and images are an empty file."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "sessions").mkdir()
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"")
    for name in ("qemu-system-x86_64", "bochs"):
        (tmp_path / "bin" / name).write_text(ACTOR.format(python=sys.executable))
    (tmp_path / "bin" / "grub-mkrescue").write_text('#!/bin/sh\n: > "$2"\n')
    for name in ("xorriso", "mformat"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "sessions"))
    monkeypatch.setattr("tempfile.tempdir", None)
    setup = STAGE.format(kernel=str(kernel))
    for name in ("fetch", "root_image", "initramfs"):
        monkeypatch.setattr(session, name, getattr(session, name))  # put back afterwards
    exec(setup, {})

    def play(role):
        monkeypatch.setenv("ROLE", role)
        return SimpleNamespace(sessions=tmp_path / "sessions", cache=tmp_path / "cache", setup=setup)

    return play


@pytest.mark.parametrize("cpu", ["amd", "intel"])
def test_the_token_is_secret_and_differs_each_time(cpu, stage):
    place = stage("agent")
    tokens = set()
    for _ in range(2):
        with boot(cpu, timeout=30) as host:
            tokens.add(host.run(["0"]).stdout)
            assert stat.S_IMODE(host.folder.stat().st_mode) == 0o700
            words = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in group(host._process.pid))
            assert not any(token.encode() in words for token in tokens)  # everybody can read those
        assert os.listdir(place.sessions) == []
    assert len(tokens) == 2
    assert len(list(place.cache.glob("iso-*"))) == (cpu == "intel")  # one CD serves all


@pytest.mark.parametrize("cpu", ["amd", "intel"])
def test_strangers_on_the_port_are_not_listened_to(cpu, stage):
    stage("strangers")
    with boot(cpu, timeout=30) as host:
        assert host.kernel == "6.1.0"
        assert host.run(["5"]).returncode == 5


def test_bytecode_travels_when_it_is_asked_for(stage, tmp_path):
    """What a development machine has compiled is of no use in a host, but pytest's rewritten tests are."""
    stage("agent")
    (tmp_path / "tests" / "__pycache__").mkdir(parents=True)
    (tmp_path / "tests" / "__pycache__" / "a.pyc").write_bytes(b"")
    with boot("amd", timeout=30) as host:

        def sent(**options):
            host.put(tmp_path / "tests", **options)
            with open(host.folder / "exchange.img", "rb") as disk:
                disk.seek(wire.INBOX)
                with tarfile.open(fileobj=disk, mode="r|") as archive:
                    return archive.getnames()

        assert sent() == ["tests"]
        assert sent(bytecode=True) == ["tests", "tests/__pycache__", "tests/__pycache__/a.pyc"]


def test_without_the_agent_the_boot_ends_by_its_time_limit(stage):
    place = stage("strangers only")
    with pytest.raises(TimeoutError), boot("intel", timeout=1):
        pass
    assert os.listdir(place.sessions) == []


def group(leader):
    """The processes of a process group."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getpgid(int(pid)) == leader:
                found.append(int(pid))
        except ProcessLookupError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("role", ["mute", "agent"])
def test_nothing_is_left_when_pykvm_is_ended_by_a_signal(number, role, stage):
    place = stage(role)
    bystander = place.sessions / "pykvm-host-of-somebody-else"
    bystander.mkdir()
    script = place.setup + "from pykvm.cli import main\nsys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "host", "run", "--cpu", "amd", "--", "sleep"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_until(lambda: actors(place.sessions) and (role == "mute" or list(place.sessions.glob("*/pykvm"))))
    process.send_signal(number)
    process.wait(60)
    wait_until(lambda: not actors(place.sessions) and os.listdir(place.sessions) == [bystander.name])


def actors(folder):
    """The pids of emulators whose command line names ``folder``."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"qemu-system" in words and os.fsencode(folder) in words:
            found.append(int(pid))
    return found


def wait_until(condition):
    """Up to a minute: that is patience, not an assertion about speed."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came true")


# --- exit statuses ----------------------------------------------------------------------------------------------------


def test_what_is_missing_gives_69(fake, capfd):
    for words in (["run", "--cpu", "amd", "--", "true"], ["run", "--cpu", "nosuch", "--", "true"], ["list"], ["fetch"]):
        assert main(["host", *words]) == 69, words
        assert capfd.readouterr().err.startswith("pykvm: ")


@pytest.mark.parametrize(
    ("role", "message"), [("panic", "the host's kernel panicked"), ("dies", "QEMU ended with status 3")], ids=["panic", "dies"]
)
def test_a_host_that_fails_gives_70(role, message, stage, capfd):
    stage(role)
    assert main(["host", "run", "--cpu", "amd", "--", "1"]) == 70
    assert message in capfd.readouterr().err


def test_a_command_gives_its_own_status(stage, capfd, tmp_path):
    stage("agent")
    assert main(["host", "run", "--cpu", "amd", "--", "1"]) == 1
    assert main(["host", "run", "--cpu", "amd", "--get", "report", "--", "3"]) == 3  # it is more telling than the file that is not there
    assert "FileNotFoundError: report" in capfd.readouterr().err
    assert main(["host", "run", "--cpu", "amd", "--get", "report", "--", "0"]) == 70
    assert main(["host", "run", "--cpu", "amd", "--put", str(tmp_path / "nothing"), "--", "0"]) == 64
    capfd.readouterr()
    assert main(["host", "--help"]) == 0
    said = capfd.readouterr().out
    assert "69 an emulator" in said and "70 the host failed" in said
