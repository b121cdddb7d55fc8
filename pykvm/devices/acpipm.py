"""ACPI's fixed hardware: the PM1 event and control registers and the PM timer, as on QEMU's PCs at port 0x600.

| offset | width |                                                                                                 |
|--------|-------|-------------------------------------------------------------------------------------------------|
| 0      | 16    | PM1 status: 0 the timer's bit 23 has changed, 8 power button, 10 RTC, 15 woken; a 1 clears      |
| 2      | 16    | PM1 enable: the same bits; a pair of ones raises the SCI                                        |
| 4      | 16    | PM1 control: bit 0 SCI_EN (always on), 10 to 12 the sleep type, 13 goes to sleep                |
| 8      | 32    | the timer, 3.579545 MHz, 24 bits; read only                                                     |

Sleep types are those of QEMU's PC: 0 is S5, and the run ends as "power-off"; 1 is S3, suspend to RAM (state/sleep.py), from which the RTC's
alarm wakes the machine when bit 10 is enabled, and the power button always. There are no others.
The timer's status bit is worked out when somebody looks and at each ``tick()``. Source: ACPI 6.5 sections 4.8.1 to 4.8.3.
"""

from __future__ import annotations

import time

from pykvm.devices.saved import Saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar

__all__ = ["AcpiPm"]

LENGTH = 12
STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
TMR, GBL, PWRBTN, RTC_WAKE, WAK = 1 << 0, 1 << 5, 1 << 8, 1 << 10, 1 << 15
EVENTS = TMR | GBL | PWRBTN | RTC_WAKE
SCI_EN, SLP_TYP, SLP_EN = 1 << 0, 7 << 10, 1 << 13
TIMER_HZ = 3579545
TIMER_BITS = 24
S5, S3 = 0, 1  # the sleep types that the DSDT's \_S5 and \_S3 name


class AcpiPm:
    """``stop("power-off", None)`` ends the run; ``stop("sleep", None)`` leads to fall_asleep(), and ``wake()`` is called when it is over.

    ``irq(level)`` is the SCI's line; ``now()`` gives nanoseconds that only rise. ``asleep``: it is in S3.
    """

    name = "ACPI PM"
    register_names: ClassVar = {STATUS: "PM1 status", ENABLE: "PM1 enable", CONTROL: "PM1 control", TIMER: "timer"}

    def __init__(
        self,
        stop: Callable[[str, int | None], object],
        irq: Callable[[int], object] | None = None,
        now: Callable[[], int] = time.monotonic_ns,
        wake: Callable[[], object] | None = None,
    ) -> None:
        self.stop, self.irq, self.now, self.wake = stop, irq, now, wake
        self.asleep = False
        self.start = now()
        self.status = self.enable = self.control = 0
        self._carries = 0  # how often the timer's top bit had changed when somebody looked last
        self._level = 0

    @property
    def timer(self) -> int:
        """The timer's ticks since the machine was made, without the 24 bits' wrap."""
        return max(0, self.now() - self.start) * TIMER_HZ // 1_000_000_000

    def press_power_button(self) -> None:
        """The guest is asked to power off, if it has ACPI and looks. From S3 it is woken."""
        if self.asleep:
            self._wake_up(PWRBTN)
        else:
            self.status |= PWRBTN
            self._update_irq()

    def alarm(self) -> None:
        """The RTC's alarm: heard only in S3, and only where the guest has enabled it."""
        if self.asleep and self.enable & RTC_WAKE:
            self._wake_up(RTC_WAKE)

    def fall_asleep(self) -> None:
        """The machine is in S3 from now on."""
        self.asleep = True

    def _wake_up(self, why: int) -> None:
        """Out of S3 come registers as after a reset, but for the status that says why."""
        self.asleep, self.status, self.enable, self.control = False, WAK | why, 0, 0
        self._update_irq()
        if self.wake is not None:
            self.wake()

    def tick(self) -> None:
        """To be called now and then, from the thread that runs the guest: the timer's status bit and its SCI come."""
        carries = self.timer >> TIMER_BITS - 1
        if carries != self._carries:
            self._carries = carries
            self.status |= TMR
        self._update_irq()

    def read(self, offset: int, size: int) -> int:
        """A register, or several bytes of them."""
        if offset == TIMER and size == 4:  # what guests do all the time
            return self.timer & (1 << TIMER_BITS) - 1
        self.tick()
        registers = self.status | self.enable << 16 | (self.control | SCI_EN) << 32 | (self.timer & (1 << TIMER_BITS) - 1) << 64
        return registers >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A register; an 8-bit or 32-bit access is that part of them."""
        for i in range(size):
            self._write(offset + i, value >> 8 * i & 0xFF)
        self.tick()

    def _write(self, offset: int, byte: int) -> None:
        shift = 8 * (offset & 1)
        if offset & ~1 == STATUS:
            self.tick()
            self.status &= ~(byte << shift)
        elif offset & ~1 == ENABLE:
            self.enable = (self.enable & ~(0xFF << shift) | byte << shift) & EVENTS
        elif offset & ~1 == CONTROL:
            self.control = (self.control & ~(0xFF << shift) | byte << shift) & SLP_TYP
            type = (self.control & SLP_TYP) >> 10
            if byte << shift & SLP_EN and type in (S5, S3):
                self.stop("power-off" if type == S5 else "sleep", None)

    def save(self) -> dict[str, Any]:
        """Registers, and how long the timer has run, in nanoseconds: it stands still while it is saved."""
        registers = {"status": self.status, "enable": self.enable, "control": self.control, "level": self._level, "asleep": self.asleep}
        return {"version": 2, **registers, "elapsed": max(0, self.now() - self.start), "carries": self._carries}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        saved = Saved(state, self.name, 2)
        self.status, self.enable, self.control = (saved.number(name, 0xFFFF) for name in ("status", "enable", "control"))
        self.start = self.now() - saved.number("elapsed", (1 << 63) - 1)
        self._carries, self._level = saved.number("carries", (1 << 63) - 1), saved.number("level", 1)
        self.asleep = saved.version >= 2 and saved.flag("asleep")

    def _update_irq(self) -> None:
        level = 1 if self.status & self.enable else 0
        if level != self._level:
            self._level = level
            if self.irq is not None:
                self.irq(level)

    def __repr__(self) -> str:
        return f"<ACPI PM status {self.status:#x} enable {self.enable:#x} timer {self.timer & (1 << TIMER_BITS) - 1:#x}>"
