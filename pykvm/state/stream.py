"""The frames of a live migration on a connected stream socket (docs/state.md has the format).

A frame is a header of 32 bytes, a head and a body. Header, head and body have a CRC-32C each, lengths are checked against what the kind of
frame may have before anything is allocated, and frames are numbered. Both sides give up on a peer that does not get a whole frame
through in ``patience`` seconds. Nothing here trusts the other side: a frame arrives whole, or MigrationError says why not.
"""

from __future__ import annotations

import socket
from struct import Struct, pack
from time import monotonic

from pykvm.abi import ffi, lib
from pykvm.errors import MigrationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Buffer = bytes | bytearray | memoryview

__all__ = ["VERSION", "Frame", "Stream", "crc32c"]

VERSION = 1
MAGIC = 0x4D564B50  # "PKVM"
HEADER = Struct("<IHHIIIIII")  # magic, version, kind, number, bytes of head and body, CRCs of head, body and the 28 bytes before

HELLO, WELCOME, REFUSE, PAGES, ROUND, ROUND_DONE, STATE, READY, COMMIT, RUNNING, ABORT = range(1, 12)
NAMES = ("", "HELLO", "WELCOME", "REFUSE", "PAGES", "ROUND", "ROUND_DONE", "STATE", "READY", "COMMIT", "RUNNING", "ABORT")
MAX_ROWS = 4096  # of a PAGES frame, 16 bytes each
MAX_PAGES = 256  # of data in one
_WORDS = (64 << 10, 0)
LIMITS = {  # kind: the most that head and body may have
    HELLO: (64 << 20, 0), WELCOME: _WORDS, REFUSE: _WORDS, PAGES: (16 * MAX_ROWS, 4096 * MAX_PAGES), ROUND: _WORDS, ROUND_DONE: _WORDS,
    STATE: (64 << 20, 0), READY: _WORDS, COMMIT: _WORDS, RUNNING: _WORDS, ABORT: _WORDS,
}  # fmt: skip
TICK = 0.1  # seconds; a wait looks this often whether it should go on
_PIECE = 1 << 20


class _Refusal(MigrationError):
    """The other side's own words."""


class Frame:
    """The beginning of a frame: its kind and its head. The body, of ``size`` bytes, is still in the socket: Stream.body_into()."""

    __slots__ = ("body_sum", "head", "kind", "size")

    def __init__(self, kind: int, head: bytes, size: int, body_sum: int) -> None:
        self.kind, self.head, self.size, self.body_sum = kind, head, size, body_sum

    def fields(self) -> dict[str, Any]:
        """The head as JSON, an object. Raises MigrationError."""
        from json import loads

        try:
            value = loads(self.head)
        except (ValueError, RecursionError) as why:
            raise MigrationError(f"the other side's {NAMES[self.kind]} is no JSON: {why}") from None
        if not isinstance(value, dict):
            raise MigrationError(f"the other side's {NAMES[self.kind]} is no JSON object")
        return value

    def __repr__(self) -> str:
        return f"<Frame {NAMES[self.kind]} head of {len(self.head)} bytes, body of {self.size}>"


