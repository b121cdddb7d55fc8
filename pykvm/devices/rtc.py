"""The MC146818 real-time clock and its CMOS RAM at ports 0x70 (index) and 0x71 (data).

The time is the host's, in BCD or binary, 12 or 24 hours, as register B says; a guest that sets the clock moves an offset.
Bit 7 of the index masks NMI and is kept, nothing more. Source: Motorola MC146818 datasheet, table 1 and registers A to D.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Rtc"]

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
REG_A, REG_B, REG_C, REG_D = 10, 11, 12, 13
CENTURY = 0x32
B_24H, B_BINARY, B_SET = 0x02, 0x04, 0x80
A_UIP = 0x80
D_VALID = 0x80
PM = 0x80
_TIME = {SECONDS: 5, MINUTES: 4, HOURS: 3, DAY: 2, MONTH: 1, YEAR: 0}  # register -> place in struct_time


class Rtc:
    """``now()`` gives seconds since the epoch (UTC); ``memory`` bytes of RAM go into the CMOS size registers, where BIOSes look."""

    name = "RTC"

    def __init__(self, now: Callable[[], float] = time.time, memory: int = 0) -> None:
        self.now = now
        self.index = 0
        self.ram = bytearray(128)
        self.ram[REG_A] = 0x26  # 32768 Hz time base, 1024 Hz rate: what a BIOS leaves
        self.ram[REG_B] = B_24H
        self.offset = 0.0
        self._frozen: list[int] | None = None  # while B.SET is on, the registers are the guest's to write
        self._store_size(memory)

    def _store_size(self, memory: int) -> None:
        """CMOS memory size: 0x15 base KiB, 0x17 and 0x30 extended KiB, 0x34 above 16 MiB in 64 KiB (Bochs and QEMU agree)."""
        base = min(640, memory >> 10)
        extended = min(0xFFFF, max(0, memory - (1 << 20)) >> 10)
        above = min(0xFFFF, max(0, min(memory, 0xC000_0000) - (16 << 20)) >> 16)
        for register, value in ((0x15, base), (0x17, extended), (0x30, extended), (0x34, above)):
            self.ram[register : register + 2] = value.to_bytes(2, "little")

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

    def __repr__(self) -> str:
        year, month, day, hour, minute, second, _ = self._fields()
        return f"<RTC {year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}, index {self.index:#x}>"

    # --- registers ---------------------------------------------------------------------------------------------------

    def _fields(self) -> list[int]:
        """Year, month, day, hour, minute, second, weekday (Sunday is 1)."""
        if self._frozen is not None:
            return self._frozen
        try:
            t = time.gmtime(self.now() + self.offset)
        except (OverflowError, ValueError, OSError):
            self.offset = 0.0  # the guest set a year that the host cannot count to
            t = time.gmtime(self.now())
        return [t.tm_year, t.tm_mon, t.tm_mday, t.tm_hour, t.tm_min, min(t.tm_sec, 59), (t.tm_wday + 1) % 7 + 1]

    def _encode(self, value: int) -> int:
        return value if self.ram[REG_B] & B_BINARY else value // 10 % 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.ram[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 0xF)

    def _read(self, register: int) -> int:
        if register in _TIME or register in (WEEKDAY, CENTURY):
            year, month, day, hour, minute, second, weekday = self._fields()
            if register == HOURS and not self.ram[REG_B] & B_24H:
                return self._encode((hour - 1) % 12 + 1) | (PM if hour >= 12 else 0)
            values = {SECONDS: second, MINUTES: minute, HOURS: hour, WEEKDAY: weekday, DAY: day, MONTH: month}
            values |= {YEAR: year % 100, CENTURY: year // 100}
            return self._encode(values[register]) & 0xFF
        if register == REG_C:
            flags = self.ram[REG_C]
            self.ram[REG_C] = 0  # reading acknowledges
            return flags
        if register == REG_D:
            return D_VALID
        return self.ram[register]

    def _write(self, register: int, value: int) -> None:
        if register in _TIME or register in (WEEKDAY, CENTURY):
            self._set_time(register, value)
        elif register == REG_A:
            self.ram[REG_A] = value & ~A_UIP  # the update takes no time here, so it is never in progress
        elif register == REG_B:
            self._write_b(value)
        elif register not in (REG_C, REG_D):
            self.ram[register] = value

    def _write_b(self, value: int) -> None:
        if value & B_SET and self._frozen is None:
            self._frozen = self._fields()
        elif not value & B_SET and self._frozen is not None:
            fields, self._frozen = self._frozen, None
            self._adopt(fields)
        self.ram[REG_B] = value

    def _set_time(self, register: int, value: int) -> None:
        fields = list(self._fields())
        if register == HOURS and not self.ram[REG_B] & B_24H:
            fields[3] = self._decode(value & 0x7F) % 12 + (12 if value & PM else 0)
        elif register == YEAR:
            fields[0] = fields[0] // 100 * 100 + self._decode(value)
        elif register == CENTURY:
            fields[0] = self._decode(value) * 100 + fields[0] % 100
        elif register == WEEKDAY:
            fields[6] = self._decode(value)
        else:
            fields[_TIME[register]] = self._decode(value)
        if self._frozen is not None:
            self._frozen = fields
        else:
            self._adopt(fields)

    def _adopt(self, fields: list[int]) -> None:
        """Move the clock to these fields; a date that does not exist leaves it as it is."""
        import calendar
        import datetime

        year, month, day, hour, minute, second, _ = fields
        try:
            wanted = calendar.timegm(datetime.datetime(year, month, day, hour, minute, second).timetuple())
        except (ValueError, OverflowError):
            return
        self.offset = wanted - self.now()
