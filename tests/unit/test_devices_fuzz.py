"""Every device's registers driven with garbage: answers are in range, nothing raises, and what always holds does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm import GuestMemory
from pykvm.console import Console
from pykvm.devices.acpipm import AcpiPm
from pykvm.devices.debugconsole import DebugConsole
from pykvm.devices.debugexit import DebugExit
from pykvm.devices.exceptionreport import ExceptionReport
from pykvm.devices.fwcfg import LENGTH as FW_CFG_LENGTH
from pykvm.devices.fwcfg import FwCfg
from pykvm.devices.hypercall import LENGTH, HypercallPort
from pykvm.devices.ioapic import Ioapic
from pykvm.devices.pciconfig import PciConfig
from pykvm.devices.pctestdev import BytePorts, EchoPorts, FlushPort, IrqLines
from pykvm.devices.post import PostPort
from pykvm.devices.reset import KeyboardController, PortA, ResetControl
from pykvm.devices.rom import Rom
from pykvm.devices.rtc import Rtc
from pykvm.devices.scratch import Scratch
from pykvm.devices.uart16550 import Uart16550

M64 = (1 << 64) - 1


class Line:
    """An interrupt line: ``level``, and that only changes are told."""

    def __init__(self):
        self.level = 0

    def __call__(self, level):
        assert level in (0, 1) and level != self.level
        self.level = level


class Driven:
    """A device, the offsets a guest reaches it at, what else the world does to it, and what holds after each step."""

    def __init__(self, device, length, happen=(), check=lambda: None):
        self.device, self.length, self.happen, self.check = device, length, happen, check


def plain(device, length):
    return lambda: Driven(device(), length)


def ignore(*_):
    pass


def uart():
    line, stdin = Line(), [b"typed"]
    device = Uart16550(Console(limit=64).extend, line, lambda: stdin[0])

    def check():
        assert len(device.rx) == len(device.rx_errors) <= (16 if device.fcr & 1 else 1)
        assert 0 <= device.divisor <= 0xFFFF and device.ier < 16 and device.mcr < 32
        iir = device._iir()
        assert line.level == (device.mcr & 0x18 == 8 and not iir & 1)
        assert iir in (0, 1, 2, 4, 6, 0xC)
        needs = {1: 0, 6: 4, 4: 1, 0xC: 1, 2: 2, 0: 8}[iir]
        assert device.ier & needs == needs
        assert iir not in (4, 0xC) or device.rx
        assert iir != 6 or device.line_errors & 0x1E
        if not device.lcr & 0x80:  # as the guest sees it; these reads are part of the sequence
            assert device.read(2, 1) == iir | (0xC0 if device.fcr & 1 else 0)
        lsr, has = device.read(5, 1), bool(device.rx)
        assert lsr & 0x60 == 0x60 and lsr & 1 == has
        assert device.read(5, 1) & 0x1E == 0  # reading has cleared the errors
        assert lsr & 0x80 == 0 or device.fcr & 1
        assert device.read(6, 1) & 0xF0 == device.msr_lines and device.read(6, 1) & 0xF == 0

    def new_input(value):
        stdin[0] = b"" if value % 3 else value.to_bytes(8, "little")

    happen = (
        lambda value: device.tick(),
        lambda value: device.receive(value.to_bytes(8, "little")),
        new_input,
        lambda value: device.reset(),
    )
    return Driven(device, 8, happen, check)


def rtc():
    line, clock = Line(), [1.7e9]
    device = Rtc(lambda: clock[0], 1 << 32, line)

    def check():
        due = bool(device.ram[0xC] & device.ram[0xB] & 0x70)
        assert line.level == due
        assert device.ram[0xC] & ~0x70 == 0 and device.ram[0xA] & 0x80 == 0
        for register in range(14):
            if register != 0xC:
                assert device._read(register) in range(256)
        assert device._read(0xD) == 0x80
        assert repr(device).startswith("<RTC ")

    def pass_time(value):
        clock[0] += (value % 1000) ** 3 / 1e3 - 1e5  # back, too

    return Driven(device, 2, (lambda value: device.tick(), pass_time), check)


def ioapic():
    sent, told = [], []

    def send(address, data):
        assert address & 0xFFF00FFB == 0xFEE00000 and data & ~0xC7FF == 0
        assert data & 0x700 != 0x700
        sent.append((address, data))

    device = Ioapic(send, told.append)

    def check():
        for entry in device.entries:
            assert entry & ~0xFF0000000001EFFF & ~(1 << 14) == 0  # reserved bits, and delivery status, are 0
            assert not entry & 1 << 14 or entry & 1 << 15  # remote IRR is for level-triggered ones
        assert device.index in range(256) and device.id in range(16)
        if told:
            assert all(not device.entries[pin] & 1 << 16 for pin in told[-1])
        for pin in range(24):
            entry = device.entries[pin]
            if entry & 0x1C000 == 0x8000 and entry & 0x700 != 0x700:
                assert not device.levels >> pin & 1  # high, unmasked and not being served does not last

    happen = (lambda value: device.set_line(value % 24, value >> 8 & 1), lambda value: device.eoi(value & 0xFF))
    return Driven(device, 4096, happen, check)


def hypercall():
    def call(number, arguments):
        assert number in range(1 << 32) and len(arguments) == 4 and all(a in range(1 << 32) for a in arguments)
        return (sum(arguments) << number % 70) - number  # any size, negative too

    device = HypercallPort(call)

    def check():
        assert device.result in range(1 << 64)
        assert device.read(16, 4) | device.read(20, 4) << 32 == device.result
        assert [device.read(4 * i, 4) for i in range(4)] == device.arguments

    return Driven(device, LENGTH, (), check)


def fw_cfg():
    """With an access structure that the guest keeps changing, where 32-bit writes of small numbers find it."""
    memory = GuestMemory.of_size("64K")
    rom = memory.add(0x10000, 0x1000, readonly=True)
    before = rom.map[:]
    device = FwCfg(memory)
    device.add_file("opt/x", bytes(1000))

    def check():
        assert device.selected in range(1 << 16) and device.offset >= 0 and device.address in range(1 << 64)
        assert rom.map[:] == before

    happen = (
        lambda value: memory.write_u64(value % 0x1FF * 8, value),
        lambda value: memory.write(0, (value & 0xFFFFFFFF).to_bytes(4, "big") + bytes(2) + (value & 0xFFFF).to_bytes(2, "big") + bytes(8)),
    )
    return Driven(device, FW_CFG_LENGTH, happen, check)


def acpi_pm():
    line, clock, stopped = Line(), [0], []
    device = AcpiPm(lambda reason, code: stopped.append(reason), line, lambda: clock[0])

    def check():
        assert line.level == bool(device.status & device.enable)
        assert device.status & ~0x8501 == 0 and device.enable & ~0x521 == 0 and device.control & ~0x1C00 == 0
        assert set(stopped) <= {"power-off", "sleep"}
        if stopped[-1:] == ["sleep"]:
            stopped.clear()
            device.fall_asleep()

    def pass_time(value):
        clock[0] += value % 10_000_000_000

    return Driven(device, 12, (lambda value: device.tick(), lambda value: device.press_power_button(), pass_time), check)


def byte_ports():
    console, echo = Console(limit=64), EchoPorts()

    def check():
        assert len(echo.bytes) == 4

    return Driven(BytePorts(echo, DebugConsole(console)), 4, (lambda value: echo.write(0, 4, value & 0xFFFFFFFF),), check)


DEVICES = {
    "fw_cfg": fw_cfg,
    "ACPI PM": acpi_pm,
    "byte ports": byte_ports,
    "test ports": plain(EchoPorts, 4),
    "flush": plain(lambda: FlushPort(ignore), 4),
    "interrupt lines": plain(lambda: IrqLines(ignore), 24),
    "PCI configuration": plain(lambda: PciConfig(ResetControl(ignore)), 8),
    "port A": plain(lambda: PortA(ignore), 1),
    "debug console": plain(lambda: DebugConsole(Console(limit=64)), 1),
    "debug exit": plain(lambda: DebugExit(ignore), 4),
    "exception report": plain(lambda: ExceptionReport(ignore), 4),
    "POST": plain(lambda: PostPort(history=4), 1),
    "reset control": plain(lambda: ResetControl(ignore), 1),
    "keyboard": plain(lambda: KeyboardController(ignore), 5),
    "scratch": plain(lambda: Scratch(8), 8),
    "ROM": plain(Rom, 4096),
    "UART": uart,
    "RTC": rtc,
    "IOAPIC": ioapic,
    "hypercall": hypercall,
}
# Small numbers hit registers, 0 and all ones hit every bit of one.
values = st.one_of(st.integers(0, 255), st.integers(0, M64), st.sampled_from([0, M64, 0x70F9, 0x8010, 0x40, 0x13]))
steps = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "write", "happen"]),
        st.one_of(st.integers(0, 30), st.integers(0, 4200)),
        st.integers(0, 3),
        values,
    ),
    max_size=50,
)


@pytest.mark.parametrize("name", DEVICES)
@settings(deadline=None, max_examples=150)
@given(steps, st.booleans())
def test_garbage(name, sequence, aligned):
    driven = DEVICES[name]()
    device = driven.device
    for kind, at, log2, value in sequence:
        size = 1 << log2
        offset = at % driven.length
        if aligned:
            offset = at * 16 % driven.length if driven.length > 32 else offset & ~(size - 1)
        if kind == "happen":
            if driven.happen:
                driven.happen[at % len(driven.happen)](value)
        elif kind == "write" and hasattr(device, "write"):
            device.write(offset, size, value & ((1 << 8 * size) - 1))
        elif kind == "read" and hasattr(device, "read"):
            answer = device.read(offset, size)
            assert type(answer) is int and 0 <= answer < 1 << 8 * size
        driven.check()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["write", "write", "line", "eoi"]), st.integers(0, 23), values), max_size=60))
def test_garbage_in_redirection_entries(sequence):
    """The same for the IOAPIC where it matters: each write reaches an entry."""
    driven = ioapic()
    device = driven.device
    for kind, pin, value in sequence:
        if kind == "write":
            device.write(0, 4, 0x10 + 2 * pin + (value & 1))
            device.write(0x10, 4, value >> 1 & 0xFFFFFFFF)
            low = device.read(0x10, 4)
            assert low in range(1 << 32)
        elif kind == "line":
            device.set_line(pin, value & 1)
        else:
            device.eoi(value & 0xFF)
        driven.check()
