"""``pykvm migrate``: move a running guest to where ``pykvm receive`` waits.

Exit status: 0 it runs there; 75 it goes on here, and why; 76 it was handed over and no answer came: it is paused here; 130 Ctrl-C: it
was called off, and goes on here; 64 nobody answers there, or the machine refuses.
"""

from __future__ import annotations

import sys

from pykvm.cli import say
from pykvm.cli.options import Command, Option, number
from pykvm.errors import ConfigError
from pykvm.units import parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.state.remote import ControlClient

COMMAND = Command(
    "migrate",
    "PATH --to unix:DEST",
    "Move the guest that runs with --control unix:PATH to where `pykvm receive unix:DEST` waits. It runs on while its memory is\n"
    "copied; then it stands still for a moment, and goes on there. Until it is handed over, whatever goes wrong, it goes on here.\n"
    "A paused guest arrives paused. Ctrl-C calls it off.",
    [
        Option("--to", "where pykvm receive waits", "unix:DEST"),
        Option("--downtime", "a goal: how long the guest may stand still, such as 50ms", "TIME", "10ms", parse_duration),
        Option("--patience", "give up on a destination that does not answer for so many seconds", "SECONDS", 10.0, number),
        Option("--json", "the report as JSON"),
    ],
    ["pykvm migrate /tmp/guest.socket --to unix:/tmp/there.socket --downtime 20ms"],
)

PHASES = ("saving", "sending", "restoring", "starting")  # what the guest stands still for


def main(argv: list[str]) -> int:
    """Move it; returns the exit status."""
    (path,), o = COMMAND.parse(argv, 1, 1)
    if o["to"] is None:
        raise ConfigError("where to? give --to unix:DEST, where pykvm receive waits")
    from pykvm.state.remote import ControlClient
    from pykvm.unixsocket import path_of

    path_of(o["to"], "--to")
    with ControlClient(path) as client:
        client.send("migrate", to=o["to"], downtime=o["downtime"], patience=o["patience"], wait=True)
        called_off = False
        while True:
            try:
                answer = _follow(client)
                break
            except KeyboardInterrupt:
                called_off = True
                _call_off(path)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if o["json"]:
        import json

        print(json.dumps(answer, indent=2))
    if not answer["ok"]:
        if not o["json"]:
            say(f"pykvm: {answer['error']}")
        return 130 if called_off else 76 if answer.get("uncertain") else 75
    if not o["json"]:
        print(report_text(answer["report"]))
    return 0


def _follow(client: ControlClient) -> dict[str, Any]:
    """Show progress until the answer comes."""
    shown = 0
    while True:
        answer = client.line()
        progress = answer.get("progress")
        if progress is None:
            return answer
        if sys.stderr.isatty():
            print(f"\r\x1b[K{progress_text(progress)}", end="", file=sys.stderr, flush=True)
        elif progress["round"] != shown:
            shown = progress["round"]
            say(progress_text(progress))


def _call_off(path: str) -> None:
    from pykvm.state.remote import ControlClient

    try:
        with ControlClient(path) as other:
            other.ask("cancel")
    except ConfigError as error:
        say(f"pykvm: {error}")


def progress_text(p: dict[str, Any]) -> str:
    """One line."""
    slowed = f", guest slowed by {p['slowed']:.0%}" if p["slowed"] else ""
    return (
        f"{p['phase']}, round {p['round']}: {p['left'] / 1e6:.1f} MB left, {p['sent'] / 1e6:.1f} MB sent, {p['rate'] / 1e6:.0f} MB/s, "
        f"guest writes {p['dirty_rate'] / 1e6:.1f} MB/s{slowed}, expected downtime {p['expected'] * 1e3:.1f} ms"
    )


def report_text(r: dict[str, Any]) -> str:
    """How it went."""
    lines = [
        f"moved to {r['to']} in {r['seconds']:.2f} s: stood still for {r['downtime'] * 1e3:.1f} ms (goal {r['goal'] * 1e3:g} ms)",
        f"{r['bytes'] / 1e6:.1f} MB sent for {r['memory'] / 1e6:.1f} MB of memory, {len(r['rounds'])} rounds, {r['zeros']} zero pages",
        f"{'round':>5} {'pages':>9} {'zero':>9} {'MB':>9} {'ms':>9} {'dirty after':>12} {'slowed':>7}",
    ]
    for i, row in enumerate(r["rounds"], 1):
        lines.append(
            f"{i:>5} {row['pages']:>9} {row['zeros']:>9} {row['bytes'] / 1e6:>9.1f} {row['seconds'] * 1e3:>9.1f} {row['dirty']:>12} "
            f"{row['slowed']:>7.0%}"
        )
    lines.append(f"{'last':>5} {r['last']['pages']:>9} {'':>9} {r['last']['bytes'] / 1e6:>9.1f} {r['downtime'] * 1e3:>9.1f}")
    if r["paused"]:
        lines.append("it was paused, and is so there: `pykvm control PATH resume` with the path of `pykvm receive --control` lets it go on")
    lines.append("standing still: " + ", ".join(f"{r['last'][what] * 1e3:.1f} ms {what}" for what in PHASES))
    return "\n".join(lines + [f"note: {note}" for note in r["notes"]])
