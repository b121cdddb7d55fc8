"""``pykvm bench mmu``: what virtual memory costs a guest, beside a process; and reports side by side."""

from __future__ import annotations

import sys

from pykvm.cli import say
from pykvm.cli.options import Command, Option, whole
from pykvm.errors import ConfigError
from pykvm.units import format_size, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

COMMAND = Command(
    "bench mmu",
    "[--compare A.json B.json]",
    "Page-table changes, switches between address spaces, TLB misses (4K and 2M pages of the guest on 4K and 2M pages of the host) and\n"
    "first touches, each beside the same in a process: TSC units an operation, ratio to native, exits an operation; and how many memory\n"
    "references a TLB miss costs by page size, computed. The paging in force (EPT, NPT or shadow) is named.\n"
    "--compare puts two reports side by side, such as ept=1 and ept=0; --hosts makes and compares them on emulated hosts.\n"
    "Ctrl-C ends it with status 130, after printing what was measured until then.",
    [
        Option("--workload", "only this (may be repeated): chase, random, first_touch, first_map, map_unmap, switch", "NAME", many=True),
        Option("--size", "working set of chase and random; a power of two", "SIZE"),
        Option("--rounds", "rounds to measure", "N", None, whole),
        Option("--json", "JSON instead of tables"),
        Option("--compare", "put two reports side by side"),
        Option("--plot", "draw what --compare compares: .svg, .png or .pdf (needs matplotlib)", "FILE"),
        Option("--hosts", "measure on these emulated hosts, two-level paging on and off: intel, amd or intel,amd", "CPUS"),
        Option("--out", "where --hosts puts its reports", "FOLDER", "bench-ept"),
        Option("--emulator", "what emulates this host, to be noted in the report", "NAME", ""),
    ],
    [
        "pykvm bench mmu",
        "pykvm bench mmu --workload chase --size 256M",
        "pykvm bench mmu --json > ept.json",
        "pykvm bench mmu --compare ept.json shadow.json --plot ept.svg",
        "pykvm bench mmu --hosts intel,amd --out results",
    ],
)
PAGES = {0: "-", 4096: "4K", 2 << 20: "2M", 1 << 30: "1G"}


def main(argv: list[str]) -> int:
    """What follows ``bench mmu``: measure and print, or compare."""
    operands, o = COMMAND.parse(argv, 0, 2)
    if o["compare"]:
        if len(operands) != 2:
            raise ConfigError("two reports, please: pykvm bench mmu --compare A.json B.json")
        from pykvm.bench.ept import load_report

        a, b = load_report(operands[0]), load_report(operands[1])
        if o["plot"]:
            _draw(a, b, o["plot"])
        return _print_comparison(a, b, o["json"])
    if o["plot"]:
        raise ConfigError("--plot goes with --compare: it draws two reports side by side")
    if operands:
        raise ConfigError(f"{operands[0]!r} is one word too many: reports go with --compare")
    if o["hosts"]:
        return _hosts(o["hosts"].split(","), o["out"], o["size"], o["rounds"])
    return _measure(o)


def _measure(o: dict[str, Any]) -> int:
    from pykvm.bench.mmu import WORKLOADS, bench_mmu
    from pykvm.bench.paired import Interrupted

    status = 0
    size = parse_size(o["size"] or "64M")
    try:
        report = bench_mmu(o["workload"] or WORKLOADS, size, o["rounds"] or 40, o["emulator"], _progress())
    except Interrupted as interrupt:
        report, status = interrupt.measured, 130
    if o["json"]:
        from json import dumps

        print(dumps(report.as_dict(), indent=2))
    else:
        print(report_table(report.as_dict()))
    if status:
        sys.stdout.flush()
        end = "\r\x1b[K" if sys.stderr.isatty() else ""  # over the progress line
        say(f"{end}pykvm: interrupted; this is what was measured until then")
    return status


