"""Events as lines of text and as JSON.

::

    1   253.5 µs  0x00100030 <puts+0x8>  out dx, al            ; COM1 THR <- 0x48 'H'
"""

from __future__ import annotations

from pykvm import exits
from pykvm.debug.tracefilter import name_of
from pykvm.exit_reason import reason_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.debug.trace import Capture, Event
    from pykvm.debug.where import Locator

__all__ = ["Formatter", "format_time", "printable"]

_MSR_NAMES = {
    0x10: "TSC", 0x1B: "APIC_BASE", 0x6E0: "TSC_DEADLINE", 0xC0000080: "EFER", 0xC0000081: "STAR", 0xC0000082: "LSTAR",
    0xC0000084: "SFMASK", 0xC0000100: "FS_BASE", 0xC0000101: "GS_BASE", 0xC0000102: "KERNEL_GS_BASE",
}  # fmt: skip
_DATA_SHOWN = 32


def printable(text: str) -> str:
    """Names that come out of an image, without what would move a terminal's cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def format_time(ns: float) -> str:
    """``"253.5 µs"``, ten columns wide at most."""
    for unit, size in (("s ", 1e9), ("ms", 1e6)):
        if ns >= size:
            return f"{ns / size:.3f} {unit}"
    return f"{ns / 1e3:.1f} µs"


class Formatter:
    """Words for the events of one capture."""

    def __init__(self, capture: Capture, locator: Locator) -> None:
        self.capture, self.locator = capture, locator
        self.names = capture.names
        self.several = capture.machine.cpus > 1

    def what(self, event: Event) -> str:
        """What the exit was about: ``COM1 THR <- 0x48 'H'``."""
        if not event.size:
            return self._other(event)
        access = self.names.describe(event)
        arrow = "<-" if event.is_write else "->"
        if event.count > 1:
            data = event.data or event.value.to_bytes(8, "little")[: event.size]
            more = " ..." if len(data) > _DATA_SHOWN else ""
            shown = ascii(data[:_DATA_SHOWN])[1:] if event.size == 1 else data[:_DATA_SHOWN].hex(" ", event.size)
            return f"{access} {arrow} {event.count} elements: {shown}{more}"
        meaning = f" {access.meaning}" if access.meaning else ""
        return f"{access} {arrow} {event.value:#x}{meaning}"

    def _other(self, event: Event) -> str:
        name = reason_name(event.reason)
        if name in ("X86_RDMSR", "X86_WRMSR"):
            msr = f"{_MSR_NAMES[event.qualifier]} ({event.qualifier:#x})" if event.qualifier in _MSR_NAMES else f"{event.qualifier:#x}"
            return f"MSR {msr} {'<-' if event.is_write else '->'} {event.value:#x}"
        if name == "SHUTDOWN":
            return "SHUTDOWN: triple fault"
        if event.reason == exits.InternalError.reason and event.qualifier == 1:
            return f"{name}: KVM's emulator does not know it"
        if event.is_captured and type(event.exit).__match_args__:
            return f"{name}: {event.exit!r}"
        return f"{name} {event.qualifier:#x}" if event.qualifier else name

    def line(self, event: Event) -> str:
        """One event as one line."""
        place = self.locator.place(event)
        address = f"{place.address:#010x}" if place.address is not None else "?"
        where = f"{address} <{printable(place.symbol)}>" if place.symbol else address
        source = f"  {place.source}" if place.source else ""
        cpu = f" cpu{event.vcpu}" if self.several else ""
        insn = str(place.insn) if place.insn is not None else ""
        when = format_time(self.capture.time(event))
        return f"{event.n:>6} {when:>11}{cpu}  {where:<24}  {insn:<32} ; {printable(self.what(event))}{source}"

    def as_dict(self, event: Event, *, registers: bool = False) -> dict[str, Any]:
        """One event for JSON."""
        place = self.locator.place(event)
        access = self.names.describe(event) if event.size else None
        about: dict[str, Any] = {
            "n": event.n,
            "time_ns": round(self.capture.time(event)),
            "vcpu": event.vcpu,
            "reason": reason_name(event.reason),
            "rip": event.rip,
            "insn_rip": place.address,
            "symbol": place.symbol or None,
            "source": place.source or None,
            "insn": str(place.insn) if place.insn is not None else None,
            "bytes": place.insn.bytes.hex() if place.insn is not None else None,
            "text": self.what(event),
            "in_kvm_ns": round(self.capture.ns(max(0, event.tsc_after - event.tsc_before))),
            "handler_ns": round(self.capture.ns(max(0, event.tsc_handled - event.tsc_after))) if event.tsc_handled else None,
        }
        if access is not None:
            where = "port" if event.is_pio else "gpa"
            direction = ("out" if event.is_write else "in") if event.is_pio else ("write" if event.is_write else "read")
            about |= {where: event.qualifier, "direction": direction, "size": event.size, "count": event.count, "value": event.value}
            about |= {"device": access.device, "register": access.register or None}
            if event.data:
                about["data"] = event.data[: 1 << 12].hex()
        elif event.qualifier or event.reason in (29, 30):
            about |= {"qualifier": event.qualifier, "value": event.value}
        if registers:
            regs = event.frozen().get_regs()
            about["registers"] = {name: int(value) for name, value in regs.fields()}
        return about

    def name(self, event: Event) -> str:
        """The kind: "IO out", "HLT"."""
        return name_of(event)


def registers_line(regs: Any) -> str:
    """The general registers, four a line, indented."""
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
    rows = [names[i : i + 4] for i in range(0, 16, 4)]
    return "\n".join(f"{'':>8}" + "  ".join(f"{name:>3}={getattr(regs, name):016x}" for name in row) for row in rows)
