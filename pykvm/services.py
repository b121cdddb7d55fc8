"""What a gallery guest may ask of its host by hypercall: interrupts to itself, doorbells, counters, its own page walk.

An image whose note says ``hypercalls=yes`` gets them, through ports and MMIO (devices/hypercall.py), which work on every host. VMCALL has
KVM's own numbers, and KVM passes only one of them on. ``SERVICES`` is number to name; the method of that name says what it does. A guest
that asks for nonsense gets -EINVAL, one that asks for a number that is none -KVM_ENOSYS.
"""

from __future__ import annotations

from pykvm.devices.saved import Saved
from pykvm.errors import PykvmError, StateError
from pykvm.irq import EventFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.machine import Machine

__all__ = ["SERVICES", "Services"]

EINVAL, KVM_ENOSYS = 22, 1000
KVM_HC_MAP_GPA_RANGE = 12  # the one hypercall that KVM passes on
ANY = 0xFFFFFFFF  # "no such argument"
SERVICES = {
    1: "irq_raise", 2: "irq_lower", 3: "irq_pulse", 4: "msi", 5: "nmi", 6: "interrupt", 7: "irqfd", 8: "exception",
    9: "doorbell", 10: "rung", 11: "coalesce", 12: "coalesced", 13: "exits", 14: "translate", 15: "remap",
    16: "msr_answer", 17: "msr_deny", 18: "resampled", 19: "announced",
}  # fmt: skip


