"""Frames on a serial line, and where things are on the exchange disk: what the agent in a host and pykvm outside agree on.

A frame is the magic, a kind (one byte), the payload's length, the payload, and a CRC-32 of kind, length and payload. Whatever is not a
frame (a kernel message, line noise) is skipped, so it cannot be mistaken for one. Used on both sides; imports the standard library only.

The exchange disk begins with a header that names it and holds the session's secret token, which the agent shows in READY: only who can
read the disk, which lies in a folder of the user's own, is taken for the agent. Files for the host follow, files from it are at OUTBOX.
"""

from __future__ import annotations

import json
import struct
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["Decoder", "decode_json", "encode", "encode_json", "exchange_header", "token_of"]

MAGIC = b"\xf5pK\xfa"
_HEAD = struct.Struct("<BI")
_CRC = struct.Struct("<I")
MAX_PAYLOAD = 1 << 20

EXCHANGE_NAME = b"pykvm-exchange"  # image.py's init knows the disk by it
INBOX, OUTBOX = 4096, 512 << 20

# Kinds. Host to agent: COMMAND, KILL. Agent to host: READY, STDOUT, STDERR, RESULT.
COMMAND, KILL, READY, STDOUT, STDERR, RESULT = b"CKROEX"


def encode(kind: int, payload: bytes) -> bytes:
    """One frame."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame holds at most {MAX_PAYLOAD} bytes, not {len(payload)}")
    body = _HEAD.pack(kind, len(payload)) + payload
    return MAGIC + body + _CRC.pack(zlib.crc32(body))


def encode_json(kind: int, value: Any) -> bytes:
    """A frame whose payload is JSON."""
    return encode(kind, json.dumps(value).encode())


def decode_json(payload: bytes) -> dict[str, Any]:
    """The payload of such a frame; an empty dict for what is no JSON object."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def exchange_header(token: str) -> bytes:
    """What the exchange disk begins with."""
    return EXCHANGE_NAME + b"\n" + token.encode() + b"\n"


def token_of(header: bytes) -> str:
    """The token in it. ValueError for another disk."""
    name, token, *_ = [*header.split(b"\n", 2), b"", b""]
    if name != EXCHANGE_NAME or not token:
        raise ValueError("this is not the exchange disk")
    return token.decode()


class Decoder:
    """Bytes in, frames out. ``skipped`` counts bytes that belonged to no valid frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.skipped = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Add bytes; yields (kind, payload) for each frame that is complete and whole."""
        self._buffer += data
        while True:
            start = self._buffer.find(MAGIC)
            if start < 0:
                keep = next((n for n in (3, 2, 1) if self._buffer.endswith(MAGIC[:n])), 0)
                self._skip(len(self._buffer) - keep)
                return
            self._skip(start)
            if len(self._buffer) < len(MAGIC) + _HEAD.size:
                return
            kind, length = _HEAD.unpack_from(self._buffer, len(MAGIC))
            end = len(MAGIC) + _HEAD.size + length
            if length > MAX_PAYLOAD:
                self._skip(1)
                continue
            if len(self._buffer) < end + _CRC.size:
                return
            body = bytes(self._buffer[len(MAGIC) : end])
            if _CRC.unpack_from(self._buffer, end)[0] != zlib.crc32(body):
                self._skip(1)  # the magic may occur again inside what looked like a payload
                continue
            del self._buffer[: end + _CRC.size]
            yield kind, body[_HEAD.size :]

    def _skip(self, n: int) -> None:
        self.skipped += n
        del self._buffer[:n]
