"""The MC146818 real-time clock and its CMOS RAM at ports 0x70 (index) and 0x71 (data).

The time is the host's, in BCD or binary, 12 or 24 hours, as register B says; a guest that sets the clock moves an offset. What it writes
register by register need not be a date at once (February while the day is still 31): the registers then hold what was written until it
is one. The weekday follows from the date.

No thread runs here. Register C's flags are worked out from the time that has passed, and the interrupt line rises when that is next
done: at an access to the data port, and at each ``tick()``. So a guest that counts 1024 periodic interrupts a second gets fewer.
Bit 7 of the index masks NMI and is kept, nothing more. Source: Motorola MC146818 datasheet, table 1, "Alarm", and registers A to D.
"""

from __future__ import annotations

import time

from pykvm.errors import StateError
from pykvm.platform import MMIO_HOLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Rtc"]

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
REG_A, REG_B, REG_C, REG_D = 10, 11, 12, 13
CENTURY = 0x32
CPUS_LESS_1 = 0x5F
B_24H, B_BINARY, B_UPDATE, B_ALARM, B_PERIODIC, B_SET = 0x02, 0x04, 0x10, 0x20, 0x40, 0x80
B_INTERRUPTS = B_UPDATE | B_ALARM | B_PERIODIC
C_UPDATE, C_ALARM, C_PERIODIC, C_IRQ = 0x10, 0x20, 0x40, 0x80  # an enabled one of the first three makes the fourth
A_RATE, A_RESET, A_UIP = 0x0F, 0x60, 0x80
D_VALID = 0x80
PM = 0x80
DONT_CARE = 0xC0
DAY_SECONDS = 86400
CRYSTAL = 32768  # Hz: the unit that time is counted in here
UPDATE_TOLD = 8 + 65  # crystal periods: UIP comes on 244 µs before an update, which takes 1984 µs; the second ends with it (table 6)
_LIMITS = {  # register -> smallest and largest value; of HOURS in 24-hour mode
    SECONDS: (0, 59), MINUTES: (0, 59), HOURS: (0, 23), WEEKDAY: (1, 7), DAY: (1, 31), MONTH: (1, 12), YEAR: (0, 99), CENTURY: (0, 99),
}  # fmt: skip


