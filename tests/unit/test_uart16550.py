"""The UART against the PC16550D datasheet: registers, sending, receiving, the interrupt line."""

import pytest

from pykvm.devices.uart16550 import Uart16550
from tests.unit.serial_line import (
    CTS,
    DCD,
    DLAB,
    DLL,
    DLM,
    DR,
    DSR,
    FCR,
    IER,
    IIR,
    IS_RX,
    IS_TIMEOUT,
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
    OUT2,
    RBR,
    RX,
    SCR,
    TEMT,
    THR,
    THRE,
    THRI,
    Serial,
)


@pytest.fixture
def com():
    return Serial()


# --- registers -------------------------------------------------------------------------------------------------------


def test_after_reset(com):
    """Datasheet table 1; the lines say that somebody is connected."""
    assert [com[r] for r in (IER, IIR, LCR, MCR, LSR, MSR)] == [0, NONE, 0, 0, THRE | TEMT, CTS | DSR | DCD]
    assert com.levels == []


def test_scratch_register_is_independent(com):
    for value in (0, 0x55, 0xAA, 0xFF):
        com[SCR] = value
        com[LCR] = DLAB
        assert com[SCR] == value
        com[LCR] = 3
        assert com[SCR] == value
    assert com.sent == b""


def test_dlab_selects_the_divisor(com):
    com[IER] = RX
    com[LCR] = DLAB | 3
    com[DLL], com[DLM] = 0x34, 0x12
    assert (com[DLL], com[DLM], com[LCR]) == (0x34, 0x12, DLAB | 3)
    assert com.uart.divisor == 0x1234
    com[LCR] = 3
    assert com[IER] == RX
    com[THR] = ord("x")
    assert com.sent == b"x"
    com[LCR] = DLAB
    assert (com[DLL], com[DLM]) == (0x34, 0x12)


def test_dlab_does_not_eat_input(com):
    com.receive(b"q")
    com[LCR] = DLAB
    assert com[DLL] == 0x0C
    com[LCR] = 0
    assert com[RBR] == ord("q")


def test_unimplemented_bits_read_as_zero(com):
    com[IER] = com[MCR] = 0xFF
    assert (com[IER], com[MCR]) == (0x0F, 0x1F)


def test_line_and_modem_status_are_read_only(com):
    before = com[LSR], com[MSR]
    com[LSR] = com[MSR] = 0xFF
    assert (com[LSR], com[MSR]) == before
    com[LSR] = com[MSR] = 0
    assert (com[LSR], com[MSR]) == before


def test_fifo_bits_of_iir(com):
    assert com[IIR] & 0xC0 == 0
    com[FCR] = 1
    assert com[IIR] == 0xC0 | NONE
    com[FCR] = 0xC6  # without bit 0 the FIFOs are off, whatever the rest says
    assert com[IIR] == NONE


def test_wide_accesses_touch_consecutive_registers(com):
    com.uart.write(LCR, 2, OUT2 << 8 | 3)
    assert com.uart.read(LCR, 2) == OUT2 << 8 | 3
    com.uart.write(LCR, 1, DLAB)
    com.uart.write(DLL, 2, 0xABCD)
    assert com.uart.read(DLL, 2) == 0xABCD == com.uart.divisor
    assert com.uart.read(SCR, 4) == 0xFFFFFF00
    assert com.uart.read(8, 2) == 0xFFFF
    com.uart.write(8, 8, 0)


# --- sending ---------------------------------------------------------------------------------------------------------


def test_sending(com):
    for byte in b"hello\0\xff":
        assert com[LSR] & (THRE | TEMT) == THRE | TEMT
        com[THR] = byte
    assert com.sent == b"hello\0\xff"


def test_thri_interrupts_at_once_and_reading_iir_clears_it(com):
    com[MCR] = OUT2
    com[IER] = THRI
    assert com.levels == [1]
    assert com[IIR] == IS_TX
    assert com.levels == [1, 0]
    assert com[IIR] == NONE
    com[THR] = ord("a")
    assert com.levels == [1, 0, 1]
    assert com[IIR] == IS_TX
    assert com.level == 0
    com[IER] = 0
    com[IER] = THRI
    assert com.levels == [1, 0, 1, 0, 1]
    com[IER] = 0
    assert com.level == 0


