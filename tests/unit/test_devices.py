"""The small devices, and the console that two of them fill."""

import calendar
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.console import Console
from pykvm.devices.debugconsole import DebugConsole
from pykvm.devices.debugexit import DebugExit
from pykvm.devices.post import PostPort
from pykvm.devices.reset import KeyboardController, ResetControl
from pykvm.devices.rtc import Rtc
from pykvm.devices.scratch import Scratch

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, A, B, C, D, CENTURY = 0, 2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 0x32
H24, BINARY, SET, PM = 2, 4, 0x80, 0x80
SIZES = (1, 2, 4, 8)


@pytest.fixture
def stops():
    return []


@pytest.fixture
def stop(stops):
    return lambda reason, code: stops.append((reason, code))


# --- debug console, debug exit, POST ---------------------------------------------------------------------------------


def test_debug_console_collects_bytes():
    sink = bytearray()
    device = DebugConsole(sink)
    device.write(0, 1, ord("a"))
    device.write(0, 4, 0x65646362)
    assert sink == b"abcde"
    assert device.read(0, 1) == 0xE9


def test_debug_exit(stop, stops):
    device = DebugExit(stop)
    device.write(0, 1, 0)
    device.write(0, 4, 0xDEADBEEF)
    assert stops == [("exit", 0), ("exit", 0xDEADBEEF)]


def test_post_port_keeps_the_newest_codes():
    port = PostPort(history=3)
    assert port.read(0, 1) == 0
    for code in range(1, 6):
        port.write(0, 1, code)
    assert port.codes == [3, 4, 5]
    assert port.read(0, 1) == 5
    port.write(0, 2, 0x1234)
    assert (port.read(0, 1), port.read(0, 2)) == (0x34, 0x1234)


# --- reset -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "resets"), [(0x02, 0), (0x0A, 0), (0x00, 0), (0xFB, 0), (0x06, 1), (0x0E, 1), (0x04, 1)])
def test_reset_control(stop, stops, value, resets):
    device = ResetControl(stop)
    device.write(0, 1, value)
    assert stops == [("reset", None)] * resets
    assert device.read(0, 1) == value & 0x0A


def test_keyboard_controller_resets(stop, stops):
    device = KeyboardController(stop)
    device.write(0, 1, 0xFE)  # data, no command
    device.write(4, 1, 0xFF)
    device.write(4, 1, 0xD1)
    assert stops == []
    device.write(4, 1, 0xFE)
    assert stops == [("reset", None)]


def test_keyboard_controller_looks_idle(stop):
    """Input buffer empty (bit 1), so a guest that waits to send its reset does not wait for ever; no key (bit 0)."""
    device = KeyboardController(stop)
    assert device.read(4, 1) & 3 == 0
    assert device.read(0, 1) == 0


# --- scratch ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(SIZES), st.integers(0, (1 << 64) - 1)), max_size=20))
def test_scratch_keeps_what_is_inside(writes):
    device, model = Scratch(16), bytearray(16)
    for offset, size, value in writes:
        data = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        device.write(offset, size, int.from_bytes(data, "little"))
        model[offset : min(offset + size, 16)] = data[: max(0, 16 - offset)]
        assert device.bytes == model
        kept = bytes(model[offset : offset + size])
        assert device.read(offset, size).to_bytes(size, "little") == kept + b"\xff" * (size - len(kept))


# --- RTC -------------------------------------------------------------------------------------------------------------


class Clock:
    """An RTC register by register, and the host's time that it sees."""

    def __init__(self, *fields, memory=0):
        self.now = calendar.timegm(fields) + 0.5 if fields else 0.0
        self.rtc = Rtc(lambda: self.now, memory)

    def __getitem__(self, register):
        self.rtc.write(0, 1, register)
        return self.rtc.read(1, 1)

    def __setitem__(self, register, value):
        self.rtc.write(0, 1, register)
        self.rtc.write(1, 1, value)

    @property
    def date(self):
        return tuple(self[r] for r in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS))


def test_time_in_bcd():
    clock = Clock(2024, 2, 29, 23, 58, 37)
    assert clock.date == (0x20, 0x24, 0x02, 0x29, 0x23, 0x58, 0x37)
    assert clock[WEEKDAY] == 5  # Thursday; Sunday is 1


def test_time_in_binary():
    clock = Clock(1999, 12, 31, 23, 59, 58)
    clock[B] = H24 | BINARY
    assert clock.date == (19, 99, 12, 31, 23, 59, 58)


