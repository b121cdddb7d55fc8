"""A 16550A UART: eight byte-wide registers, FIFOs, loopback, modem status and an interrupt line.

Complete enough for Linux's 8250 driver, its autodetection and loopback tests included. What is sent leaves at once, so the
transmitter is always empty; what is received waits in a queue of the host's until there is room in the FIFO.
Source: National Semiconductor PC16550D datasheet, section 8 (registers), tables III and IV.
"""

from __future__ import annotations

from pykvm.devices.once import Once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Uart16550"]

# Register offsets. RBR/THR and IER give way to the divisor latch while LCR.DLAB is set.
RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)
IER_RX, IER_TX, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_MODEM, IIR_TX, IIR_RX, IIR_LINE, IIR_TIMEOUT, IIR_FIFO = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C, 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_CLEAR_TX = 1, 2, 4
LCR_BREAK, LCR_DLAB = 0x40, 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_DR, LSR_OE, LSR_FE, LSR_BI, LSR_THRE, LSR_TEMT, LSR_FIFO_ERROR = 0x01, 0x02, 0x08, 0x10, 0x20, 0x40, 0x80
LSR_ERRORS = 0x1E  # overrun, parity, framing, break: what the line status interrupt reports
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
FIFO_SIZE = 16
TRIGGER = (1, 4, 8, 14)
CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD


