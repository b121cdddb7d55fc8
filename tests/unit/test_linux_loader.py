"""Linux' 32-bit boot protocol, and the vmlinux inside a bzImage; hostile headers and packed data give one clean error."""

import gzip
import lzma
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import ConfigError, GuestImageError
from pykvm.loaders import load, peek
from pykvm.loaders.bzimage import vmlinux
from pykvm.loaders.handover import Handover, Module
from pykvm.loaders.source import read_image
from pykvm.memory import GuestMemory
from pykvm.memorymap import e820, memory_map
from tests.unit.test_loaders import CODE, MIB, Memory, elf

LIMIT = 1 << 20
KERNEL = elf([(MIB, CODE * 100, 300)])


def bzimage(payload=b"", *, version=0x20F, loadflags=0x81, relocatable=0, preferred=16 * MIB, init_size=0x3000, sects=3, code=CODE):
    """A boot sector, ``sects`` sectors of setup, ``code``, and the packed ``payload`` behind it."""
    head = bytearray(512 * (sects + 1))
    head[0x1F1] = sects
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x200:0x206] = b"\xeb\x66HdrS"
    struct.pack_into("<H", head, 0x206, version)
    head[0x211] = loadflags
    struct.pack_into("<I", head, 0x214, MIB)
    struct.pack_into("<I", head, 0x22C, 0x7FFFFFFF)
    head[0x234] = relocatable
    struct.pack_into("<I", head, 0x238, 255)
    struct.pack_into("<II", head, 0x248, len(code), len(payload))
    struct.pack_into("<QI", head, 0x258, preferred, init_size)
    return bytes(head) + code + payload


def start(data, handover=None, memory=None):
    memory = memory or Memory(32 * MIB)
    boot = load(peek(data, "kernel"), data, memory, handover=handover)
    page = memory.read(boot.registers["rsi"], 4096)
    return boot, memory, lambda format, at: struct.unpack_from("<" + format, page, at)[0]


def test_the_zero_page():
    data = bzimage()
    info = peek(data, "kernel")
    assert (info.kind, info.mode, info.entry) == ("Linux (bzImage)", "protected", MIB)
    assert "setup header" in info.why and "--format pvh" in info.why
    boot, memory, field = start(data, Handover("console=x  y", [Module(b"initrd" * 1000)], rsdp=0xF0010))
    assert (boot.mode, boot.entry) == ("linux", MIB)
    assert [boot.registers[name] for name in ("rbp", "rdi", "rbx")] == [0, 0, 0]
    assert memory.read(MIB, 3) == CODE
    assert field("4s", 0x202) == b"HdrS"
    assert (field("B", 0x210), field("B", 0x211)) == (0xFF, 0x01)
    assert memory.read(field("I", 0x228), 13) == b"console=x  y\0"
    initrd, size = field("I", 0x218), field("I", 0x21C)
    assert initrd >= MIB + 0x3000 and memory.read(initrd, size) == b"initrd" * 1000
    assert field("Q", 0x70) == 0xF0010
    table = e820(memory_map(memory))
    assert field("B", 0x1E8) * 20 == len(table)
    assert memory.read(boot.registers["rsi"] + 0x2D0, len(table)) == table


def test_where_it_goes():
    boot, memory, field = start(bzimage(relocatable=1))
    assert (boot.entry, field("I", 0x214)) == (16 * MIB, 16 * MIB)
    assert memory.read(16 * MIB, 3) == CODE
    assert start(bzimage(version=0x202, relocatable=1))[0].entry == MIB


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bzimage(version=0x201), "older than 2.02"),
        (bzimage(loadflags=0), "zImage"),
        (bzimage(code=b"")[:-1024] + bytes(700), "truncated"),
        (bzimage(relocatable=1, preferred=1 << 40), "32-bit mode"),
        (bzimage(init_size=0xFFFFFFFF), "32-bit mode"),
        (bzimage(init_size=64 * MIB), "--memory 128M"),
    ],
)
def test_refused(data, why):
    with pytest.raises(GuestImageError, match=why):
        load(peek(data, format="linux"), data, Memory())