@pytest.mark.parametrize("day", range(7))
def test_weekdays(day):
    assert Clock(2023, 1, 1 + day, 12, 0, 0)[WEEKDAY] == day + 1  # the first was a Sunday


@pytest.mark.parametrize(
    ("hour", "bcd"),
    [(0, 0x12), (1, 0x01), (9, 0x09), (10, 0x10), (11, 0x11), (12, 0x12 | PM), (13, 0x01 | PM), (22, 0x10 | PM), (23, 0x11 | PM)],
)
def test_twelve_hours(hour, bcd):
    clock = Clock(2020, 1, 1, hour, 0, 0)
    clock[B] = 0
    assert clock[HOURS] == bcd
    clock.now += 86400
    clock[HOURS] = bcd
    clock[B] = H24
    assert clock[HOURS] == hour // 10 << 4 | hour % 10


def test_time_passes():
    clock = Clock(2020, 12, 31, 23, 59, 59)
    clock.now += 1
    assert clock.date == (0x20, 0x21, 1, 1, 0, 0, 0)


def test_set_freezes_until_the_guest_is_done():
    """As Linux sets the clock: SET on, all fields, SET off."""
    clock = Clock(2020, 1, 1, 0, 0, 0)
    clock[B] = H24 | SET
    clock.now += 100
    assert clock.date == (0x20, 0x20, 1, 1, 0, 0, 0)
    for register, value in ((SECONDS, 0x56), (MINUTES, 0x34), (HOURS, 0x12), (DAY, 0x31), (MONTH, 0x12), (YEAR, 0x35), (CENTURY, 0x19)):
        clock[register] = value
    clock[B] = H24
    assert clock.date == (0x19, 0x35, 0x12, 0x31, 0x12, 0x34, 0x56)
    clock.now += 5
    assert clock[SECONDS] == 1 and clock[MINUTES] == 0x35


def test_setting_one_field_keeps_the_others():
    clock = Clock(2020, 5, 6, 7, 8, 9)
    clock[MINUTES] = 0x44
    assert clock.date == (0x20, 0x20, 5, 6, 7, 0x44, 9)


def test_a_date_may_be_set_register_by_register():
    """Without SET: on the way from 31 January to 5 February there is a date that does not exist."""
    clock = Clock(2023, 1, 31, 23, 59, 58)
    clock[MONTH] = 0x02
    assert clock.date == (0x20, 0x23, 0x02, 0x31, 0x23, 0x59, 0x58)
    clock.now += 1  # the time of day goes on meanwhile
    assert clock.date == (0x20, 0x23, 0x02, 0x31, 0x23, 0x59, 0x59)
    clock[DAY] = 0x05
    assert clock.date == (0x20, 0x23, 0x02, 0x05, 0x23, 0x59, 0x59)
    clock.now += 2
    assert clock.date == (0x20, 0x23, 0x02, 0x06, 0x00, 0x00, 0x01)


def test_registers_hold_what_is_no_date():
    clock = Clock(2023, 2, 28, 1, 2, 3)
    clock[DAY] = 0x31
    clock[SECONDS] = 0x7F  # not even BCD
    clock.now += 100
    assert clock.date == (0x20, 0x23, 0x02, 0x31, 0x01, 0x02, 0x7F)
    assert "2023-02-31 01:02:0x7f?" in repr(clock.rtc)
    clock[SECONDS] = 0x10
    clock[DAY] = 0x28
    assert clock.date == (0x20, 0x23, 0x02, 0x28, 0x01, 0x02, 0x10)


def test_set_with_no_date_and_a_change_of_format():
    clock = Clock(2023, 2, 28, 13, 2, 3)
    clock[B] = H24 | SET
    clock[MONTH], clock[SECONDS] = 0x13, 0x10
    clock[B] = H24
    assert clock.date == (0x20, 0x23, 0x13, 0x28, 0x13, 0x02, 0x10)
    clock[B] = BINARY  # what means a number is written in the new way
    assert clock.date == (20, 23, 0x13, 28, 1 | PM, 2, 10)
    clock[MONTH] = 12
    assert clock.date == (20, 23, 12, 28, 1 | PM, 2, 10)


