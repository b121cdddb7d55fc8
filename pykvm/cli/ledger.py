"""``pykvm ledger``: tables of the exits that ``pykvm run --ledger`` has recorded."""

from __future__ import annotations

import os
import sys

from pykvm.cli.options import Command, Option, whole
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.ledger import Ledger, Row

TITLES = {
    "reason": "by KVM's exit reason",
    "port": "by port",
    "address": "by guest physical address (MMIO)",
    "rip": "by instruction",
    "vcpu": "by vCPU",
    "qualifier": "by reason and what it is about",
}
_SHOWN = ("reason", "port", "address", "rip", "vcpu")

COMMAND = Command(
    "ledger",
    "FILE.npy",
    "What pykvm run --ledger FILE.npy has recorded: exits by reason, port, address and instruction, the slowest ones, KVM's own\n"
    "counters, and the CPU's exit reasons when they were traced. \"in KVM\" is KVM_RUN from in to out: the guest's own instructions\n"
    'are in it. "handler" is from there until pykvm had the answer. p99: 99 of 100 took no longer.',
    [
        Option("--by", "only this table; may be repeated", choices=tuple(TITLES), many=True),
        Option("--top", "rows of a table at most", "N", 16, whole),
        Option("--slowest", "how many of the slowest exits", "N", 8, whole),
        Option("--json", "everything as one JSON object, all rows of the tables"),
        Option("--csv", "the tables as CSV, all rows"),
    ],
    ["pykvm run hello --ledger hello.npy && pykvm ledger hello.npy", "pykvm ledger hello.npy --by rip --csv"],
)


def main(argv: list[str]) -> int:
    """Load it and print."""
    (path,), o = COMMAND.parse(argv, 1, 1)
    if o["json"] and o["csv"]:
        raise ConfigError("--json or --csv, not both")
    from pykvm.ledger import Ledger

    ledger = Ledger.load(path)
    tables = {what: ledger.by(what) for what in o["by"] or _SHOWN}
    if o["json"]:
        from json import dumps

        print(dumps(_as_dict(ledger, tables, o["slowest"]), indent=2))
    elif o["csv"]:
        _csv(ledger, tables)
    else:
        _show(path, ledger, tables, o)
    return 0


def _as_dict(ledger: Ledger, tables: dict[str, list[Row]], slowest: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "about": ledger.about,
        "summary": ledger.summary(),
        "tables": {what: [row.as_dict(ledger.unit) for row in rows] for what, rows in tables.items()},
        "slowest": _slowest(ledger, slowest),
        "kvm_counters": ledger.kvm_counters(),
        "hardware": ledger.hardware,
    }


def _slowest(ledger: Ledger, n: int) -> list[dict[str, Any]]:
    from pykvm.ledger import kind_name

    start = int(ledger.records["tsc_before"].min()) if len(ledger) else 0
    unit = ledger.unit
    found = []
    for record in ledger.slowest(n):
        before, after, handled = (int(record[name]) for name in ("tsc_before", "tsc_after", "tsc_handled"))
        times = {"at": before - start, "kvm": max(0, after - before), "handler": max(0, handled - after)}
        ns = 1e6 / ledger.tsc_khz if ledger.tsc_khz else 1.0
        found.append(
            {
                "exit": kind_name(record),
                "vcpu": int(record["vcpu"]),
                "instruction": ledger.site(record).name,
                **{f"{name}_{unit}": round(time * ns) for name, time in times.items()},
            }
        )
    return found


def _csv(ledger: Ledger, tables: dict[str, list[Row]]) -> None:
    import csv

    rows = [{"by": what, **row.as_dict(ledger.unit)} for what, table in tables.items() for row in table]
    times = [f"{side}_{kind}_{ledger.unit}" for side in ("kvm", "handler") for kind in ("total", "median", "p99")]
    out = csv.DictWriter(sys.stdout, ["by", "name", "key", "count", *times], lineterminator="\n")
    out.writeheader()
    out.writerows(rows)


# --- text -------------------------------------------------------------------------------------------------------------