def _progress() -> Callable[[str, int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(name: str, i: int, n: int) -> None:
        end = "\r\x1b[K" if i == n else "\r"
        print(f"bench mmu, {name}: round {i} of {n}\x1b[K" if i < n else "", end=end, file=sys.stderr, flush=True)

    return show


def _hosts(cpus: list[str], folder: str, size: str | None, rounds: int | None) -> int:
    from time import monotonic

    from pykvm.bench.ept import SIZE, load_report, measure_host
    from pykvm.bench.mmu import check

    check([], parse_size(size or SIZE))
    start = monotonic()
    tell = (lambda text: say(f"[{monotonic() - start:5.1f} s] {text}")) if sys.stderr.isatty() else None
    for i, cpu in enumerate(cpus):
        on, off = measure_host(cpu, folder, size or SIZE, rounds or 0, tell)
        print(("" if not i else "\n") + f"{on}\n{off}\n", flush=True)
        _print_comparison(load_report(on), load_report(off), False)
        sys.stdout.flush()
    return 0


# --- tables -----------------------------------------------------------------------------------------------------------


def _pages(row: dict[str, Any]) -> str:
    return f"{PAGES.get(row['guest_page'], '?')} on {PAGES.get(row['host_page'], '?')}"


def _times(value: float) -> str:
    """A ratio; small ones keep two digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _units(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _rate(row: dict[str, Any], name: str) -> str:
    """A counter an operation."""
    value = row["counters_per_op"].get(name)
    return "-" if value is None else "0" if not value else "<0.001" if value < 0.001 else f"{value:.3f}"


def _ratio(row: dict[str, Any]) -> str:
    e = row["ratio"]
    return "-" if e is None else f"{_times(e['median'])} ({_times(e['low'])}-{_times(e['high'])})"


def _columns(lines: list[list[str]], left: int) -> list[str]:
    """Columns, the first ``left`` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    made = []
    for line in lines:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        made.append("  ".join(cells).rstrip())
    return made


def _wrapped(texts: list[str]) -> list[str]:
    from textwrap import wrap

    return [line for text in texts for line in wrap(text, 118, subsequent_indent="  ")]


def _about(host: dict[str, Any]) -> str:
    emulator = f", in {host['emulator']}" if host["emulator"] else ""
    return f"{host['cpu']}{emulator}; Linux {host['kernel']}, {host['module']}"


def paging_in_force(host: dict[str, Any]) -> str:
    """As it is said in tables."""
    if host["paging"] == "unknown":
        return "unknown"
    return "shadow paging" if host["paging"] == "shadow" else f"{host['paging']}, {host['host_levels']} levels"


def _references(row: dict[str, Any], host: dict[str, Any]) -> str:
    """What a TLB miss of this row may read at most."""
    from pykvm.bench.walkcost import nested, shadow

    if host["paging"] == "unknown":
        return "-"
    if host["paging"] == "shadow":
        return str(shadow(row["guest_page"], row["host_page"]))
    return str(nested(row["guest_page"], row["host_page"], 4, host["host_levels"]))


def report_table(report: dict[str, Any]) -> str:
    """One report as text."""
    from pykvm.bench.ept import caveats

    host, ns = report["host"], 1e6 / report["host"]["tsc_khz"]
    lines = [
        _about(host),
        f"paging in force: {paging_in_force(host)} ({host['two_level_paging']})",
        f"TSC units an operation (at {host['tsc_khz'] / 1e6:.2f} GHz), medians of {report['rounds']} rounds, 95 % intervals; "
        f"working set {format_size(report['size'])}",
        "",
    ]
    cells = [["workload", "pages", "guest", "" if host["emulator"] else "ns", "native", "ratio to native", "exits", "KVM #PF", "refs/miss"]]
    for row in report["rows"]:
        value = row["per_op"]["median"]
        native = "-" if row["native"] is None else _units(row["native"]["median"])
        times = [_units(value), "" if host["emulator"] else _units(value * ns), native, _ratio(row)]
        cells.append([row["workload"], _pages(row), *times, _rate(row, "exits"), _rate(row, "pf_taken"), _references(row, host)])
    lines += _columns(cells, 2)
    lines += ["", "pages: the guest's on the host's; KVM #PF: page faults that KVM handled, an operation; refs/miss: as computed below"]
    for row in report["rows"]:
        if row["host_page"] > 4096:
            lines.append(f"  {row['workload']} {_pages(row)}: {row['backing']}; in KVM's tables: {_mapped(row)}")
    lines += [f"  {text}" for text in dict.fromkeys(_native_lines(report))]
    lines += _miss_lines(report, ns)
    lines += ["", *walk_table(host["host_levels"])]
    notes = [*report["notes"], *caveats(host)]
    return "\n".join([*lines, *([""] if notes else []), *_wrapped(notes)])


def _mapped(row: dict[str, Any]) -> str:
    return ", ".join(f"{n} of {name.removeprefix('pages_').upper()}" for name, n in row["mapped"].items() if n) or "unknown"


def _native_lines(report: dict[str, Any]) -> list[str]:
    texts = []
    for row in report["rows"]:
        faults = f" ({row['native_faults_per_op']:.3g} of the host's page faults an operation)" if row["native_faults_per_op"] else ""
        texts.append(f"{row['workload']} natively: {row['native_as'] or 'no counterpart in a process'}{faults}")
    return texts


def _miss_lines(report: dict[str, Any], ns: float) -> list[str]:
    lines = []
    for miss in report["misses"]:
        parts = []
        for who in ("native", "guest"):
            e = miss[who]
            at = "" if report["host"]["emulator"] else f", {e['median'] * ns:.0f} ns"
            parts.append(f"{who} {e['median']:+.1f} ({e['low']:+.1f} to {e['high']:+.1f}{at})")
        lines.append(f"  {miss['workload']}, 4K pages over 2M pages on both sides, that is, TLB misses: {'; '.join(parts)}")
    return lines


def walk_table(host_levels: int = 4) -> list[str]:
    """The computed memory references of a TLB miss, as lines."""
    from pykvm.bench.walkcost import table

    cells = [["guest page", "host page", "process", "EPT/NPT", "shadow", "TLB entry"]]
    for row in table(4, host_levels):
        sizes = [PAGES[row[name]] for name in ("guest_page", "host_page", "tlb_entry")]
        cells.append([*sizes[:2], *(str(row[name]) for name in ("native", "nested", "shadow")), sizes[2]])
    return [
        f"memory references of a TLB miss, computed, nothing cached: {host_levels} levels in EPT/NPT, 4 in all other tables",
        "(process: g; EPT/NPT: (g + 1) * (h + 1) - 1, for g levels of the guest and h of the host; shadow: to the smaller page)",
        *_columns(cells, 0),
    ]


def _print_comparison(a: dict[str, Any], b: dict[str, Any], as_json: bool) -> int:
    from pykvm.bench.ept import compare

    pairs = compare(a, b)
    if as_json:
        from json import dumps

        both = {"schema": 1, "benchmark": "mmu comparison", "a": a["host"], "b": b["host"], "pairs": [p.as_dict() for p in pairs]}
        print(dumps(both, indent=2))
    else:
        print(comparison_table(a, b))
    return 0


def _names(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, str]:
    """What to call the two: their paging, where that tells them apart."""
    x, y = a["host"]["paging"], b["host"]["paging"]
    return (x, y) if x != y else (f"A: {x}", f"B: {y}")


def _draw(a: dict[str, Any], b: dict[str, Any], path: str) -> None:
    from pykvm.bench.ept import compare
    from pykvm.bench.plot import draw_pairs

    draw_pairs(compare(a, b), _names(a, b), f"What virtual memory costs a guest: {_about(a['host'])}", path)


def comparison_table(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Two reports side by side."""
    from pykvm.bench.ept import caveats, compare

    names = _names(a, b)
    lines = [f"{name}: {_about(r['host'])} ({r['host']['two_level_paging']})" for name, r in zip(names, (a, b), strict=True)]
    lines += [f"TSC units an operation, medians of {a['rounds']} and {b['rounds']} rounds; working set {format_size(a['size'])}", ""]
    x, y = names
    cells = [["workload", "pages", x, y, f"{y} / {x}", f"exits, {x}", f"{y}", f"to native, {x}", f"{y}", f"refs, {x}", f"{y}"]]
    for pair in compare(a, b):
        times = [_units(row["per_op"]["median"]) for row in (pair.a, pair.b)]
        ratios = ["-" if row["ratio"] is None else _times(row["ratio"]["median"]) for row in (pair.a, pair.b)]
        refs = [_references(row, r["host"]) for row, r in ((pair.a, a), (pair.b, b))]
        cells.append(
            [pair.workload, _pages(pair.a), *times, _times(pair.times), _rate(pair.a, "exits"), _rate(pair.b, "exits"), *ratios, *refs]
        )
    lines += _columns(cells, 2)
    lines += ["", "refs: memory references of a TLB miss, computed, nothing cached, under either paging"]
    for name, r in zip(names, (a, b), strict=True):
        lines += [f"{name}:{text[1:]}" for text in _miss_lines(r, 1e6 / r["host"]["tsc_khz"])]
    lines += ["", *walk_table(max(a["host"]["host_levels"], b["host"]["host_levels"]))]
    notes = list(dict.fromkeys([*caveats(a["host"]), *caveats(b["host"])]))
    return "\n".join([*lines, *([""] if notes else []), *_wrapped(notes)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
