"""What ports and MMIO addresses are called: device and register names in place of numbers, and values by their bits.

A device of your own may bring a table: an attribute ``register_names``, {offset: name} or {offset: (name when read, name when written)}.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.bus import Bus, Range
    from pykvm.debug.trace import Event

__all__ = ["Access", "Names"]

_UART = {0: ("RBR", "THR"), 1: "IER", 2: ("IIR", "FCR"), 3: "LCR", 4: "MCR", 5: "LSR", 6: "MSR", 7: "SCR"}
_UART_DLAB = {0: "DLL", 1: "DLM"}
_UART_BITS = {
    "IER": ("RX", "TX", "LINE", "MODEM"),
    "LSR": ("DR", "OE", "PE", "FE", "BI", "THRE", "TEMT", "FIFO_ERROR"),
    "MSR": ("DCTS", "DDSR", "TERI", "DDCD", "CTS", "DSR", "RI", "DCD"),
    "MCR": ("DTR", "RTS", "OUT1", "OUT2", "LOOP"),
}
_COM = {0x3F8: "COM1", 0x2F8: "COM2", 0x3E8: "COM3", 0x2E8: "COM4"}
_CMOS = {
    0: "seconds", 1: "seconds alarm", 2: "minutes", 3: "minutes alarm", 4: "hours", 5: "hours alarm", 6: "weekday", 7: "day", 8: "month",
    9: "year", 10: "register A", 11: "register B", 12: "register C", 13: "register D", 0x32: "century",
}  # fmt: skip
_IOAPIC = {0x00: "IOREGSEL", 0x10: "IOWIN", 0x40: "EOI"}
_PORTS = {  # what guests written for a PC look for where this machine has nothing
    0x20: "PIC1 command", 0x21: "PIC1 data", 0xA0: "PIC2 command", 0xA1: "PIC2 data", 0x40: "PIT counter 0", 0x41: "PIT counter 1",
    0x42: "PIT counter 2", 0x43: "PIT command", 0x61: "PC speaker", 0x92: "fast A20", 0xCF8: "PCI address", 0xCFC: "PCI data",
}  # fmt: skip
_CONSOLES = {"debug console", "UART"}


class Access:
    """``device`` and ``register`` (each may be empty), and ``meaning``, the value in words (may be empty)."""

    __slots__ = ("device", "meaning", "register")

    def __init__(self, device: str, register: str = "", meaning: str = "") -> None:
        self.device, self.register, self.meaning = device, register, meaning

    def __str__(self) -> str:
        return f"{self.device} {self.register}".rstrip()


class Names:
    """Names what the accesses of one bus reach, event after event. What decides (the UART's DLAB, the RTC's index) is followed, since a
    device may be further by the time an event is looked at."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self._version = -1
        self._values: dict[int, int] = {}  # port of a register that decides -> its value
        self._look()

    def _look(self) -> None:
        pio = self.bus.pio
        self._version = pio.version
        decide = {c.base + 3: getattr(c.device, "lcr", 0) for c in pio.ranges if c.name == "UART"}
        decide |= {c.base: getattr(c.device, "index", 0) for c in pio.ranges if c.name == "RTC"}
        self._values = {port: self._values.get(port, value) for port, value in decide.items()}

    def see(self, event: Event) -> None:
        """Every event comes by here, in order."""
        if self.bus.pio.version != self._version:
            self._look()
        if event.is_write and event.qualifier in self._values and event.is_pio:
            self._values[event.qualifier] = event.value

    def describe(self, event: Event) -> Access:
        """What an access reaches, for an event that was the last to be seen."""
        space = self.bus.pio if event.is_pio else self.bus.mmio
        claimed = space.find(event.qualifier, max(event.size, 1))
        if claimed is None:
            known = _PORTS.get(event.qualifier, "") if event.is_pio else ""
            where = f"port {event.qualifier:#x}" if event.is_pio else f"gpa {event.qualifier:#x}"
            return Access(known or where, "", "no device")
        decides = self._values.get(claimed.base + (3 if claimed.name == "UART" else 0), 0)
        return _named(claimed, event.qualifier - claimed.base, event, decides)


def _named(claimed: Range, offset: int, event: Event, decides: int) -> Access:
    device, write, value, name = claimed.device, bool(event.is_write), event.value, claimed.name
    table: dict[int, Any] | None = getattr(device, "register_names", None)
    if isinstance(table, dict):
        return Access(name, _pick(table, offset, write) or f"+{offset:#x}")
    if name == "UART":
        return _uart(_COM.get(claimed.base, name), bool(decides & 0x80), offset, write, value)
    if name == "RTC":
        if offset == 0:
            return Access("RTC", "index", _CMOS.get(value & 0x7F, f"CMOS byte {value & 0x7F:#x}"))
        return Access("RTC", _CMOS.get(decides & 0x7F, f"CMOS byte {decides & 0x7F:#x}"))
    if name == "IOAPIC":
        return Access(name, _IOAPIC.get(offset, f"+{offset:#x}"))
    if name in ("debug console", "debug port"):
        return Access(name, "", _character(value))
    if name == "keyboard controller":
        return Access(
            name,
            {0: "data", 4: "command" if write else "status"}.get(offset, f"+{offset:#x}"),
            "reset" if write and value & 0xFF == 0xFE else "",
        )
    if name == "exception report":
        from pykvm.debug.explain import VECTORS

        return Access(name, "", VECTORS.get(value, f"exception {value}"))
    return Access(name, f"+{offset:#x}" if claimed.length > 4 else "")


def _pick(table: dict[int, Any], offset: int, write: bool) -> str:
    found = table.get(offset, "")
    return str(found[1 if write else 0] if isinstance(found, tuple) else found)


def _uart(name: str, dlab: bool, offset: int, write: bool, value: int) -> Access:
    register = _pick(_UART_DLAB, offset, write) if dlab and offset < 2 else _pick(_UART, offset, write)
    if register in ("THR", "RBR"):
        return Access(name, register, _character(value))
    bits = _UART_BITS.get(register)
    return Access(name, register, " ".join(bit for i, bit in enumerate(bits) if value >> i & 1) if bits else "")


def _character(value: int) -> str:
    """A byte as Python would write it, so that nothing a guest prints reaches a terminal as it is."""
    return ascii(chr(value & 0xFF))