def test_linux_sets_the_clock():
    """mc146818_set_time(): SET, the divider held in reset, the registers, SET off, the divider on: half a second to the next second."""
    clock = Clock(2020, 1, 1, 0, 0, 0)
    control, rate = clock[B], clock[A]
    clock[B] = control | SET
    clock[A] = rate | 0x70
    for register, value in ((YEAR, 0x38), (MONTH, 0x01), (DAY, 0x19), (HOURS, 0x03), (MINUTES, 0x14), (SECONDS, 0x07)):
        clock[register] = value
    clock[B] = control
    clock.now += 10  # it stands still until the divider runs
    assert clock.date == (0x20, 0x38, 0x01, 0x19, 0x03, 0x14, 0x07)
    clock[A] = rate
    clock.now += 0.4
    assert clock[SECONDS] == 0x07
    clock.now += 0.2
    assert clock[SECONDS] == 0x08


@pytest.mark.parametrize("now", [1732490000.1234567, 1.9, 1e9 + 1e-6, 123456789.987654321])
def test_what_is_set_is_what_is_read(now):
    clock = Clock()
    clock.now = now
    for second in range(60):
        clock[SECONDS] = second // 10 << 4 | second % 10
        assert clock[SECONDS] == second // 10 << 4 | second % 10


# --- the RTC's interrupts --------------------------------------------------------------------------------------------

SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM = 1, 3, 5
UF, AF, PF, IRQF = UIE, AIE, PIE, _ = 0x10, 0x20, 0x40, 0x80


def test_update_flag():
    """Once a second, whatever register B enables; reading takes it back. The clock starts half a second before the first."""
    clock = Clock(2020, 1, 1, 0, 0, 0)
    clock[A] = 0x20
    assert clock[C] == 0
    clock.now += 0.6
    assert (clock[C], clock[C]) == (UF, 0)
    clock.now += 100
    assert (clock[C], clock[C]) == (UF, 0)
    clock[B] = H24 | SET
    clock.now += 5
    assert clock[C] == 0  # no updates
    clock[B] = H24
    clock[A] = 0x70
    clock.now += 5
    assert clock[C] == 0


def test_an_update_is_told_of_from_244_microseconds_before_to_its_end():
    clock = Clock()
    for fraction, told in ((0.5, 0), (1 - 2300e-6, 0), (1 - 2200e-6, 0x80), (1 - 20e-6, 0x80), (1.0, 0), (1.1, 0)):
        clock.now = 1e9 + fraction
        assert clock[A] == 0x26 | told
    clock.now = 1e9 + 1 - 100e-6
    clock[A] = 0xA6  # it cannot be written
    clock[B] = H24 | SET  # no updates, nothing to tell of
    assert clock[A] == 0x26


