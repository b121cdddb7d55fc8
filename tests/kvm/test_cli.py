"""The command as a user runs it: exit statuses, stdout and stderr, bad input, Ctrl-C."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

from pykvm import asm, gallery
from pykvm.memory import host_memory
from tests.conftest import TIME_SCALE

PATIENCE = 60 * TIME_SCALE  # seconds for a whole process
PYKVM = [sys.executable, "-m", "pykvm"]
LIMIT = str(20 * TIME_SCALE)  # for guests that end by themselves
FLAT = ("--format", "flat")  # without it, what a file is taken for is said on stderr
slow = pytest.mark.slow
both_loops = pytest.mark.parametrize("loop", ["python", "native"])


def heed_ctrl_c():
    """Whoever started pytest in the background made it, and its children, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*words, stdin=b"", before=(), **options):
    """The finished process; stdout as bytes, stderr as text. Whatever happens, there is no traceback."""
    options = {"stdout": subprocess.PIPE, **options}
    done = subprocess.run([*before, *PYKVM, *words], input=stdin, stderr=subprocess.PIPE, timeout=PATIENCE, check=False, **options)
    done.stderr = done.stderr.decode()
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def flat(tmp_path):
    """A flat real-mode image of a snippet; its path."""

    def make(source):
        path = tmp_path / "guest.bin"
        path.write_bytes(asm(source, bits=16, org=0x7C00) if isinstance(source, str) else source)
        return str(path)

    return make


def complaint(done):
    """The one line on stderr of a command that did nothing."""
    assert done.stderr.startswith("pykvm: ")
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == b""
    return done.stderr[len("pykvm: ") :].strip()


# --- how guests end ---------------------------------------------------------------------------------------------------


