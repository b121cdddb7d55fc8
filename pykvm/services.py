"""What a gallery guest may ask of its host by hypercall: interrupts to itself, doorbells, counters, its own page walk.

An image whose note says ``hypercalls=yes`` gets them, through ports and MMIO (devices/hypercall.py), which work on every host. VMCALL has
KVM's own numbers, and KVM passes only one of them on. ``SERVICES`` is number to name; the method of that name says what it does. A guest
that asks for nonsense gets -EINVAL, one that asks for a number that is none -KVM_ENOSYS.
"""

from __future__ import annotations

from pykvm.errors import PykvmError
from pykvm.irq import EventFd

TYPE_CHECKING = False
if TYPE_CHECKING:
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
        self._rung = 0
        self._written: list[int] = []
        self._msrs: dict[int, int] = {}
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
        self._announced += arguments[1]
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
            fd, resample = EventFd(), EventFd() if level == 1 else None
            self._machine.vm.irqfd(gsi, fd.fd, -1 if resample is None else resample.fd)
            self._irqfds[gsi] = fd
            if resample is not None:
                self._resamples[gsi] = resample
        fd.signal()
        return 0

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
        self._bell = bell
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
        return 0

    def msr_deny(self, index: int, *_: int) -> int:
        """Accesses to the MSR ``index`` are #GP from now on."""
        self._machine.on_msr(index)
        return 0

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (*self._irqfds.values(), *self._resamples.values(), *([self._bell] if self._bell else [])):
            fd.close()


class _Rung:
    """The doorbell's device: it hears of writes that do not match, and of none that do."""

    name = "doorbell"

    def __init__(self, services: Services) -> None:
        self._services = services

    def write(self, offset: int, size: int, value: int) -> None:
        self._services._rung += 1


class _Written:
    """Keeps up to 4096 written values."""

    name = "coalesced page"

    def __init__(self, values: list[int]) -> None:
        self._values = values

    def write(self, offset: int, size: int, value: int) -> None:
        if len(self._values) < 4096:
            self._values.append(value)
