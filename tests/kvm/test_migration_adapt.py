"""Live migration to a KVM that has less than the guest was promised: refused by name, or what the guest does not use is dropped and listed.

The destination is this host, whose view of itself (compat.Host) lacks some features: what does not run there is another CPU, no more.
"""

import json
import socket
import subprocess
import sys

import pytest

import pykvm
from pykvm import MigrationError
from pykvm.cpuid import Cpuid
from pykvm.state.compat import Host
from pykvm.state.migrate import Migration
from pykvm.x86.cpu_features import features_of
from tests.conftest import TIMEOUT
from tests.kvm.moving import CONSOLE, PASSES, Receiving, Running, Turnstile, exit_code, goes_on, move, until, walker

pytestmark = pytest.mark.usefixtures("patient_source")

MODEL = "sandybridge"  # the model of the guest's CPU
# What the destination lacks: behind CR4.PGE, CR4.DE and CR4.PCIDE, which the guest has off, or a matter of speed or of faults.
UNUSED = ("pge", "de", "pcid", "ss", "arat")


def lacking(monkeypatch, *names):
    """Destinations, from now on, are another host, without those features."""
    asked = Host.of.__func__

    def of(cls, system):
        host = asked(cls, system)
        host.features = [name for name in host.features if name not in names]
        return host

    monkeypatch.setattr(Host, "of", classmethod(of))
    monkeypatch.setattr("pykvm.state.restore.boot_id", lambda: "another host's")


def promised(machine):
    """Of UNUSED, what this host could promise the guest."""
    vcpu = machine.save().vcpus[0]
    return [name for name in UNUSED if name in features_of(Cpuid.of_rows(vcpu["asked"])) & features_of(Cpuid.of_rows(vcpu["cpuid"]))]


@pytest.fixture
def model():
    """A guest of a CPU model, that waits half way; and what it was promised of UNUSED."""
    with walker(PASSES // 2, cpu=MODEL) as machine:
        names = promised(machine)
        assert "pge" in names
        running = Running(machine)
        until(lambda: len(machine.console.data) == PASSES // 2)
        yield machine, names
        machine.stop()
        running.thread.join(TIMEOUT)


def test_a_guest_that_the_destination_cannot_run(machine, monkeypatch):
    """It is refused by name, and before any of its memory moves; --adapt does not help where an instruction would be missing."""
    lacking(monkeypatch, "sse2")
    for adapt in (False, True):
        a, b = socket.socketpair()
        there = Receiving(b, adapt=adapt)
        migration = Migration(machine, a, "there")
        with pytest.raises(MigrationError, match="refuses: this host cannot run it: CPUID feature sse2"):
            migration.run()
        assert migration.rounds == []
        assert goes_on(machine)
        assert "sse2" in str(there.wait().error)


def test_what_is_not_in_use_is_dropped(model, monkeypatch):
    """On request alone. Both sides list it, and the guest ends as it would have."""
    machine, names = model
    lacking(monkeypatch, *names)
    a, b = socket.socketpair()
    there = Receiving(b)
    with pytest.raises(MigrationError, match="none of it is in use: --adapt drops it"):
        move(machine, a)
    there.wait()
    assert goes_on(machine)
    a, b = socket.socketpair()
    there = Receiving(b, adapt=True)
    report = move(machine, a)
    dropped = sorted(f"CPUID feature {name}" for name in names)
    assert sorted(note for note in report["notes"] if note.startswith("dropped: ")) == [f"dropped: {what}" for what in dropped]
    moved = there.wait().machine
    assert sorted(moved.restored.dropped) == dropped
    assert not features_of(moved.vcpu.asked) & set(names)
    result = there.running.end()
    assert (result.console, result.exit_code) == (CONSOLE, exit_code())
    there.close()


SWITCHES = """
        sti
1:      inc qword ptr [0x200000]
        in al, 0x50                 # the turnstile
        test al, al
        jz 1b
        mov rax, cr4
        or rax, 0x80                # PGE
        mov cr4, rax
        out 0xe9, al
2:      inc qword ptr [0x200000]
        jmp 2b
"""


def test_what_comes_into_use_on_the_way_is_not_dropped(monkeypatch):
    """The last state is compared too: the guest has switched on what was to be dropped, and stays where it is."""
    code = pykvm.asm(SWITCHES, bits=64, org=0x100000)
    with pykvm.Machine(code, mode="long", memory="4M", entry=0x100000, cpu=MODEL) as machine:
        turnstile = Turnstile(0)
        machine.add_device(turnstile, port=0x50)
        lacking(monkeypatch, "pge")
        running = Running(machine)
        until(lambda: machine.memory.read_u64(0x200000))

        def let_it_pass(progress):
            if progress.phase == "copying":
                turnstile.most = 1
                until(lambda: machine.console.data)

        a, b = socket.socketpair()
        there = Receiving(b, adapt=True, most=0)
        migration = Migration(machine, a, "there", on_progress=let_it_pass)
        with pytest.raises(MigrationError, match="this host cannot run it: CPUID feature pge"):
            migration.run()
        assert migration.rounds and there.wait().machine is None
        assert goes_on(machine)
        machine.stop()
        running.end()


POOR = """
import sys
from pykvm.cli import main
from pykvm.state import compat, restore

asked = compat.Host.of.__func__

def of(cls, system):
    host = asked(cls, system)
    host.features = [name for name in host.features if name != "pge"]
    return host

compat.Host.of = classmethod(of)
restore.boot_id = lambda: "another host's"
sys.exit(main())
"""


@pytest.mark.slow
def test_the_commands_list_what_is_dropped(tmp_path):
    """pykvm run, migrate and receive --adapt, each a process."""
    control, where, command = str(tmp_path / "control"), f"unix:{tmp_path / 'there'}", [sys.executable, "-m", "pykvm"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    start = [*command, "run", "echo", "--cpu", MODEL, "--control", f"unix:{control}", "--timeout", str(TIMEOUT)]
    with subprocess.Popen(start, **pipes) as source:
        receive = [sys.executable, "-c", POOR, "receive", where, "--adapt", "--timeout", str(TIMEOUT)]
        with subprocess.Popen(receive, **pipes) as destination:
            assert b"waiting at" in destination.stderr.readline()
            ask = [*command, "control", control, "status"]
            until(lambda: subprocess.run(ask, capture_output=True, check=False).returncode == 0)
            done = subprocess.run([*command, "migrate", control, "--to", where, "--json"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert "dropped: CPUID feature pge" in json.loads(done.stdout)["report"]["notes"]
            out, err = destination.communicate(b"there\n", timeout=TIMEOUT)
            assert (destination.returncode, out) == (0, b"THERE\n"), err
            assert b"pykvm: dropped: CPUID feature pge\n" in err
        assert source.wait(TIMEOUT) == 0
