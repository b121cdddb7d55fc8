"""The frames of a migration: what is sent arrives, and whatever else arrives is a clear error."""

import json
import os
import random
import socket
import tracemalloc
from contextlib import suppress
from struct import pack
from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm import GuestMemory, MigrationError
from pykvm.state import stream as wire
from pykvm.state.pages import PageReceiver, PageSender
from pykvm.state.stream import HEADER, Stream, crc32c


@pytest.fixture
def pair():
    a, b = socket.socketpair()
    ours, theirs = Stream(a, patience=2), Stream(b, patience=2)
    yield ours, theirs
    ours.close()
    theirs.close()


def raw(data, patience=1.0):
    """A stream into which somebody has written ``data``, and hung up."""
    a, b = socket.socketpair()
    a.sendall(data)
    a.close()
    return Stream(b, patience=patience)


def frame(kind, head=b"", body=b"", number=0, version=wire.VERSION, magic=wire.MAGIC, sizes=None):
    sizes = sizes or (len(head), len(body))
    header = HEADER.pack(magic, version, kind, number, *sizes, crc32c(head), crc32c(body), 0)[:-4]
    return header + crc32c(header).to_bytes(4, "little") + head + body


def test_the_checksum_is_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4
    assert crc32c(b"") == 0
    assert crc32c(b"56789", crc32c(b"1234")) == crc32c(b"123456789")
    assert crc32c(bytes(32)) == 0x8A9136AA


@given(st.lists(st.tuples(st.sampled_from([wire.HELLO, wire.STATE]), st.binary(max_size=5000)), max_size=5))
def test_frames_arrive_as_they_were_sent(frames):
    a, b = socket.socketpair()
    with a, b:
        ours, theirs = Stream(a), Stream(b)
        for kind, head in frames:
            ours.send(kind, head)
        assert [(f.kind, f.head) for f in (theirs.receive(wire.HELLO, wire.STATE) for _ in frames)] == frames
        assert ours.sent == sum(HEADER.size + len(head) for _, head in frames)


def test_a_large_frame_comes_through_a_small_buffer(pair):
    ours, theirs = pair
    text = os.urandom(3 << 20).hex()
    sender = Thread(target=lambda: ours.send_fields(wire.STATE, text=text))
    sender.start()
    assert theirs.receive(wire.STATE).fields() == {"text": text}
    sender.join()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "closed the connection"),
        (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", "no pykvm migration"),
        (frame(wire.HELLO, version=7), "speaks version 7 .* this one version 1"),
        (frame(wire.HELLO, magic=1), "no pykvm migration"),
        (frame(99), "kind 99"),
        (frame(0), "kind 0"),
        (frame(wire.HELLO, number=3), "frame 3 arrived where 0"),
        (frame(wire.COMMIT), "COMMIT arrived where HELLO was due"),
        (frame(wire.HELLO, sizes=(0xFFFFFFFF, 0)), "more than a frame may have"),
        (frame(wire.HELLO, sizes=(0, 1)), "more than a frame may have"),
        (frame(wire.HELLO, b"{}")[:-1], "closed the connection"),
        (frame(wire.HELLO, b"{}")[:-1] + b"]", "damaged"),
        (frame(wire.HELLO, b"{}")[:20] + b"\xff" + frame(wire.HELLO, b"{}")[21:], "header arrived damaged"),
        (frame(wire.REFUSE, b'{"why": "no AVX-512\\n here"}'), "refuses: no AVX-512 here$"),
        (frame(wire.ABORT, b'{"why": 3}'), "gives up: it says no reason"),
        (frame(wire.ABORT, b"rubbish"), "ABORT is no JSON"),
    ],
)
def test_what_is_no_frame_is_refused(data, why):
    stream = raw(data)
    with pytest.raises(MigrationError, match=why):
        stream.receive(wire.HELLO)
    stream.close()


