"""``pykvm resume``: goes on with a guest that pykvm snapshot has saved. Exit status as for pykvm run, and 65 for a damaged snapshot."""

from __future__ import annotations

from pykvm.cli import say
from pykvm.cli.guest import Output
from pykvm.cli.options import Command, Option
from pykvm.cli.run import RUN_OPTIONS, check, finish, options_of
from pykvm.machine import Machine

COMMAND = Command(
    "resume",
    "DIR",
    "Go on with a guest that pykvm snapshot has saved. Its memory is read and compared with its checksums, then mapped: a guest\n"
    "reads only what it touches, and the snapshot stays as it is. On another host, what the guest uses and the host lacks is named.",
    [
        Option("--no-verify", "do not read the memory first: damage to it is not found"),
        Option("--adapt", "drop what this host lacks and the guest does not use, and list it"),
        Option("--accept-tsc", "run it although its TSC has another frequency here, and cannot be scaled"),
        Option("--pin", "run each vCPU on a host CPU of its own"),
        Option("--loop", "who handles exits first", default="native", choices=("python", "native")),
        *RUN_OPTIONS,
    ],
    ["pykvm resume hello.snap", "pykvm resume booted.snap --no-verify --stats"],
)


def main(argv: list[str]) -> int:
    """Restore and run; returns the exit status."""
    (directory,), o = COMMAND.parse(argv, 1, 1)
    check(o)
    output = Output()
    machine = Machine.restore(
        directory,
        verify=o["verify"],
        adapt=o["adapt"],
        accept_tsc=o["accept_tsc"],
        pin=o["pin"],
        loop=o["loop"],
        **options_of(o, output),
    )
    if not o["verify"]:
        say("pykvm: its memory was not verified")
    tell(machine)
    return finish(machine, o, output)


def tell(machine: Machine) -> None:
    """What is not quite as it was when the machine was saved."""
    assert machine.restored is not None  # restore() has set it
    for dropped in machine.restored.dropped:
        say(f"pykvm: dropped: {dropped}")
    for note in machine.restored.notes:
        say(f"pykvm: {note}")
    for (space, base), _ in machine.waiting_devices.items():
        say(f"pykvm: a device at {'port' if space == 'pio' else 'gpa'} {base:#x} was there when it was saved, and is not now")
