"""``pykvm bench``: measurements, each beside plain C in the same run."""

from __future__ import annotations

import sys
from time import monotonic

from pykvm.cli import say
from pykvm.cli.options import Command, Option, number, whole
from pykvm.errors import ConfigError
from pykvm.units import MIB, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.bench.paired import Estimate
    from pykvm.bench.start import Comparison


def _guest_size(text: str) -> int:
    size = parse_size(text)
    if size < 16 * MIB:
        raise ConfigError(f"{text} is too small: a guest that migrates has at least 16M here")
    return size


COMMAND = Command(
    "bench",
    "exits|steps|irq|loop|start|state|debug|mmu|compare A B|table A|plot A FILE",
    "exits: what each kind of exit costs, through plain C, the native loop and the Python loop, and by the guest's own clock.\n"
    "steps: which instructions of user space lie between two KVM_RUNs, by part and by function; single-stepped, through each loop.\n"
    "irq: from the host's KVM_IRQ_LINE to the guest's handler and back, beside the same ioctls in C.\n"
    "loop: what one vCPU does in a second, and how many times as much several do, each on a host CPU of its own.\n"
    "start: from nothing to a guest's first exit and gone again, beside C; many VMs at once, and what memory each takes.\n"
    "state: live migration to another process, beside a C copy of the same bytes, and how long a guest stands still.\n"
    "debug: what a trace costs an exit, what a single step costs beside a bare C loop of them, and the walk of an address.\n"
    "mmu: page walks, page tables and EPT; pykvm bench mmu --help tells more.\n"
    "compare: judges two files of bench exits --json; status 1 when the second is slower anywhere.\n"
    "table: a file of bench exits --json as tables in Markdown.\n"
    "plot: draws a file of bench exits --json, from a host without matplotlib for example; FILE ends with .svg, .png or .pdf.\n"
    "Medians with 95 % intervals; differences are taken within a round, so a noisy machine widens intervals, not results.\n"
    "Ctrl-C ends it with status 130, after printing what was measured until then.",
    [
        Option("--rounds", "rounds to measure; bench exits 48, bench state 8, others 40", "N", convert=whole),
        Option("--batch", "exits (steps) a round and loop; bench exits 250, bench irq 500, bench debug 1000", "N", convert=whole),
        Option("--cpus", "vCPUs, at most (bench loop); as many as there are CPUs", "N", convert=whole),
        Option("--kind", "only this kind of exit, or those that begin so; may be repeated (bench exits, bench steps)", "KIND", many=True),
        Option("--vms", "VMs at once, at most (bench start)", "N", 1000, whole),
        Option("--size", "memory of the guest that migrates (bench state)", "SIZE", 1 << 30, _guest_size),
        Option("--least", "the smallest difference that counts, in percent (bench compare)", "PERCENT", 3.0, number),
        Option("--json", "JSON instead of tables"),
        Option("--plot", "draw the results: .svg, .png or .pdf (bench exits; needs matplotlib)", "FILE"),
    ],
    [
        "pykvm bench exits",
        "pykvm bench exits --kind PIO --rounds 200",
        "pykvm bench exits --json > a.json; pykvm bench compare a.json b.json",
        "pykvm bench exits --plot exits.svg",
        "pykvm bench steps --kind 'MMIO read 32'",
        "pykvm host run --cpu intel --get a.json -- sh -c 'pykvm bench exits --json > a.json'; pykvm bench plot a.json intel.svg",
        "pykvm bench loop --cpus 2",
    ],
)


_FILES = {"compare": ("A.json", "B.json"), "table": ("A.json",), "plot": ("A.json", "PICTURE.svg")}


def main(argv: list[str]) -> int:
    """Measure and print."""
    if argv[:1] == ["mmu"]:
        from pykvm.cli import bench_mmu

        return bench_mmu.main(argv[1:])
    (what, *files), o = COMMAND.parse(argv, 1, 3)
    if what not in ("exits", "steps", "irq", "loop", "start", "state", "debug", *_FILES):
        raise ConfigError(
            f"no benchmark is called {what!r}: use exits, steps, irq, loop, start, state, debug, mmu, compare A B, table A or plot A FILE"
        )
    wanted = _FILES.get(what, ())
    if len(files) != len(wanted):
        if not wanted:
            raise ConfigError(f"{files[0]!r} is one word too many: pykvm bench {what}")
        raise ConfigError(f"{what} takes {'one file' if len(wanted) == 1 else 'two files'}: pykvm bench {what} {' '.join(wanted)}")
    match what:
        case "exits":
            return _exits(o["kind"], o["batch"] or 250, o["rounds"] or 48, o["json"], o["plot"])
        case "steps":
            return _steps(o["kind"], o["json"])
        case "irq":
            return _irq(o["batch"] or 500, o["rounds"] or 40, o["json"])
        case "loop":
            return _loop(o["cpus"], o["rounds"] or 40, o["json"])
        case "debug":
            return _debug(o["batch"] or 1000, o["rounds"] or 40, o["json"])
        case "start":
            return _start(o["rounds"] or 40, o["vms"], o["json"])
        case "state":
            return _state(o["size"], o["rounds"] or 8, o["json"])
        case "table":
            return _table(files[0])
        case "plot":
            return _plot(*files)
    return _compare(files[0], files[1], o["least"] / 100, o["json"])


