"""Frames on a serial line: all that was sent arrives, nothing else does. And the archive an emulated host boots from."""

import struct
import zlib
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pykvm.hosts import image, wire
from pykvm.hosts.wire import MAGIC, MAX_PAYLOAD, Decoder, decode_json, encode, encode_json, exchange_header, token_of

frames = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=60)), max_size=8)
MAGICAL = st.lists(st.sampled_from([*(MAGIC[i : i + 1] for i in range(4)), MAGIC, b"\0\0\0\0", b"K", b"\x01"]), max_size=30).map(b"".join)
garbage = st.one_of(st.binary(max_size=80), MAGICAL)


def decode(*pieces):
    decoder = Decoder()
    return [frame for piece in pieces for frame in decoder.feed(piece)], decoder


def cut(data, places):
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def no_magic(data):
    """Is there no start of a frame in it, nor one that what follows could complete?"""
    return MAGIC not in data and not any(data.endswith(MAGIC[:n]) for n in (1, 2, 3))


def test_kinds_differ():
    kinds = [wire.COMMAND, wire.KILL, wire.READY, wire.STDOUT, wire.STDERR, wire.RESULT]
    assert len(set(kinds)) == 6


def test_layout():
    frame = encode(0x43, b"abc")
    assert frame[:9] == b"\xf5pK\xfa" + b"\x43" + b"\3\0\0\0"
    assert struct.unpack("<I", frame[-4:])[0] == zlib.crc32(frame[4:-4])


@settings(deadline=None)
@given(frames, st.lists(st.integers(0, 1000), max_size=10))
def test_frames_arrive_however_they_are_cut(sent, places):
    got, decoder = decode(*cut(b"".join(encode(*frame) for frame in sent), places))
    assert got == sent
    assert decoder.skipped == 0


def test_byte_by_byte():
    data = b"noise" + encode(1, MAGIC) + MAGIC[:2] + encode(2, b"")
    got, decoder = decode(*(data[i : i + 1] for i in range(len(data))))
    assert got == [(1, MAGIC), (2, b"")]
    assert decoder.skipped == 7


@settings(deadline=None)
@given(st.lists(st.tuples(garbage.filter(no_magic), st.binary(max_size=40)), max_size=6), st.lists(st.integers(0, 1000), max_size=8))
def test_noise_between_frames_is_skipped_and_counted(parts, places):
    data = b"".join(noise + encode(7, payload) for noise, payload in parts)
    got, decoder = decode(*cut(data, places))
    assert got == [(7, payload) for _, payload in parts]
    assert decoder.skipped == sum(len(noise) for noise, _ in parts)


@settings(deadline=None, max_examples=300)
@given(st.lists(garbage, max_size=10))
def test_garbage_gives_no_frame_and_no_crash(pieces):
    got, decoder = decode(*pieces)
    assert got == []
    assert 0 <= decoder.skipped <= sum(map(len, pieces))


def test_garbage_without_a_magic_is_not_kept():
    _, decoder = decode(b"x" * 100_000 + MAGIC[:3])
    assert decoder.skipped == 100_000
    assert list(decoder.feed(b"y")) == []
    assert decoder.skipped == 100_004


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 255), st.binary(max_size=60), st.data())
def test_a_corrupted_frame_is_never_delivered(kind, payload, data):
    frame = bytearray(encode(kind, payload))
    assume(MAGIC not in payload)
    flips = data.draw(st.dictionaries(st.integers(0, len(frame) - 1), st.integers(1, 255), min_size=1, max_size=4))
    for at, bits in flips.items():
        frame[at] ^= bits
    decoder = Decoder()
    assert list(decoder.feed(bytes(frame))) == []
    filler = bytes(MAX_PAYLOAD + 16)  # a damaged length may ask for this much before it is found out
    assert list(decoder.feed(filler + encode(1, b"next"))) == [(1, b"next")]


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 1000), st.binary(min_size=60, max_size=80))
def test_a_truncated_frame_does_not_take_the_next_with_it(payload, at, following):
    frame = encode(5, payload)
    got, _ = decode(frame[: at % len(frame)], encode(6, following))
    assert got == [(6, following)]


