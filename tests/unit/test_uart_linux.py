"""The UART as Linux's 8250 driver probes and drives it (drivers/tty/serial/8250/8250_port.c), and as nobody should."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.serial_line import (
    CTS,
    DCD,
    DLAB,
    DR,
    DTR,
    EFR,
    FCR,
    IER,
    IIR,
    IS_LINE,
    IS_RX,
    IS_TIMEOUT,
    IS_TX,
    LCR,
    LINE,
    LOOP,
    LSR,
    MCR,
    MSR,
    NONE,
    OUT2,
    RBR,
    RTS,
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
