"""``pykvm trace --html``: what a page needs of a trace, collected as it runs, in bounded memory: the first and the last events with their
registers, counts of all, densities over time. debug/trace_page.py makes the page.
"""

from __future__ import annotations

import os
from collections import deque

from pykvm.debug.trace import Event
from pykvm.debug.trace_text import Formatter, printable
from pykvm.wholefile import replace_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.debug.pagetables import Node
    from pykvm.debug.tracer import Item, Tracer
    from pykvm.debug.where import Place
    from pykvm.result import Result

__all__ = ["Density", "Report"]

FIRST, LAST = 1500, 500  # events that the table keeps
HOT = 24  # places in the table of hot places
_PLACES = 4096  # places counted apart; what comes later is counted as one
_KINDS = 10  # lanes of the timeline
_BINS = 400
_CODE = 48  # instructions shown of a function
_FUNCTIONS = 12
_CONSOLE = 20_000  # characters
_NODES = 600
_REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags")


class Density:
    """How many events fell into each of 400 equal spans of time; the spans double when time outgrows them."""

    def __init__(self) -> None:
        self.width = 1000.0  # nanoseconds
        self.lanes: dict[str, list[int]] = {}

    def add(self, lane: str, ns: float) -> None:
        """One event."""
        if lane not in self.lanes and len(self.lanes) >= _KINDS:
            lane = "others"
        while ns >= self.width * _BINS:
            self.width *= 2
            for bins in self.lanes.values():
                bins[:] = [a + b for a, b in zip(bins[::2], bins[1::2], strict=True)] + [0] * (_BINS // 2)
        self.lanes.setdefault(lane, [0] * _BINS)[int(ns / self.width)] += 1


class _Hot:
    __slots__ = ("count", "place", "what")

    def __init__(self, place: Place, what: str) -> None:
        self.count, self.place, self.what = 0, place, what


class Report:
    """Takes the items of a Tracer (``add`` is a sink); ``save(path, result)`` writes the page."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.machine = tracer, tracer.machine
        self.formatter = Formatter(tracer.capture, tracer.locator)
        self.first: list[dict[str, Any]] = []
        self.last: deque[dict[str, Any]] = deque(maxlen=LAST)
        self.count = self.left_out = 0
        self.kinds: dict[str, int] = {}
        self.hot: dict[tuple[int | None, str], _Hot] = {}
        self.elsewhere = 0
        self.density = Density()
        self.end_ns = 0.0
        self.stepping = tracer.step
        self._states: dict[str, int] = {}

    def add(self, item: Item) -> None:
        """One event, change or step."""
        self.count += 1
        row = self._event(item) if isinstance(item, Event) else self._other(item)
        if len(self.first) < FIRST:
            self.first.append(row)
            return
        self.left_out += len(self.last) == LAST
        self.last.append(row)

    def _event(self, event: Event) -> dict[str, Any]:
        place, what, ns = self.tracer.locator.place(event), printable(self.formatter.what(event)), self.tracer.capture.time(event)
        kind = self.formatter.name(event)
        self._count(kind, place, what)
        self.density.add(kind, ns)
        self.end_ns = max(self.end_ns, ns)
        regs = event.frozen().get_regs()
        return {
            **self._where(place),
            "n": event.n,
            "t": round(ns),
            "cpu": event.vcpu,
            "k": kind,
            "w": what,
            "kvm": round(self.tracer.capture.ns(max(0, event.tsc_after - event.tsc_before))),
            "regs": _values(regs),
        }

    def _other(self, item: Any) -> dict[str, Any]:
        """A changed piece of memory, or a step."""
        place = getattr(item, "place", None)
        if place is None:
            return {"n": item.n, "t": None, "cpu": 0, "k": "memory", "w": printable(str(item)), "at": "", "i": "", "regs": None, "kvm": 0}
        what = str(item).partition(" ; ")[2]
        self._count("step", place, "")
        self.density.add("step", item.n * 1000.0)
        self.end_ns = max(self.end_ns, item.n * 1000.0)
        return {
            **self._where(place),
            "n": item.n,
            "t": None,
            "cpu": item.cpu,
            "k": "step",
            "w": printable(what),
            "regs": _values(item.regs),
            "kvm": 0,
        }

    def _where(self, place: Place) -> dict[str, Any]:
        at = "?" if place.address is None else f"{place.address:#x}"
        insn = "" if place.insn is None else str(place.insn)
        return {"at": at, "s": printable(place.symbol)[:80], "l": place.source, "i": insn}

    def _count(self, kind: str, place: Place, what: str) -> None:
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        key = (place.address, kind)
        hot = self.hot.get(key)
        if hot is None:
            if len(self.hot) >= _PLACES:
                self.elsewhere += 1
                return
            hot = self.hot[key] = _Hot(place, what)
        hot.count += 1

    # --- the page ----------------------------------------------------------------------------------------------------

    def save(self, path: str, result: Result) -> None:
        """Write the page, as a whole or not at all."""
        from pykvm.debug.trace_page import page

        text = page(self.data(result))
        replace_file(path, lambda file: file.write(text.encode("utf-8", "replace")))

    def data(self, result: Result) -> dict[str, Any]:
        """All that the page shows, as plain values."""
        m = self.machine
        console = result.console
        code = f" {result.exit_code}" if result.reason == "exit" else ""
        return {
            "title": os.path.basename(m.info.path).removesuffix(".elf"),
            "image": m.info.path,
            "mode": m.info.mode,
            "cpus": m.cpus,
            "end": {"until": "stopped as asked"}.get(result.reason, result.reason) + code,
            "crashed": result.reason in ("crash", "timeout"),
            "explanation": result.explanation,
            "steps": self.stepping,
            "count": self.count,
            "left_out": self.left_out,
            "first": len(self.first),
            "events": [*self.first, *self.last],
            "registers": _REGISTERS,
            "kinds": sorted(self.kinds.items(), key=lambda item: -item[1]),
            "density": {"width": self.density.width, "lanes": self.density.lanes, "end": self.end_ns},
            "hot": self._hot_rows(),
            "elsewhere": self.elsewhere,
            "code": self._code(),
            "console": console[-_CONSOLE:],
            "console_cut": max(0, len(console) - _CONSOLE),
            "slots": [{"gpa": s.gpa, "size": s.size, "backing": s.backing, "readonly": s.readonly} for s in m.memory.slots[:200]],
            "segments": [{"gpa": s.gpa, "size": s.memsz} for s in m.info.segments[:50]],
            "mmio": [{"name": printable(r.name), "base": r.base, "length": r.length} for r in m.bus.mmio.ranges[:200]],
            "pio": [{"name": printable(r.name), "base": r.base, "length": r.length} for r in m.bus.pio.ranges[:200]],
            **self._tables(),
        }

    def _hot_rows(self) -> list[dict[str, Any]]:
        rows = sorted(self.hot.items(), key=lambda item: -item[1].count)[:HOT]
        return [{**self._where(hot.place), "k": kind, "c": hot.count, "w": hot.what} for (_, kind), hot in rows]

    def _code(self) -> list[dict[str, Any]]:
        """The functions around the hottest places, each instruction with how often it made an exit."""
        from pykvm.debug.control import Control  # a view of the vCPU as it stands
        from pykvm.disasm import disassemble

        view = Control(self.machine).view(0)
        counts: dict[int, int] = {}
        for (address, _), hot in self.hot.items():
            if address is not None:
                counts[address] = counts.get(address, 0) + hot.count
        shown: list[dict[str, Any]] = []
        covered: set[int] = set()
        symbols = self.tracer.locator.symbols
        for hot in sorted(self.hot.values(), key=lambda hot: -hot.count):
            address = hot.place.address
            if address is None or hot.place.insn is None or address in covered or len(shown) >= _FUNCTIONS:
                continue
            found = symbols.lookup(address)
            start = address - found[1] if found is not None and found[1] <= 512 else address
            run = disassemble(view.read(start, 15 * _CODE), start, hot.place.bits, _CODE)
            if address not in {insn.address for insn in run}:
                run = disassemble(view.read(address, 15 * 8), address, hot.place.bits, 8)
            lines: list[dict[str, Any]] = []
            for insn in run:
                name = symbols.name(insn.address)
                if lines and name and "+" not in name:
                    break  # the next function
                covered.add(insn.address)
                lines.append({
                    "a": f"{insn.address:#x}", "b": insn.bytes.hex(), "i": str(insn), "c": counts.get(insn.address, 0),
                    "l": self.tracer.locator.lines.name(insn.address),
                })  # fmt: skip
            last = max((i for i, line in enumerate(lines) if line["c"]), default=0)
            del lines[last + 6 :]  # what follows is perhaps no code
            shown.append({"name": printable(found[0])[:80] if found else f"{start:#x}", "lines": lines})
        return shown

    def _tables(self) -> dict[str, Any]:
        """Ranges and the tree of the first vCPU's page tables as they are now."""
        from pykvm.debug.pagetables import page_tables, tree

        s = self.machine.vcpu.get_sregs()
        registers = {"cr0": s.cr0, "cr3": s.cr3, "cr4": s.cr4, "efer": s.efer}
        found = page_tables(self.machine.memory, **registers, limit=300)
        roots, count = tree(self.machine.memory, **registers, limit=_NODES)
        ranges = [
            {
                "gva": f"{m.gva:#x}",
                "end": f"{m.gva + m.size - 1:#x}",
                "gpa": f"{m.gpa:#x}",
                "size": m.size,
                "page": m.page_size,
                "r": m.rights,
            }
            for m in found
        ]
        about = {"paging": found.paging, "root": f"{found.root:#x}", "cut": found.cut, "tree_cut": count.cut, "malformed": found.malformed}
        return {"tables": {**about, "ranges": ranges, "tree": [_node(node) for node in roots]}}


def _values(regs: Any) -> list[str] | None:
    """The registers that the page shows, in hexadecimal."""
    return None if regs is None else [f"{int(getattr(regs, name)):x}" for name in _REGISTERS]


def _node(node: Node) -> dict[str, Any]:
    """A line of the tree, with those below it."""
    return {
        "level": node.level,
        "index": node.index,
        "count": node.count,
        "gva": f"{node.gva:#x}",
        "value": f"{node.value:#018x}",
        "kind": node.kind,
        "gpa": f"{node.gpa:#x}",
        "page": node.page_size,
        "r": node.rights,
        "below": [_node(child) for child in node.children],
    }
