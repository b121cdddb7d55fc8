"""Whatever packet a gdb session gets, it answers. (The packet layer below has its own: tests/unit/test_gdb_packets.py.)"""

import pytest

from pykvm import Machine
from pykvm.debug.control import Control
from pykvm.debug.gdb.session import Session

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

COMMANDS = [
    b"Z0",
    b"z2",
    b"Z1",
    b"m",
    b"M",
    b"X",
    b"p",
    b"P",
    b"G",
    b"H",
    b"Hg",
    b"T",
    b"qXfer",
    b"qXfer:features:read:",
    b"vFile:pread",
    b"qRcmd,",
]
TAILS = (b"", b",", b":", b"0,ffffffffffffffffff:", b"1,1,1", b"0,0:", b"100000,1", b"ffffffffffffffff,8")


@pytest.fixture(scope="module")
def session():
    with Machine("spin") as machine:
        yield Session(Control(machine), lambda data: None)


@pytest.mark.slow
@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(packet=st.binary(max_size=60) | st.sampled_from(COMMANDS))
def test_any_packet_is_answered(session, packet):
    """But for those that let the guest go on, which this one would do forever."""
    if packet[:1] in (b"c", b"C", b"s", b"S") or packet.startswith(b"vCont;"):
        return
    for tail in (*TAILS, b"%s=%s" % (packet, packet)):
        assert isinstance(session.handle(packet + tail), bytes)
