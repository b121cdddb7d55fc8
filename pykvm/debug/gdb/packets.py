"""The packet layer of the gdb remote serial protocol: ``$data#checksum``, acknowledgements, the interrupt byte, escapes.

It knows neither sockets nor guests. Whatever bytes come in, ``feed()`` ends, holds at most one packet's worth of them, and never raises.
Source: GDB manual, sections E.1 (overview, escapes), E.8 (acknowledgement), E.10 (interrupts).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    Kind = Literal["packet", "bad", "interrupt", "ack", "nak"]

__all__ = ["PACKET_SIZE", "PacketReader", "escape", "frame", "parse_hex", "unescape"]

PACKET_SIZE = 0x4000  # the longest packet that is taken, and announced
_ESCAPED = b"#$}*"


def checksum(data: bytes | bytearray) -> int:
    """The sum of all bytes modulo 256."""
    return sum(data) & 0xFF


def frame(data: bytes) -> bytes:
    """A packet that carries ``data``, which is escaped already where it is binary."""
    return b"$%s#%02x" % (data, checksum(data))


def escape(data: bytes) -> bytes:
    """Binary data as it goes into a packet."""
    return b"".join(b"}%c" % (byte ^ 0x20) if byte in _ESCAPED else b"%c" % byte for byte in data)


def unescape(data: bytes) -> bytes:
    """Binary data as it was; an escape without a byte to come vanishes."""
    parts = data.split(b"}")
    return parts[0] + b"".join(b"%c" % (part[0] ^ 0x20) + part[1:] for part in _joined(parts[1:]) if part)


def _joined(parts: list[bytes]) -> Iterator[bytes]:
    """An escaped ``}`` is ``}]``, so that a part is empty only where two escapes stand together: the second one is the escaped byte."""
    waiting = False
    for part in parts:
        if waiting:
            yield b"}" + part
            waiting = False
        elif part:
            yield part
        else:
            waiting = True


def parse_hex(text: bytes) -> int | None:
    """A number in hex without sign, spaces or underscores; None for anything else, or for more than 64 bits."""
    if not 0 < len(text) <= 16 or text.strip(b"0123456789abcdefABCDEF"):
        return None
    return int(text, 16)


class PacketReader:
    """Makes packets of a stream of bytes.

    >>> list(PacketReader().feed(b"+$g#67"))
    [('ack', b''), ('packet', b'g')]

    A packet with a wrong checksum, and one longer than ``limit``, is ("bad", b""). Between packets only the interrupt means something.
    """

    def __init__(self, limit: int = PACKET_SIZE) -> None:
        self.limit = limit
        self._data = bytearray()
        self._state: Literal["idle", "data", "sum1", "sum2"] = "idle"
        self._too_long = False
        self._sum = b""

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """What ``data`` completes, in order."""
        for byte in data:
            if self._state == "idle":
                if byte == 0x24:  # $
                    self._begin()
                elif byte == 0x03:
                    yield "interrupt", b""
                elif byte == 0x2B:
                    yield "ack", b""
                elif byte == 0x2D:
                    yield "nak", b""
            elif self._state == "data":
                if byte == 0x23:  # #
                    self._state = "sum1"
                elif byte == 0x24:  # never inside a packet: the last one was cut off
                    yield "bad", b""
                    self._begin()
                elif len(self._data) >= self.limit:
                    self._too_long = True
                else:
                    self._data.append(byte)
            elif self._state == "sum1":
                self._sum = b"%c" % byte
                self._state = "sum2"
            else:
                self._state = "idle"
                good = not self._too_long and parse_hex(self._sum + b"%c" % byte) == checksum(self._data)
                packet = bytes(self._data) if good else b""
                self._data.clear()
                yield ("packet" if good else "bad"), packet

    def _begin(self) -> None:
        self._data.clear()
        self._too_long = False
        self._state = "data"
