"""``pykvm bench exits --plot``: bars with intervals, where the time goes, and distributions, on one page (matplotlib); and the two sides of
``pykvm bench mmu --compare``."""

from __future__ import annotations

import os

from pykvm.errors import ConfigError
from pykvm.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.bench.ept import Pair

__all__ = ["check", "draw", "draw_pairs"]

_FORMATS = (".svg", ".png", ".pdf")
_COLOURS = {"C": "#4c566a", "native": "#5e81ac", "python": "#d08770", "kernel": "#8a9a5b"}
_NAMES = {"C": "plain C", "native": "native loop", "python": "Python loop", "kernel": "in the kernel, or no exit"}
_PARTS = {"hardware and KVM": "#4c566a", "ioctl boundary": "#a3b1c6", "native loop": "#5e81ac", "Python": "#d08770"}
_CURVES = 6  # distributions, at most
_WANTED = ("PIO out 8", "MMIO read 32", "RDMSR, user space", "ioeventfd PIO", "CPUID", "trap, #PF", "HLT")


def check(path: str) -> None:
    """Raises ConfigError for a file that cannot be drawn, before anything is measured."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in _FORMATS:
        raise ConfigError(f"--plot {path}: the name has to end with {', '.join(_FORMATS)}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ConfigError(f"--plot {path}: there is no folder {folder}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ConfigError(f"--plot {path}: it cannot be written")
    _figure_class()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'pykvm-vmm[plot]', or pip install matplotlib") from None
    return Figure


def draw(results: dict[str, Any], path: str) -> None:
    """Draw what ``pykvm bench exits --json`` prints."""
    check(path)
    rows = [row for row in results["rows"] if row.get("guest") or row.get("c")]
    if not rows:
        raise ConfigError("nothing was measured that could be drawn")
    clocked = [row for row in rows if row["guest"]]
    split = [row for row in rows if row["decomposition"]]
    tall = [max(2.2, 0.24 * sum(len(row["guest"]) > 0 for row in rows) + 1.2), max(2.2, 0.24 * len(split) + 1.2), 3.6]
    if not split:
        tall[1] = 0.0
    panels = [i for i, height in enumerate(tall) if height and (i != 0 or clocked) and (i != 2 or clocked)]
    figure = _figure_class()(figsize=(11, sum(tall[i] for i in panels) + 1.2), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[tall[i] for i in panels])[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        (lambda a: _bars(a, clocked), lambda a: _stacks(a, split), lambda a: _curves(a, clocked))[panel](axis)
    figure.suptitle(_title(results), fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def draw_pairs(pairs: list[Pair], names: tuple[str, str], title: str, path: str) -> None:
    """Draw two reports of ``pykvm bench mmu`` side by side: what an operation costs, and the exits that it makes."""
    check(path)
    figure = _figure_class()(figsize=(11, 0.36 * len(pairs) + 2.2), layout="constrained")
    costs, exits = figure.subplots(1, 2)
    rows = [f"{pair.workload}, {format_size(pair.guest_page)} on {format_size(pair.host_page)}" for pair in pairs]
    for side, (name, colour) in enumerate(zip(names, ("#5e81ac", "#d08770"), strict=True)):
        for y, pair in enumerate(pairs):
            row, at = (pair.a, pair.b)[side], y - 0.2 + 0.4 * side
            label = None if y else name
            e = row["per_op"]
            spread = [[max(0.0, e["median"] - e["low"])], [max(0.0, e["high"] - e["median"])]]
            costs.barh(at, e["median"], 0.36, color=colour, label=label)
            costs.errorbar(e["median"], at, xerr=spread, color="#222222", linewidth=0.9)
            exits.barh(at, row["counters_per_op"].get("exits", 0.0), 0.36, color=colour, label=label)
    costs.set_xscale("log")
    _tidy(costs, rows)
    _tidy(exits, [""] * len(rows))
    costs.set_xlabel("TSC units an operation: median with its 95 % interval", fontsize=8)
    exits.set_xlabel("VM exits an operation", fontsize=8)
    costs.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _title(results: dict[str, Any]) -> str:
    host = results["host"]
    modules = ", ".join(host.get("vendor_modules") or ["no vendor module"])
    unit = "TSC units = instructions" if host.get("tsc_counts_instructions") else f"TSC at {results['rows'][0]['tsc_khz'] / 1e6:.2f} GHz"
    noise = "" if results.get("noise", {}).get("quiet", True) else "  —  the machine was not quiet"
    return f"What an exit costs: {host.get('cpu') or 'unknown CPU'}, {modules}, {host.get('kernel', '')}; {unit}{noise}"


def _tidy(axis: Any, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", which="both", color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    _frameless(axis)


def _frameless(axis: Any) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="x", which="both", labelsize=8)  # where a logarithmic axis is short, its minor ticks have labels too


def _bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for y, row in enumerate(rows):
        loops = [name for name in _NAMES if name in row["guest"]]
        height = 0.8 / len(loops)
        for i, name in enumerate(loops):
            e = row["guest"][name]
            value = max(e["median"], 0.5)
            at = y - 0.4 + (i + 0.5) * height
            axis.barh(at, value, height * 0.92, color=_COLOURS[name], label=None if name in seen else _NAMES[name])
            axis.errorbar(
                value, at, xerr=[[max(0.0, value - max(e["low"], 0.5))], [max(0.0, e["high"] - value)]], color="#222222", linewidth=0.9
            )
            axis.plot(max(e["p99"], 0.5), at, "|", color=_COLOURS[name], markersize=4, markeredgewidth=1.2)
            seen.add(name)
    axis.set_xscale("log")
    _tidy(axis, [row["kind"] for row in rows])
    axis.set_xlabel("TSC units by the guest's clock: median with its 95 % interval; the tick is the 99th percentile", fontsize=8)
    axis.set_title("One exit or trap, through each loop", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)


def _stacks(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Shares: kinds differ by orders of magnitude."""
    seen: set[str] = set()
    for y, row in enumerate(rows):
        parts = row["decomposition"]
        shown = {name: max(0.0, parts[name]["median"]) for name in ("hardware and KVM", "ioctl boundary", "Python") if name in parts}
        total = sum(shown.values()) or 1.0
        left = 0.0
        for name, value in shown.items():
            share = 100 * value / total
            axis.barh(y, share, 0.78, left=left, color=_PARTS[name], label=None if name in seen else name)
            if share > 9:
                dark = name != "ioctl boundary"
                where = (left + share / 2, y, f"{value:,.0f}")
                axis.text(*where, ha="center", va="center", fontsize=7, color="white" if dark else "#222222")
            left += share
            seen.add(name)
    _tidy(axis, [row["kind"] for row in rows])
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of the round trip through the Python loop; the numbers are TSC units", fontsize=8)
    axis.set_title("Where the time of an exit goes", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _curves(axis: Any, rows: list[dict[str, Any]]) -> None:
    wanted = [row for name in _WANTED for row in rows if row["kind"] == name] or rows
    for index, row in enumerate(wanted[:_CURVES]):
        for name, style in (("C", "-"), ("python", "--"), ("kernel", "-")):
            if name in row["guest"]:
                values = [max(value, 0.5) for value in row["guest"][name]["quantiles"]]
                steps = len(values) - 1
                shares = [100 * i / steps for i in range(steps)]
                label = row["kind"] if name != "python" else f"{row['kind']}, Python"
                axis.plot(values[:-1], shares, style, color=f"C{index}", linewidth=1.3, label=label)
    axis.set_xscale("log")
    axis.set_ylim(0, 100)
    axis.grid(which="both", color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    _frameless(axis)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylabel("% of exits that took at most this", fontsize=8)
    axis.set_xlabel("TSC units by the guest's clock", fontsize=8)
    axis.set_title("Latencies", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=5)  # a kind above its Python loop
