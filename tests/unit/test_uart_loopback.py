"""The UART against the PC16550D datasheet: loopback, modem status, line errors."""

import pytest

from tests.unit.serial_line import (
    BI,
    BREAK,
    CTS,
    DCD,
    DCTS,
    DDCD,
    DDSR,
    DR,
    DSR,
    DTR,
    FCR,
    FE,
    FIFO_ERROR,
    IER,
    IIR,
    IS_LINE,
    IS_MODEM,
    IS_RX,
    IS_TX,
    LCR,
    LINE,
    LOOP,
    LSR,
    MCR,
    MODEM,
    MSR,
    NONE,
    OE,
    OUT1,
    OUT2,
    RBR,
    RI,
    RTS,
    RX,
    TEMT,
    TERI,
    THR,
    THRE,
    THRI,
    Serial,
)


@pytest.fixture
def com():
    return Serial()


def test_loopback_returns_output_as_input(com):
    com[MCR] = LOOP
    com[THR] = 0x5A
    assert com.sent == b""
    assert com[LSR] & DR
    assert com[RBR] == 0x5A
    assert com[LSR] & DR == 0


def test_loopback_keeps_the_outside_out(com):
    com[FCR], com[MCR] = 1, LOOP
    com.receive(b"later")
    assert com[LSR] & DR == 0
    com[THR] = ord("l")
    assert com.read_all() == b"l"
    com[MCR] = 0
    assert com.read_all() == b"later"


def test_what_waited_out_a_loopback_interrupts_afterwards(com):
    com[IER], com[MCR] = RX, OUT2 | LOOP
    com.receive(b"x")
    assert com.levels == []
    com[MCR] = OUT2
    assert com.levels == [1]
    assert com[IIR] == IS_RX


@pytest.mark.parametrize("mcr", range(16))
def test_loopback_modem_lines_follow_mcr(com, mcr):
    com[MCR] = LOOP | mcr
    expected = DSR * (mcr & DTR > 0) | CTS * (mcr & RTS > 0) | RI * (mcr & OUT1 > 0) | DCD * (mcr & OUT2 > 0)
    assert com[MSR] & 0xF0 == expected
    com[MCR] = mcr
    assert com[MSR] & 0xF0 == CTS | DSR | DCD


@pytest.mark.parametrize(
    ("before", "after", "deltas"),
    [
        (0, DTR, DDSR), (DTR, 0, DDSR), (0, RTS, DCTS), (RTS, 0, DCTS), (0, OUT2, DDCD), (OUT2, 0, DDCD),
        (0, OUT1, 0), (OUT1, 0, TERI), (0, 15, DDSR | DCTS | DDCD), (15, 0, DDSR | DCTS | DDCD | TERI), (15, 15, 0),
    ],
)  # fmt: skip
def test_modem_deltas(com, before, after, deltas):
    """Each line's change is remembered until MSR is read; of the ring indicator only its end."""
    com[MCR] = LOOP | before
    assert com[MSR] is not None
    com[MCR] = LOOP | after
    assert com[MSR] & 0x0F == deltas
    assert com[MSR] & 0x0F == 0


def test_deltas_add_up_until_read(com):
    com[MCR] = LOOP
    assert com[MSR] & 0x0F == DCTS | DDSR | DDCD
    com[MCR] = LOOP | DTR
    com[MCR] = LOOP
    com[MCR] = LOOP | RTS
    assert com[MSR] & 0x0F == DCTS | DDSR


def test_modem_status_interrupt(com):
    com[MCR], com[IER] = LOOP, MODEM
    assert com[IIR] == IS_MODEM  # unplugged by loopback
    assert com[MSR] & 0x0F
    assert com[IIR] == NONE
    com[MCR] = OUT2  # plugged in again, and the line to the interrupt controller is back
    assert com.levels == [1]
    assert com[IIR] == IS_MODEM
    assert com[MSR] & 0x0F
    assert com.levels == [1, 0]


def test_overrun_at_16_bytes(com):
    """A full FIFO keeps what it has; the error is reported once."""
    com[FCR], com[MCR] = 1, LOOP
    for i in range(16):
        com[THR] = i
    assert com[LSR] & OE == 0
    com[THR] = 99
    assert com[LSR] & (DR | OE) == DR | OE
    assert com[LSR] & (DR | OE) == DR
    assert com.read_all() == bytes(range(16))