@pytest.mark.parametrize(
    ("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (4, 4096), (6, 1024), (8, 256), (12, 16), (13, 8), (14, 4), (15, 2)]
)
def test_periodic_flag(rate, hertz):
    """Datasheet table 5."""
    clock = Clock()
    clock.now = 1e9
    clock[A] = 0x20 | rate
    assert clock[C] & PF == PF
    seen = 0
    for step in range(1, 101):
        clock.now = 1e9 + (step + 0.01) / (4 * hertz)
        seen += clock[C] >> 6 & 1
    assert seen == 25


def test_no_rate_no_periodic_flag():
    clock = Clock()
    for register_a in (0x20, 0x76):  # no rate; the divider in reset
        clock[A] = register_a
        assert clock[C] is not None
        clock.now += 10.0
        assert clock[C] & PF == 0


ANY = 0xC0


@pytest.mark.parametrize(
    ("alarm", "first", "second"),  # seconds from 12:34:56 to the first alarm, and from that to the next
    [
        ((0x12, 0x34, 0x57), 1, 86400),
        ((0x12, 0x34, 0x56), 86400, 86400),
        ((0x12, 0x35, 0x00), 4, 86400),
        ((0x13, 0x00, 0x00), 1504, 86400),
        ((0x12, 0x00, 0x00), 86400 - 2096, 86400),
        ((0x00, 0x00, 0x00), 41104, 86400),
        ((ANY, ANY, ANY), 1, 1),
        ((ANY, ANY, 0x10), 14, 60),
        ((ANY, 0x10, 0x00), 2104, 3600),
        ((0xFF, 0xFF, 0x56), 60, 60),
        ((0x23, ANY, 0xC3), 37504, 1),
        ((0x13, ANY, 0x59), 1504 + 59, 60),
    ],
)
@pytest.mark.parametrize("format_", [H24, H24 | BINARY, 0])
def test_alarm(alarm, first, second, format_):
    clock = Clock(2020, 2, 28, 12, 34, 56)
    clock[B] = format_
    for register, value in zip((HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM), alarm, strict=True):
        if value < ANY:
            number = (value >> 4) * 10 + (value & 0xF)
            pm = 0
            if register == HOURS_ALARM and not format_ & H24:
                pm, number = PM * (number >= 12), (number - 1) % 12 + 1
            value = pm | (number if format_ & BINARY else number // 10 << 4 | number % 10)
        clock[register] = value
    for seconds in (first, second, second):
        if seconds > 1:
            clock.now += seconds - 1
            assert clock[C] & AF == 0
            clock.now += 1
        else:
            clock.now += seconds
        assert clock[C] & AF == AF
        assert clock[C] & AF == 0
    clock.now += 3 * 86400  # looked at late
    assert clock[C] & AF == AF


@pytest.mark.parametrize("alarm", [(0x24, ANY, ANY), (ANY, 0x60, ANY), (ANY, ANY, 0x0A), (0x8F, 0, 0)])
def test_an_alarm_that_is_no_time_never_comes(alarm):
    clock = Clock(2020, 2, 28, 12, 34, 56)
    clock[HOURS_ALARM], clock[MINUTES_ALARM], clock[SECONDS_ALARM] = alarm
    clock.now += 10 * 86400
    assert clock[C] & AF == 0


def interrupting(*fields):
    clock = Clock(*fields)
    levels = []
    clock.rtc.irq = levels.append
    return clock, levels


@pytest.mark.parametrize(("enable", "wait"), [(UIE, 1), (AIE, 1), (PIE, 1 / 1024)])
def test_interrupts(enable, wait):
    clock, levels = interrupting(2020, 1, 1, 0, 0, 0)
    clock[SECONDS_ALARM] = clock[MINUTES_ALARM] = clock[HOURS_ALARM] = 0xFF
    clock[C]
    clock[B] = H24 | enable
    clock.rtc.tick()
    assert levels == []
    clock.now += wait
    assert levels == []
    clock.rtc.tick()
    assert levels == [1]
    clock.now += wait
    clock.rtc.tick()
    assert levels == [1]  # the line stays high until register C is read
    assert clock[C] & (IRQF | enable) == IRQF | enable
    assert levels == [1, 0]
    clock.now += wait
    assert clock[0x40] == 0  # any access finds it
    assert levels == [1, 0, 1]
    clock[B] = H24
    assert levels == [1, 0, 1, 0]
    assert clock[C] & (IRQF | enable) == enable


def test_enabling_what_has_come_interrupts_at_once():
    clock, levels = interrupting(2020, 1, 1, 0, 0, 0)
    clock.now += 1
    clock[B] = H24 | UIE
    assert levels == [1]


def test_set_takes_the_update_interrupt_away():
    clock, _ = interrupting(2020, 1, 1, 0, 0, 0)
    clock[B] = H24 | UIE | AIE | PIE | SET
    assert clock[B] == H24 | AIE | PIE | SET


def test_a_tick_without_an_interrupt_asks_for_no_time():
    clock, levels = interrupting(2020, 1, 1, 0, 0, 0)
    clock.rtc.now = None
    clock.rtc.tick()
    clock.rtc.irq = None
    clock.rtc.ram[B] |= UIE
    clock.rtc.tick()
    assert levels == []


def test_a_host_clock_that_is_set_back_is_no_update():
    clock = Clock(2020, 1, 1, 0, 0, 0)
    clock[C]
    clock.now -= 1000
    assert clock[C] & (UF | AF | PF) == 0
    clock.now += 1
    assert clock[C] & UF == UF


# --- the RTC's registers ---------------------------------------------------------------------------------------------


def test_status_registers():
    clock = Clock(2020, 1, 1, 0, 0, 0)
    clock[A] = 0xFF
    assert clock[A] == 0x7F  # an update is never in progress
    clock[C] = clock[D] = 0x55
    assert (clock[C], clock[D]) == (0, 0x80)  # no interrupt; battery good


def test_cmos_ram_and_the_nmi_bit():
    clock = Clock()
    clock[0x40] = 0xA5
    assert (clock[0x40], clock[0xC0]) == (0xA5, 0xA5)
    assert clock.rtc.index == 0xC0
    assert clock.rtc.read(0, 1) == 0xFF


def test_sixteen_bit_write_is_index_and_data():
    clock = Clock()
    clock.rtc.write(0, 2, 0x7741)
    assert clock[0x41] == 0x77
    assert clock.rtc.read(0, 2) == 0x77FF


@pytest.mark.parametrize(
    ("memory", "base", "extended", "above"),
    [
        (0, 0, 0, 0),
        (512 << 10, 512, 0, 0),
        (16 << 20, 640, 15 << 10, 0),
        (64 << 20, 640, 63 << 10, 48 << 4),
        (8 << 30, 640, 65535, 3056 << 4),
    ],
)
def test_memory_size(memory, base, extended, above):
    clock = Clock(memory=memory)
    words = [clock[r] | clock[r + 1] << 8 for r in (0x15, 0x17, 0x30, 0x34)]
    assert words == [base, extended, extended, above]


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2099, 12, 31)))
@settings(deadline=None)
def test_any_date_can_be_set_and_read_back(wanted):
    clock = Clock(2024, 2, 29, 1, 2, 3)
    clock[B] = H24 | BINARY | SET
    fields = (wanted.year // 100, wanted.year % 100, wanted.month, wanted.day, wanted.hour, wanted.minute, wanted.second)
    for register, value in zip((CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS), fields, strict=True):
        clock[register] = value
    clock[B] = H24 | BINARY
    assert clock.date == fields
    assert clock[WEEKDAY] == wanted.isoweekday() % 7 + 1


# --- hostile sequences -----------------------------------------------------------------------------------------------

accesses = st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.sampled_from(SIZES), st.integers(0, (1 << 64) - 1)), max_size=60)


