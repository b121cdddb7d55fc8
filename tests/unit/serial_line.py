"""A UART seen byte by byte from the guest, and the names of its registers' bits: for the tests of test_uart*.py."""

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
