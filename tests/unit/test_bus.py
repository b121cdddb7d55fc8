"""The bus: who is asked, with what, and what happens where nobody is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.bus import Bus, Native
from pykvm.errors import ConfigError, DeviceOverlapError

SIZES = (1, 2, 4, 8)


class Recorder:
    """A device that notes each access and answers reads with ``answer``, cut to the size."""

    def __init__(self, answer=0x1122334455667788):
        self.answer, self.seen = answer, []

    def read(self, offset, size):
        self.seen.append(("read", offset, size))
        return self.answer & ((1 << 8 * size) - 1)

    def write(self, offset, size, value):
        self.seen.append(("write", offset, size, value))


class Bytes:
    """RAM as a device."""

    def __init__(self, length):
        self.data = bytearray(length)

    def read(self, offset, size):
        assert size in SIZES and 0 <= offset <= len(self.data) - size
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset, size, value):
        assert size in SIZES and 0 <= offset <= len(self.data) - size
        self.data[offset : offset + size] = value.to_bytes(size, "little")


@pytest.fixture
def bus():
    return Bus()


# --- claiming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "length"), [(0x100, 8), (0x107, 1), (0xF9, 8), (0x102, 2), (0x80, 0x100)])
def test_overlap_names_both(bus, base, length):
    bus.pio.add(0x100, 8, Recorder(), name="first one")
    with pytest.raises(DeviceOverlapError) as caught:
        bus.pio.add(base, length, Recorder(), name="second one")
    assert "first one at 0x100-0x107" in str(caught.value)
    assert f"second one at {base:#x}-{base + length - 1:#x}" in str(caught.value)
    assert [r.name for r in bus.pio.ranges] == ["first one"]


def test_neighbours_and_the_other_space_do_not_overlap(bus):
    for base in (0x108, 0x100, 0xFF):
        bus.pio.add(base, 1 if base == 0xFF else 8, Recorder())
    bus.mmio.add(0x100, 8, Recorder())
    assert [r.base for r in bus.pio.ranges] == [0xFF, 0x100, 0x108]


def test_an_overlap_is_found_whatever_lies_between(bus):
    for base in range(0, 0x100, 0x10):
        bus.pio.add(base, 4, Recorder(), name=f"at {base}")
    with pytest.raises(DeviceOverlapError, match="at 112 "):
        bus.pio.add(0x73, 2, Recorder())


@pytest.mark.parametrize(("base", "length"), [(0, 0), (0, -1), (-1, 1), (0xFFFF, 2), (0x10000, 1)])
def test_outside_the_space(bus, base, length):
    with pytest.raises(ConfigError, match="0-0xffff"):
        bus.pio.add(base, length, Recorder())
    assert bus.pio.ranges == ()


def test_the_last_addresses_can_be_claimed(bus):
    bus.pio.add(0xFFFF, 1, Recorder())
    bus.mmio.add((1 << 52) - 8, 8, Recorder())
    assert bus.read("pio", 0xFFFF, 1) == 0x88
    assert bus.read("mmio", (1 << 52) - 8, 8) == 0x1122334455667788
    with pytest.raises(ConfigError):
        bus.mmio.add(1 << 52, 1, Recorder())


def test_what_is_no_device(bus):
    with pytest.raises(ConfigError, match="neither read"):
        bus.pio.add(0, 1, object())


def test_names(bus):
    named = Recorder()
    named.name = "its own"
    assert bus.pio.add(0, 1, named).name == "its own"
    assert bus.pio.add(1, 1, named, name="given").name == "given"
    assert bus.pio.add(2, 1, Recorder()).name == "Recorder"
    assert "given at 0x1-0x1" in repr(bus)


def test_remove_and_change_reports(bus):
    calls = []
    bus.on_change = lambda: calls.append(bus.pio.version)
    claimed = bus.pio.add(0x10, 4, Recorder())
    assert bus.pio.find(0x10, 4) is claimed
    bus.pio.remove(claimed)
    assert bus.pio.find(0x10, 4) is None
    assert calls == [1, 2]
    bus.pio.add(0x12, 1, Recorder())


def test_native_promises(bus):
    sink = bytearray()
    assert bus.pio.add(0, 1, Recorder()).native is None
    assert bus.pio.add(1, 1, Recorder(), native=Native.IGNORE).native is Native.IGNORE
    assert (Native.constant(5).kind, Native.constant(5).value) == ("constant", 5)
    assert Native.append(sink).sink is sink


# --- accesses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("space", ["pio", "mmio"])
def test_sizes_and_offsets(bus, space, size):
    device = Recorder()
    getattr(bus, space).add(0x200, 16, device)
    mask = (1 << 8 * size) - 1
    assert bus.read(space, 0x200 + 16 - size, size) == 0x1122334455667788 & mask
    bus.write(space, 0x203, size, 0xA1B2C3D4E5F60718 & mask)
    assert device.seen == [("read", 16 - size, size), ("write", 3, size, 0xA1B2C3D4E5F60718 & mask)]
    assert bus.unclaimed == {}


@pytest.mark.parametrize("size", SIZES)
def test_unclaimed_is_reported_and_reads_as_ones(bus, size):
    calls = []
    bus.on_unclaimed = lambda *call: calls.append(call)
    assert bus.read("pio", 0x300, size) == (1 << 8 * size) - 1
    assert bus.read("pio", 0x300, size) == (1 << 8 * size) - 1
    bus.write("mmio", 0x300, size, 5)
    assert calls == [("pio", 0x300, size, False, 0), ("mmio", 0x300, size, True, 5)]
    assert bus.unclaimed == {("pio", 0x300, size, False): 2, ("mmio", 0x300, size, True): 1}


def test_unclaimed_is_bounded(bus):
    for port in range(300):
        bus.write("pio", port, 1, 0)
    bus.write("pio", 0, 1, 0)
    assert (len(bus.unclaimed), bus.unclaimed_more, bus.unclaimed["pio", 0, 1, True]) == (256, 44, 2)


@pytest.mark.parametrize(("at", "size"), [(0xFF, 2), (0xFC, 8), (0x10F, 2), (0x10D, 4), (0x109, 8), (0x10F, 8)])
def test_straddling_belongs_to_nobody(bus, at, size):
    """Neither of two touching devices sees an access that is not all its own."""
    devices = [Recorder(), Recorder(), Recorder()]
    for device, base in zip(devices, (0xF0, 0x100, 0x110), strict=True):
        bus.mmio.add(base, 16, device)
    assert bus.mmio.find(at, size) is None
    assert bus.read("mmio", at, size) == (1 << 8 * size) - 1
    bus.write("mmio", at, size, 0)
    assert [d.seen for d in devices] == [[], [], []]
    assert set(bus.unclaimed) == {("mmio", at, size, False), ("mmio", at, size, True)}


@pytest.mark.parametrize(
    ("at", "size", "parts"),
    [
        (0xFFD, 3, [(0xFFD, 1), (0xFFE, 2)]),
        (0x1000, 5, [(0x1000, 4), (0x1004, 1)]),
        (0xFFA, 6, [(0xFFA, 2), (0xFFC, 4)]),
        (0x1000, 7, [(0x1000, 4), (0x1004, 2), (0x1006, 1)]),
    ],
)
def test_odd_sizes_reach_a_device_in_pieces(bus, at, size, parts):
    """KVM cuts an access at the end of a page; the device contract knows 1, 2, 4 and 8 bytes only."""
    recorder, value = Recorder(), int.from_bytes(bytes(range(1, size + 1)), "little")
    bus.mmio.add(0, 0x2000, recorder)
    bus.mmio.add(0x2000, 0x2000, Bytes(0x2000))
    bus.write("mmio", at, size, value)
    assert [seen[1:3] for seen in recorder.seen] == parts
    bus.write("mmio", 0x2000 + at, size, value)
    assert bus.read("mmio", 0x2000 + at, size) == value
    assert [bus.read("mmio", 0x2000 + at + i, 1) for i in range(size)] == list(range(1, size + 1))


def test_missing_methods(bus):
    class ReadOnly:
        def read(self, offset, size):
            return 7

    class WriteOnly:
        def write(self, offset, size, value):
            self.last = value

    device = WriteOnly()
    bus.pio.add(0, 4, ReadOnly())
    bus.pio.add(4, 4, device)
    bus.write("pio", 0, 4, 1)
    bus.write("pio", 4, 2, 0x1234)
    assert (bus.read("pio", 0, 4), bus.read("pio", 4, 2), device.last) == (7, 0xFFFF, 0x1234)
    assert bus.unclaimed == {}


def test_rep_is_one_access_each(bus):
    device = Recorder()
    device.read = lambda offset, size: device.seen.append("read") or len(device.seen)
    bus.pio.add(0x60, 2, device)
    assert bus.in_(0x60, 2, 3) == b"\1\0\2\0\3\0"
    device.seen.clear()
    bus.out(0x60, 2, b"\1\2\3\4\5\6", 3)
    assert device.seen == [("write", 0, 2, v) for v in (0x0201, 0x0403, 0x0605)]
    bus.out(0x90, 1, b"ab", 2)
    assert bus.in_(0x90, 4, 2) == b"\xff" * 8
    assert bus.unclaimed == {("pio", 0x90, 1, True): 2, ("pio", 0x90, 4, False): 2}


@pytest.mark.parametrize("error", [ValueError, KeyError, ZeroDivisionError, KeyboardInterrupt])
def test_exceptions_of_devices_propagate(bus, error):
    thrown = error("mine")

    class Broken:
        def read(self, offset, size):
            raise thrown

        def write(self, offset, size, value):
            raise thrown

    bus.pio.add(0, 4, Broken())
    for call in (lambda: bus.read("pio", 0, 1), lambda: bus.write("pio", 0, 1, 0), lambda: bus.in_(0, 1), lambda: bus.out(0, 1, b"x")):
        with pytest.raises(error) as caught:
            call()
        assert caught.value is thrown
    assert bus.unclaimed == {}


@pytest.mark.parametrize("answer", [None, -1, 256, 1.0, "x", b"x"])
def test_a_wrong_answer_names_the_device(bus, answer):
    class Wrong:
        def read(self, offset, size):
            return answer

    bus.pio.add(0x10, 4, Wrong(), name="liar")
    with pytest.raises(TypeError, match=r"<liar at 0x10-0x13>: read\(offset=0x2, size=1\)"):
        bus.read("pio", 0x12, 1)


# --- against a model -------------------------------------------------------------------------------------------------

places = st.lists(st.tuples(st.integers(0, 255), st.integers(1, 64)), max_size=20)


@settings(deadline=None)
@given(places, st.lists(st.tuples(st.integers(0, 330), st.integers(1, 8)), max_size=30))
def test_find_agrees_with_a_map_of_bytes(wanted, accesses):
    bus, owner = Bus(), {}
    for base, length in wanted:
        mine = range(base, base + length)
        if any(at in owner for at in mine):
            with pytest.raises(DeviceOverlapError):
                bus.mmio.add(base, length, Recorder())
        else:
            owner |= dict.fromkeys(mine, bus.mmio.add(base, length, Recorder()))
    bases = [r.base for r in bus.mmio.ranges]
    assert bases == sorted(bases)
    for at, size in accesses:
        owners = {owner.get(at + i) for i in range(size)}
        assert bus.mmio.find(at, size) is (owners.pop() if len(owners) == 1 else None)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 8), st.binary(min_size=8, max_size=8)), max_size=40))
def test_any_sizes_keep_the_bytes(writes):
    bus, device, model = Bus(), Bytes(64), bytearray(64)
    bus.mmio.add(0x1000, 64, device)
    for offset, size, data in writes:
        bus.write("mmio", 0x1000 + offset, size, int.from_bytes(data[:size], "little"))
        if offset + size <= 64:
            model[offset : offset + size] = data[:size]
            assert bus.read("mmio", 0x1000 + offset, size).to_bytes(size, "little") == data[:size]
    assert device.data == model


def test_a_range_whose_announcement_fails_is_not_kept(bus):
    def refuse():
        raise ConfigError("no room")

    bus.on_change = refuse
    with pytest.raises(ConfigError):
        bus.mmio.add(0x1000, 8, Recorder())
    assert bus.mmio.ranges == ()


def test_numpy_integers_answer_as_others_do(bus):
    np = pytest.importorskip("numpy")

    class Array:
        def read(self, offset, size):
            return np.uint8(0x80 + offset)

    bus.pio.add(0x10, 1, Array())
    assert bus.in_(0x10, 1, 3) == b"\x80\x80\x80"