class Stream:
    """Frames over ``sock``, which it owns. ``check()`` is called while it waits, and may raise. ``sent`` counts bytes."""

    def __init__(self, sock: socket.socket, *, patience: float = 30.0, check: Callable[[], object] = lambda: None) -> None:
        self.socket, self.patience, self.check = sock, patience, check
        self.sent = 0
        self._out = self._in = 0
        # Blocking, with the kernel's own time limit: a system call for each piece, and no poll before it.
        sock.settimeout(None)
        tick = pack("@ll", 0, int(TICK * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)

    # --- sending -----------------------------------------------------------------------------------------------------

    def send(self, kind: int, head: Buffer = b"", body: Buffer = b"", body_sum: int | None = None) -> None:
        """One frame, or MigrationError. ``body_sum``: the body's CRC, where it is known."""
        data = self._header(kind, head, body, body_sum)
        pieces = [memoryview(piece) for piece in (data, head, body) if len(piece)]
        deadline = monotonic() + self.patience
        while pieces:
            try:
                n = self.socket.sendmsg(pieces)
            except BlockingIOError:
                n = 0
            except OSError as why:
                self._hear_why()
                raise MigrationError(f"the connection broke while {NAMES[kind]} was sent: {why.strerror or why}") from None
            self.sent += n
            while n:
                step = min(n, len(pieces[0]))
                n -= step
                pieces[0] = pieces[0][step:]
                if not pieces[0]:
                    del pieces[0]
            if pieces:
                self._wait(deadline, f"takes no more of {NAMES[kind]}")

    def _hear_why(self) -> None:
        """A peer that hangs up has said why before: raise that, if it is there."""
        self.check, self.patience = lambda: None, min(self.patience, 0.5)
        try:
            while True:
                self.receive(WELCOME, ROUND_DONE, READY, RUNNING)
        except _Refusal:
            raise
        except MigrationError:
            pass

    def send_fields(self, kind: int, **fields: Any) -> None:
        """One frame whose head is JSON."""
        from json import dumps

        self.send(kind, dumps(fields, separators=(",", ":")).encode())

    def send_at_once(self, kind: int) -> bool | None:
        """An empty frame with one system call. True: all of it is on its way; False: nothing is; None: a part is."""
        data = self._header(kind)
        try:
            n = self.socket.send(data)
        except OSError:
            return False
        self.sent += n
        return True if n == len(data) else None if n else False

    def _header(self, kind: int, head: Buffer = b"", body: Buffer = b"", body_sum: int | None = None) -> bytes:
        most_head, most_body = LIMITS[kind]
        if len(head) > most_head or len(body) > most_body:
            raise MigrationError(f"{NAMES[kind]} of {len(head)} and {len(body)} bytes is more than a frame may have")
        sums = crc32c(head), crc32c(body) if body_sum is None else body_sum
        data = HEADER.pack(MAGIC, VERSION, kind, self._out, len(head), len(body), *sums, 0)[:-4]
        self._out = (self._out + 1) & 0xFFFFFFFF
        return data + crc32c(data).to_bytes(4, "little")

    # --- receiving ---------------------------------------------------------------------------------------------------

    def receive(self, *kinds: int) -> Frame:
        """The next frame, which must be one of ``kinds``. A REFUSE or an ABORT instead raises MigrationError with the peer's reason."""
        deadline = monotonic() + self.patience
        waits = f"sends no {' or '.join(NAMES[kind] for kind in kinds)}"
        header = bytearray(HEADER.size)
        self._fill([memoryview(header)], deadline, waits)
        magic, version, kind, number, head_size, size, head_sum, body_sum, header_sum = HEADER.unpack(header)
        if magic != MAGIC:
            raise MigrationError("what the other side sends is no pykvm migration")
        if version != VERSION:
            raise MigrationError(f"the other side speaks version {version} of the migration protocol, this one version {VERSION}")
        if crc32c(header[:-4]) != header_sum:
            raise MigrationError("a header arrived damaged: its checksum is wrong")
        if kind not in LIMITS:
            raise MigrationError(f"the other side sends a frame of kind {kind}, which version {VERSION} does not have")
        if number != self._in:
            raise MigrationError(f"frame {number} arrived where {self._in} was due")
        self._in = (self._in + 1) & 0xFFFFFFFF
        most_head, most_body = LIMITS[kind]
        if head_size > most_head or size > most_body:
            raise MigrationError(f"{NAMES[kind]} announces {head_size} and {size} bytes: more than a frame may have")
        head = self._read(head_size, deadline, f"does not end its {NAMES[kind]}")
        if crc32c(head) != head_sum:
            raise MigrationError(f"{NAMES[kind]} arrived damaged: its checksum is wrong")
        frame = Frame(kind, bytes(head), size, body_sum)
        if kind in (REFUSE, ABORT):
            why = frame.fields().get("why")
            said = " ".join(why.split())[:2000] if isinstance(why, str) else "it says no reason"
            raise _Refusal(f"the other side {'refuses' if kind == REFUSE else 'gives up'}: {said}")
        if kind not in kinds:
            raise MigrationError(f"{NAMES[kind]} arrived where {' or '.join(NAMES[k] for k in kinds)} was due")
        return frame

    def body_into(self, frame: Frame, buffers: Sequence[memoryview]) -> None:
        """The frame's body, into buffers of the same size together."""
        left = [buffer for buffer in buffers if len(buffer)]
        self._fill(list(left), monotonic() + self.patience, f"does not end its {NAMES[frame.kind]}")
        crc = 0
        for buffer in left:
            crc = crc32c(buffer, crc)
        if crc != frame.body_sum:
            raise MigrationError(f"{NAMES[frame.kind]} arrived damaged: its checksum is wrong")

    def _read(self, size: int, deadline: float, waits: str) -> bytearray:
        """``size`` bytes, taken as they come: what a peer announces is not allocated before it arrives."""
        data = bytearray()
        while len(data) < size:
            piece = bytearray(min(size - len(data), _PIECE))
            self._fill([memoryview(piece)], deadline, waits)
            data += piece
        return data

    def _fill(self, buffers: list[memoryview], deadline: float, waits: str) -> None:
        while buffers:
            try:
                n = self.socket.recvmsg_into(buffers[:512], 0, socket.MSG_WAITALL)[0]
                if not n:
                    raise MigrationError("the other side has closed the connection")
            except BlockingIOError:
                n = 0
            except OSError as why:
                raise MigrationError(f"the connection broke: {why.strerror or why}") from None
            while n:
                step = min(n, len(buffers[0]))
                n -= step
                buffers[0] = buffers[0][step:]
                if not buffers[0]:
                    del buffers[0]
            if buffers:
                self._wait(deadline, waits)

    def _wait(self, deadline: float, what: str) -> None:
        self.check()
        if monotonic() > deadline:
            raise MigrationError(f"the other side {what}: nothing for {self.patience:g} seconds")

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def crc32c(data: Buffer, crc: int = 0) -> int:
    """CRC-32C of the bytes, going on from ``crc``."""
    return int(lib.pykvm_crc32c(crc, ffi.from_buffer(data), len(data)))
