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


def test_a_date_that_does_not_exist_changes_nothing():
    clock = Clock(2023, 2, 28, 1, 2, 3)
    before = clock.date
    clock[DAY] = 0x31
    assert clock.date == before
    clock[B] = H24 | SET
    clock[MONTH], clock[SECONDS] = 0x13, 0x10
    clock[B] = H24
    assert clock.date == before


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
    clock[B] = H24 | BINARY
    _, year, month, day, hour, minute, second = clock.date
    assert year < 100 and hour < 24 and minute < 60 and second < 60
    assert 1 <= month <= 12 and 1 <= day <= 31


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


def test_console_text_survives_any_bytes():
    console = Console()
    console.extend(b"caf\xc3\xa9 \xff")
    assert console.text == "caf\u00e9 \ufffd"
