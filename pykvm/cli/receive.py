"""``pykvm receive``: wait for a guest that migrates here, and run it.

Exit status: as of pykvm run, once the guest is here; 75 it did not come, and goes on where it was; 64 it cannot listen there.
"""

from __future__ import annotations

from pykvm.cli import say
from pykvm.cli.guest import Output
from pykvm.cli.options import Command, Option, number
from pykvm.cli.resume import tell
from pykvm.cli.run import RUN_OPTIONS, check, finish, options_of
from pykvm.errors import ConfigError

COMMAND = Command(
    "receive",
    "unix:DEST",
    "Wait at a socket, which only its owner may use, for one guest that `pykvm migrate --to unix:DEST` sends, and run it: what it prints\n"
    "from now on is stdout, and its end is this command's. The time limit begins when it starts here.",
    [
        Option("--patience", "give up on a source that sends nothing for so many seconds", "SECONDS", 30.0, number),
        Option("--within", "wait so many seconds for a guest; without it, for ever", "SECONDS", convert=number),
        Option("--adapt", "drop what the guest was promised, does not use, and this host has not; what is dropped is listed"),
        Option("--accept-tsc", "where this host's TSC has another frequency and KVM cannot scale it, let the guest's clock run at it"),
        Option("--pin", "run each vCPU on a host CPU of its own"),
        Option("--loop", "who handles exits first", default="native", choices=("python", "native")),
        *RUN_OPTIONS,
    ],
    ["pykvm receive unix:/tmp/there.socket --timeout 60"],
)


def main(argv: list[str]) -> int:
    """Receive and run it; returns the exit status."""
    (where,), o = COMMAND.parse(argv, 1, 1)
    check(o)
    from pykvm.errors import MigrationError
    from pykvm.state.receive import Incoming
    from pykvm.unixsocket import UnixListener, path_of

    path = path_of(where)
    try:
        listener = UnixListener(path)
    except OSError as error:
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from None
    with listener:
        say(f"pykvm: waiting at {where} for a guest")
        listener.socket.settimeout(o["within"])
        try:
            sock, _ = listener.socket.accept()
        except TimeoutError:
            raise MigrationError(f"no guest came in {o['within']:g} seconds") from None
    output = Output()
    incoming = Incoming(
        sock, patience=o["patience"], adapt=o["adapt"], accept_tsc=o["accept_tsc"], resumable=o["control"] is not None, pin=o["pin"],
        loop=o["loop"], **options_of(o, output),
    )  # fmt: skip
    machine = incoming.take()
    tell(machine)
    if machine.group.paused:
        say(f"pykvm: the guest came paused: pykvm control {o['control'].removeprefix('unix:')} resume lets it go on")
    return finish(machine, o, output)