@pytest.mark.parametrize("head", [b"[]", b"", b"{", b"\xff", b"[" * 60000, b"1" * 60000, b'{"a": ' * 9000])
def test_a_head_that_is_no_object(head):
    stream = raw(frame(wire.HELLO, head))
    got = stream.receive(wire.HELLO)
    with pytest.raises(MigrationError, match="HELLO is no JSON"):
        got.fields()
    stream.close()


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400), st.integers(1, 255))
def test_any_bytes_are_an_error_or_a_frame(junk, at, change):
    """Bytes that nobody meant, and frames in which one byte has changed."""
    good = frame(wire.HELLO, b'{"version": 1}')
    for data in (junk, good[:4] + junk, _changed(good, at, change), _changed(frame(wire.PAGES, bytes(16), bytes(4096)), at, change)):
        stream = raw(data)
        try:
            with pytest.raises(MigrationError):
                got = stream.receive(wire.HELLO, wire.PAGES)
                stream.body_into(got, [memoryview(bytearray(got.size))])
                assert data == good, "a frame that is damaged was taken for a good one"
                raise MigrationError("nothing was changed")
        finally:
            stream.close()


def _changed(data, at, change):
    at %= len(data)
    return data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]


def test_what_is_announced_is_not_allocated():
    stream = raw(frame(wire.STATE, sizes=(64 << 20, 0)) + bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(MigrationError, match="closed the connection"):
            stream.receive(wire.STATE)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
        stream.close()


def test_a_peer_that_stalls(pair):
    ours, theirs = pair
    ours.patience = theirs.patience = 0.3
    with pytest.raises(MigrationError, match=r"sends no READY or ROUND_DONE: nothing for 0.3 seconds"):
        ours.receive(wire.READY, wire.ROUND_DONE)
    theirs.socket.sendall(frame(wire.READY, b"{}")[:-1])
    with pytest.raises(MigrationError, match="does not end its READY"):
        ours.receive(wire.READY)
    with pytest.raises(MigrationError, match="takes no more of STATE"):
        ours.send(wire.STATE, bytes(8 << 20))


def test_a_wait_can_be_called_off(pair):
    ours, _ = pair

    def check():
        raise MigrationError("cancelled")

    ours.check = check
    with pytest.raises(MigrationError, match="cancelled"):
        ours.receive(wire.READY)


def test_a_peer_that_has_gone(pair):
    ours, theirs = pair
    theirs.close()
    with pytest.raises(MigrationError, match="broke while HELLO was sent"):
        ours.send(wire.HELLO, b"{}")
    assert ours.send_at_once(wire.COMMIT) is False


# --- pages --------------------------------------------------------------------------------------------------------------


def rows(*runs):
    return b"".join(pack("<QII", *run) for run in runs)


def take(memory, head, body):
    stream = raw(frame(wire.PAGES, head, body))
    try:
        with PageReceiver(stream, memory) as receiver:
            receiver.take(stream.receive(wire.PAGES))
            return receiver.pages
    finally:
        stream.close()


def test_pages_go_where_they_belong():
    with GuestMemory.of_size("64K") as memory:
        memory.add(0x100000, 0x3000)
        memory.write(0, b"x" * 0x10000)
        data = random.Random(1).randbytes(3 * 4096)
        assert take(memory, rows((0x101, 1, 1), (1, 2, 0), (4, 2, 1)), data) == 5
        assert memory.read(0x101000, 4096) == data[:4096]
        assert memory.read(0x4000, 8192) == data[4096:]
        assert memory.read(0x1000, 8192) == bytes(8192)
        assert memory.read(0, 4096) == memory.read(0x3000, 4096) == b"x" * 4096


@pytest.mark.parametrize(
    ("head", "body", "why"),
    [
        (b"", b"", "a part of a row"),
        (bytes(17), b"", "a part of a row"),
        (rows((0, 0, 0)), b"", "no such memory"),
        (rows((16, 1, 0)), b"", "no such memory"),
        (rows((15, 2, 1)), bytes(8192), "no such memory"),
        (rows((0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, 0)), b"", "no such memory"),
        (rows((0, 1, 2)), b"", "kind 2"),
        (rows((0, 2, 1)), bytes(4096), "names 2 pages with bytes, and 4096"),
        (rows((0, 1, 0)), bytes(4096), "names 0 pages"),
        (rows(*[(0, 16, 1)] * 4096), bytes(4096 * 256), "272 pages with bytes"),
    ],
)
def test_a_table_that_lies(head, body, why):
    with GuestMemory.of_size("64K") as memory, pytest.raises(MigrationError, match=why):
        a, b = socket.socketpair()
        stream = Stream(b, patience=2)

        def send():
            with a, suppress(BrokenPipeError):
                a.sendall(frame(wire.PAGES, head, body))

        Thread(target=send, daemon=True).start()
        try:
            with PageReceiver(stream, memory) as receiver:
                receiver.take(stream.receive(wire.PAGES))
        finally:
            stream.close()


def test_damaged_pages_are_found():
    with GuestMemory.of_size("64K") as memory:
        stream = raw(frame(wire.PAGES, rows((0, 1, 1)), bytes(4096))[:-1] + b"\1")
        with pytest.raises(MigrationError, match="PAGES arrived damaged"), PageReceiver(stream, memory) as receiver:
            receiver.take(stream.receive(wire.PAGES))
        stream.close()


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=64).map(lambda b: b[: len(b) // 16 * 16]), st.integers(0, 3))
def test_any_table_is_an_error_or_pages(head, pages):
    with GuestMemory.of_size("64K") as memory:
        try:
            take(memory, head, bytes(4096 * pages))
        except MigrationError:
            pass


def test_json_fields_are_compact(pair):
    ours, theirs = pair
    ours.send_fields(wire.WELCOME, a=[1, 2], b=None)
    assert theirs.receive(wire.WELCOME).head == json.dumps({"a": [1, 2], "b": None}, separators=(",", ":")).encode()


class Log:
    """As a DirtyLog whose dirty pages are these."""

    def __init__(self, memory, pages, chunk):
        self.dirty, self.chunk = {}, chunk
        for slot in memory.slots:
            bitmap = np.zeros(-(-slot.size // 4096 // 64), np.uint64)
            for page in pages:
                at = page - slot.gpa // 4096
                if 0 <= at < slot.size // 4096:
                    bitmap[at // 64] |= np.uint64(1 << at % 64)
            self.dirty[slot] = bitmap

    def chunks(self):
        for slot, bitmap in self.dirty.items():
            for first in range(0, slot.size // 4096, self.chunk):
                yield slot, bitmap, first, min(first + self.chunk, slot.size // 4096)


PAGES = 700  # of the first slot; the second one has 100, from page 0x1000 on


@settings(deadline=None, max_examples=25)
@given(
    written=st.dictionaries(st.one_of(st.integers(0, PAGES - 1), st.integers(0x1000, 0x1063)), st.integers(0, 3), max_size=60),
    filled=st.booleans(),
    dirty=st.one_of(st.just(None), st.sets(st.one_of(st.integers(0, PAGES - 1), st.integers(0x1000, 0x1063)))),
    chunk=st.sampled_from([64, 192, 1 << 14]),
    backing=st.sampled_from(["anonymous", "memfd"]),
)
def test_dirty_pages_arrive(written, filled, dirty, chunk, backing):
    """Touched, zero and untouched ones; in two rounds, as a migration sends them."""
    every = [*range(PAGES), *range(0x1000, 0x1064)]
    a, b = socket.socketpair()
    with GuestMemory() as here, GuestMemory() as there:
        for memory in (here, there):
            memory.add(0, PAGES * 4096, backing if memory is here else "anonymous")
            memory.add(0x1000000, 100 * 4096)
        if filled:
            here.write(0, b"\x55" * (PAGES * 4096))
        for page, what in written.items():
            here.write(page * 4096, [bytes(4096), b"\1" + bytes(4095), bytes(4095) + b"\1", bytes([page & 0xFF]) * 4096][what])
        ours, theirs = Stream(a, patience=5), Stream(b, patience=5)
        sender = PageSender(ours)

        def send():
            sender.send_all(Log(here, every, chunk), lambda: None)
            if dirty is not None:
                for page in dirty:
                    here.write_u64(page * 4096 + 8, 0 if page % 3 else page)
                sender.send_all(Log(here, dirty, chunk), lambda: None)
            ours.send(wire.ROUND)

        thread = Thread(target=send)
        thread.start()
        with PageReceiver(theirs, there) as receiver:
            while (got := theirs.receive(wire.PAGES, wire.ROUND)).kind == wire.PAGES:
                receiver.take(got)
        thread.join()
        assert there.read(0, PAGES * 4096) == here.read(0, PAGES * 4096)
        assert there.read(0x1000000, 100 * 4096) == here.read(0x1000000, 100 * 4096)
        assert receiver.pages == sender.pages == len(every) + len(dirty or ())
        ours.close()
        theirs.close()