class Uart16550:
    """``output(bytes)`` takes what the guest sends; ``receive(bytes)`` gives it input; ``irq(level)`` is its interrupt line.

    ``poll``, when given, is asked for input (it returns bytes, perhaps none) when the guest looks and none is waiting, and by ``tick()``.
    Registers are a byte wide; a wider access touches consecutive registers, as on the ISA bus.
    """

    name = "UART"

    def __init__(
        self,
        output: Callable[[bytes], object],
        irq: Callable[[int], object] | None = None,
        poll: Callable[[], bytes] | None = None,
    ) -> None:
        self.output, self.irq, self.poll = Once(output), irq, poll
        self.queue = bytearray()  # input that the FIFO has no room for yet
        self._level = 0
        self.reset()

    def reset(self) -> None:
        """Master reset (datasheet table 1); input that waits in the host's queue stays."""
        self.rx = bytearray()  # RBR, or the FIFO
        self.rx_errors = bytearray()  # LSR's FE and BI for each byte in rx that is not at its top yet
        self.ier = self.fcr = self.lcr = self.mcr = self.scr = 0
        self.divisor = 0x000C  # 9600 baud
        self.line_errors = 0
        self.msr_deltas = 0
        self.msr_lines = CONNECTED
        self.thre_pending = False
        self._update_irq()

    def __repr__(self) -> str:
        waiting = len(self.rx) + len(self.queue)
        return f"<UART lcr={self.lcr:#x} mcr={self.mcr:#x} ier={self.ier:#x} fcr={self.fcr:#x}, {waiting} bytes wait>"

    # --- host side ---------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Input from the outside: waits for room, so nothing is overrun."""
        self.queue.extend(data)
        self._fill()
        self._update_irq()

    def tick(self) -> None:
        """To be called now and then, from the thread that runs the guest: input comes in for a guest that waits for its interrupt.

        A guest that has not enabled that interrupt is not given any: it may never look, and what it does not take is somebody else's.
        """
        if self.ier & IER_RX and self.poll is not None and not self.rx and not self.queue and not self.mcr & MCR_LOOP:
            data = self.poll()
            if data:
                self.receive(data)

    def _fill(self) -> None:
        if self.mcr & MCR_LOOP:
            return  # the receiver is disconnected from the outside
        room = FIFO_SIZE if self.fcr & FCR_ENABLE else 1
        while self.queue and len(self.rx) < room:
            self.rx.append(self.queue.pop(0))
            self.rx_errors.append(0)

    def _want_input(self) -> None:
        """The guest looks: fetch what is there."""
        if not self.rx and not self.mcr & MCR_LOOP:
            if self.poll is not None and not self.queue:
                self.queue.extend(self.poll())
            if self.queue:
                self._fill()

    # --- saving ------------------------------------------------------------------------------------------------------

    _BYTES = ("ier", "fcr", "lcr", "mcr", "scr", "line_errors", "msr_deltas", "msr_lines")

    def save(self) -> dict[str, Any]:
        """Registers, FIFO and the input that waits."""
        state: dict[str, Any] = {name: getattr(self, name) for name in self._BYTES}
        state |= {"version": 1, "divisor": self.divisor, "thre_pending": self.thre_pending, "level": self._level}
        return state | {"rx": self.rx.hex(), "rx_errors": self.rx_errors.hex(), "queue": self.queue.hex()}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        from pykvm.devices.saved import Saved

        saved = Saved(state, self.name, 1)
        for name in self._BYTES:
            setattr(self, name, saved.number(name, 0xFF))
        self.divisor, self._level, self.thre_pending = saved.number("divisor", 0xFFFF), saved.number("level", 1), saved.flag("thre_pending")
        self.rx = bytearray(saved.bytes("rx", FIFO_SIZE))
        self.rx_errors = bytearray(saved.bytes("rx_errors", FIFO_SIZE, len(self.rx)))
        self.queue = bytearray(saved.bytes("queue", 1 << 24))

    # --- guest side --------------------------------------------------------------------------------------------------

    def write(self, offset: int, size: int, value: int) -> None:
        """A register write; the common case, one byte to send, comes first."""
        if offset == RBR_THR and size == 1 and not (self.lcr & LCR_DLAB or self.mcr & MCR_LOOP):
            self.output(bytes((value,)))
            if self.ier & IER_TX:
                self._sent()
            return
        for i in range(size):
            if offset + i < 8:
                self._write(offset + i, value >> 8 * i & 0xFF)

    def read(self, offset: int, size: int) -> int:
        """A register read; past the eighth register all ones."""
        if size == 1:
            return self._read(offset) if offset < 8 else 0xFF
        value = 0
        for i in range(size):
            value |= (self._read(offset + i) if offset + i < 8 else 0xFF) << 8 * i
        return value

    def _sent(self) -> None:
        # The holding register was full for no time at all: THRE drops and rises, which is an edge for the interrupt.
        self.thre_pending = True
        self._update_irq()

    def _write(self, register: int, value: int) -> None:
        if register <= IER and self.lcr & LCR_DLAB:
            shift = 8 * register
            self.divisor = self.divisor & ~(0xFF << shift) | value << shift
            return
        if register == RBR_THR:
            if self.mcr & MCR_LOOP:
                if not self.lcr & LCR_BREAK:  # while the line is held low, what is sent is lost
                    self._loop_back(value)
            else:
                self.output(bytes((value,)))
            self._sent()
        elif register == IER:
            rising = value & ~self.ier
            self.ier = value & 0x0F
            if rising & IER_TX:
                self.thre_pending = True  # the transmitter is empty: enabling its interrupt raises it
        elif register == IIR_FCR:
            if (value ^ self.fcr) & FCR_ENABLE or (value & FCR_ENABLE and value & FCR_CLEAR_RX):
                self.rx.clear()
                self.rx_errors.clear()
            self.fcr = value & 0xC9 if value & FCR_ENABLE else 0
        elif register == LCR:
            was = self._breaks_itself()
            self.lcr = value
            self._break(was)
        elif register == MCR:
            was = self._breaks_itself()
            self._write_mcr(value & 0x1F)
            self._break(was)
        elif register == SCR:
            self.scr = value
        # LSR and MSR are read only; writing them is for factory tests.
        self._fill()
        self._update_irq()

    def _loop_back(self, value: int, errors: int = 0) -> None:
        if len(self.rx) < (FIFO_SIZE if self.fcr & FCR_ENABLE else 1):
            self.rx.append(value)
            self.rx_errors.append(errors)
        else:
            self.line_errors |= LSR_OE
            if not self.fcr & FCR_ENABLE:  # the receiver buffer itself is overwritten; a full FIFO keeps what it has
                self.rx[-1] = value
                self.rx_errors[-1] = errors
        self._show_errors()

    def _show_errors(self) -> None:
        """LSR tells of a byte's errors when it has come to the top of the FIFO."""
        if self.rx_errors and self.rx_errors[0]:
            self.line_errors |= self.rx_errors[0]
            self.rx_errors[0] = 0

    def _breaks_itself(self) -> bool:
        return bool(self.lcr & LCR_BREAK and self.mcr & MCR_LOOP)

    def _break(self, was: bool) -> None:
        """The receiver sees its own transmitter's break begin: one zero byte without a stop bit, however long it lasts."""
        if self._breaks_itself() and not was:
            self._loop_back(0, LSR_BI | LSR_FE)

    def _write_mcr(self, value: int) -> None:
        self.mcr = value
        if value & MCR_LOOP:
            # DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
            lines = (
                (MSR_DSR if value & MCR_DTR else 0)
                | (MSR_CTS if value & MCR_RTS else 0)
                | (MSR_RI if value & MCR_OUT1 else 0)
                | (MSR_DCD if value & MCR_OUT2 else 0)
            )
        else:
            lines = CONNECTED
        changed = lines ^ self.msr_lines
        deltas = changed >> 4 & 0x0B  # DCTS, DDSR, DDCD
        if changed & MSR_RI and not lines & MSR_RI:
            deltas |= 0x04  # TERI: only the trailing edge of the ring indicator counts
        self.msr_deltas |= deltas
        self.msr_lines = lines

    def _read(self, register: int) -> int:
        if register <= IER and self.lcr & LCR_DLAB:
            return self.divisor >> 8 * register & 0xFF
        if register == RBR_THR:
            self._want_input()
            value = 0
            if self.rx:
                value = self.rx.pop(0)
                del self.rx_errors[0]
                self._show_errors()
                if not self.rx and self.queue:
                    self._update_irq()  # empty for a moment: what comes next is a new edge
            self._fill()
        elif register == IER:
            return self.ier
        elif register == IIR_FCR:
            value = self._iir()
            if value == IIR_TX:
                self.thre_pending = False  # reading it as the source takes it back
            value |= IIR_FIFO if self.fcr & FCR_ENABLE else 0
        elif register == LCR:
            return self.lcr
        elif register == MCR:
            return self.mcr
        elif register == LSR:
            self._want_input()
            value = LSR_THRE | LSR_TEMT | self.line_errors | (LSR_DR if self.rx else 0)
            if self.fcr & FCR_ENABLE and (self.line_errors & (LSR_FE | LSR_BI) or any(self.rx_errors)):
                value |= LSR_FIFO_ERROR
            self.line_errors = 0
        elif register == MSR:
            value = self.msr_lines | self.msr_deltas
            self.msr_deltas = 0
        else:
            return self.scr
        self._update_irq()
        return value

    # --- interrupts --------------------------------------------------------------------------------------------------

    def _iir(self) -> int:
        """The source of highest priority (datasheet table IV)."""
        if self.ier & IER_LINE and self.line_errors & LSR_ERRORS:
            return IIR_LINE
        if self.ier & IER_RX and self.rx:
            if not self.fcr & FCR_ENABLE or len(self.rx) >= TRIGGER[self.fcr >> 6]:
                return IIR_RX
            return IIR_TIMEOUT  # no more is coming right now: four character times are over in no time here
        if self.ier & IER_TX and self.thre_pending:
            return IIR_TX
        if self.ier & IER_MODEM and self.msr_deltas:
            return IIR_MODEM
        return IIR_NONE

    def _update_irq(self) -> None:
        # On a PC, OUT2 gates the line to the interrupt controller; in loopback it is disconnected.
        gated = self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        level = 1 if gated and self._iir() != IIR_NONE else 0
        if level != self._level:
            self._level = level
            if self.irq is not None:
                self.irq(level)
