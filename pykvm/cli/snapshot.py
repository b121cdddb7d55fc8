"""``pykvm snapshot``: a guest run up to a place, and saved.

Exit status: 0 it is saved; 1 the run ended before the place; else as for pykvm run.
"""

from __future__ import annotations

import sys

from pykvm.cli import say
from pykvm.cli.guest import GUEST_OPTIONS, TIME_LIMIT, Input, Output, open_machine, parse_guest
from pykvm.cli.options import Command, Option
from pykvm.errors import ConfigError, GuestCrash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.machine import Machine

COMMAND = Command(
    "snapshot",
    "IMAGE",
    "Run a guest up to a place, and save all of it in a directory: pykvm resume goes on from there. EXIT is as for pykvm trace: 17 (the\n"
    "17th), hlt, port=0x3f8 ...; SECONDS have a unit or a point: 2s, 0.5. A snapshot that is there is replaced when the new one is whole.",
    [
        *GUEST_OPTIONS,
        TIME_LIMIT,
        Option("--at", "save at this exit, or after so long", "EXIT|SECONDS"),
        Option("--out", "the directory to save in", "DIR"),
        Option("--json", "one JSON object instead of text"),
    ],
    [
        "pykvm snapshot hello --at 5 --out hello.snap",
        "pykvm snapshot kernel --at 2s --out booted.snap",
        "pykvm resume hello.snap",
    ],
)


def main(argv: list[str]) -> int:
    """Run and save; returns the exit status."""
    image, _, o = parse_guest(COMMAND, argv)
    if not o["at"] or not o["out"]:
        raise ConfigError(f"{'--at' if o['out'] else '--out'} is missing: pykvm snapshot IMAGE --at EXIT|SECONDS --out DIR")
    seconds = _seconds(o["at"])
    output = Output()
    show = None if o["json"] else output.write
    with open_machine(image, o, on_output=show, poll_input=Input(output).poll) as machine:
        machine.on_heartbeat = output.flush
        try:
            ended = _run(machine, o["at"], seconds, o["timeout"])
        except GuestCrash as crash:
            ended = f"the guest crashed: {crash}"
        output.flush()
        if ended:
            say(f"pykvm: nothing is saved: {ended}")
            return 1
        state = machine.snapshot(o["out"])
        from pykvm.state.snapshot import describe

        about = describe(state)
    if o["json"]:
        import json

        print(json.dumps({"directory": o["out"], "at": o["at"], **about}, indent=2))
    else:
        if about["console_bytes"] and not machine.console.data.endswith(b"\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
        say(f"pykvm: saved at {o['at']} in {o['out']}; pykvm resume {o['out']} goes on")
    return 0


def _seconds(text: str) -> float | None:
    """``2s`` or ``0.5`` as seconds; None for what is no time."""
    number = text.removesuffix("s")
    if number == text and "." not in text:
        return None
    try:
        value = float(number)
    except ValueError:
        return None
    if not 0 < value < 1e9:
        raise ConfigError(f"--at {text}: give a positive time")
    return value


def _run(machine: Machine, place: str, seconds: float | None, timeout: float | None) -> str:
    """Up to the place; why not, in words, or nothing."""
    if seconds is not None:
        reason = machine.run(seconds, explain=False).reason
        return "" if reason == "timeout" else f"the run ended before {place} ({reason})"
    from pykvm.debug.reach import run_until

    reason = run_until(machine, place, timeout)
    return "" if reason == "until" else f"no exit was {place}: the run ended first ({reason})"