@settings(deadline=None)
@pytest.mark.parametrize("kind", ["debugconsole", "debugexit", "post", "reset", "keyboard", "scratch", "rtc"])
@given(accesses)
def test_any_sequence(kind, sequence):
    ignore = lambda *_: None  # noqa: E731
    device = {
        "debugconsole": lambda: DebugConsole(Console(limit=64)),
        "debugexit": lambda: DebugExit(ignore),
        "post": lambda: PostPort(history=4),
        "reset": lambda: ResetControl(ignore),
        "keyboard": lambda: KeyboardController(ignore),
        "scratch": lambda: Scratch(8),
        "rtc": lambda: Rtc(lambda: 1e9, 1 << 32),
    }[kind]()
    for is_write, offset, size, value in sequence:
        if is_write:
            device.write(offset, size, value & ((1 << 8 * size) - 1))
        elif hasattr(device, "read"):
            answer = device.read(offset, size)
            assert type(answer) is int and 0 <= answer < 1 << 8 * size


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from([SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY, A, B, C, D, 1]), st.integers(0, 255))),
    st.floats(-1e12, 1e12),
)
def test_whatever_is_set_the_clock_can_be_read(writes, now):
    clock = Clock()
    clock.now = now
    for register, value in writes:
        clock[register] = value
    for register in range(128):
        assert clock[register] in range(256)
    clock[A], clock[B] = 0x26, H24 | BINARY
    wanted = (20, 38, 1, 19, 3, 14, 7)
    for register, value in zip((CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS), wanted, strict=True):
        clock[register] = value
    assert clock.date == wanted  # whatever was there before
    clock.now += 60
    assert clock.date == (20, 38, 1, 19, 3, 15, 7)


# --- the console -----------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=30), max_size=30))
def test_console_keeps_the_newest(pieces):
    heard = []
    console = Console(limit=40, on_output=heard.append)
    for piece in pieces:
        console.extend(piece)
        assert len(console.data) <= 40
    everything = b"".join(pieces)
    assert heard == pieces
    assert console.dropped + len(console.data) == len(everything)
    assert everything.endswith(bytes(console.data))
    assert console.dropped == 0 or len(everything) > 40


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_debug_console_output_that_raises(failure):
    """Kept once, passed on once; the caller hears of it once, though the run loop gives the access to the device again."""
    heard = []

    def output(data):
        heard.append(data)
        if len(heard) == 1:
            raise failure

    console = Console(on_output=output)
    device = DebugConsole(console)
    with pytest.raises(failure):
        device.write(0, 1, ord("a"))
    for character in "aab":  # the first is the second turn
        device.write(0, 1, ord(character))
    assert (console.text, heard) == ("aab", [b"a", b"a", b"b"])


def test_console_text_survives_any_bytes():
    console = Console()
    console.extend(b"caf\xc3\xa9 \xff")
    assert console.text == "caf\u00e9 \ufffd"