class Services:
    """The hypercalls of one machine. ``call(number, arguments)`` is what the device uses, ``vmcall()`` is for HYPERCALL exits."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._irqfds: dict[int, EventFd] = {}
        self._resamples: dict[int, EventFd] = {}
        self._bell: EventFd | None = None
        self._bell_at: list[int] = []  # the doorbell's arguments
        self._pages: list[int] = []  # gpas of coalesced pages
        self._rung = 0
        self._written: list[int] = []
        self._msrs: dict[int, int] = {}
        self._answered: list[int] = []  # MSRs
        self._denied: list[int] = []
        self._announced = 0

    def call(self, number: int, arguments: tuple[int, ...]) -> int:
        """Carry one out; never raises for what a guest asks."""
        name = SERVICES.get(number)
        if name is None:
            return -KVM_ENOSYS
        try:
            return int(getattr(self, name)(*arguments[:4])) or 0
        except (PykvmError, ValueError, OSError):
            return -EINVAL

    def vmcall(self, number: int, arguments: tuple[int, ...]) -> int:
        """A hypercall of KVM's own numbering, made with VMCALL or VMMCALL."""
        if number != KVM_HC_MAP_GPA_RANGE:
            return -KVM_ENOSYS
        self._announced = self._announced + arguments[1] & (1 << 64) - 1
        return 0

    def announced(self, *_: int) -> int:
        """How many pages KVM_HC_MAP_GPA_RANGE has told the host of."""
        return self._announced

    # --- interrupts --------------------------------------------------------------------------------------------------

    def irq_raise(self, gsi: int, *_: int) -> int:
        """The line ``gsi`` goes high."""
        self._machine.irq(gsi).set(1)
        return 0

    def irq_lower(self, gsi: int, *_: int) -> int:
        """The line ``gsi`` goes low."""
        self._machine.irq(gsi).set(0)
        return 0

    def irq_pulse(self, gsi: int, *_: int) -> int:
        """The line ``gsi`` goes high and low again."""
        self._machine.irq(gsi).pulse()
        return 0

    def msi(self, address: int, data: int, *_: int) -> int:
        """An MSI, delivered at once."""
        self._machine.vm.signal_msi(address, data)
        return 0

    def nmi(self, cpu: int, *_: int) -> int:
        """An NMI for the vCPU ``cpu``."""
        self._machine.nmi(cpu)
        return 0

    def interrupt(self, vector: int, *_: int) -> int:
        """``vector``, as soon as vCPU 0 can take it; without an irqchip."""
        self._machine.interrupt(vector)
        return 0

    def exception(self, vector: int, error_code: int, *_: int) -> int:
        """The guest takes an exception where it is; ``error_code`` 0xFFFFFFFF: without one."""
        self._machine.inject_exception(vector, None if error_code == ANY else error_code)
        return 0

    def irqfd(self, gsi: int, level: int, *_: int) -> int:
        """Signal the irqfd of ``gsi``, which is made at the first call; ``level`` 1 makes it a level-triggered one, with resample."""
        fd = self._irqfds.get(gsi)
        if fd is None:
            if gsi > 23:
                return -EINVAL
            fd = self._add_irqfd(gsi, level == 1)
        fd.signal()
        return 0

    def _add_irqfd(self, gsi: int, level: bool) -> EventFd:
        fd, resample = EventFd(), EventFd() if level else None
        self._machine.vm.irqfd(gsi, fd.fd, -1 if resample is None else resample.fd)
        self._irqfds[gsi] = fd
        if resample is not None:
            self._resamples[gsi] = resample
        return fd

    def resampled(self, gsi: int, *_: int) -> int:
        """How often the guest has ended the interrupt of a level-triggered irqfd since this was asked last."""
        return self._resamples[gsi].take() if gsi in self._resamples else -EINVAL

    # --- writes that do not exit -------------------------------------------------------------------------------------

    def doorbell(self, port: int, length: int, datamatch: int, *_: int) -> int:
        """From now on a write of ``length`` bytes to ``port`` (of ``datamatch``, unless 0xFFFFFFFF) rings an eventfd and does not exit."""
        if self._bell is not None:
            return -EINVAL
        bell = EventFd()
        self._machine.add_device(
            _Rung(self), port=port, length=max(length, 1), eventfd=bell, datamatch=None if datamatch == ANY else datamatch
        )
        self._bell, self._bell_at = bell, [port, length, datamatch]
        return 0

    def rung(self, *_: int) -> int:
        """How often the doorbell has rung since this was asked last; exits that reached the device in the high half."""
        exits, self._rung = self._rung, 0
        return (0 if self._bell is None else self._bell.take()) | exits << 32

    def coalesce(self, gpa: int, *_: int) -> int:
        """From now on writes to the page at ``gpa`` are coalesced."""
        if self._written:
            return -EINVAL
        self._machine.add_device(_Written(self._written), gpa=gpa, length=4096, coalesced=True)
        self._pages.append(gpa)
        return 0

    def coalesced(self, index: int, *_: int) -> int:
        """The ``index``-th value that was written to that page, or with 0xFFFFFFFF how many there are."""
        if index == ANY:
            return len(self._written)
        return self._written[index] if index < len(self._written) else -EINVAL

    # --- looking in the mirror ---------------------------------------------------------------------------------------

    def exits(self, reason: int, *_: int) -> int:
        """How many exits with this KVM_EXIT_ number the guest has caused, this one included; 0xFFFFFFFF: all."""
        counts = self._machine.exit_counts()
        return sum(counts.values()) if reason == ANY else counts.get(reason, 0)

    def translate(self, low: int, high: int, *_: int) -> int:
        """The gpa of the gva ``high:low`` under vCPU 0's page tables, as KVM_TRANSLATE has it; 2**64 - 1: none."""
        gpa = self._machine.vcpu.translate(high << 32 | low)
        return (1 << 64) - 1 if gpa is None else gpa

    def remap(self, gpa: int, *_: int) -> int:
        """The memslot with ``gpa`` gets other host memory with the same content."""
        slot = self._machine.memory.find(gpa)
        if slot is None:
            return -EINVAL
        before = slot.hva
        return 0 if self._machine.move_slot(slot).hva != before else -EINVAL

    # --- MSRs --------------------------------------------------------------------------------------------------------

    def msr_answer(self, index: int, *_: int) -> int:
        """User space keeps the MSR ``index`` from now on: reads give what was written, all bits inverted."""
        self._machine.on_msr(
            index,
            read=lambda: ~self._msrs.get(index, 0),
            write=lambda value: self._msrs.__setitem__(index, value),
        )
        self._answered.append(index)
        return 0

    def msr_deny(self, index: int, *_: int) -> int:
        """Accesses to the MSR ``index`` are #GP from now on."""
        self._machine.on_msr(index)
        self._denied.append(index)
        return 0

    # --- saving ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Have interrupts arrive that irqfds were signalled for."""
        for gsi, fd in self._irqfds.items():
            self._machine.vm.flush_irqfd(gsi, fd.fd, self._resamples[gsi].fd if gsi in self._resamples else -1)

    def save(self) -> dict[str, Any]:
        """What the guest has asked for so far."""
        return {
            "version": 1,
            "irqfds": [[gsi, int(gsi in self._resamples)] for gsi in self._irqfds],
            "resampled": [[gsi, _peek(fd)] for gsi, fd in self._resamples.items()],
            "doorbell": list(self._bell_at),
            "rung": [0 if self._bell is None else _peek(self._bell), self._rung],
            "pages": list(self._pages),
            "written": list(self._written),
            "answered": list(dict.fromkeys(self._answered)),
            "denied": list(dict.fromkeys(self._denied)),
            "msrs": [[index, value] for index, value in self._msrs.items()],
            "announced": self._announced,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave, in a machine that is new. Raises StateError."""
        saved = Saved(state, "services", 1)
        long, word = (1 << 64) - 1, 0xFFFFFFFF
        for gsi, level in saved.pairs("irqfds", 23, 24):
            self._add_irqfd(gsi, bool(level))
        for gsi, count in saved.pairs("resampled", long - 1, 24):
            if gsi not in self._resamples:
                raise StateError("services.resampled", f"GSI {gsi} has no level-triggered irqfd")
            self._resamples[gsi].signal(count)
        bell = saved.numbers("doorbell", word, at_most=3)
        rung, self._rung = saved.numbers("rung", long - 1, 2)
        if bell:
            if len(bell) != 3 or self.doorbell(*bell) or self._bell is None:
                raise StateError("services.doorbell", "it cannot be made")
            self._bell.signal(rung)
        for gpa in saved.numbers("pages", word, at_most=256):
            if self.coalesce(gpa):
                raise StateError("services.pages", f"gpa {gpa:#x} cannot be coalesced")
        self._written[:] = saved.numbers("written", long, at_most=4096)
        for index in saved.numbers("answered", word, at_most=256):
            self.msr_answer(index)
        for index in saved.numbers("denied", word, at_most=256):
            self.msr_deny(index)
        self._msrs.update(saved.pairs("msrs", long, 256))
        self._announced = saved.number("announced", long)

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (*self._irqfds.values(), *self._resamples.values(), *([self._bell] if self._bell else [])):
            fd.close()


def _peek(fd: EventFd) -> int:
    """What take() would give, left in it."""
    count = fd.take()
    if count:
        fd.signal(count)
    return count


class _Rung:
    """The doorbell's device: it hears of writes that do not match, and of none that do."""

    name = "doorbell"

    def __init__(self, services: Services) -> None:
        self._services = services

    def write(self, offset: int, size: int, value: int) -> None:
        self._services._rung += 1

    def save(self) -> dict[str, Any]:
        """Services has it all."""
        return {"version": 1}

    def load(self, state: dict[str, Any]) -> None:
        """There is nothing to take back."""


class _Written:
    """Keeps up to 4096 written values."""

    name = "coalesced page"

    def __init__(self, values: list[int]) -> None:
        self._values = values

    def write(self, offset: int, size: int, value: int) -> None:
        if len(self._values) < 4096:
            self._values.append(value)

    def save(self) -> dict[str, Any]:
        """Services has it all."""
        return {"version": 1}

    def load(self, state: dict[str, Any]) -> None:
        """There is nothing to take back."""
