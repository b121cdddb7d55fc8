"""The user-space IOAPIC against the 82093AA datasheet: registers, edge and level interrupts, remote IRR, EOI."""

import pytest

from pykvm.devices.ioapic import PINS, Ioapic
from pykvm.irq import msi_message

LEVEL, MASKED, REMOTE_IRR, PENDING = 1 << 15, 1 << 16, 1 << 14, 1 << 12


class Chip:
    """An IOAPIC register by register; ``sent`` are the vectors of its messages, ``routes`` what it said last of its entries."""

    def __init__(self):
        self.messages, self.routes = [], None
        self.ioapic = Ioapic(lambda *message: self.messages.append(message), self.tell)

    def tell(self, routes):
        self.routes = routes

    def __getitem__(self, register):
        self.ioapic.write(0, 4, register)
        return self.ioapic.read(0x10, 4)

    def __setitem__(self, register, value):
        self.ioapic.write(0, 4, register)
        self.ioapic.write(0x10, 4, value)

    def entry(self, pin):
        return self[0x10 + 2 * pin]

    def program(self, pin, low, destination=0):
        self[0x11 + 2 * pin] = destination << 24
        self[0x10 + 2 * pin] = low

    @property
    def sent(self):
        return [data & 0xFF for _, data in self.messages]


@pytest.fixture
def chip():
    return Chip()


def test_after_reset(chip):
    assert chip[0] == chip[2] == 0
    assert chip[1] == 0x00170020  # 24 entries; version 0x20, which has the EOI register
    for pin in range(PINS):
        assert (chip.entry(pin), chip[0x11 + 2 * pin]) == (MASKED, 0)


def test_registers(chip):
    chip[0] = 0xFFFFFFFF
    assert chip[0] == chip[2] == 0x0F000000
    chip[1] = chip[2] = 0
    assert (chip[1], chip[2]) == (0x00170020, 0x0F000000)
    for register in (3, 0xF, 0x40, 0xFF):
        chip[register] = 0xFFFFFFFF
        assert chip[register] == 0
    assert chip.ioapic.read(0, 4) == 0xFF
    assert (chip.ioapic.read(0x20, 4), chip.ioapic.read(4, 8)) == (0, 0)


def test_status_bits_are_read_only(chip):
    chip.program(3, 0xFFFFFFFF, 0xFF)
    assert chip.entry(3) == 0x1FFFF & ~REMOTE_IRR & ~PENDING
    assert chip[0x11 + 6] == 0xFF000000
    chip[0x11 + 6] = 0x00FFFFFF
    assert chip[0x11 + 6] == 0


def test_edge_sends_on_the_rise_only(chip):
    chip.program(4, 0x31)
    for level, sent in [(1, 1), (1, 1), (0, 1), (1, 2), (0, 2)]:
        chip.ioapic.set_line(4, level)
        assert chip.sent == [0x31] * sent
    assert chip.entry(4) == 0x31  # no remote IRR
    chip.ioapic.eoi(0x31)
    assert chip.sent == [0x31] * 2


def test_edge_on_a_masked_pin_is_lost(chip):
    chip.ioapic.set_line(4, 1)
    chip.program(4, 0x31)
    assert chip.sent == []
    chip.ioapic.set_line(4, 0)
    chip.ioapic.set_line(4, 1)
    assert chip.sent == [0x31]


def test_level_is_sent_once_until_it_is_ended(chip):
    chip.program(9, LEVEL | 0x40)
    chip.ioapic.set_line(9, 1)
    chip.ioapic.set_line(9, 1)
    assert chip.sent == [0x40]
    assert chip.entry(9) == LEVEL | REMOTE_IRR | 0x40
    chip.ioapic.set_line(9, 0)
    assert chip.entry(9) & REMOTE_IRR  # until EOI, whatever the line does
    chip.ioapic.eoi(0x40)
    assert chip.entry(9) == LEVEL | 0x40
    assert chip.sent == [0x40]


def test_level_that_is_still_high_is_sent_again_on_eoi(chip):
    chip.program(9, LEVEL | 0x40)
    chip.ioapic.set_line(9, 1)
    for n in (2, 3):
        chip.ioapic.eoi(0x41)  # another's
        chip.ioapic.eoi(0x40)
        assert chip.sent == [0x40] * n
        assert chip.entry(9) & REMOTE_IRR


