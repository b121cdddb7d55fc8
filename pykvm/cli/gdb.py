"""``pykvm gdb``: a guest under gdb.

Exit status: that of ``pykvm run``; 0 when gdb has killed the guest.
"""

from __future__ import annotations

import sys

from pykvm.cli import say
from pykvm.cli.guest import MACHINE_OPTIONS, Output, open_machine
from pykvm.cli.options import Command, Option, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.debug.control import Control
    from pykvm.debug.stepping import Stopped

COMMAND = Command(
    "gdb",
    "IMAGE",
    "Run a guest and serve it to gdb: one thread a vCPU, symbols from the image by themselves. The guest's console is stdout.\n"
    "Connect with: gdb -ex 'target remote 127.0.0.1:1234'. Without --wait it runs at once, and gdb may come and go.",
    [
        Option("--listen", "where gdb connects to: HOST:PORT, or unix:PATH, which only its owner may use", "WHERE", "127.0.0.1:1234"),
        Option("--wait", "the guest does not start before gdb says so"),
        Option("--remote", "allow --listen on addresses that other machines can reach: who connects owns the guest"),
        *MACHINE_OPTIONS,
        Option("--timeout", "seconds that the guest may run at a time; without it no limit", "SECONDS", convert=number),
    ],
    [
        "pykvm gdb page_fault --wait",
        "pykvm gdb spinlock --wait --listen unix:/tmp/spinlock.gdb",
    ],
)


def main(argv: list[str]) -> int:
    """Serve it; returns the exit status."""
    (image,), o = COMMAND.parse(argv, 1, 1)
    from pykvm.debug.control import Control
    from pykvm.debug.gdb.listen import Listener
    from pykvm.debug.gdb.server import Server

    output = Output()
    machine = open_machine(image, o, on_output=output.write)
    with machine, Listener(o["listen"], remote=o["remote"]) as listener:
        machine.on_heartbeat = output.flush
        control = Control(machine)
        say(f"pykvm: gdb -ex 'target remote {listener.name}'")
        try:
            stopped = Server(control, listener, o["timeout"]).serve(wait=o["wait"])
        finally:
            output.flush()
        return _report(control, stopped)


def _report(control: Control, stopped: Stopped | None) -> int:
    """What became of the guest, on stderr, and the exit status."""
    sys.stdout.flush()
    if stopped is None:
        say("pykvm: killed by gdb")
        return 0
    if stopped.reason == "crash":
        say(f"pykvm: the guest crashed: {control.explain(stopped)}")
        return 70
    if stopped.reason == "timeout":
        say(f"pykvm: time limit: {control.explain(stopped)}")
        return 124
    if stopped.reason == "reset":
        say("pykvm: the guest reset itself")
    code = stopped.code or 0
    if code > 63:
        say(f"pykvm: debug exit code {code} ({code:#x})")
    return min(code, 63)