class Rtc:
    """``now()`` gives seconds since the epoch (UTC); ``memory`` bytes of RAM and the number of ``cpus`` go into CMOS, where BIOSes look.

    ``irq(level)`` is its interrupt line (GSI 8 on a PC): high from when register C's IRQF is set until the guest reads that register.
    ``on_alarm()`` is called for each alarm that is enabled.
    """

    name = "RTC"

    def __init__(
        self, now: Callable[[], float] = time.time, memory: int = 0, irq: Callable[[int], object] | None = None, cpus: int = 1
    ) -> None:
        self.now, self.irq = now, irq
        self.on_alarm: Callable[[], object] | None = None
        self.index = 0
        self.ram = bytearray(128)
        self.ram[REG_A] = 0x26  # 32768 Hz time base, 1024 Hz rate: what a BIOS leaves
        self.ram[REG_B] = B_24H
        self.offset = 0  # crystal periods from the host's time to the guest's
        self._held: dict[int, int] | None = None  # the time registers as bytes, while they are the guest's to write or no date
        self._held_at = 0  # in guest seconds: their time of day goes on from there
        self._seen = self._time()  # up to here the flags are worked out
        self._level = 0
        self._store_size(memory)
        self.ram[CPUS_LESS_1] = cpus - 1

    def _store_size(self, memory: int) -> None:
        """CMOS memory size: 0x15 base KiB, 0x17 and 0x30 extended KiB, 0x34 above 16 MiB and 0x5B above 4 GiB in 64 KiB."""
        base = min(640, memory >> 10)
        extended = min(0xFFFF, max(0, memory - (1 << 20)) >> 10)
        above = min(0xFFFF, max(0, min(memory, MMIO_HOLE) - (16 << 20)) >> 16)
        high = min(0xFFFFFF, max(0, memory - MMIO_HOLE) >> 16)
        for register, size, value in ((0x15, 2, base), (0x17, 2, extended), (0x30, 2, extended), (0x34, 2, above), (0x5B, 3, high)):
            self.ram[register : register + size] = value.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        """Offset 0 is the index (write only: all ones), offset 1 the data."""
        value = self._read(self.index & 0x7F) if offset == 1 else 0xFF
        if size == 1:
            return value
        high = (1 << 8 * size) - 1 & ~0xFF
        return value | high if offset == 1 else (self._read(self.index & 0x7F) << 8 | 0xFF) | (high & ~0xFF00)

    def write(self, offset: int, size: int, value: int) -> None:
        """Index, data, or both with one 16-bit write."""
        if offset == 0:
            self.index = value & 0xFF
            if size > 1:
                self._write(self.index & 0x7F, value >> 8 & 0xFF)
        else:
            self._write(self.index & 0x7F, value & 0xFF)

    def tick(self) -> None:
        """To be called now and then, from the thread that runs the guest: the interrupt that is due comes."""
        if self.irq is not None and self.ram[REG_B] & B_INTERRUPTS:
            self._catch_up()

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Registers, CMOS RAM and how the guest's time differs from the host's, in crystal periods: time passes while it is saved."""
        held = None if self._held is None else [list(row) for row in self._held.items()]
        return {
            "version": 1, "index": self.index, "ram": self.ram.hex(), "offset": self.offset, "held": held, "held_at": self._held_at,
            "seen": self._seen, "level": self._level,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        from pykvm.devices.saved import Saved

        saved = Saved(state, self.name, 1)
        far = 1 << 62
        self.index, self.ram = saved.number("index", 0xFF), bytearray(saved.bytes("ram", 128, 128))
        self.offset, self._held_at = saved.number("offset", far, -far), saved.number("held_at", far, -far)
        self._seen, self._level = saved.number("seen", far, -far), saved.number("level", 1)
        self._held = None
        if state.get("held") is not None:
            held = dict(saved.pairs("held", 0xFF))
            if set(held) != set(_LIMITS):
                raise StateError("RTC.held", "these are not the registers of a time")
            self._held = held

    def __repr__(self) -> str:
        year, month, day, hour, minute, second = map(self._number, (YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS))
        return f"<RTC {self._number(CENTURY)}{year}-{month}-{day} {hour}:{minute}:{second}, index {self.index:#x}>"

    # --- registers ---------------------------------------------------------------------------------------------------

    def _read(self, register: int) -> int:
        self.tick()
        if register in _LIMITS:
            return self._registers()[register]
        if register == REG_C:
            self._catch_up()
            value = self.ram[REG_C] | (C_IRQ if self._level_due() else 0)
            self.ram[REG_C] = 0  # reading acknowledges
            self._update_irq()
            return value
        if register == REG_D:
            return D_VALID
        if register == REG_A and not self._stands() and self._time() % CRYSTAL >= CRYSTAL - UPDATE_TOLD:
            return self.ram[REG_A] | A_UIP
        return self.ram[register]

    def _write(self, register: int, value: int) -> None:
        self._catch_up()  # by the registers as they were
        if register in _LIMITS:
            self._set_time(register, value)
        elif register == REG_A:
            self._control(value & ~A_UIP, self.ram[REG_B])  # UIP is read only
        elif register == REG_B:
            self._control(self.ram[REG_A], value & ~B_UPDATE if value & B_SET else value)
        elif register not in (REG_C, REG_D):
            self.ram[register] = value
        self._update_irq()

    def _control(self, a: int, b: int) -> None:
        """Registers A and B: the clock stands still while B.SET is on or A resets the divider."""
        registers, stood = self._registers(), self._stands()
        numbers = {r: self._decode(r, value) for r, value in registers.items()}
        divider_starts = self.ram[REG_A] & A_RESET == A_RESET != a & A_RESET
        self.ram[REG_A], self.ram[REG_B] = a, b
        for register, number in numbers.items():  # B may say now that they are written in another way
            if number is not None:
                registers[register] = self._encode(register, number)
        if self._stands():
            self._held = registers
        elif stood:
            self._hold(registers, CRYSTAL // 2 if divider_starts else 0)  # the first update is half a second after the divider's start
        elif self._held is not None:
            self._hold(registers)

    def _stands(self) -> bool:
        return bool(self.ram[REG_B] & B_SET) or self.ram[REG_A] & A_RESET == A_RESET

    # --- time --------------------------------------------------------------------------------------------------------

    def _time(self) -> int:
        """The guest's time in crystal periods."""
        return int(self.now() * CRYSTAL // 1) + self.offset

    def _registers(self) -> dict[int, int]:
        """What the time registers hold."""
        seconds = self._time() // CRYSTAL
        if self._held is None:
            t = time.gmtime(seconds)
            numbers = {SECONDS: t.tm_sec, MINUTES: t.tm_min, HOURS: t.tm_hour, WEEKDAY: (t.tm_wday + 1) % 7 + 1}
            numbers |= {DAY: t.tm_mday, MONTH: t.tm_mon, YEAR: t.tm_year % 100, CENTURY: t.tm_year // 100 % 100}
            return {register: self._encode(register, number) for register, number in numbers.items()}
        registers = dict(self._held)
        if not self._stands():
            hour, minute, second = (self._decode(r, registers[r]) for r in (HOURS, MINUTES, SECONDS))
            if hour is not None and minute is not None and second is not None:
                now = (hour * 3600 + minute * 60 + second + seconds - self._held_at) % DAY_SECONDS
                for register, number in ((HOURS, now // 3600), (MINUTES, now // 60 % 60), (SECONDS, now % 60)):
                    registers[register] = self._encode(register, number)
        return registers

    def _set_time(self, register: int, value: int) -> None:
        registers = self._registers()
        registers[register] = value
        if self._stands():
            self._held = registers
        else:
            self._hold(registers)

    def _hold(self, registers: dict[int, int], fraction: int = 0) -> None:
        """The clock goes on from these, if they are a date; otherwise they stay as they are, and the time of day goes on, if it is one."""
        import calendar
        import datetime

        self._held, self._held_at = registers, self._time() // CRYSTAL
        numbers = [self._decode(r, registers[r]) for r in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)]
        known = [number for number in numbers if number is not None]
        if len(known) < len(numbers):
            return
        century, year, month, day, hour, minute, second = known
        try:
            date = datetime.datetime(100 * century + year, month, day, hour, minute, second)
        except ValueError:
            return
        self.offset += calendar.timegm(date.timetuple()) * CRYSTAL + fraction - self._time()
        self._held = None
        self._seen = self._time()

    def _encode(self, register: int, number: int) -> int:
        pm = 0
        if register == HOURS and not self.ram[REG_B] & B_24H:
            pm = PM if number >= 12 else 0
            number = (number - 1) % 12 + 1
        return (number if self.ram[REG_B] & B_BINARY else number // 10 << 4 | number % 10) | pm

    def _decode(self, register: int, value: int) -> int | None:
        """The number that a register's byte means; None where it means none."""
        pm = 0
        twelve = register == HOURS and not self.ram[REG_B] & B_24H
        if twelve:
            value, pm = value & ~PM, 12 if value & PM else 0
        if not self.ram[REG_B] & B_BINARY:
            if value & 0xF > 9 or value >> 4 > 9:
                return None
            value = (value >> 4) * 10 + (value & 0xF)
        low, high = (1, 12) if twelve else _LIMITS[register]
        if not low <= value <= high:
            return None
        return value % 12 + pm if twelve else value

    def _number(self, register: int) -> str:
        value = self._registers()[register]
        number = self._decode(register, value)
        return f"{value:#x}?" if number is None else f"{number:02}"

    # --- interrupts --------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Set the flags for what has happened since the last time."""
        before, self._seen = self._seen, self._time()
        if self._seen > before and self.ram[REG_A] & A_RESET != A_RESET:
            rate = self.ram[REG_A] & A_RATE
            if rate:
                shift = rate - 1 if rate > 2 else rate + 6  # 1 and 2 mean the same as 8 and 9
                if self._seen >> shift > before >> shift:
                    self.ram[REG_C] |= C_PERIODIC
            first, last = before // CRYSTAL + 1, self._seen // CRYSTAL
            if first <= last and not self._stands():
                self.ram[REG_C] |= C_UPDATE
                if self._held is None and self._alarm_after(first % DAY_SECONDS) <= last - first:
                    self.ram[REG_C] |= C_ALARM
                    if self.on_alarm is not None and self.ram[REG_B] & B_ALARM:
                        self.on_alarm()
        self._update_irq()

    def _alarm_after(self, second: int) -> int:
        """Seconds from this one of the day to the alarm's; a whole day and more when its registers mean no time."""
        hours, minutes, seconds = (
            [n for n in range(_LIMITS[register][1] + 1) if alarm & DONT_CARE == DONT_CARE or alarm == self._encode(register, n)]
            for register, alarm in ((HOURS, self.ram[HOURS_ALARM]), (MINUTES, self.ram[MINUTES_ALARM]), (SECONDS, self.ram[SECONDS_ALARM]))
        )
        if not (hours and minutes and seconds):
            return 1 << 62
        h, m, s = second // 3600, second // 60 % 60, second % 60
        if h in hours:
            if m in minutes:
                for later in seconds:
                    if later >= s:
                        return later - s
            for later in minutes:
                if later > m:
                    return (later - m) * 60 + seconds[0] - s
        at = minutes[0] * 60 + seconds[0] - second
        for later in hours:
            if later > h:
                return later * 3600 + at
        return DAY_SECONDS + hours[0] * 3600 + at

    def _level_due(self) -> bool:
        return bool(self.ram[REG_C] & self.ram[REG_B] & B_INTERRUPTS)

    def _update_irq(self) -> None:
        level = int(self._level_due())
        if level != self._level:
            self._level = level
            if self.irq is not None:
                self.irq(level)
