"""``pykvm gdb``: a guest under gdb; and ``pykvm run --gdb``, which is the same.

Exit status: that of ``pykvm run``; 0 when gdb has killed the guest.
"""

from __future__ import annotations

from pykvm.cli import run, say
from pykvm.cli.guest import GUEST_OPTIONS, Output, open_machine, parse_guest
from pykvm.cli.options import Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.machine import Machine
    from pykvm.result import Result

COMMAND = Command(
    "gdb",
    "IMAGE",
    "Run a guest and serve it to gdb: one thread a vCPU, symbols from the image by themselves. The guest's console is stdout.\n"
    "Connect with: gdb -ex 'target remote 127.0.0.1:1234'. Without --wait it runs at once, and gdb may come and go.\n"
    "It is what pykvm run --gdb is, and takes the same options.",
    [
        Option("--listen", "where gdb connects to: HOST:PORT, or unix:PATH, which only its owner may use", "WHERE", run.GDB_PORT),
        *GUEST_OPTIONS,
        *(option for option in run.RUN_OPTIONS if option.name != "--gdb"),
    ],
    [
        "pykvm gdb page_fault --wait",
        "pykvm gdb spinlock --wait --listen unix:/tmp/spinlock.gdb",
    ],
)


def main(argv: list[str]) -> int:
    """Serve it; returns the exit status."""
    image, _, o = parse_guest(COMMAND, argv)
    o["gdb"] = o["listen"]
    run.check(o)
    output = Output()
    return run.finish(open_machine(image, o, **run.options_of(o, output)), o, output)


def serve(machine: Machine, where: str, *, wait: bool, remote: bool, timeout: float | None) -> Result:
    """Run the machine for whoever connects at ``where``, to its end: "killed" when gdb has ended it. Raises what Machine.run() does."""
    from pykvm.debug.control import Control
    from pykvm.debug.gdb.listen import Listener
    from pykvm.debug.gdb.server import Server
    from pykvm.debug.reach import end_of

    with Listener(where, remote=remote) as listener:
        say(f"pykvm: gdb -ex 'target remote {listener.name}'")
        stopped = Server(Control(machine), listener, timeout).serve(wait=wait)
    return machine.result("killed") if stopped is None else end_of(machine, stopped)