def test_a_rise_while_it_is_served_is_sent_after_eoi(chip):
    chip.program(9, LEVEL | 0x40)
    for level in (1, 0, 1):
        chip.ioapic.set_line(9, level)
    assert chip.sent == [0x40]
    chip.ioapic.eoi(0x40)
    assert chip.sent == [0x40] * 2


def test_eoi_register(chip):
    chip.program(9, LEVEL | 0x40)
    chip.ioapic.set_line(9, 1)
    chip.ioapic.write(0x40, 4, 0x40)
    assert chip.sent == [0x40, 0x40]


def test_eoi_reaches_all_pins_of_a_vector(chip):
    for pin in (9, 10):
        chip.program(pin, LEVEL | 0x40)
        chip.ioapic.set_line(pin, 1)
    chip.ioapic.set_line(9, 0)
    chip.ioapic.eoi(0x40)
    assert [bool(chip.entry(pin) & REMOTE_IRR) for pin in (9, 10)] == [False, True]
    assert chip.sent == [0x40] * 3


def test_unmasking_with_the_line_high_sends(chip):
    chip.program(9, MASKED | LEVEL | 0x40)
    chip.ioapic.set_line(9, 1)
    assert chip.sent == []
    chip.program(9, LEVEL | 0x40)
    assert chip.sent == [0x40]
    chip.program(9, MASKED | LEVEL | 0x40)
    chip.ioapic.eoi(0x40)
    assert chip.sent == [0x40]  # masked while it is served
    chip.program(9, LEVEL | 0x40)
    assert chip.sent == [0x40, 0x40]


def test_writing_the_destination_sends_nothing(chip):
    chip.program(9, LEVEL | 0x40)
    chip.ioapic.set_line(9, 1)
    chip[0x11 + 18] = 1 << 24
    assert chip.sent == [0x40]


def test_switching_to_edge_forgets_remote_irr(chip):
    """As Linux gets out of a stuck interrupt (mask, edge, level)."""
    chip.program(9, LEVEL | 0x40)
    chip.ioapic.set_line(9, 1)
    chip.program(9, MASKED | 0x40)
    assert chip.entry(9) == MASKED | 0x40
    chip.program(9, LEVEL | 0x40)
    assert chip.sent == [0x40, 0x40]


@pytest.mark.parametrize(
    ("low", "destination", "message"),
    [
        (0x31, 5, msi_message(0x31, 5)),
        (LEVEL | 0x32, 0xFF, msi_message(0x32, 0xFF, level=True)),
        (1 << 11 | 0x33, 3, msi_message(0x33, 3, logical=True)),
        (4 << 8, 1, msi_message(0, 1, nmi=True)),
        (1 << 8 | 1 << 11 | 0x34, 1, (0xFEE01004, 0x134)),
        (1 << 13 | 0x35, 0, msi_message(0x35)),  # polarity: a line here is asserted or not
    ],
)
def test_messages(chip, low, destination, message):
    chip.program(7, low, destination)
    chip.ioapic.set_line(7, 1)
    assert chip.messages == [message]
    assert chip.routes == {7: message}


def test_extint_has_no_message(chip):
    chip.program(0, 0x700)
    chip.ioapic.set_line(0, 1)
    assert (chip.messages, chip.routes) == ([], {})


def test_routes_are_those_of_unmasked_entries(chip):
    chip.program(1, 0x21)
    chip.program(2, LEVEL | 0x22)
    assert set(chip.routes) == {1, 2}
    chip.program(1, MASKED | 0x21)
    assert set(chip.routes) == {2}


@pytest.mark.parametrize("pin", [-1, 24])
def test_pins_that_are_not_there(chip, pin):
    with pytest.raises(ValueError, match="pins 0 to 23"):
        chip.ioapic.set_line(pin, 1)


def test_repr(chip):
    chip.program(1, 0x21)
    chip.ioapic.set_line(2, 1)
    assert repr(chip.ioapic) == "<IOAPIC 1 of 24 entries unmasked, lines high 0x4>"
