"""The packet layer of gdb's protocol and the image file, without KVM: whatever bytes come, it ends, keeps little, and never raises."""

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm import ConfigError
from pykvm.debug.gdb.files import ImageFile
from pykvm.debug.gdb.listen import Listener
from pykvm.debug.gdb.packets import PACKET_SIZE, PacketReader, escape, frame, parse_hex, unescape


def packets(data, reader=None):
    return list((reader or PacketReader()).feed(data))


@given(st.binary(max_size=300))
def test_binary_data_survives(data):
    assert unescape(escape(data)) == data
    assert packets(frame(b"X" + escape(data))) == [("packet", b"X" + escape(data))]


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_any_bytes_in_any_pieces(pieces):
    """The same events however the stream is cut; never more kept than the limit."""
    reader = PacketReader(limit=16)
    found = [event for piece in pieces for event in packets(piece, reader)]
    assert found == packets(b"".join(pieces), PacketReader(limit=16))
    assert len(reader._data) <= 16
    assert all(kind in ("packet", "bad", "interrupt", "ack", "nak") for kind, _ in found)
    # and it recovers: whatever was begun ends with the first good packet, or the one after it
    again = packets(frame(b"g") + frame(b"g"), reader)
    assert again[-1] == ("packet", b"g")


@given(st.binary(max_size=60))
def test_a_wrong_checksum_is_no_packet(data):
    good = frame(escape(data))
    bad = good[:-2] + (b"%02x" % ((int(good[-2:], 16) + 1) & 0xFF))
    assert packets(bad) == [("bad", b"")]
    assert packets(good[:-2] + b"zz") == [("bad", b"")]


@given(st.binary(max_size=80))
def test_unescape_takes_anything(data):
    assert len(unescape(data)) <= len(data)


def test_a_packet_without_end_is_dropped():
    reader = PacketReader()
    assert packets(b"$" + b"m" * (3 * PACKET_SIZE), reader) == []
    assert len(reader._data) == PACKET_SIZE
    assert packets(b"#00" + frame(b"?"), reader) == [("bad", b""), ("packet", b"?")]


def test_interrupts_only_between_packets():
    assert packets(b"\x03+$X\x03#5b-") == [("interrupt", b""), ("ack", b""), ("packet", b"X\x03"), ("nak", b"")]


@pytest.mark.parametrize("text", [b"", b"-1", b"+1", b"0x1", b"1_0", b" 1", b"1 ", b"1" * 17, b"\xff"])
def test_what_is_no_number(text):
    assert parse_hex(text) is None


def test_the_image_is_the_only_file():
    file = ImageFile("/images/hello.elf", b"\x7fELF}#$*" + bytes(range(256)))
    hex_path = b"/images/hello.elf".hex().encode()
    assert file.answer(b"open:" + hex_path + b",0,0") == b"F1"
    assert file.answer(b"open:" + b"/etc/passwd".hex().encode() + b",0,0") == b"F-1,2"
    assert file.answer(b"open:" + hex_path + b",1,0") == b"F-1,16"  # for writing
    answer = file.answer(b"pread:1,100,0")
    assert answer.startswith(b"F100;")
    assert unescape(answer[5:]) == file.data[:256]
    assert file.answer(b"pread:1,ffffffffffffffff,ffffffffffffffff") == b"F0;"
    assert len(file.answer(b"fstat:1")) >= 64
    assert file.answer(b"close:1") == b"F0"
    assert file.answer(b"pread:1,10,0") == b"F-1,9"


@given(st.binary(max_size=60))
def test_any_file_request(request):
    assert ImageFile("/x", b"abc").answer(request)[:1] in (b"F", b"")


# --- where it listens -------------------------------------------------------------------------------------------------


def test_only_the_loopback_unless_told():
    with Listener("127.0.0.1:0") as listener:
        assert listener.name.startswith("127.0.0.1:")
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is not of the loopback.*--remote"):
        Listener("0.0.0.0:0")
    with Listener("0.0.0.0:0", remote=True) as listener:
        assert listener.name.startswith("0.0.0.0:")
    for wrong in ("nonsense", "127.0.0.1:http", "127.0.0.1:70000", "unix:"):
        with pytest.raises(ConfigError):
            Listener(wrong)


def test_a_unix_socket_is_its_owners(tmp_path):
    path = tmp_path / "gdb.sock"
    with Listener(f"unix:{path}"):
        assert os.stat(path).st_mode & 0o777 == 0o600
        with pytest.raises(ConfigError, match="Address already in use"):
            Listener(f"unix:{path}")
    assert not path.exists()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()  # as a killed process leaves it
    Listener(f"unix:{path}").close()
    path.write_text("a file of somebody's")
    with pytest.raises(ConfigError, match="Address already in use"):
        Listener(f"unix:{path}")
    assert path.read_text() == "a file of somebody's"
