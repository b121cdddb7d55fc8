"""The UART against the PC16550D datasheet, and as Linux's 8250 driver probes and drives it (drivers/tty/serial/8250/8250_port.c)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.uart16550 import Uart16550

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = EFR = 2
LCR, MCR, LSR, MSR, SCR = range(3, 8)
RX, THRI, LINE, MODEM = 1, 2, 4, 8
DR, OE, PE, FE, BI, THRE, TEMT, FIFO_ERROR = (1 << i for i in range(8))
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 0x10
DCTS, DDSR, TERI, DDCD, CTS, DSR, RI, DCD = (1 << i for i in range(8))
BREAK, DLAB = 0x40, 0x80
NONE, IS_MODEM, IS_TX, IS_RX, IS_LINE, IS_TIMEOUT = 1, 0, 2, 4, 6, 0xC


class Serial:
    """A UART seen byte by byte from the guest; ``sent`` and ``levels`` are what came out."""

    def __init__(self, poll=None):
        self.sent, self.levels = bytearray(), []
        self.uart = Uart16550(self.sent.extend, self.levels.append, poll)

    def __getitem__(self, register):
        return self.uart.read(register, 1)

    def __setitem__(self, register, value):
        self.uart.write(register, 1, value)

    @property
    def level(self):
        return self.levels[-1] if self.levels else 0

    def receive(self, data):
        self.uart.receive(data)

    def read_all(self):
        """As a driver does: while data is ready."""
        data = bytearray()
        while self[LSR] & DR:
            data.append(self[RBR])
        return bytes(data)


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


# --- loopback and modem status ---------------------------------------------------------------------------------------


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


# --- Linux -----------------------------------------------------------------------------------------------------------


def test_linux_autoconfig(com):
    """autoconfig() finds a 16550A with a FIFO of 16 bytes, and none of its relatives."""
    com[IER] = 0
    low = com[IER]
    com[IER] = 0x0F
    assert (low & 0x0F, com[IER] & 0x0F) == (0, 0x0F)
    com[IER] = 0
    com[MCR] = LOOP | OUT2 | RTS
    assert com[MSR] & 0xF0 == DCD | CTS
    com[MCR] = 0
    com[LCR] = 0xBF
    com[EFR] = 0
    com[LCR] = 0
    com[FCR] = 1
    assert com[IIR] & 0xC0 == 0xC0
    for lcr in (0x80, 0xBF):
        com[LCR] = lcr
        assert com[EFR] != 0  # 16650 and 16850 have an enhanced feature register here
    com[LCR], com[FCR] = 0, 0x21
    first = com[IIR] >> 5
    com[LCR] = 0x80
    com[FCR] = 0x21
    assert (first, com[IIR] >> 5) == (6, 6)  # a TI16750 says 7
    com[LCR] = 0
    com[IER] = 0x40
    assert com[IER] & 0x40 == 0  # XScale

    com[FCR], com[MCR] = 7, LOOP  # size_fifo()
    for count in range(256):
        com[THR] = count
    assert com.read_all() == bytes(range(16))
    assert com.sent == b""


def test_linux_startup_sees_no_broken_transmitter(com):
    """serial8250_do_startup(): the checks for UART_BUG_TXEN and UART_BUG_THRE, and that the port answers at all."""
    for value in (7, 0):
        com[FCR] = value
    assert com[LSR] != 0xFF
    com[MCR] = OUT2
    com[IER] = THRI
    first = com[IIR]
    com[IER] = 0
    com[IER] = THRI
    again = com[IIR]
    com[IER] = 0
    assert (first & NONE, again & NONE) == (0, 0)
    com[IER] = THRI
    lsr, iir = com[LSR], com[IIR]
    com[IER] = 0
    assert lsr & TEMT and not iir & NONE
    assert com.level == 0


def test_linux_interrupt_driven_echo(com):
    """Edges only: every rise runs the handler until IIR says there is nothing left."""
    pending = bytearray()
    com[FCR], com[MCR], com[IER] = 0x81, OUT2 | DTR | RTS, RX | LINE

    def handler():
        while not (iir := com[IIR]) & NONE:
            if iir & 0x0E in (IS_RX, IS_TIMEOUT, IS_LINE):
                pending.extend(com.read_all())
                com[IER] = RX | LINE | THRI
            elif iir & 0x0E == IS_TX:
                for byte in pending[:16]:
                    com[THR] = byte
                del pending[:16]
                if not pending:
                    com[IER] = RX | LINE

    text, edges = bytes(range(1, 251)), 0
    for i in range(0, len(text), 50):
        com.receive(text[i : i + 50])
        while com.levels[edges:]:
            edges = len(com.levels)
            handler()
        assert com.level == 0
    assert com.sent == text


# --- hostile sequences -----------------------------------------------------------------------------------------------

sizes = st.sampled_from([1, 2, 4, 8])
offsets = st.integers(0, 9)
reads = st.tuples(st.just("read"), offsets, sizes)
writes = st.tuples(st.just("write"), offsets, sizes, st.integers(0, (1 << 64) - 1))
register_writes = st.tuples(st.just("write"), st.integers(0, 7), st.just(1), st.integers(0, 255))
receives = st.tuples(st.just("receive"), st.binary(max_size=40))


def check_line(com):
    """The line agrees with IIR, and only its changes were reported."""
    assert com.levels == [1, 0] * (len(com.levels) // 2) + [1] * (len(com.levels) % 2)
    gated, level = com[MCR] & (OUT2 | LOOP) == OUT2, com.level
    assert level == (gated and not com[IIR] & NONE)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(reads, writes, register_writes, receives), max_size=60))
def test_any_sequence(operations):
    com = Serial()
    for kind, *arguments in operations:
        if kind == "receive":
            com.receive(*arguments)
        elif kind == "write":
            offset, size, value = arguments
            com.uart.write(offset, size, value & ((1 << 8 * size) - 1))
        else:
            offset, size = arguments
            value = com.uart.read(offset, size)
            assert type(value) is int and 0 <= value < 1 << 8 * size
        assert len(com.uart.rx) <= 16
        assert len(com.levels) < 2 or com.levels[-1] != com.levels[-2]
    assert com[LSR] & (THRE | TEMT) == THRE | TEMT
    check_line(com)


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            receives,
            st.tuples(st.just("write"), st.sampled_from([THR, IER, LCR, MCR, SCR]), st.integers(0, 255)),
            st.tuples(st.just("read"), st.sampled_from([IER, IIR, LCR, MCR, LSR, MSR, SCR])),
            st.tuples(st.just("take")),
        ),
        max_size=60,
    ),
    st.sampled_from([0, 1, 0x81]),
)
def test_without_loopback_every_byte_goes_through_once(operations, fcr):
    com, given_in, taken, written = Serial(), bytearray(), bytearray(), bytearray()
    com[FCR] = fcr
    for kind, *arguments in operations:
        if kind == "receive":
            com.receive(*arguments)
            given_in += arguments[0]
        elif kind == "write":
            register, value = arguments
            if register == THR and not com[LCR] & DLAB:
                written.append(value)
            com[register] = value & ~LOOP if register == MCR else value
        elif kind == "read":
            assert com[arguments[0]] in range(256)
        elif com[LSR] & DR and not com[LCR] & DLAB:
            taken.append(com[RBR])
    com[LCR] = 0
    assert taken + com.read_all() == given_in
    assert com.sent == written
