"""Interrupts on their way to a vCPU: lines (GSIs), where they are routed, MSI messages, and the eventfds of irqfd and ioeventfd.

A line has a *level* that stays until it is changed; a *pulse* is an edge, up and down again. Devices get a line's ``set`` as their
``irq(level)`` callable and know nothing of KVM.
Sources: api.rst 4.25 (irq_line), 4.52 (routing), 4.59 (ioeventfd), 4.70 (MSI), 4.75 (irqfd); SDM vol. 3 section 11.11 (message format).
"""

from __future__ import annotations

import os

from pykvm.abi import lib
from pykvm.errors import ConfigError
from pykvm.lifetime import Closes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["EventFd", "IrqLine", "Route", "default_routes", "msi_message"]

MSI_BASE = 0xFEE00000
PIC_PINS, IOAPIC_PINS = 16, 24


class IrqLine:
    """A wire into the interrupt controller. ``drive(level)`` is what carries a change of it."""

    __slots__ = ("_drive", "gsi", "level")

    def __init__(self, gsi: int, drive: Callable[[int], object]) -> None:
        self.gsi, self._drive, self.level = gsi, drive, 0

    def set(self, level: int) -> None:
        """The line is high (1) or low (0) from now on."""
        self.level = 1 if level else 0
        self._drive(self.level)

    def pulse(self) -> None:
        """An edge: high, then low."""
        self._drive(1)
        self._drive(0)
        self.level = 0

    def __repr__(self) -> str:
        return f"<IrqLine GSI {self.gsi} {'high' if self.level else 'low'}>"


class Route:
    """Where a GSI leads: to a pin of an in-kernel chip, or to an MSI message."""

    __slots__ = ("address", "chip", "data", "gsi", "pin")

    def __init__(self, gsi: int, chip: int | None, pin: int, address: int, data: int) -> None:
        self.gsi, self.chip, self.pin, self.address, self.data = gsi, chip, pin, address, data

    @classmethod
    def to_chip(cls, gsi: int, chip: str, pin: int) -> Route:
        """``chip``: "pic-master", "pic-slave" or "ioapic"."""
        chips = {"pic-master": lib.KVM_IRQCHIP_PIC_MASTER, "pic-slave": lib.KVM_IRQCHIP_PIC_SLAVE, "ioapic": lib.KVM_IRQCHIP_IOAPIC}
        if chip not in chips:
            raise ConfigError(f"unknown irqchip {chip!r}: use one of {', '.join(chips)}")
        return cls(gsi, chips[chip], pin, 0, 0)

    @classmethod
    def to_msi(cls, gsi: int, address: int, data: int) -> Route:
        """An interrupt on ``gsi`` sends this message; msi_message() makes one."""
        return cls(gsi, None, 0, address, data)

    def fill(self, entry: Any) -> None:
        """Into a ``struct kvm_irq_routing_entry``."""
        entry.gsi = self.gsi
        if self.chip is None:
            entry.type = lib.KVM_IRQ_ROUTING_MSI
            entry.u.msi.address_lo, entry.u.msi.address_hi = self.address & 0xFFFFFFFF, self.address >> 32
            entry.u.msi.data = self.data
        else:
            entry.type = lib.KVM_IRQ_ROUTING_IRQCHIP
            entry.u.irqchip.irqchip, entry.u.irqchip.pin = self.chip, self.pin

    def __repr__(self) -> str:
        where = f"MSI {self.data:#x} to {self.address:#x}" if self.chip is None else f"chip {self.chip} pin {self.pin}"
        return f"<Route GSI {self.gsi}: {where}>"


def default_routes() -> list[Route]:
    """What KVM_CREATE_IRQCHIP sets up: GSI n leads to IOAPIC pin n, and below 16 to the PICs too."""
    routes = [Route.to_chip(n, "pic-master" if n < 8 else "pic-slave", n % 8) for n in range(PIC_PINS)]
    return routes + [Route.to_chip(n, "ioapic", n) for n in range(IOAPIC_PINS)]


def msi_message(vector: int, apic_id: int = 0, *, level: bool = False, nmi: bool = False, logical: bool = False) -> tuple[int, int]:
    """(address, data) of an MSI for one LAPIC: fixed delivery of ``vector``, or an NMI (SDM vol. 3 figures 11-24 and 11-25)."""
    if not 0 <= vector <= 0xFF or not 0 <= apic_id <= 0xFF:
        raise ConfigError(f"vector {vector} or APIC id {apic_id} has more than 8 bits")
    address = MSI_BASE | apic_id << 12 | (1 << 2 if logical else 0)
    data = vector | (4 << 8 if nmi else 0) | (1 << 15 | 1 << 14 if level else 0)
    return address, data


class EventFd(Closes):
    """A kernel counter (eventfd(2)), a context manager: what KVM signals (ioeventfd) or is signalled with (irqfd)."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd = -1
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def signal(self, count: int = 1) -> None:
        """Add to the counter."""
        os.eventfd_write(self.fd, count)

    def take(self) -> int:
        """How often it was signalled since it was taken last; does not wait."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def wait(self, timeout: float | None = None) -> int:
        """Like take(), but waits up to ``timeout`` seconds for a signal; 0 when none came."""
        from select import poll

        waiter = poll()
        waiter.register(self.fd, 1)  # POLLIN
        return self.take() if waiter.poll(None if timeout is None else timeout * 1000) else 0

    def close(self) -> None:
        """Close it; KVM lets go of it when the VM does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EventFd {'closed' if self.fd < 0 else f'fd {self.fd}'}>"