def test_hello():
    done = run("run", "hello", "--timeout", LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello from long mode.\n", "")


@slow
@both_loops
@pytest.mark.parametrize(("name", "console"), [("hello", b"Hello from long mode.\n"), ("halt", b"")])
def test_guests_that_end_well(name, console, loop):
    done = run("run", name, "--loop", loop, "--timeout", LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, console, "")


@slow
@both_loops
@pytest.mark.parametrize(
    ("code", "status", "stderr"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (63, 63, ""),
        (64, 63, "pykvm: debug exit code 64 (0x40)\n"),
        (255, 63, "pykvm: debug exit code 255 (0xff)\n"),
    ],
)
def test_debug_exit_codes(code, status, stderr, loop, flat):
    done = run("run", flat(f"mov al, {code}; out 0xf4, al"), *FLAT, "--loop", loop, "--timeout", LIMIT)
    assert (done.returncode, done.stderr) == (status, stderr)


@slow
def test_debug_exit_of_32_bits(flat):
    image = flat("mov eax, 0x12345600; out 0xf4, eax")
    done = run("run", image, *FLAT, "--timeout", LIMIT)
    assert (done.returncode, done.stderr) == (63, f"pykvm: debug exit code {0x12345600} (0x12345600)\n")
    assert run("run", flat("mov al, 5; out 0xf4, al"), *FLAT, "--qemu-exit-status", "--timeout", LIMIT).returncode == 11


@slow
def test_triple_fault_is_explained():
    done = run("run", "triple_fault", "--timeout", LIMIT)
    assert done.returncode == 70
    assert done.stderr.startswith("pykvm: the guest crashed: triple fault")
    assert "rip=" in done.stderr


@slow
@both_loops
def test_other_crashes(loop):
    done = run("run", "exec_hole", "--loop", loop, "--timeout", LIMIT)
    assert done.returncode == 70
    assert done.stderr.startswith("pykvm: the guest crashed: ")
    assert "0xd0100000" in done.stderr


@slow
@both_loops
def test_time_limit(loop):
    done = run("run", "spin", "--timeout", "0.2", "--loop", loop)
    assert (done.returncode, done.stdout) == (124, b"")
    assert done.stderr.startswith("pykvm: time limit of 0.2 s: the guest spins at 0x10000")


@slow
@both_loops
@pytest.mark.parametrize("seconds", ["1e-9", "5e-6", "0.0001"])
def test_time_limits_however_short_end(seconds, loop):
    done = subprocess.run([*PYKVM, "run", "spin", "--timeout", seconds, "--loop", loop], capture_output=True, timeout=10 * TIME_SCALE)
    assert done.returncode == 124


@pytest.fixture
def one_cpu():
    """This process and its children share a CPU: whoever is written to runs at once, and can interrupt right after the write."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@slow
@both_loops
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c(loop, as_json, flat, one_cpu):
    """What the guest has printed comes out at once, and once only; then it spins."""
    image = flat("sti; mov al, 'x'; out 0xe9, al; mov al, 10; out 0xe9, al; 1: jmp 1b")
    words = [*PYKVM, "run", image, *FLAT, "--timeout", str(PATIENCE), "--loop", loop]
    if as_json:  # nothing comes out before the end: a guest without output has to be seen in /proc
        words += ["--json"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c)
    try:
        if as_json:
            wait_for_vcpu(process)
        else:
            assert process.stdout.readline() == b"x\n"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    if as_json and stdout:  # else it was caught before the run
        assert json.loads(stdout)["reason"] == "interrupted"
        assert json.loads(stdout)["status"] == 130
    else:
        assert (stdout, stderr) == (b"", b"pykvm: interrupted\n")


def wait_for_vcpu(process):
    """Until the process has a vCPU."""
    folder = f"/proc/{process.pid}/fd"
    while process.poll() is None:
        for fd in os.listdir(folder):
            try:
                if "kvm-vcpu" in os.readlink(f"{folder}/{fd}"):
                    return
            except FileNotFoundError:
                pass
    pytest.fail(process.stderr.read().decode())


# --- console ----------------------------------------------------------------------------------------------------------


@slow
def test_echo():
    done = run("run", "echo", "--timeout", LIMIT, stdin=b"hello, 1 2 3\nnot read\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"HELLO, 1 2 3\n", "")


@slow
@both_loops
def test_echo_until_the_end_of_stdin(loop):
    text = b"abc" * 3000  # no line end: Ctrl-D ends it
    done = run("run", "echo", "--loop", loop, "--timeout", LIMIT, stdin=text)
    assert (done.returncode, done.stdout, done.stderr) == (0, text.upper() + b"\n", "")
    done = run("run", "echo", "--loop", loop, "--timeout", LIMIT, stdin=b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", "")


@slow
def test_bytes_pass_unchanged(flat):
    image = flat("xor ax, ax; 1: out 0xe9, al; inc al; jnz 1b; mov al, 10; out 0xe9, al; hlt")
    assert run("run", image, *FLAT, "--timeout", LIMIT).stdout == bytes(range(256)) + b"\n"


@slow
def test_a_command_line_reaches_the_guest():
    assert run("run", "hello", "--append", "grüße=1", "--timeout", LIMIT).stdout == "Hello from long mode.\ngrüße=1\n".encode()
    assert run("run", "hello", "--append", b"\xff=1", "--timeout", LIMIT).stdout == b"Hello from long mode.\n\xff=1\n"


@slow
def test_unclaimed_accesses_are_told(flat):
    image = flat("mov cx, 3; mov dx, 0x300; 1: out dx, ax; loop 1b; hlt")
    done = run("run", image, *FLAT, "--timeout", LIMIT)
    assert (done.returncode, done.stderr) == (0, "pykvm: no device claims: write to port 0x300, 2 bytes, 3 times\n")
    done = run("run", image, *FLAT, "--strict", "--timeout", LIMIT)
    assert done.returncode == 70
    assert "port 0x300" in done.stderr.splitlines()[0]


@slow
@both_loops
def test_statistics(loop):
    done = run("run", "hello", "--stats", "--loop", loop, "--timeout", LIMIT)
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = done.stdout.decode().splitlines()[1:]
    assert header.split()[:2] == ["exit", "count"]
    assert {tuple(row.split()[:4]) for row in rows} == {("IO", "out", "0x3f8", "22"), ("IO", "out", "0xf4", "1")}


@slow
@pytest.mark.parametrize("words", [("run", "hello"), ("run", "hello", "--json"), ("guests",), ("guests", "hello"), ("--help",)])
def test_a_reader_that_has_gone(words):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(*words, stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@slow
@pytest.mark.parametrize(
    "words",
    [("run", "hello"), ("run", "hello", "--stats"), ("run", "hello", "--json"), ("guests",), ("--help",), ("run", "--help")],
)
def test_a_full_disk(words):
    with open("/dev/full", "wb") as full:
        done = run(*words, stdout=full)
    assert done.returncode != 0
    assert done.stderr.startswith("pykvm: ") and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@slow
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("run", "triple_fault"), 70),
        (("run", "spin", "--timeout", "0.1"), 124),
        (("run", "helo"), 65),
        (("rum", "hello"), 64),
        (("run", "hello", "--mode", "real"), 64),
    ],
)
def test_nowhere_to_complain(words, status):
    """The exit status says it all the same."""
    with open("/dev/full", "wb") as full:
        assert subprocess.run([*PYKVM, *words], stdout=subprocess.PIPE, stderr=full, timeout=PATIENCE).returncode == status
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert subprocess.run([*PYKVM, *words], stdout=subprocess.PIPE, stderr=writing, timeout=PATIENCE).returncode == status
    finally:
        os.close(writing)


@slow
def test_nowhere_to_print_nor_to_complain():
    with open("/dev/full", "wb") as full:
        assert subprocess.run([*PYKVM, "run", "hello"], stdout=full, stderr=full, timeout=PATIENCE).returncode == 74


@slow
@pytest.mark.parametrize("words", [("run", "hello"), ("run", "hello", "--stats"), ("run", "helo"), ("guests",)])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_closed_streams(words, closed):
    """Files that pykvm opens must not take the place of what is closed: a guest's output would go to /dev/kvm."""
    done = run(*words, before=("sh", "-c", f'exec "$@" {closed}', "sh"))
    assert all(line.startswith("pykvm: ") for line in done.stderr.splitlines()), done.stderr
    assert (done.returncode == 65) == ("helo" in words)


# --- JSON -------------------------------------------------------------------------------------------------------------


@slow
@both_loops
def test_json(loop):
    done = run("run", "hello", "--json", "--stats", "--loop", loop, "--timeout", LIMIT)
    assert (done.returncode, done.stderr) == (0, "")
    got = json.loads(done.stdout)
    assert sum(row["count"] for row in got["stats"]) == 23
    expected = {
        "image": gallery.find("hello"),
        "mode": "long",
        "status": 0,
        "reason": "exit",
        "exit_code": 0,
        "console": "Hello from long mode.\n",
        "exits": {"IO": 23},
        "unclaimed": [],
        "explanation": None,
    }
    assert {key: got[key] for key in expected} == expected


@slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("triple_fault",), {"status": 70, "reason": "crash", "exit_code": None, "exits": {"SHUTDOWN": 1}}),
        (("spin", "--timeout", "0.2"), {"status": 124, "reason": "timeout", "exit_code": None, "console": ""}),
        (("halt",), {"status": 0, "reason": "halted", "exit_code": 0, "stats": None, "exits": {"HLT": 1}}),
        (("mmio_straddle",), {"status": 0}),
    ],
)
def test_json_of_other_ends(words, expected):
    done = run("run", *words, "--json")
    got = json.loads(done.stdout)
    assert {key: got[key] for key in expected} == expected
    assert done.returncode == got["status"]
    assert done.stderr == ""
    assert bool(got["explanation"]) == (got["status"] in (70, 124))
    if words == ("mmio_straddle",):
        assert {"space": "mmio", "address": 0xD0001000, "size": 4, "direction": "write", "count": 1} in got["unclaimed"]


