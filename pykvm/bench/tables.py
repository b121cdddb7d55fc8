"""The results of ``pykvm bench exits`` as text and as Markdown, and those of ``pykvm bench steps``."""

from __future__ import annotations

from pykvm.bench.setup import NAIVE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.bench.exits import Row
    from pykvm.bench.paired import Estimate
    from pykvm.bench.steps import Steps

__all__ = ["exit_tables", "markdown", "steps_table"]

_WIDTH, _WIDE = 24, 64
LOOPS = ("native", "python")


def _plus_minus(e: Estimate | None, sign: str = "") -> str:
    return "" if e is None else f"{e.value:{sign}.0f} ±{(e.high - e.low) / 2:.0f}"


def exit_tables(rows: list[Row], *, instructions: bool, emulated: bool) -> str:
    """One table for what reaches user space, one for what the guest alone sees, and what could not be measured."""
    parts = []
    if rows:
        unit = (
            "instructions: the TSC counts them here"
            if instructions
            else f"at {rows[0].tsc_khz / 1e6:.2f} GHz: 1000 are {1e9 / rows[0].tsc_khz:.0f} ns"
        )
        parts.append(f"TSC units an exit ({unit}); medians ± half the 95 % interval.")
    if emulated:
        parts.append(
            "KVM's instruction emulator runs CPL0 code here, at 0.5 to 1 µs an instruction: what a loop takes has some of the\n"
            "guest's own in it. From what the guest's clock says they are taken off."
        )
    measured = [row for row in rows if row.rounds]
    user, guest = [row for row in measured if row.of.reaches != "guest"], [row for row in measured if row.of.reaches == "guest"]
    if user:
        parts += [_user_table(user), _decomposition(user)]
    if guest:
        parts.append(_guest_table(guest))
    absent = [f"  {row.kind:<{_WIDTH}} {row.unavailable}" for row in rows if row.unavailable is not None]
    if absent:
        parts.append("\n".join(["not on this host:", *absent]))
    return "\n\n".join(parts)


def _user_table(rows: list[Row]) -> str:
    naive = any(NAIVE in row.over_c for row in rows)
    lines = ["Exits to user space: a batch, timed from outside; and one at a time by the guest's clock, median and 99th percentile", ""]
    head = f"{'exit':<{_WIDTH}}{'plain C':>16}{'C + native':>16}{'C + Python':>18}"
    lines.append(head + (f"{'C + naive cffi':>16}" if naive else "") + f"{'guest: C':>18}{'guest: Python':>18}")
    for row in rows:
        over, inside = row.over_c, row.guest
        line = f"{row.kind:<{_WIDTH}}{_plus_minus(row.c):>16}{_plus_minus(over.get('native'), '+'):>16}"
        line += f"{_plus_minus(over.get('python'), '+'):>17}{'*' if row.of.reaches == 'bare' else ' '}"
        line += f"{_plus_minus(over.get(NAIVE), '+'):>16}" if naive else ""
        for name in ("C", "python"):
            line += f"{f'{inside[name].median.value:.0f} / {inside[name].p99:.0f}' if name in inside else '':>18}"
        lines.append(line.rstrip())
    if any(row.of.reaches == "bare" for row in rows):
        lines.append("* such an exit ends a run: Python is VCPU.run() here, a typed exit object each time")
    return "\n".join(lines)


def _decomposition(rows: list[Row]) -> str:
    lines = [
        "Where it goes. The boundary is a KVM_RUN that comes back before it enters the guest; hardware and KVM are the rest of C's",
        "",
    ]
    names = ("hardware and KVM", "ioctl boundary", "native loop", "Python")
    lines.append(f"{'exit':<{_WIDTH}}" + "".join(f"{name:>19}" for name in names))
    for row in rows:
        parts = row.decomposition
        lines.append((f"{row.kind:<{_WIDTH}}" + "".join(f"{_plus_minus(parts.get(name)):>19}" for name in names)).rstrip())
    return "\n".join(lines)


def _guest_table(rows: list[Row]) -> str:
    lines = ["What does not reach user space, by the guest's clock; what does not exit at all is among it", ""]
    lines.append(f"{'exit or trap':<{_WIDTH}}{'median':>16}{'p99':>12}   what it is")
    for row in rows:
        for guest in row.guest.values():
            lines.append(f"{row.kind:<{_WIDTH}}{_plus_minus(guest.median):>16}{guest.p99:>12.0f}   {row.of.note}".rstrip())
    return "\n".join(lines)


def steps_table(steps: Steps) -> str:
    """Instructions of user space by part, then by function."""
    from pykvm.bench.steps import PARTS

    loops = list(steps.by_loop)
    head = "".join(f"{loop.partition(',')[0]:>12}" for loop in loops)
    lines = [f"{steps.kind}: instructions of user space from one KVM_RUN to the next", "", f"{'part':<{_WIDTH}}{head}"]
    for part in PARTS:
        if any(part in steps.parts[loop] for loop in loops):
            lines.append(f"{part:<{_WIDTH}}" + "".join(f"{steps.parts[loop].get(part, 0):>12}" for loop in loops))
    lines += [f"{'all':<{_WIDTH}}" + "".join(f"{steps.totals[loop]:>12}" for loop in loops), "", f"{'function':<{_WIDE}}{head}"]
    for file, function in steps.places:
        counts = "".join(f"{steps.by_loop[loop].get((file, function), 0):>12}" for loop in loops)
        lines.append(f"{f'{function} ({file})':<{_WIDE}}{counts}")
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The same as exit_tables(), of a file that compare.read_results() has read."""
    measured = [row for row in results["rows"] if "unavailable" not in row and row["rounds"]]
    user, guest = [row for row in measured if row["reaches"] != "guest"], [row for row in measured if row["reaches"] == "guest"]
    lines = []
    if user:
        lines += [
            "| exit | plain C | C + native | C + Python | hardware and KVM | ioctl boundary | guest's clock: C | native | Python |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for row in user:
        over, parts, inside = row["over_c"], row["decomposition"], row["guest"]
        bare = "*" if row["reaches"] == "bare" else ""
        cells = [row["kind"], _cell(row["c"]), _cell(over.get("native"), "+"), _cell(over.get("python"), "+") + bare]
        cells += [_cell(parts.get(name)) for name in ("hardware and KVM", "ioctl boundary")]
        cells += [f"{_number(inside[name]['median'])} / {_number(inside[name]['p99'])}" if name in inside else "" for name in ("C", *LOOPS)]
        lines.append(f"| {' | '.join(cells)} |")
    if guest:
        lines += ["", "| by the guest's clock alone | median | p99 | |", "|---|---|---|---|"]
    for row in guest:
        for value in row["guest"].values():
            lines.append(f"| {row['kind']} | {_cell(value)} | {_number(value['p99'])} | {row['note']} |")
    absent = [f"- {row['kind']}: {row['unavailable']}" for row in results["rows"] if "unavailable" in row]
    return "\n".join([*lines, *([""] if absent else []), *absent])


def _cell(e: dict[str, float] | None, sign: str = "") -> str:
    return "" if e is None else f"{_number(e['median'], sign)} ±{_number((e['high'] - e['low']) / 2)}"


def _number(value: float, sign: str = "") -> str:
    """Thousands apart, and a real minus."""
    return f"{value:{sign},.0f}".replace(",", " ").replace("-", "−")
