"""``pykvm control``: ask a running machine that was started with --control, or tell it.

Exit status: 0; 64 nobody answers there, or the machine refuses, and says why.
"""

from __future__ import annotations

from pykvm.cli.options import Command, Option
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

COMMAND = Command(
    "control",
    "PATH status|pause|resume|snapshot DIR|power|cancel|quit",
    "Ask a machine that runs with --control unix:PATH, or tell it. status: what it is and does. pause, resume: its vCPUs leave the guest\n"
    "and wait, and go on. snapshot DIR: save it there, and go on. power: press the power button of platform pc-test, so that\n"
    "the guest powers off, or wakes from S3. cancel: give a migration up. quit: end the run.",
    [Option("--json", "the answer as the socket gave it")],
    ["pykvm control /tmp/guest.socket status", "pykvm control /tmp/guest.socket pause"],
)
TOLD = ("status", "pause", "resume", "snapshot", "power", "cancel", "quit")


def main(argv: list[str]) -> int:
    """Ask and print."""
    (path, command, *more), o = COMMAND.parse(argv, 2, 3)
    if command == "migrate":
        raise ConfigError(f"migrations have a command of their own: pykvm migrate {path} --to unix:DEST")
    if command not in TOLD:
        raise ConfigError(f"unknown command {command!r}: use one of {', '.join(TOLD)}")
    if len(more) != (command == "snapshot"):
        raise ConfigError(
            "snapshot needs a directory: pykvm control PATH snapshot DIR" if not more else f"{more[0]!r} is one word too many"
        )
    import os

    from pykvm.state.remote import ControlClient

    with ControlClient(path) as client:
        answer = client.ask(command, **({"dir": os.path.abspath(more[0])} if more else {}))
    if o["json"]:
        import json

        print(json.dumps(answer))
    elif command == "status":
        print(status_text(answer))
    return 0


def status_text(answer: dict[str, Any]) -> str:
    """The answer to status, for a person."""
    cpus = answer["cpus"]
    lines = [
        f"{answer['status']}: {answer['image']}, {cpus} vCPU{'s' * (cpus != 1)}, {answer['memory'] >> 10} KiB",
        f"{answer['seconds']:.1f} s, {answer['exits']} exits, {answer['console']} bytes printed",
    ]
    migration = answer.get("migration")
    if migration is not None:
        lines.append(f"migration to {migration['to']}: {migration['phase']}")
        if "error" in migration:
            lines.append(migration["error"])
    return "\n".join(lines)