@slow
def test_json_of_the_gallery():
    everything = json.loads(run("guests", "--json").stdout)
    assert [guest["name"] for guest in everything] == gallery.names()
    one = json.loads(run("guests", "hello", "--json").stdout)
    assert one in everything
    assert set(one) == {"name", "shows", "about", "note", "image"}
    assert one["note"]["mode"] == "long"


# --- the gallery and help ---------------------------------------------------------------------------------------------


@slow
def test_guests():
    done = run("guests")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.decode().splitlines()
    assert sorted(line.split()[0] for line in lines if line.startswith("  ")) == gallery.names()
    done = run("guests", "hello")
    assert done.returncode == 0
    assert done.stdout.decode().startswith(gallery.source("hello"))
    assert "# mode=long\n" in done.stdout.decode()


@slow
@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("guests", "-h"), ("--version",)])
def test_help(words):
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(b"usage: pykvm " if "--version" not in words else b"pykvm 0.")


# --- bad input --------------------------------------------------------------------------------------------------------


@slow
def test_the_nearest_name_is_offered():
    done = run("run", "helo")
    assert done.returncode == 65
    assert complaint(done).endswith("did you mean hello?")


@slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rum", "hello"), "did you mean run?"),
        (("run",), "pykvm run IMAGE"),
        (("run", "hello", "halt"), "one word too many"),
        (("run", "hello", "--jsn"), "did you mean --json?"),
        (("run", "hello", "--json=1"), "takes no value"),
        (("run", "hello", "--memory"), "needs a value"),
        (("run", "hello", "--mode", "virtual"), "use one of"),
        (("run", "hello", "--mode", "real"), "real mode reaches 1 MiB"),
        (("run", "hello", "--loop", "rust"), "use one of"),
        (("run", "hello", "--timeout", "0"), "positive"),
        (("run", "hello", "--timeout", "-1"), "positive"),
        (("run", "hello", "--timeout", "nan"), "positive"),
        (("run", "hello", "--timeout", "soon"), "not a number"),
        (("run", "hello", "--memory", "0"), "needs memory"),
        (("run", "hello", "--memory", "-16M"), "positive"),
        (("run", "hello", "--memory", "4097"), "multiple of the page size"),
        (("run", "hello", "--memory", "0.3K"), "not a whole"),
        (("run", "hello", "--memory", "1.0e999"), "1.0e999"),
        (("run", "hello", "--memory", "much"), "not a size"),
        (("run", "hello", "--memory", "1000T"), "more than this host has"),
        (("run", "hello", "--memory", "9" * 30), ""),
        (("run", "hello", "--memory", str(host_memory() // 4096 * 4096 + 4096)), "more than this host has"),
        (("run", "hello", "--entry", "0x80000000"), "outside the guest's 16M of RAM"),
        (("run", "hello", "--entry", "-1"), "not a 64-bit address"),
        (("run", "hello", "--entry", "start"), "not an address"),
        (("run", "hello", "--append", "x" * 5000), "command line"),
    ],
)
def test_usage(words, message):
    done = run(*words)
    assert done.returncode == 64
    assert message in complaint(done)


@slow
def test_no_command_prints_the_help():
    done = run()
    assert done.returncode == 64
    assert done.stdout.startswith(b"usage: pykvm ")


def elf():
    with open(gallery.find("hello"), "rb") as file:
        return file.read()


@slow
@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"", (), "empty"),
        (elf()[:3], ("--memory", "4K"), "RAM"),  # so short that it is a flat image
        (elf()[:10], (), "truncated"),
        (elf()[:52], (), "truncated"),
        (elf()[:100], (), "truncated"),
        (b"\x7fELF" + random.Random(1).randbytes(4096), (), ""),
        (b"\x7fELF\x02\x01" + random.Random(2).randbytes(4096), (), ""),
        (elf()[:40] + b"\xff" * 24 + elf()[64:], (), ""),
        (elf(), ("--memory", "64K"), "use --memory 2M"),
        (b"\xf4" * (128 << 10), ("--memory", "64K"), "use --memory 1M"),
        (b"\xf4" * (3 << 20), ("--memory", "2M"), "use --memory 4M"),
    ],
)
def test_bad_images(data, options, message, flat):
    path = flat(data)
    done = run("run", path, *options)
    assert done.returncode == 65
    line = complaint(done)
    assert line.startswith(path) and message in line