def test_overrun_without_fifo(com):
    """The newer byte wins."""
    com[MCR] = LOOP
    com[THR] = 1
    assert com[LSR] & OE == 0
    com[THR] = 2
    assert com[LSR] & (DR | OE) == DR | OE
    assert com[RBR] == 2


@pytest.mark.parametrize("fifo", [0, 1])
@pytest.mark.parametrize("order", ["loopback first", "break first"])
def test_break_in_loopback(com, order, fifo):
    """One zero byte, without a stop bit, when the break begins; LSR tells of it once. What is sent during it is lost."""
    com[FCR], com[IER] = fifo, LINE
    for register, value in [(MCR, LOOP), (LCR, BREAK | 3)][:: 1 if order == "loopback first" else -1]:
        com[register] = value
    assert com[IIR] & 0xF == IS_LINE
    assert com[LSR] == FIFO_ERROR * fifo | TEMT | THRE | BI | FE | DR
    assert com[LSR] == TEMT | THRE | DR
    assert com[IIR] & 0xF == NONE
    com[THR] = 0x55
    assert (com[RBR], com[LSR]) == (0, TEMT | THRE)
    com[LCR] = BREAK | 7  # it goes on
    assert com[LSR] & (BI | DR) == 0
    com[LCR] = 3
    com[THR] = 0x55
    assert (com[LSR], com[RBR]) == (TEMT | THRE | DR, 0x55)
    assert com.sent == b""


def test_a_break_shows_when_it_is_at_the_top_of_the_fifo(com):
    com[FCR], com[MCR] = 1, LOOP
    for byte in b"ab":
        com[THR] = byte
    com[LCR] = BREAK
    com[LCR] = 0
    com[THR] = ord("c")
    assert [com[LSR] & (FIFO_ERROR | BI | DR) for _ in range(2)] == [FIFO_ERROR | DR] * 2  # somewhere in the FIFO
    assert (com[RBR], com[RBR]) == (ord("a"), ord("b"))
    assert com[LSR] & (FIFO_ERROR | BI | FE | DR) == FIFO_ERROR | BI | FE | DR
    assert com[LSR] & (FIFO_ERROR | BI | FE | DR) == DR
    assert (com[RBR], com[RBR]) == (0, ord("c"))


def test_a_break_that_finds_no_room(com):
    com[FCR], com[MCR] = 1, LOOP
    for i in range(16):
        com[THR] = i
    com[LCR] = BREAK
    assert com[LSR] & (OE | BI) == OE
    assert com.read_all() == bytes(range(16))
    com[FCR] = 0
    com[LCR] = 0
    com[THR] = 9
    com[LCR] = BREAK
    assert com[LSR] & (OE | BI | DR) == OE | BI | DR
    assert com[RBR] == 0


def test_clearing_the_fifo_clears_the_break_in_it(com):
    com[FCR], com[MCR] = 1, LOOP
    com[THR] = 1
    com[LCR] = BREAK
    com[FCR] = 1 | 2
    assert com[LSR] == THRE | TEMT


def test_a_break_on_the_line_is_nothing_to_the_receiver(com):
    com[LCR] = BREAK
    assert com[LSR] == THRE | TEMT
    com[LCR] = 0
    assert com[LSR] == THRE | TEMT


def test_line_status_interrupt_comes_first(com):
    com[MCR], com[IER] = LOOP, RX | THRI | LINE | MODEM
    com[THR] = 1
    com[THR] = 2
    order = []
    for register in (LSR, RBR, None, MSR):  # what acknowledges each; the transmitter's goes with IIR
        order.append(com[IIR])
        if register is not None:
            com[register]
    assert order == [IS_LINE, IS_RX, IS_TX, IS_MODEM]
    assert com[IIR] == NONE


@pytest.mark.parametrize("enabled", [0, LINE, MODEM])
def test_only_enabled_sources_show(com, enabled):
    com[MCR] = LOOP
    com[THR] = 1
    com[THR] = 2
    com[IER] = enabled
    assert com[IIR] == {0: NONE, LINE: IS_LINE, MODEM: IS_MODEM}[enabled]
    assert com[LSR] & (DR | OE) == DR | OE  # there they are in any case
    assert com[MSR] & 0x0F
