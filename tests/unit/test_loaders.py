"""Loaders: what good images give, and that hostile ones give one clean error and leave memory alone."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import ConfigError, GuestImageError
from pykvm.loaders import load, note, peek
from pykvm.memory import GuestMemory
from pykvm.symbols import Symbols

MIB = 1 << 20
EHDR = {32: "<4sBBB9xHHIIIIIHHHHHH", 64: "<4sBBB9xHHIQQQIHHHHHH"}
PT_LOAD, PT_NOTE = 1, 4


class Memory(GuestMemory):
    """RAM at 0 that counts its writes."""

    def __init__(self, size=2 * MIB, fill=0):
        super().__init__()
        self.ram = self.add(0, size).map
        if fill:
            self.ram[:] = bytes([fill]) * size
        self.writes = 0

    def write(self, gpa, data):
        self.writes += 1
        super().write(gpa, data)


def note_bytes(text, name=b"pykvm\0", kind=1):
    content = text if isinstance(text, bytes) else text.encode()
    pad = lambda b: b + bytes(-len(b) % 4)  # noqa: E731
    return struct.pack("<III", len(name), len(content), kind) + pad(name) + pad(content)


def elf(segments=(), notes=b"", *, bits=64, entry=MIB, machine=None, etype=2, **fields):
    """An image of (gpa, content, memsz) segments; ``fields`` overrides e_phoff, e_phnum, e_phentsize."""
    header, entry_size = struct.calcsize(EHDR[bits]), 56 if bits == 64 else 32
    parts = [(PT_LOAD, gpa, content, memsz) for gpa, content, memsz in segments]
    parts += [(PT_NOTE, 0, notes, len(notes))] if notes else []
    offset, table, body = header + entry_size * len(parts), b"", b""
    for kind, gpa, content, memsz in parts:
        at = offset + len(body)
        if bits == 64:
            table += struct.pack("<IIQQQQQQ", kind, 5, at, gpa, gpa, len(content), memsz, 1)
        else:
            table += struct.pack("<IIIIIIII", kind, at, gpa, gpa, len(content), memsz, 5, 1)
        body += content
    phoff, phnum = fields.get("phoff", header), fields.get("phnum", len(parts))
    machine = machine if machine is not None else 62 if bits == 64 else 3
    ident = (b"\x7fELF", 2 if bits == 64 else 1, 1, 1, etype, machine, 1, entry)
    sizes = (0, header, fields.get("phentsize", entry_size), phnum, 0, 0, 0)
    return struct.pack(EHDR[bits], *ident, phoff, 0, *sizes) + table + body


CODE = b"\x90\x90\xf4"
HELLO = elf([(MIB, CODE, 3)], note_bytes("mode=long\nmemory=16M\n"))


# --- good images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "mode"), [(32, "protected"), (64, "long")])
def test_elf_without_note(bits, mode):
    memory = Memory()
    data = elf([(MIB, CODE, 3)], bits=bits)
    info = peek(data, "guest.elf")
    assert (info.format, info.mode, info.entry, info.note) == (f"ELF{bits}", mode, MIB, {})
    boot = load(info, data, memory)
    assert (boot.entry, boot.mode) == (MIB, mode)
    assert memory.ram[MIB : MIB + 3] == CODE
    assert memory.ram[:].count(0) == memory.size - 3


def test_note_comes_before_memory():
    info = peek(HELLO)
    assert info.note == {"mode": "long", "memory": "16M"}


def test_note_among_others():
    notes = note_bytes(b"\1\2\3\4\5", b"GNU\0", 3) + note_bytes("mode=user\nx.y=a=b\n\n")
    assert peek(elf([(MIB, CODE, 3)], notes)).note == {"mode": "user", "x.y": "a=b"}


def test_mode_of_the_caller_wins():
    assert peek(HELLO, mode="user").mode == "user"
    assert peek(CODE, mode="long").entry == MIB


def test_real_mode_elf():
    data = elf([(0x7C00, CODE, 3)], note_bytes("mode=real"), bits=32, entry=0x7C01)
    memory = Memory()
    assert load(peek(data), data, memory).entry == 0x7C01
    assert memory.ram[0x7C00:0x7C03] == CODE


def test_flat():
    info = peek(CODE, "boot.bin")
    assert (info.format, info.mode, info.entry) == ("flat", "real", 0x7C00)
    memory = Memory(64 << 10)
    load(info, CODE, memory, entry=0x7C02)
    assert memory.ram[0x7C00:0x7C03] == CODE


def test_bss_is_zero_and_its_neighbours_are_kept():
    memory = Memory(8 * MIB, fill=0xAA)
    data = elf([(MIB, CODE, 3 * MIB + 5)])
    load(peek(data), data, memory)
    assert memory.ram[MIB : MIB + 3] == CODE
    assert not any(memory.ram[MIB + 3 : 4 * MIB + 5])
    assert memory.ram[MIB - 1] == memory.ram[4 * MIB + 5] == 0xAA


def test_bss_in_clean_memory_is_not_touched():
    memory = Memory(8 * MIB)
    data = elf([(MIB, CODE, 6 * MIB)])
    load(peek(data), data, memory)
    assert memory.writes == 1


def test_empty_segments_are_nothing():
    data = elf([(MIB, CODE, 3), (1 << 60, b"", 0)])
    assert len(peek(data).segments) == 1


# --- bad ones --------------------------------------------------------------------------------------------------------

BAD = {
    "empty": (b"", "empty"),
    "magic only": (b"\x7fELF", "truncated"),
    "half a header": (HELLO[:40], "truncated"),
    "no program headers": (HELLO[:64], "truncated"),
    "no content": (HELLO[:177], "truncated"),
    "class": (HELLO[:4] + b"\3" + HELLO[5:], "class 3"),
    "big endian": (HELLO[:5] + b"\2" + HELLO[6:], "byte order 2"),
    "aarch64": (elf([(MIB, CODE, 3)], machine=183), "machine 183"),
    "x32": (elf([(MIB, CODE, 3)], bits=32, machine=62), "elf_i386"),
    "i386 in ELF64": (elf([(MIB, CODE, 3)], machine=3), "elf_x86_64"),
    "object": (elf([(MIB, CODE, 3)], etype=1), "link it"),
    "shared object": (elf([(MIB, CODE, 3)], etype=3), "-no-pie"),
    "core": (elf([(MIB, CODE, 3)], etype=4), "core dump"),
    "no segment": (elf(), "no segment to load"),
    "PN_XNUM": (elf([(MIB, CODE, 3)], phnum=0xFFFF), "65535 program headers"),
    "many headers": (elf([(MIB, CODE, 3)], phnum=129), "129 program headers"),
    "header size": (elf([(MIB, CODE, 3)], phentsize=8), "8 bytes each"),
    "header size 0": (elf([(MIB, CODE, 3)], phentsize=0), "0 bytes each"),
    "headers far away": (elf([(MIB, CODE, 3)], phoff=(1 << 64) - 8), "past the end"),
    "filesz over memsz": (elf([(MIB, CODE, 2)]), "more bytes in the file"),
    "memsz overflows": (elf([(MIB, CODE, (1 << 64) - 1)]), "beyond"),
    "gpa overflows": (elf([((1 << 64) - 2, CODE, 3)]), "beyond"),
    "note too long": (elf([(MIB, CODE, 3)], note_bytes("x=" + "y" * 5000)), "more than 4096"),
    "note not text": (elf([(MIB, CODE, 3)], note_bytes(b"mode=\xff")), "UTF-8"),
    "note without =": (elf([(MIB, CODE, 3)], note_bytes("hello")), "not key=value"),
    "note mode": (elf([(MIB, CODE, 3)], note_bytes("mode=huge")), "real, protected, long, user"),
    "note memory": (elf([(MIB, CODE, 3)], note_bytes("memory=lots")), "is not a size"),
    "note size": (elf([(MIB, CODE, 3)], struct.pack("<III", 6, 0xFFFFFFF0, 1) + b"pykvm\0\0\0"), "larger than"),
    "notes without end": (elf([(MIB, CODE, 3)], bytes(1 << 17)), "more than 65536"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_there_is_memory(case):
    data, why = BAD[case]
    with pytest.raises(GuestImageError, match=why) as caught:
        peek(data, "bad.elf")
    assert str(caught.value).startswith("bad.elf")
    assert "\n" not in str(caught.value)


def refused(data, *words, memory=None, **options):
    memory = memory or Memory()
    with pytest.raises(GuestImageError) as caught:
        load(peek(data, "bad.elf"), data, memory, **options)
    assert memory.writes == 0
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_outside_ram():
    refused(elf([(MIB, CODE, 3), (40 * MIB, CODE, 3)]), "0x2800000-0x2800002", "2M of RAM", "--memory 64M")
    refused(elf([(MIB, CODE, 100 * MIB)]), "--memory 128M")
    refused(elf([(0xD000_0000, CODE, 3)], entry=0xD000_0000), "link it outside 0xc0000000-0xffffffff")
    refused(elf([(1 << 32, CODE, 3)], entry=1 << 32), "--memory 4G")
    refused(elf([(1 << 50, CODE, 3)], entry=1 << 50), "link it where the guest has RAM")
    refused(bytes(3 * MIB), "0x7c00-0x307bff", "--memory 4M")


def test_overlap():
    refused(elf([(MIB, CODE, 3), (MIB + 0x2000, CODE, 3), (MIB + 2, CODE, 3)]), "overlap at gpa 0x100002")
    refused(elf([(MIB, CODE, 3), (MIB, CODE, 3)]), "overlap")
    touching = elf([(MIB, CODE, 3), (MIB + 3, CODE, 3)])
    load(peek(touching), touching, Memory())


@pytest.mark.parametrize(
    ("mode", "gpa", "fine"),
    [
        ("real", 0x1000, True),
        ("protected", 0xFFF, False),
        ("protected", 0x7C00, True),
        ("long", 0x9000, False),
        ("long", 0x7C00, True),
        ("user", 0x7C00, False),
        ("user", 0x9F000, True),
    ],
)
def test_the_tables_of_a_mode_are_not_the_images(mode, gpa, fine):
    data = elf([(gpa, CODE, 3)], note_bytes(f"mode={mode}"), entry=gpa)
    if fine:
        load(peek(data), data, Memory())
    else:
        refused(data, f"{mode} mode has tables", "link it at 1 MiB")


def test_entry():
    refused(elf([(MIB, CODE, 3)], entry=0), "entry, gpa 0x0", "--entry")
    refused(elf([(MIB, CODE, 3)], entry=MIB + 3), "in none of its segments")
    memory = Memory()
    for entry in (4 * MIB, -1, 1 << 64):
        with pytest.raises(ConfigError, match="--entry"):
            load(peek(HELLO), HELLO, memory, entry=entry)
    assert memory.writes == 0
    assert load(peek(HELLO), HELLO, memory, entry=0x500).entry == 0x500


def test_a_file_that_shrank_after_the_look():
    info = peek(HELLO, "bad.elf")
    with pytest.raises(GuestImageError, match="truncated"):
        load(info, HELLO[:100], Memory())


# --- anything at all -------------------------------------------------------------------------------------------------


def try_to_load(data):
    """Load, or fail as documented, with memory untouched."""
    memory = Memory(2 * MIB)
    try:
        info = peek(data, "fuzz")
        load(info, data, memory)
    except GuestImageError as error:
        assert memory.writes == 0
        assert "\n" not in str(error)
        return
    assert any(s.gpa <= info.entry < s.gpa + s.memsz for s in info.segments)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes(data):
    try_to_load(data)
    try_to_load(b"\x7fELF" + data)


SEED = {
    64: elf([(MIB, CODE, 3), (MIB + 0x1000, b"data", 0x800)], note_bytes("mode=long\nmemory=2M\n")),
    32: elf([(0x7C00, CODE, 3), (0x8000, b"data", 64)], note_bytes("mode=real\n"), bits=32, entry=0x7C00),
}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([32, 64]), st.data())
def test_mutated_images(bits, data):
    """One to four fields of a good image replaced by edge values."""
    image = bytearray(SEED[bits])
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        top = (1 << 8 * width) - 1
        edges = st.sampled_from([0, 1, top, top - 1, top >> 1, (top >> 1) + 1, len(image) & top, MIB & top])
        value = data.draw(edges | st.integers(0, top))
        at = data.draw(st.integers(0, len(image) - width))
        image[at : at + width] = value.to_bytes(width, "little")
    try_to_load(bytes(image))
    try_to_load(bytes(image[: data.draw(st.integers(0, len(image)))]))


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_arbitrary_notes(content):
    try:
        parsed = note.parse(content, "fuzz", 0)
    except GuestImageError:
        return
    assert all(isinstance(k, str) and isinstance(v, str) and k for k, v in parsed.items())


# --- symbols ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linked(tmp_path_factory):
    """A small linked image with a symbol table."""
    import subprocess

    folder = tmp_path_factory.mktemp("symbols")
    source = ".globl _start\n.set CONSTANT, 0x100001\n_start: nop\nnop\nloop: jmp loop\n.data\nvalue: .long 1\n"
    subprocess.run(["as", "--64", "-o", folder / "a.o", "-"], input=source, text=True, check=True)
    subprocess.run(["ld", "-Ttext=0x100000", "-Tdata=0x101000", "-o", folder / "a.elf", folder / "a.o"], check=True)
    return (folder / "a.elf").read_bytes()


def test_symbols(linked):
    symbols = Symbols.from_elf(linked)
    assert symbols.address("_start") == 0x100000
    assert symbols.address("value") == 0x101000
    assert symbols.address("nothing") is None
    assert symbols.lookup(0x100001) == ("_start", 1)  # not CONSTANT
    assert symbols.name(0x100002) == "loop"
    assert symbols.name(0x100003) == "loop+0x1"
    assert symbols.lookup(0xFFFFF) is None
    assert symbols.name(1 << 40) == ""


def test_an_image_without_symbols():
    assert len(Symbols.from_elf(HELLO)) == 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_hostile_symbol_tables(linked, data):
    image = bytearray(linked)
    tail = image.find(b"_start\0")  # from the string tables on: the section headers follow them
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.sampled_from([0, (1 << 8 * width) - 1]) | st.integers(0, (1 << 8 * width) - 1))
        at = data.draw(st.integers(0, 63 - width) | st.integers(tail - 200, len(image) - width))
        image[at : at + width] = value.to_bytes(width, "little")
    try:
        symbols = Symbols.from_elf(bytes(image), "fuzz")
    except GuestImageError:
        return
    symbols.lookup(0x100001)


@pytest.mark.parametrize("shentsize", [0, 64])
def test_a_section_count_without_end(linked, shentsize):
    """e_shnum 0 means: the count is in section 0, where it has 64 bits."""
    image = bytearray(linked)
    shoff = struct.unpack_from("<Q", image, 40)[0]
    struct.pack_into("<HH", image, 58, shentsize, 0)
    struct.pack_into("<Q", image, shoff + 32, 1 << 60)
    with pytest.raises(GuestImageError):
        Symbols.from_elf(bytes(image))