def test_every_single_bit_matters():
    frame = encode(0x4F, b"payload")
    for bit in range(len(frame) * 8):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode(bytes(damaged), bytes(100))[0] == [], bit


def test_a_length_beyond_the_limit_is_no_frame():
    head = MAGIC + struct.pack("<BI", 1, MAX_PAYLOAD + 1)
    got, decoder = decode(head + encode(2, b"good"))
    assert got == [(2, b"good")]
    assert decoder.skipped == len(head)


def test_the_largest_payload():
    payload = bytes(range(256)) * (MAX_PAYLOAD // 256)
    assert decode(encode(1, payload))[0] == [(1, payload)]
    with pytest.raises(ValueError, match="at most 1048576 bytes, not 1048577"):
        encode(1, payload + b"x")


def test_frames_left_by_an_early_break_come_with_the_next_bytes():
    """The agent leaves the loop for a command and reads on inside it."""
    decoder = Decoder()
    for frame in decoder.feed(encode(1, b"a") + encode(2, b"b")):
        assert frame == (1, b"a")
        break
    assert list(decoder.feed(b"")) == [(2, b"b")]


@pytest.mark.parametrize("value", [{}, {"op": "run", "command": ["a", "\u00e9"]}, {"x": [1, None, {"y": 0.5}]}])
def test_json(value):
    ((kind, payload),), _ = decode(encode_json(wire.COMMAND, value))
    assert (kind, decode_json(payload)) == (wire.COMMAND, value)


NO_OBJECTS = [b"", b"{", b"[1]", b"null", b"3", b"\xff\xfe", b"{} {}", b"9" * 9999, b"[" * 200_000, b'{"a":' * 200_000]


@pytest.mark.parametrize("payload", NO_OBJECTS, ids=lambda payload: repr(payload[:8]))
def test_json_that_is_no_object(payload):
    assert decode_json(payload) == {}


@given(st.binary(max_size=60))
def test_json_of_any_bytes(payload):
    assert isinstance(decode_json(payload), dict)


# --- the exchange disk ------------------------------------------------------------------------------------------------


def test_the_token_comes_back_from_the_header():
    header = exchange_header("0123456789abcdef")
    assert token_of(header.ljust(wire.INBOX, b"\0")) == "0123456789abcdef"
    assert len(header) <= 512 < wire.INBOX < wire.OUTBOX


@given(st.binary(max_size=60))
def test_another_disk_has_no_token(data):
    for header in (data, wire.EXCHANGE_NAME + data.replace(b"\n", b""), wire.EXCHANGE_NAME + b"\n\n" + data):
        with pytest.raises(ValueError, match="not the exchange disk"):
            token_of(header)


# --- the initramfs ---------------------------------------------------------------------------------------------------


def read_cpio(archive):
    """(name, mode, data, device) of each entry of a newc archive, and their inode numbers."""
    entries, inodes, at = [], [], 0
    while True:
        assert (at % 4, archive[at : at + 6]) == (0, b"070701")
        field = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + field[11]]
        assert name.endswith(b"\0")
        start = at + 110 + field[11] + 3 & ~3
        at = start + field[6] + 3 & ~3
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return entries, inodes
        entries.append((name[:-1].decode(), field[1], archive[start : start + field[6]], (field[9], field[10])))
        inodes.append(field[0])


@given(st.dictionaries(st.text("abc./", min_size=1, max_size=12), st.binary(max_size=20), max_size=6))
def test_cpio(files):
    archive = image.cpio({name: (0o644, data) for name, data in files.items()}, ("bin", "dev"))
    entries, inodes = read_cpio(archive)
    assert entries == [
        ("bin", 0o40755, b"", (0, 0)),
        ("dev", 0o40755, b"", (0, 0)),
        ("dev/console", 0o20600, b"", (5, 1)),
        *((name, 0o100644, data, (0, 0)) for name, data in files.items()),
    ]
    assert len(set(inodes)) == len(inodes)