def test_what_it_cannot_take():
    data = bzimage()
    for handover, error, why in (
        (Handover("x" * 256), ConfigError, "at most 255 bytes"),
        (Handover(modules=[Module(b"a"), Module(b"b")]), ConfigError, "one --initrd"),
        (Handover(modules=[Module(bytes(2 * MIB), "big")]), GuestImageError, "initrd big .*--memory"),
    ):
        memory = Memory()
        with pytest.raises(error, match=why):
            load(peek(data), data, memory, handover=handover)
        assert memory.writes == 0
    low = bytearray(data)
    struct.pack_into("<I", low, 0x22C, MIB)
    with pytest.raises(GuestImageError, match="must end at gpa 0x100000"):
        load(peek(bytes(low)), bytes(low), Memory(), handover=Handover(modules=[Module(b"a")]))
    with pytest.raises(GuestImageError, match="no Linux setup header"):
        peek(CODE, format="linux")


# --- the kernel inside -----------------------------------------------------------------------------------------------


def lz4(data, step=7):
    """A legacy frame: every ``step`` bytes a literal run, then a match where the data repeats ``back`` bytes before."""
    out, i, literals = bytearray(), 0, b""

    def sequence(literals, back=0, length=0):
        def extend(n):
            return b"" if n < 15 else b"\xff" * ((n - 15) // 255) + bytes([(n - 15) % 255])

        match = length - 4
        token = min(len(literals), 15) << 4 | (min(match, 15) if back else 0)
        return bytes([token]) + extend(len(literals)) + literals + (struct.pack("<H", back) + extend(match) if back else b"")

    while i < len(data):
        best = (0, 0)
        for back in (1, 2, 3, step, 300):
            n = 0
            while back <= i and i + n < len(data) - 5 and data[i + n] == data[i + n - back] and n < 1000:
                n += 1
            best = max(best, (n, back))
        if best[0] >= 4:
            out += sequence(literals, best[1], best[0])
            literals = b""
            i += best[0]
        else:
            literals += data[i : i + 1]
            i += 1
    out += sequence(literals)
    return b"\x02!L\x18" + struct.pack("<I", len(out)) + bytes(out) + struct.pack("<I", len(data))


PACKERS = {
    "gzip": gzip.compress,
    "xz": lambda d: lzma.compress(d, filters=[{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2}]) + struct.pack("<I", len(d)),
    "lzma": lambda d: lzma.compress(d, lzma.FORMAT_ALONE) + struct.pack("<I", len(d)),
    "lz4": lz4,
}


@pytest.mark.parametrize("name", PACKERS)
def test_the_vmlinux_inside(name, tmp_path):
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage(PACKERS[name](KERNEL)))
    assert read_image(image, "pvh") == (KERNEL, str(image))
    assert read_image(image)[0] == image.read_bytes()


def test_what_cannot_be_taken_out():
    for payload, why in (
        (b"", "no packed kernel"),
        (b"(\xb5/\xfd....", "zstd"),
        (b"BZh9....", "bzip2"),
        (b"nonsense", "cannot be unpacked"),
        (gzip.compress(KERNEL)[:4] + b"\xff" * 20, "cannot be unpacked"),
        (lz4(KERNEL)[:-20], "damaged or truncated"),
        (gzip.compress(bytes(LIMIT + 1)), f"more than {LIMIT}"),
        (lzma.compress(bytes(LIMIT + 1)), f"more than {LIMIT}"),
        (lz4(bytes(LIMIT + 1)), f"more than {LIMIT}"),
    ):
        with pytest.raises(GuestImageError, match=why):
            vmlinux(bzimage(payload), "kernel", LIMIT)
    with pytest.raises(GuestImageError, match="no packed kernel"):
        vmlinux(bzimage(gzip.compress(KERNEL), version=0x207), "kernel", LIMIT)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=9).flatmap(lambda b: st.integers(1, 60).map(lambda n: b * n)), max_size=6).map(b"".join))
def test_lz4(data):
    assert vmlinux(bzimage(lz4(data)), "kernel", LIMIT) == data


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=120))
def test_any_lz4(data):
    block = b"\x02!L\x18" + struct.pack("<I", len(data)) + data + bytes(4)
    try:
        assert len(vmlinux(bzimage(block), "kernel", LIMIT)) <= LIMIT
    except GuestImageError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_headers(data):
    image = bytearray(bzimage(b"payload"))
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        at = data.draw(st.integers(0x1F0, 0x268))
        image[at : at + width] = data.draw(st.sampled_from([0, (1 << 8 * width) - 1]) | st.integers(0, (1 << 8 * width) - 1)).to_bytes(
            width, "little"
        )
    for size in (len(image), data.draw(st.integers(0, len(image)))):
        with GuestMemory.of_size("32M") as memory:
            try:
                content = bytes(image[:size])
                load(peek(content, "fuzz"), content, memory, handover=Handover("line", [Module(b"m")]))
            except (GuestImageError, ConfigError) as error:
                assert "\n" not in str(error)