def test_writing_ier_again_is_no_new_edge(com):
    com[MCR] = OUT2
    com[IER] = THRI
    assert com[IIR] == IS_TX
    com[IER] = THRI | RX
    assert com[IIR] == NONE
    assert com.levels == [1, 0]


def test_without_thri_sending_does_not_interrupt(com):
    com[MCR] = OUT2
    com[IER] = RX | LINE | MODEM
    com[THR] = ord("a")
    assert com[IIR] == NONE
    assert com.levels == []


def test_a_source_that_is_not_shown_is_not_cleared(com):
    """Reading IIR takes the transmitter's interrupt back only if that is what it showed."""
    com[IER] = THRI | RX
    com.receive(b"x")
    assert com[IIR] == IS_RX
    assert com[RBR] == ord("x")
    assert com[IIR] == IS_TX
    assert com[IIR] == NONE


# --- receiving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fcr", [0, 1, 0xC1])
def test_input_arrives_in_order_and_none_is_lost(com, fcr):
    com[FCR] = fcr
    data = bytes(range(256))
    com.receive(data[:200])
    com.receive(data[200:])
    assert com[LSR] & (DR | OE) == DR
    assert com.read_all() == data
    assert com[LSR] & (DR | OE) == 0


def test_receive_interrupt(com):
    com[MCR], com[IER] = OUT2, RX
    com.receive(b"ab")
    assert com.levels == [1]
    assert com[IIR] == com[IIR] == IS_RX  # reading IIR does not clear this one
    assert com[RBR] == ord("a")
    assert com.level == 1
    assert com[RBR] == ord("b")
    assert com.levels[-1] == 0
    assert com[IIR] == NONE


def test_without_fifo_each_byte_is_an_edge(com):
    """A handler that reads one byte an interrupt gets them all from an edge-triggered PIC."""
    com[MCR], com[IER] = OUT2, RX
    com.receive(b"abc")
    for n, byte in enumerate(b"abc"):
        assert com.levels == [1, 0] * n + [1]
        assert com[RBR] == byte
    assert com.levels == [1, 0] * 3


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_level_or_timeout(com, fcr, trigger):
    com[FCR], com[IER], com[MCR] = fcr, RX, OUT2
    com.receive(bytes(trigger))
    assert com[IIR] == 0xC0 | IS_RX
    assert com[RBR] == 0
    assert com[IIR] == 0xC0 | (IS_TIMEOUT if trigger > 1 else NONE)
    assert com.level == (trigger > 1)
    assert com.read_all() == bytes(trigger - 1)
    assert com.level == 0


def test_clearing_the_receive_fifo(com):
    com[MCR], com[IER], com[FCR] = OUT2, RX, 1
    com.receive(b"abc")
    com[FCR] = 1 | 4
    assert com[RBR] == ord("a")  # bit 2 clears the other FIFO
    com[FCR] = 1 | 2
    assert com[LSR] & DR == 0
    assert com.level == 0
    com.receive(b"d")
    assert com.read_all() == b"d"


def test_switching_the_fifos_clears_them(com):
    com[FCR] = 1
    com.receive(b"abc")
    com[FCR] = 0
    assert com[LSR] & DR == 0


def test_reading_nothing_gives_zero(com):
    com.receive(b"x")
    assert (com[RBR], com[RBR]) == (ord("x"), 0)


def test_poll_is_asked_only_when_nothing_waits():
    pieces = [b"ab", b"", b"c"]
    com = Serial(lambda: pieces.pop(0) if pieces else b"")
    assert com[LSR] & DR
    assert pieces == [b"", b"c"]
    assert (com[RBR], com[RBR], com[RBR]) == (ord("a"), ord("b"), 0)
    assert com.read_all() == b"c"


# --- input on the heartbeat -------------------------------------------------------------------------------------------


class Stdin:
    """What poll() is asked for, and how often."""

    def __init__(self, *pieces):
        self.pieces, self.asked = list(pieces), 0

    def __call__(self):
        self.asked += 1
        return self.pieces.pop(0) if self.pieces else b""