def _plot(results: str, picture: str) -> int:
    from pykvm.bench.compare import read_results
    from pykvm.bench.plot import check, draw

    check(picture)
    draw(read_results(results), picture)
    return 0


def _table(results: str) -> int:
    from pykvm.bench.compare import read_results
    from pykvm.bench.tables import markdown

    print(markdown(read_results(results)))
    return 0


# --- progress, and the end --------------------------------------------------------------------------------------------


def _progress(label: str) -> Callable[..., None] | None:
    """Shows how far a measurement is, where standard error is a terminal: called with (i, n), or (what, i, n)."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return _plain_progress(label)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)  # no thread beside what is measured
    task = bar.add_task(label, total=None)
    shown = 0.0

    def show(*at: Any) -> None:
        nonlocal shown
        *what, i, n = at
        if not bar.live.is_started:
            bar.start()
        now = monotonic()
        due = now - shown > 0.1
        shown = now if due else shown
        bar.update(task, completed=i, total=n, description=f"{label}: {what[0]}" if what else label, refresh=due)
        if i >= n:
            bar.stop()

    _bars.append(bar)
    return show


_bars: list[Any] = []


def _plain_progress(label: str) -> Callable[..., None]:
    def show(*at: Any) -> None:
        *what, i, n = at
        text = f"{label}{f': {what[0]}' if what else ''}: {i} of {n}" if i < n else ""
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    return show


def _end_progress() -> None:
    while _bars:
        _bars.pop().stop()


def _status(interrupted: bool) -> int:
    if not interrupted:
        return 0
    sys.stdout.flush()
    end = "\r\x1b[K" if sys.stderr.isatty() else ""  # over the progress line
    say(f"{end}pykvm: interrupted; this is what was measured until then")
    return 130


def _print_json(benchmark: str, schema: int = 1, **fields: Any) -> None:
    from json import dumps

    print(dumps({"schema": schema, "benchmark": benchmark, **fields}, indent=2 if schema == 1 else None))


# --- exits ------------------------------------------------------------------------------------------------------------


def _exits(words: list[str], batch: int, rounds: int, json: bool, plot: str | None) -> int:
    from pykvm.bench.kinds import chosen

    kinds = chosen(words)
    if plot is not None:
        from pykvm.bench.plot import check

        check(plot)  # before minutes are spent
    from pykvm.bench.compare import SCHEMA
    from pykvm.bench.exits import bench_exits
    from pykvm.bench.host import Noise, describe, sentence, tsc_counts_instructions
    from pykvm.bench.paired import Interrupted
    from pykvm.probe import cpl0_emulated

    host = {**describe(), "cpl0_emulated": cpl0_emulated(), "tsc_counts_instructions": tsc_counts_instructions()}
    noise = Noise()
    interrupted = False
    try:
        rows = bench_exits(kinds, batch, rounds, _progress("bench exits"), noise.look)
    except Interrupted as interrupt:
        rows, interrupted = interrupt.measured, True
    finally:
        _end_progress()
    quiet = noise.as_dict()
    results = {"batch": batch, "rounds": rounds, "host": host, "noise": quiet, "rows": [row.as_dict() for row in rows]}
    if json:
        _print_json("exits", SCHEMA, **results)
    else:
        from pykvm.bench.tables import exit_tables

        print(exit_tables(rows, instructions=host["tsc_counts_instructions"], emulated=host["cpl0_emulated"]))
        print(f"\n{sentence(quiet)}")
    if plot is not None:
        from pykvm.bench.plot import draw

        draw(results, plot)
    return _status(interrupted)


def _compare(first: str, second: str, least: float, json: bool) -> int:
    from pykvm.bench.compare import compare, read_results, table

    a, b = read_results(first), read_results(second)
    differences = compare(a, b, least)
    if json:
        _print_json("compare", differences=[d.as_dict() for d in differences])
    else:
        print(table(differences, a, b))
    return int(any(d.verdict == "slower" for d in differences))


def _steps(words: list[str], json: bool) -> int:
    from pykvm.bench.kinds import chosen
    from pykvm.bench.steps import bench_steps
    from pykvm.bench.tables import steps_table

    found = [bench_steps(kind) for kind in chosen(words or ["PIO out 8"])]
    if json:
        _print_json("steps", kinds=[steps.as_dict() for steps in found])
    else:
        print("\n\n".join(map(steps_table, found)))
    return 0


# --- the others -------------------------------------------------------------------------------------------------------


def _irq(batch: int, rounds: int, json: bool) -> int:
    from pykvm.bench.irq import bench_irq
    from pykvm.bench.paired import Interrupted

    interrupted = False
    try:
        row = bench_irq(batch, rounds, _progress("bench irq"))
    except Interrupted as interrupt:
        row, interrupted = interrupt.measured, True
    finally:
        _end_progress()
    if json:
        _print_json("irq", batch=batch, unit="tsc", **row.as_dict())
    else:
        ns = 1e6 / row.tsc_khz
        print("an interrupt: PIO exit, KVM_IRQ_LINE up and down, the guest's handler, EOI, IRETQ")
        print(f"  plain C       {row.c.value:>9.0f} TSC units  {row.c.value * ns:>7.0f} ns")
        print(f"  Python loop   {row.python.value:>9.0f} TSC units  {row.python.value * ns:>7.0f} ns  {_times(row.ratio)}")
    return _status(interrupted)


def _loop(cpus: int | None, rounds: int, json: bool) -> int:
    from pykvm.bench.loop import bench_loop
    from pykvm.bench.paired import Interrupted

    interrupted = False
    try:
        rows = bench_loop(cpus, rounds=rounds, progress=_progress("bench loop"))
    except Interrupted as interrupt:
        rows, interrupted = interrupt.measured, True
    finally:
        _end_progress()
    if json:
        _print_json("loop", rows=[row.as_dict() for row in rows])
    else:
        print("loops a second on one vCPU, and how many times as much several vCPUs do together\n")
        for row in rows:
            several = "   ".join(f"{n} vCPUs {_times(e)}" for n, e in row.ratios.items())
            print(f"{row.kind:<20} {row.one.value:>12,.0f} /s   {several}")
    return _status(interrupted)


def _debug(batch: int, rounds: int, json: bool) -> int:
    from pykvm.bench.debug import bench_debug
    from pykvm.bench.paired import Interrupted

    interrupted = False
    try:
        rows = bench_debug(batch, rounds, _progress("bench debug"))
    except Interrupted as interrupt:
        rows, interrupted = interrupt.measured, True
    finally:
        _end_progress()
    if json:
        _print_json("debug", batch=batch, unit="tsc", rows=[row.as_dict() for row in rows])
    else:
        for row in rows:
            us = 1e3 / row.tsc_khz
            print(row.what)
            for name, e in row.units.items():
                more = row.over.get(name)
                beside = "" if more is None else f"  {more.value * us:>+9.3f} µs ({more.low * us:.3f} to {more.high * us:.3f})"
                times = "" if more is None else f"  {_times(row.times[name])}"
                print(f"  {name:<20} {e.value:>10.0f} TSC units  {e.value * us:>9.3f} µs{beside}{times}")
    return _status(interrupted)


def _times(e: Estimate) -> str:
    return f"{e.value:.2f} × ({e.low:.2f} to {e.high:.2f})"


def _start(rounds: int, vms: int, json: bool) -> int:
    from pykvm.bench.many import Crowd, bench_many
    from pykvm.bench.paired import Interrupted
    from pykvm.bench.start import bench_in_process, bench_phases, bench_whole_process

    both: list[Comparison] = []
    crowds: list[Crowd] = []
    interrupted = False
    try:
        both.append(bench_in_process(5 * rounds, _progress("bench start, in-process")))
        both.extend(bench_phases(rounds, _progress("bench start, step by step")))
        both.append(bench_whole_process(rounds, _progress("bench start, whole processes")))
        for crowd in bench_many(vms):
            crowds.append(crowd)
    except Interrupted as interrupt:
        both.extend(interrupt.measured if isinstance(interrupt.measured, list) else [interrupt.measured])
        interrupted = True
    except KeyboardInterrupt:
        if not both:
            raise
        interrupted = True
    finally:
        _end_progress()
    if json:
        _print_json("start", comparisons=[c.as_dict() for c in both], many=[crowd.as_dict() for crowd in crowds])
    else:
        print("\n\n".join(map(_comparison, both)))
        if crowds:
            print("\nmany VMs alive at once, 1 MiB of RAM each, run to their first exit")
            print("\n".join(f"  {crowd}" for crowd in crowds))
    return _status(interrupted)


def _state(size: int, rounds: int, json: bool) -> int:
    from pykvm.bench.migration import bench_migration
    from pykvm.bench.paired import Interrupted
    from pykvm.bench.saved import bench_saved

    interrupted = False
    row, saved = None, []
    try:
        saved = bench_saved(5 * rounds, 512 << 20, size // 4, _progress("bench state"))
        row = bench_migration(size, rounds, _progress("bench state, migration"))
    except Interrupted as interrupt:
        interrupted = True
        if isinstance(interrupt.measured, list):
            saved = interrupt.measured
        else:
            row = interrupt.measured
    finally:
        _end_progress()
    if json:
        _print_json("state", comparisons=[c.as_dict() for c in saved], migration=None if row is None else row.as_dict())
    else:
        for comparison in saved:
            print(_comparison(comparison))
        if row is not None:
            print(row)
    return _status(interrupted)


def _comparison(c: Comparison) -> str:
    lines = [c.title]
    for name, ms in c.ms.items():
        times = "" if name == c.base else f"  {_times(c.ratio[name])}"
        lines.append(f"  {name:<18} {ms.value:>8.3f} ms{times}")
    return "\n".join(lines)
