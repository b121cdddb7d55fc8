"""``pykvm doctor``: this host, row by row."""

from __future__ import annotations

import sys

from pykvm.cli.options import Command, Option

__all__ = ["COMMAND", "main"]

COMMAND = Command(
    "doctor",
    "",
    "What this host's CPU and KVM are and can do, each row with where it was read; the rows under behaviour are found by running tiny\n"
    "guests. Status 0 when /dev/kvm can be used, else 69.",
    [Option("--json", "JSON instead of a table")],
    ["pykvm doctor", "pykvm doctor --json | python3 -m json.tool"],
)


def main(argv: list[str]) -> int:
    """Print the rows."""
    _, o = COMMAND.parse(argv)
    from pykvm.doctor import examine

    usable = False
    rows = []
    group = ""
    tty = sys.stdout.isatty()
    for row in examine():
        rows.append(row)
        usable = usable or (row.name == "access" and row.value == "yes")
        if o["json"]:
            continue
        if row.group != group:
            print(f"{'' if not group else chr(10)}{row.group}")
            group = row.group
        source = f"\x1b[2m{row.source}\x1b[0m" if tty else row.source
        print(f"  {row.name:<32} {row.value:<34} {source}", flush=True)
    if o["json"]:
        import json

        print(json.dumps({"usable": usable, "rows": [row.as_dict() for row in rows]}, indent=2))
    return 0 if usable else 69
