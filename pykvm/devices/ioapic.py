"""An 82093AA I/O APIC in user space, for the split irqchip: 24 pins, each with a redirection entry that says which message it sends.

With KVM_CAP_SPLIT_IRQCHIP the LAPICs are in the kernel and this is not. KVM is told of each unmasked entry as an MSI route
(``on_routes``), so that it exits with IOAPIC_EOI when a vCPU ends a level-triggered interrupt; ``eoi(vector)`` then clears the pin's
remote IRR and, if the line is still high, sends it again.
Source: Intel 82093AA datasheet sections 3.0 and 3.2; SDM vol. 3 section 11.8.5 (EOI).
"""

from __future__ import annotations

from pykvm.devices.saved import Saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Ioapic"]

PINS = 24
VERSION = 0x20 | (PINS - 1) << 16  # an EOI register at 0x40, 24 entries
IOREGSEL, IOWIN, EOIR = 0x00, 0x10, 0x40
DELIVERY, LOGICAL, PENDING, ACTIVE_LOW, REMOTE_IRR, LEVEL, MASKED = 0x700, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16
READ_ONLY = PENDING | REMOTE_IRR
EXTINT = 0x700


class Ioapic:
    """``send(address, data)`` delivers an MSI; ``on_routes({pin: (address, data)})`` hears which unmasked entries there are.

    Registers: 32-bit accesses at offsets 0x00 (index), 0x10 (window) and 0x40 (EOI).
    """

    name = "IOAPIC"

    def __init__(self, send: Callable[[int, int], object], on_routes: Callable[[dict[int, tuple[int, int]]], object]) -> None:
        self.send, self.on_routes = send, on_routes
        self.index = 0
        self.id = 0
        self.entries = [MASKED] * PINS  # the low 32 bits hold the fields, 63-56 the destination
        self.levels = 0  # a bit for each line that is high

    # --- lines -------------------------------------------------------------------------------------------------------

    def set_line(self, pin: int, level: int) -> None:
        """A line changes. Edge-triggered entries send on the rise, level-triggered ones while it is high and not being served."""
        if not 0 <= pin < PINS:
            raise ValueError(f"the IOAPIC has pins 0 to {PINS - 1}, not {pin}")
        before = self.levels >> pin & 1
        self.levels = self.levels & ~(1 << pin) | (1 << pin if level else 0)
        if level and (not before or self.entries[pin] & LEVEL):
            self._serve(pin)

    def eoi(self, vector: int) -> None:
        """A vCPU has ended ``vector``: its level-triggered pins may send again."""
        for pin, entry in enumerate(self.entries):
            if entry & LEVEL and entry & REMOTE_IRR and entry & 0xFF == vector:
                self.entries[pin] &= ~REMOTE_IRR
                if self.levels >> pin & 1:
                    self._serve(pin)

    def _serve(self, pin: int) -> None:
        entry = self.entries[pin]
        if entry & MASKED or entry & REMOTE_IRR or entry & DELIVERY == EXTINT:
            return
        if entry & LEVEL:
            self.entries[pin] |= REMOTE_IRR
        self.send(*_message(entry))

    # --- registers ---------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """IOREGSEL or IOWIN; anything else reads as 0."""
        mask = (1 << 8 * size) - 1
        if offset == IOREGSEL:
            return self.index & mask
        if offset == IOWIN:
            return self._read(self.index) & mask
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """IOREGSEL, IOWIN or EOI; anything else vanishes."""
        if offset == IOREGSEL:
            self.index = value & 0xFF
        elif offset == IOWIN:
            self._write(self.index, value & 0xFFFFFFFF)
        elif offset == EOIR:
            self.eoi(value & 0xFF)

    def _read(self, register: int) -> int:
        if register == 0:
            return self.id << 24
        if register == 1:
            return VERSION
        if register == 2:
            return self.id << 24  # the arbitration id follows the id
        pin, high = divmod(register - 0x10, 2)
        return self.entries[pin] >> 32 * high & 0xFFFFFFFF if 0 <= pin < PINS else 0

    def _write(self, register: int, value: int) -> None:
        if register == 0:
            self.id = value >> 24 & 0xF
            return
        pin, high = divmod(register - 0x10, 2)
        if not 0 <= pin < PINS:
            return
        entry = self.entries[pin]
        if high:
            entry = entry & 0xFFFFFFFF | (value & 0xFF000000) << 32
        else:
            entry = entry & ~0xFFFFFFFF | value & 0x1FFFF & ~READ_ONLY | entry & READ_ONLY
            if not entry & LEVEL:
                entry &= ~REMOTE_IRR
        self.entries[pin] = entry
        self._tell_routes()
        if not high and entry & LEVEL and self.levels >> pin & 1:
            self._serve(pin)

    def _tell_routes(self) -> None:
        self.on_routes({p: _message(e) for p, e in enumerate(self.entries) if not e & MASKED and e & DELIVERY != EXTINT})

    def reset(self) -> None:
        """As at the start; lines are as they are."""
        self.index, self.id, self.entries = 0, 0, [MASKED] * PINS
        self._tell_routes()

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Registers and lines."""
        return {"version": 1, "index": self.index, "id": self.id, "entries": list(self.entries), "levels": self.levels}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave, and tell of the routes. Raises StateError."""
        saved = Saved(state, self.name, 1)
        self.index, self.id = saved.number("index", 0xFF), saved.number("id", 0xF)
        self.entries, self.levels = saved.numbers("entries", (1 << 64) - 1, PINS), saved.number("levels", (1 << PINS) - 1)
        self._tell_routes()

    def __repr__(self) -> str:
        live = sum(not entry & MASKED for entry in self.entries)
        return f"<IOAPIC {live} of {PINS} entries unmasked, lines high {self.levels:#x}>"


def _message(entry: int) -> tuple[int, int]:
    """(address, data) of the MSI that an entry sends: the fields are the same, in other places."""
    address = 0xFEE00000 | (entry >> 56 & 0xFF) << 12 | (1 << 2 if entry & LOGICAL else 0)
    data = entry & (0xFF | DELIVERY) | (1 << 15 | 1 << 14 if entry & LEVEL else 0)
    return address, data
