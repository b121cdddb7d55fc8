"""``pykvm bench``: measurements, each beside plain C in the same run."""

from __future__ import annotations

import sys

from pykvm.cli import say
from pykvm.cli.options import Command, Option, whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.bench.exits import Row
    from pykvm.bench.paired import Estimate
    from pykvm.bench.start import Comparison

COMMAND = Command(
    "bench",
    "exits|irq|loop|start",
    "exits: the round trip of an exit through the plain C loop, the native loop and the Python loop into a Python device.\n"
    "irq: from the host's KVM_IRQ_LINE to the guest's handler and back, beside the same ioctls in C.\n"
    "loop: what one vCPU does in a second, and how many times as much several do, each on a host CPU of its own.\n"
    "start: from nothing to a guest's first exit and gone again, in-process beside C, and as a whole process.\n"
    "Medians with 95 % intervals; differences are taken within a round, so a noisy machine widens intervals, not results.\n"
    "Ctrl-C ends it with status 130, after printing what was measured until then.",
    [
        Option("--rounds", "rounds to measure", "N", 40, whole),
        Option("--batch", "exits a round and loop (bench exits, irq)", "N", 2000, whole),
        Option("--cpus", "vCPUs, at most (bench loop); as many as there are CPUs", "N", convert=whole),
        Option("--kind", "only this kind of exit; may be repeated (bench exits)", "KIND", many=True),
        Option("--json", "JSON instead of tables"),
    ],
    ["pykvm bench exits", "pykvm bench exits --kind 'PIO out' --rounds 200", "pykvm bench loop --cpus 2", "pykvm bench start --json"],
)


def main(argv: list[str]) -> int:
    """Measure and print."""
    (what,), o = COMMAND.parse(argv, 1, 1)
    match what:
        case "exits":
            return _exits(o["kind"], o["batch"], o["rounds"], o["json"])
        case "irq":
            return _irq(o["batch"], o["rounds"], o["json"])
        case "loop":
            return _loop(o["cpus"], o["rounds"], o["json"])
        case "start":
            return _start(o["rounds"], o["json"])
    from pykvm.errors import ConfigError

    raise ConfigError(f"no benchmark is called {what!r}: use exits, irq, loop or start")


def _progress(label: str) -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(i: int, n: int) -> None:
        end = "\r\x1b[K" if i == n else "\r"
        print(f"{label}: round {i} of {n}" if i < n else "", end=end, file=sys.stderr, flush=True)

    return show


def _exits(kinds: list[str], batch: int, rounds: int, json: bool) -> int:
    from pykvm.bench.exits import KINDS, bench_exits
    from pykvm.bench.paired import Interrupted
    from pykvm.errors import ConfigError

    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    show = _progress("bench exits")
    interrupted = False
    try:
        rows = bench_exits(kinds or list(KINDS), batch, rounds, None if show is None else lambda kind, i, n: show(i, n))
    except Interrupted as interrupt:
        rows, interrupted = interrupt.measured, True
    if json:
        from json import dumps

        print(dumps({"schema": 1, "benchmark": "exits", "batch": batch, "rows": [row.as_dict() for row in rows]}, indent=2))
    else:
        print(_exit_table(rows))
    return _status(interrupted)


def _status(interrupted: bool) -> int:
    if not interrupted:
        return 0
    sys.stdout.flush()
    end = "\r\x1b[K" if sys.stderr.isatty() else ""  # over the progress line
    say(f"{end}pykvm: interrupted; this is what was measured until then")
    return 130


def _exit_table(rows: list[Row]) -> str:
    names = list(rows[0].over_c)
    lines = [f"TSC units an exit (at {rows[0].tsc_khz / 1e6:.2f} GHz); in brackets ns; ± half the 95 % interval", ""]
    lines.append(f"{'exit':<11} {'plain C':>22}" + "".join(f" {'C + ' + name:>30}" for name in names))
    for row in rows:
        ns = 1e6 / row.tsc_khz
        cells = [f"{row.c.value:>9.0f} ({row.c.value * ns:.0f} ns)"]
        line = f"{row.kind:<11} {cells[0]:>22}"
        for name in names:
            e = row.over_c[name]
            line += f" {f'{e.value:+.0f} ±{(e.high - e.low) / 2:.0f} ({e.value * ns:+.0f} ns)':>30}"
        lines.append(line)
    return "\n".join(lines)


def _irq(batch: int, rounds: int, json: bool) -> int:
    from pykvm.bench.irq import bench_irq
    from pykvm.bench.paired import Interrupted

    interrupted = False
    try:
        row = bench_irq(batch, rounds, _progress("bench irq"))
    except Interrupted as interrupt:
        row, interrupted = interrupt.measured, True
    if json:
        from json import dumps

        print(dumps({"schema": 1, "benchmark": "irq", "batch": batch, "unit": "tsc", **row.as_dict()}, indent=2))
    else:
        ns = 1e6 / row.tsc_khz
        print("an interrupt: PIO exit, KVM_IRQ_LINE up and down, the guest's handler, EOI, IRETQ")
        print(f"  plain C       {row.c.value:>9.0f} TSC units  {row.c.value * ns:>7.0f} ns")
        print(f"  Python loop   {row.python.value:>9.0f} TSC units  {row.python.value * ns:>7.0f} ns  {_times(row.ratio)}")
    return _status(interrupted)


def _loop(cpus: int | None, rounds: int, json: bool) -> int:
    from pykvm.bench.loop import bench_loop
    from pykvm.bench.paired import Interrupted

    show = _progress("bench loop")
    interrupted = False
    try:
        rows = bench_loop(cpus, rounds=rounds, progress=None if show is None else lambda kind, i, n: show(i, n))
    except Interrupted as interrupt:
        rows, interrupted = interrupt.measured, True
    if json:
        from json import dumps

        print(dumps({"schema": 1, "benchmark": "loop", "rows": [row.as_dict() for row in rows]}, indent=2))
    else:
        print("loops a second on one vCPU, and how many times as much several vCPUs do together\n")
        for row in rows:
            several = "   ".join(f"{n} vCPUs {_times(e)}" for n, e in row.ratios.items())
            print(f"{row.kind:<20} {row.one.value:>12,.0f} /s   {several}")
    return _status(interrupted)


def _times(e: Estimate) -> str:
    return f"{e.value:.2f} × ({e.low:.2f} to {e.high:.2f})"


def _start(rounds: int, json: bool) -> int:
    from pykvm.bench.paired import Interrupted
    from pykvm.bench.start import bench_in_process, bench_whole_process

    both: list[Comparison] = []
    interrupted = False
    try:
        both.append(bench_in_process(5 * rounds, _progress("bench start, in-process")))
        both.append(bench_whole_process(rounds, _progress("bench start, whole processes")))
    except Interrupted as interrupt:
        both.append(interrupt.measured)
        interrupted = True
    except KeyboardInterrupt:
        if not both:
            raise
        interrupted = True
    if json:
        from json import dumps

        print(dumps({"schema": 1, "benchmark": "start", "comparisons": [c.as_dict() for c in both]}, indent=2))
    else:
        print("\n\n".join(map(_comparison, both)))
    return _status(interrupted)


def _comparison(c: Comparison) -> str:
    lines = [c.title]
    for name, ms in c.ms.items():
        times = "" if name == c.base else f"  {_times(c.ratio[name])}"
        lines.append(f"  {name:<18} {ms.value:>8.3f} ms{times}")
    return "\n".join(lines)