def _show(path: str, ledger: Ledger, tables: dict[str, list[Row]], o: dict[str, Any]) -> None:
    if not o["by"]:
        print(_head(path, ledger))
    for what, rows in tables.items():
        if rows and (o["by"] or what != "vcpu" or len(rows) > 1):
            print(f"\n{TITLES[what]}\n{_table(rows, o['top'], ledger.unit)}")
    if o["by"]:
        return
    slowest = _slowest(ledger, o["slowest"])
    if slowest:
        print(f"\nthe slowest exits\n{_slow_table(slowest, ledger.unit)}")
    counters = ledger.kvm_counters()
    if counters:
        print("\nKVM's own counters (KVM_GET_STATS_FD): what changed during the run")
        width = max(map(len, counters))
        for name, value in counters.items():
            print(f"  {name:<{width}} {value if isinstance(value, int) else ' '.join(map(str, value)):>10}")
    print(_hardware(ledger))


def _head(path: str, ledger: Ledger) -> str:
    about, s, unit = ledger.about, ledger.summary(), ledger.unit
    image = os.path.basename(about.get("image", "")) or "an unknown image"
    lines = [f"{path}: {s['exits']} exits of {image}" + (f" in {about['mode']} mode" if "mode" in about else "")]
    host = ", ".join(about[key] for key in ("cpu", "kernel", "module") if about.get(key))
    if host:
        lines.append(f"host: {host}")
    if s["lost"]:
        lines.append(f"{s['lost']} more exits found no room: they are in no table")
    parts = {"in KVM and the guest": s[f"kvm_{unit}"], "in handlers": s[f"handler_{unit}"], "between": s[f"between_{unit}"]}
    whole_time = sum(parts.values()) or 1
    lines.append("time: " + ", ".join(f"{_time(t, unit)} {name} ({100 * t / whole_time:.1f} %)" for name, t in parts.items()))
    if unit == "tsc":
        lines.append("times are in TSC units: the .json that tells the frequency is missing")
    return "\n".join(lines)


def _table(rows: list[Row], top: int, unit: str) -> str:
    shown = rows[:top]
    width = max(max(len(row.name) for row in shown), 4)
    lines = [
        f"  {'':<{width}} {'count':>9} {'in KVM: total':>14} {'median':>10} {'p99':>10} {'handler: total':>15} {'median':>10} {'p99':>10}"
    ]
    for row in shown:
        kvm = f"{_time(row.kvm_total, unit):>14} {_time(row.kvm_median, unit):>10} {_time(row.kvm_p99, unit):>10}"
        handler = f"{_time(row.handler_total, unit):>15} {_time(row.handler_median, unit):>10} {_time(row.handler_p99, unit):>10}"
        lines.append(f"  {row.name:<{width}} {row.count:>9} {kvm} {handler}")
    if len(rows) > top:
        lines.append(f"  ... and {len(rows) - top} more with {sum(row.count for row in rows[top:])} exits: --top {len(rows)} shows them")
    return "\n".join(lines)


def _slow_table(slowest: list[dict[str, Any]], unit: str) -> str:
    width = max(max(len(exit["exit"]) for exit in slowest), 4)
    lines = [f"  {'at':>10} vCPU {'exit':<{width}} {'in KVM':>10} {'handler':>10}  instruction"]
    for exit in slowest:
        at, kvm, handler = (_time(exit[f"{name}_{unit}"], unit) for name in ("at", "kvm", "handler"))
        lines.append(f"  {at:>10} {exit['vcpu']:>4} {exit['exit']:<{width}} {kvm:>10} {handler:>10}  {exit['instruction']}")
    return "\n".join(lines)


def _hardware(ledger: Ledger) -> str:
    found = ledger.hardware
    if found is None:
        return "\nthe CPU's own exit reasons were not traced: pykvm run --trace-exits does it, as root"
    lines = ["\nthe CPU's own exit reasons (tracepoint kvm:kvm_exit), and what of them came to user space"]
    width = max([len(reason) for reason in found["reasons"]] + [4])
    for reason, entry in sorted(found["reasons"].items(), key=lambda item: -item[1]["count"]):
        led_to = ", ".join(f"{n} {kind}" for kind, n in sorted(entry["led_to"].items(), key=lambda item: -item[1])[:4])
        if len(entry["led_to"]) > 4:
            led_to += ", ..."
        lines.append(f"  {reason:<{width}} {entry['count']:>9}  {led_to}".rstrip())
    if found["lost"]:
        lines.append(f"  {found['lost']} more events found no room in the trace buffer")
    if found["clock"] != "x86-tsc":
        lines.append("  the trace has no x86-tsc clock: which of them came to user space is not known")
    return "\n".join(lines)


def _time(time: float, unit: str) -> str:
    if unit == "tsc":
        return f"{time:.0f}"
    for name, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if time >= size:
            return f"{time / size:.2f} {name}"
    return f"{time:.0f} ns"