def test_a_tick_brings_input_and_its_interrupt():
    stdin = Stdin(b"", b"hi", b"!")
    com = Serial(stdin)
    com[FCR], com[MCR], com[IER] = 1, OUT2, RX
    com.uart.tick()
    assert (com.levels, stdin.asked) == ([], 1)
    com.uart.tick()
    assert com.levels == [1]
    for _ in range(3):
        com.uart.tick()  # there is something to read: no more is fetched
    assert stdin.asked == 2
    assert com[IIR] == 0xC0 | IS_RX
    assert (com[RBR], com[RBR]) == (ord("h"), ord("i"))
    assert com.levels == [1, 0]
    com.uart.tick()
    assert com.levels == [1, 0, 1]
    assert com[RBR] == ord("!")


@pytest.mark.parametrize(("ier", "mcr"), [(0, OUT2), (THRI | LINE | MODEM, OUT2), (RX, OUT2 | LOOP)])
def test_a_tick_takes_nothing_from_who_does_not_wait(ier, mcr):
    stdin = Stdin(b"not for this guest")
    com = Serial(stdin)
    com[IER], com[MCR] = ier, mcr
    com.uart.tick()
    assert stdin.asked == 0


def test_a_tick_with_nobody_to_ask(com):
    com[IER] = RX
    com.uart.tick()
    assert com[LSR] & DR == 0


def test_looking_in_loopback_asks_nobody():
    stdin = Stdin(b"later")
    com = Serial(stdin)
    com[MCR] = LOOP
    assert (com[LSR] & DR, com[RBR], stdin.asked) == (0, 0, 0)
    com[MCR] = 0
    assert com.read_all() == b"later"


# --- output that fails -------------------------------------------------------------------------------------------------


def test_output_that_raises_is_not_given_twice():
    """The run loop gives an access during which a device raised to the device again."""
    sent, levels = [], []

    def output(data):
        sent.append(data)
        if data == b"!":
            raise OSError("nobody takes it")

    uart = Uart16550(output, levels.append)
    uart.write(MCR, 1, OUT2)
    uart.write(IER, 1, THRI)
    assert uart.read(IIR, 1) == IS_TX
    for _ in range(2):
        with pytest.raises(OSError, match="nobody takes it"):
            uart.write(THR, 1, ord("!"))
        uart.write(THR, 1, ord("!"))
        assert uart.read(IIR, 1) == IS_TX  # the second turn does what the first did not come to
    uart.write(THR, 1, ord("?"))
    assert sent == [b"!", b"!", b"?"]


# --- the interrupt line ----------------------------------------------------------------------------------------------


def test_out2_and_loopback_gate_the_line(com):
    com[IER] = RX
    com.receive(b"x")
    assert com.levels == []
    com[MCR] = OUT2
    com[MCR] = OUT2 | LOOP
    com[MCR] = OUT2
    com[MCR] = 0
    assert com.levels == [1, 0, 1, 0]
    assert com[IIR] == IS_RX


def test_masking_lowers_the_line(com):
    com[MCR], com[IER] = OUT2, RX
    com.receive(b"x")
    com[IER] = 0
    assert com.levels == [1, 0]
    com[IER] = RX
    assert com.levels == [1, 0, 1]


def test_reset_lowers_the_line(com):
    com[MCR], com[IER], com[SCR] = OUT2, THRI, 9
    com.uart.reset()
    assert com.levels == [1, 0]
    assert [com[r] for r in (IER, MCR, SCR)] == [0, 0, 0]


def test_reset_keeps_what_the_host_queued(com):
    com.receive(b"xyz")  # x is in the receiver, the rest waits outside
    com.uart.reset()
    assert com.read_all() == b"yz"


def test_no_irq_callable():
    sent = bytearray()
    uart = Uart16550(sent.extend)
    uart.write(MCR, 1, OUT2)
    uart.write(IER, 1, THRI)
    uart.write(THR, 1, 7)
    assert (uart.read(IIR, 1), sent) == (IS_TX, b"\7")