@slow
@pytest.mark.parametrize("path", ["/", "/nonexistent/image", "./nonexistent"])
def test_images_that_cannot_be_read(path):
    done = run("run", path)
    assert done.returncode == 65
    assert complaint(done).startswith(f"{path}: cannot be read: ")
    done = run("guests", "helo")
    assert done.returncode == 65
    assert "did you mean hello?" in complaint(done)


@slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["auto", "long"])
def test_random_bytes_are_a_flat_image_that_ends_somehow(seed, mode, flat):
    """A flat image has no header to be wrong. What it does is its own affair; how pykvm ends is documented."""
    path = flat(random.Random(seed).randbytes(2048).replace(b"\x7fELF", b""))
    done = run("run", path, "--mode", mode, "--timeout", "0.2")
    assert done.returncode in (*range(64), 70, 124)
    if done.returncode in (70, 124):
        assert "pykvm: the guest crashed: " in done.stderr or "pykvm: time limit of 0.2 s: " in done.stderr


# --- no KVM -----------------------------------------------------------------------------------------------------------


def hidden(how):
    """Words before a command that take /dev/kvm away from it, or a skip."""
    if how == "permission":
        if os.stat("/dev/kvm").st_mode & 0o006 == 0o006:
            pytest.skip("/dev/kvm is open to everybody here")
        if os.geteuid():
            pytest.skip("only root can become nobody")
        before = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    else:
        mount = {"missing": "mount -t tmpfs none /dev", "not KVM": "mount --bind /dev/null /dev/kvm"}[how]
        before = ("unshare", "--mount", *(("--map-root-user",) if os.geteuid() else ()), "sh", "-c", f'{mount} && exec "$@"', "sh")
    if not shutil.which(before[0]):
        pytest.skip(f"{before[0]} is not installed")
    tried = subprocess.run([*before, sys.executable, "-c", "import pykvm.system"], capture_output=True, timeout=PATIENCE)
    if tried.returncode:
        pytest.skip(f"{before[0]} does not work here: {tried.stderr.decode().strip()[-200:]}")
    return before


@slow
@pytest.mark.parametrize(
    ("how", "message"), [("missing", "modprobe"), ("permission", "group kvm"), ("not KVM", "does not answer KVM_GET_API_VERSION")]
)
def test_no_kvm(how, message):
    before = hidden(how)
    done = run("run", "hello", before=before)
    assert done.returncode == 69
    line = complaint(done)
    assert line.startswith("/dev/kvm: ") and message in line
    assert run("guests", before=before).returncode == 0  # what needs no KVM works
