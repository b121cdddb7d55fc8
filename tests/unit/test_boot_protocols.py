"""Multiboot, PVH and firmware: what their loaders recognize, refuse, and hand over; and that hostile headers give one clean error."""

import gzip
import struct
import subprocess
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import ConfigError, GuestImageError
from pykvm.loaders import load, peek
from pykvm.loaders.handover import Handover, Module
from pykvm.loaders.source import LARGEST_IMAGE, read_image, read_module
from pykvm.memory import GuestMemory
from pykvm.memorymap import memory_map
from tests.unit.test_loaders import CODE, HELLO, MIB, Memory, elf, note_bytes

PAGE = 4096
XEN = note_bytes(struct.pack("<I", MIB), b"Xen\0", 18)
NOTE = note_bytes("mode=protected\nmemory=2M\n")


def header(flags=3, *fields, magic=0x1BADB002, checksum=None):
    checksum = -(magic + flags) & 0xFFFFFFFF if checksum is None else checksum
    return struct.pack(f"<{3 + len(fields)}I", magic, flags, checksum, *fields)


def multiboot(flags=3, content=b"", **options):
    """An ELF32 image whose segment begins with a header and, 16 bytes into it, the entry."""
    body = header(flags).ljust(16, b"\0") + CODE + content
    return elf([(MIB, body, len(body))], bits=32, entry=MIB + 16, **options)


def kludge(load_addr=MIB, load_end=0, bss_end=0, *, before=b"\x90" * 8, entry=None, flags=1 << 16, after=CODE):
    """A flat image, with the header after ``before``."""
    at = load_addr + len(before)
    return before + header(flags, at, load_addr, load_end, bss_end, at + 32 if entry is None else entry) + after


# --- which format it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "kind", "why"),
    [
        (HELLO, "ELF64", "it has a pykvm note"),
        (elf([(MIB, CODE, 3)]), "ELF64", "neither a pykvm note nor a multiboot header nor a PVH entry: long mode"),
        (elf([(MIB, CODE, 3)], bits=32), "ELF32", "protected mode"),
        (CODE, "flat", "no header that pykvm knows"),
        (multiboot(), "multiboot (ELF32)", "multiboot header at file offset 0x54"),
        (multiboot(notes=XEN), "multiboot (ELF32)", "it has a PVH entry too (--format pvh)"),
        (kludge(), "multiboot (flat)", "multiboot header at file offset 0x8"),
        (elf([(MIB, CODE, 3)], XEN), "PVH (ELF64)", "an ELF note names a PVH entry, gpa 0x100000"),
        # The pykvm note is the image's own word.
        (multiboot(notes=NOTE), "ELF32", "it has a pykvm note"),
        (multiboot(notes=NOTE + note_bytes("format=multiboot")), "multiboot (ELF32)", "note says so"),
        (multiboot(notes=note_bytes("format=pvh") + XEN), "PVH (ELF32)", "note says so"),
        # Almost multiboot.
        (bytes(4) + header(checksum=1), "flat", "misaligned or with a wrong checksum"),
        (bytes(3) + header(), "flat", "misaligned or with a wrong checksum"),
        (bytes(8192 - 8) + header(), "flat", "misaligned or with a wrong checksum"),
        (bytes(8192) + header(), "flat", "no header that pykvm knows"),
        # Almost firmware.
        (bytes(0xFFF0) + b"\xea" + bytes(15), "flat", "pykvm run --firmware"),
        (bytes(0x10000), "flat", "no header that pykvm knows (ELF, multiboot, Linux)"),
    ],
)
def test_recognized(data, kind, why):
    info = peek(data, "x")
    assert info.kind == kind
    assert why in info.why


def test_the_caller_may_insist():
    both = multiboot(notes=XEN)
    assert [peek(both, format=f).kind for f in ("elf", "flat", "multiboot", "pvh")] == ["ELF32", "flat", "multiboot (ELF32)", "PVH (ELF32)"]
    assert peek(both, format="elf", mode="long").mode == "long"
    with pytest.raises(ConfigError, match="--format elf or flat"):
        peek(both, mode="long")
    with pytest.raises(ConfigError, match="unknown format"):
        peek(both, format="coff")
    for format, why in (("elf", "no ELF file"), ("multiboot", "no multiboot header"), ("pvh", "no ELF file"), ("firmware", "reset")):
        with pytest.raises(GuestImageError, match=why):
            peek(CODE, format=format)
    with pytest.raises(GuestImageError, match="XEN_ELFNOTE_PHYS32_ENTRY"):
        peek(HELLO, format="pvh")


def test_a_header_on_the_last_bytes_that_count():
    assert peek(bytes(8192 - 12) + header(1 << 16)[:12] + bytes(20), format="flat")
    data = kludge(before=bytes(8192 - 12))
    assert peek(data).kind == "multiboot (flat)"


def test_bzimage_is_no_flat_binary():
    data = bytearray(0x400)
    data[0x1FE:0x200], data[0x202:0x206] = b"\x55\xaa", b"HdrS"
    with pytest.raises(GuestImageError, match="zImage"):
        peek(bytes(data))
    assert peek(bytes(data), format="flat").kind == "flat"


# --- multiboot -------------------------------------------------------------------------------------------------------

BAD = {
    "unknown requirements": (multiboot(1 << 3 | 1 << 15), "bit 3, 15"),
    "video mode": (multiboot(1 << 2), "video mode"),
    "no addresses": (header(3).ljust(64, b"\0"), "no load addresses"),
    "truncated": (kludge()[:20], "truncated"),
    "header below load": (kludge(MIB)[:8] + header(1 << 16, MIB - 4, MIB, 0, 0, MIB), "load_addr"),
    "begins before the file": (header(1 << 16, MIB, MIB - 4, 0, 0, MIB), "load_addr"),
    "load_end before load": (kludge(load_end=MIB - 1), "load_end_addr"),
    "load_end past the file": (kludge(load_end=MIB + 4096), "load_end_addr"),
    "bss before data": (kludge(bss_end=MIB + 8), "bss_end_addr"),
    "entry of ELF64": (elf([(MIB, header().ljust(64, b"\0"), 64)], entry=1 << 32), "beyond 4 GiB"),
    "format in the note": (elf([(MIB, CODE, 3)], note_bytes("format=coff")), "asks for format 'coff'"),
    "note says multiboot": (elf([(MIB, CODE, 3)], note_bytes("format=multiboot")), "no multiboot header"),
    "note says pvh": (elf([(MIB, CODE, 3)], note_bytes("format=pvh")), "no PVH entry"),
    "note says firmware": (elf([(MIB, CODE, 3)], note_bytes("format=firmware")), "below 4 GiB"),
    "PVH entry": (elf([(MIB, CODE, 3)], note_bytes(b"\1\2", b"Xen\0", 18)), "2 bytes, not 4 or 8"),
    "PVH entry of 64 bits": (elf([(MIB, CODE, 3)], note_bytes(struct.pack("<Q", 1 << 40), b"Xen\0", 18)), "beyond 4 GiB"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    data, why = BAD[case]
    with pytest.raises(GuestImageError, match=why) as caught:
        peek(data, "bad.elf")
    assert str(caught.value).startswith("bad.elf")
    assert "\n" not in str(caught.value)


def test_optional_features_are_ignored():
    assert peek(multiboot(3 | 1 << 17 | 1 << 31)).kind == "multiboot (ELF32)"


@pytest.mark.parametrize(("load_end", "bss_end", "filesz", "memsz"), [(0, 0, 43, 43), (MIB + 41, 0, 41, 41), (0, MIB + 0x2000, 43, 0x2000)])
def test_addresses_in_the_header(load_end, bss_end, filesz, memsz):
    data = kludge(MIB, load_end, bss_end)
    info = peek(data)
    (segment,) = info.segments
    assert (segment.gpa, segment.offset, segment.filesz, segment.memsz) == (MIB, 0, filesz, memsz)
    memory = Memory(fill=0xAA)
    boot = load(info, data, memory)
    assert boot.entry == MIB + 40
    assert memory.read(MIB, memsz) == data[:filesz].ljust(memsz, b"\0")
    assert memory.read_u8(MIB + memsz) == 0xAA


def test_addresses_start_in_the_middle_of_the_file():
    data = kludge(MIB, before=b"junk" * 4)
    data = data[:16] + header(1 << 16, MIB + 4, MIB, 0, 0, MIB + 36) + CODE  # so 12 bytes of the file are not loaded
    memory = Memory()
    load(peek(data), data, memory)
    assert memory.read(MIB, 8) == b"junk" + data[16:20]


def test_addresses_win_over_elf():
    body = header(1 << 16, 0x180000, 0x180000, 0, 0, 0x180020) + CODE
    data = elf([(MIB, body, len(body))], bits=32)
    info = peek(data)
    assert (info.entry, [s.gpa for s in info.segments]) == (0x180020, [0x180000])


def test_a_virtual_entry_becomes_physical():
    body = header().ljust(16, b"\0") + CODE
    data = bytearray(elf([(MIB, body, len(body))], bits=32, entry=0xC0100010))
    struct.pack_into("<I", data, 52 + 8, 0xC0100000)  # p_vaddr
    info = peek(bytes(data))
    assert (info.entry, info.segments[0].gpa) == (MIB + 16, MIB)


INFO = """flags lower upper boot_device cmdline mods_count mods_addr syms0 syms1 syms2 syms3 mmap_length mmap_addr
    drives_length drives_addr config loader"""


def start_multiboot(data, handover, memory, path="dir/kernel"):
    """(information structure as a dictionary, read by gpa; BootState)."""
    boot = load(peek(data, path), data, memory, handover=handover)
    assert boot.mode == "multiboot"
    assert boot.registers["rax"] == 0x2BADB002
    words = struct.unpack("<17I", memory.read(boot.registers["rbx"], 68))
    return dict(zip(INFO.split(), words, strict=True)), boot


def string(memory, gpa):
    return memory.read(gpa, PAGE).partition(b"\0")[0]


def test_multiboot_information():
    modules = [Module(b"a" * 5000, "path/one", "arg 1"), Module(b"", "two"), Module(b"c", "three")]
    with GuestMemory.of_size("4G") as memory:
        info, _ = start_multiboot(multiboot(content=bytes(5000)), Handover("x  y", modules), memory)
        assert info["flags"] == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
        assert (info["lower"], info["upper"]) == (639, (3 << 20) - 1024)
        assert string(memory, info["cmdline"]) == b"kernel x  y"
        assert string(memory, info["loader"]) == b"pykvm"
        table, at = [], info["mmap_addr"]
        while at < info["mmap_addr"] + info["mmap_length"]:
            size, base, length, kind = struct.unpack("<IQQI", memory.read(at, 24))
            table.append((base, length, kind))
            at += size + 4
        assert table == [(r.gpa, r.size, r.type) for r in memory_map(memory)]
        assert table[-1] == (1 << 32, 1 << 30, 1)
        assert info["mods_count"] == 3
        end = MIB + 5019
        for n, module in enumerate(modules):
            start, until, text, _ = struct.unpack("<IIII", memory.read(info["mods_addr"] + 16 * n, 16))
            assert start % PAGE == 0 and start >= end
            assert memory.read(start, until - start) == module.data
            assert string(memory, text) == (b"one arg 1", b"two", b"three")[n]
            end = until


def test_multiboot_without_anything():
    memory = Memory()
    info, _ = start_multiboot(multiboot(), None, memory)
    assert (info["mods_count"], info["mods_addr"]) == (0, 0)
    assert string(memory, info["cmdline"]) == b"kernel"
    assert (info["lower"], info["upper"]) == (639, 1024)


def test_sections(tmp_path):
    """The symbol table comes with the image, and the section headers say where."""
    source = ".text\n.globl _start, other\n.long 0x1badb002, 0, -0x1badb002\n_start: nop\n other: nop\n.data\n.long 1\n"
    subprocess.run(["as", "--32", "-o", tmp_path / "a.o", "-"], input=source, text=True, check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext=0x100000", "-o", tmp_path / "a.elf", tmp_path / "a.o"], check=True)
    data = (tmp_path / "a.elf").read_bytes()
    memory = Memory(4 * MIB)
    info, _ = start_multiboot(data, Handover(modules=[Module(b"m" * 10)]), memory)
    assert info["flags"] & 1 << 5
    count, size, at, strings = (info[f"syms{n}"] for n in range(4))
    assert size == 40
    sections = [struct.unpack("<IIIIIIIIII", memory.read(at + size * n, size)) for n in range(count)]
    named = {string(memory, sections[strings][3] + s[0]): s for s in sections}
    symbols, names = named[b".symtab"], named[b".strtab"]
    assert memory.read(symbols[3], symbols[5]) == data[symbols[4] : symbols[4] + symbols[5]]
    assert b"\0other\0" in memory.read(names[3], names[5])
    assert named[b".text"][3] == MIB
    assert {s[3] % PAGE for s in (symbols, names)} == {0}
    # Where there is no room for them, the kernel starts without.
    small = Memory(MIB + 4 * PAGE)
    info, _ = start_multiboot(data, None, small)
    assert not info["flags"] & 1 << 5


def test_the_information_stays_clear_of_the_image():
    """An image that fills all low memory; then the structure is above it."""
    body = header().ljust(16, b"\0") + CODE
    data = elf([(0x8000, body, 0x97000), (MIB, CODE, 3)], bits=32, entry=0x8010)
    memory = Memory()
    _, boot = start_multiboot(data, Handover("words"), memory)
    assert boot.registers["rbx"] >= MIB + PAGE
    assert memory.read(0x8000, len(body)) == body
    with pytest.raises(GuestImageError, match=r"boot information.*--memory"):
        start_multiboot(data, Handover("words"), Memory(MIB + PAGE))


def test_too_much_to_hand_over():
    data = multiboot()
    for handover, error, why in (
        (Handover(modules=[Module(bytes(MIB), "big")]), GuestImageError, "module big .*--memory"),
        (Handover("x" * PAGE), ConfigError, "room for 4096"),
        (Handover("a\0b"), ConfigError, "NUL"),
    ):
        memory = Memory()
        with pytest.raises(error, match=why):
            load(peek(data, "kernel"), data, memory, handover=handover)
        assert memory.writes == 0
    with pytest.raises(ConfigError, match="at most 64"):
        Handover(modules=[Module(b"")] * 65)
    with pytest.raises(ConfigError, match="takes no --initrd"):
        load(peek(HELLO), HELLO, Memory(), handover=Handover(modules=[Module(b"")]))


# --- PVH -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
def test_pvh_start_info(bits):
    data = elf([(MIB, CODE, 3)], XEN, bits=bits, entry=1 << 20)
    modules = [Module(b"initrd" * 1000, "initrd.img"), Module(b"b", "two", "its words")]
    with GuestMemory.of_size("4G") as memory:
        boot = load(peek(data), data, memory, handover=Handover("console=ttyS0", modules, rsdp=0xE0010))
        assert (boot.mode, boot.entry) == ("pvh", MIB)
        info = struct.unpack("<IIIIQQQQII", memory.read(boot.registers["rbx"], 56))
        magic, version, flags, count, table, line, rsdp, regions, entries, reserved = info
        assert (magic, version, flags, count, rsdp, reserved) == (0x336EC578, 1, 0, 2, 0xE0010, 0)
        assert string(memory, line) == b"console=ttyS0"
        end = MIB
        for n, module in enumerate(modules):
            gpa, size, text, _ = struct.unpack("<QQQQ", memory.read(table + 32 * n, 32))
            assert gpa % PAGE == 0 and gpa > end
            assert memory.read(gpa, size) == module.data
            assert (string(memory, text) if text else b"") == module.text.encode()
            end = gpa
        found = [struct.unpack("<QQII", memory.read(regions + 24 * n, 24)) for n in range(entries)]
        assert found == [(r.gpa, r.size, r.type, 0) for r in memory_map(memory)]


def test_the_pvh_entry_must_be_in_a_segment():
    data = elf([(MIB, CODE, 3)], note_bytes(struct.pack("<Q", 5), b"Xen\0", 18))
    with pytest.raises(GuestImageError, match="in none of its segments"):
        load(peek(data), data, Memory())


# --- firmware --------------------------------------------------------------------------------------------------------


def firmware_memory(info, size=2 * MIB):
    memory = Memory(size)
    memory.add(*info.rom, readonly=True)
    return memory


@pytest.mark.parametrize(
    ("size", "mirrored"),
    [(16, 16), (PAGE + 100, PAGE + 100), (128 << 10, 128 << 10), (256 << 10, 256 << 10), (320 << 10, 128 << 10), (16 * MIB, 128 << 10)],
)
def test_firmware(size, mirrored):
    """The last 128 KiB are below 1 MiB too, in RAM; of an image of 256 KiB all is."""
    data = bytes(n * 7 & 0xFF for n in range(251)) * (size // 251 + 1)
    data = data[:size]
    info = peek(data, format="firmware")
    memory = firmware_memory(info)
    boot = load(info, data, memory)
    assert (boot.mode, boot.entry) == ("firmware", 0xFFFFFFF0)
    assert memory.read((1 << 32) - size, size) == data
    assert memory.read(MIB - mirrored, mirrored) == data[-mirrored:]
    assert not any(memory.read(0xA0000, MIB - 0xA0000 - mirrored)) and memory.is_writable(0xA0000, MIB - 0xA0000)


def test_firmware_as_elf():
    data = elf([(0xFFFFF000, CODE, 3), (0xFFFFFFF0, b"\xeb\xfe", 16)], note_bytes("format=firmware"), bits=32, entry=0xFFFFFFF0)
    info = peek(data)
    memory = firmware_memory(info)
    load(info, data, memory)
    assert memory.read(0xFF000, 4) == memory.read(0xFFFFF000, 4) == CODE + b"\0"
    assert memory.read(0xFFFF0, 2) == b"\xeb\xfe"


def test_bad_firmware():
    with pytest.raises(GuestImageError, match="at most 16M"):
        peek(bytes(16 * MIB + 1), format="firmware")
    with pytest.raises(GuestImageError, match="reset"):
        peek(CODE, format="firmware")
    data = bytes(PAGE)
    info = peek(data, format="firmware")
    with pytest.raises(GuestImageError, match="--memory 1M"):
        load(info, data, firmware_memory(info, 64 << 10))
    with pytest.raises(ConfigError, match="no --append"):
        load(info, data, firmware_memory(info), handover=Handover("words"))


# --- files -----------------------------------------------------------------------------------------------------------


def test_gzip(tmp_path):
    packed = gzip.compress(HELLO)
    (tmp_path / "a.gz").write_bytes(packed)
    assert read_image(tmp_path / "a.gz") == (HELLO, str(tmp_path / "a.gz"))
    for bad, why in ((packed[:-9], "truncated"), (packed[:12] + bytes(20), "cannot be unpacked"), (packed[:2], "truncated")):
        (tmp_path / "bad.gz").write_bytes(bad)
        with pytest.raises(GuestImageError, match=why):
            read_image(tmp_path / "bad.gz")
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(LARGEST_IMAGE + 1), 1))
    with pytest.raises(GuestImageError, match="more than 256M"):
        read_image(tmp_path / "bomb.gz")


def test_modules_from_files(tmp_path):
    (tmp_path / "a b").write_bytes(b"content")
    (tmp_path / "c").write_bytes(b"other")
    spaced = read_module(f"{tmp_path}/a b")
    assert (spaced.data, spaced.text) == (b"content", "")
    worded = read_module(f"{tmp_path}/c with  words")
    assert (worded.data, worded.name, worded.text) == (b"other", f"{tmp_path}/c", "with  words")
    with pytest.raises(GuestImageError, match="cannot be read"):
        read_module(f"{tmp_path}/missing")


# --- anything at all -------------------------------------------------------------------------------------------------


def try_to_load(data, handover=None):
    """Load, or fail as documented, with memory untouched."""
    memory = Memory(2 * MIB)
    try:
        info = peek(data, "fuzz")
        if info.rom is not None:
            memory.add(*info.rom, readonly=True)
        load(info, data, memory, handover=handover)
    except (GuestImageError, ConfigError) as error:
        assert memory.writes == 0
        assert "\n" not in str(error)


SEEDS = [
    multiboot(),
    multiboot(notes=note_bytes("format=multiboot")),
    kludge(),
    kludge(bss_end=MIB + 0x1000),
    elf([(MIB, CODE, 3), (MIB + 0x1000, b"data", 64)], XEN),
    elf([(0xFFFFF000, CODE, 3), (0xFFFFFFF0, b"\xeb\xfe", 16)], note_bytes("format=firmware"), bits=32, entry=0xFFFFFFF0),
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_mutated_images(seed, data):
    image = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        top = (1 << 8 * width) - 1
        edges = st.sampled_from([0, 1, top, top - 1, top >> 1, (top >> 1) + 1, len(image) & top, MIB & top])
        at = data.draw(st.integers(0, len(image) - width))
        image[at : at + width] = data.draw(edges | st.integers(0, top)).to_bytes(width, "little")
    try_to_load(bytes(image), Handover("words", [Module(b"m", "m")]))
    try_to_load(bytes(image[: data.draw(st.integers(0, len(image)))]))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 0x1FFFF),
    st.lists(st.sampled_from([0, MIB, MIB + 8, MIB + 64, 0xFFFFFFFF]) | st.integers(0, 0xFFFFFFFF), max_size=5),
    st.binary(max_size=64),
)
def test_any_header(flags, fields, after):
    try_to_load(header(flags, *fields) + after)
    try_to_load(bytes(8) + header(flags | 1 << 16 & ~0xFFFF, *fields) + after)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_section_headers(content):
    """e_shoff, e_shentsize, e_shnum and e_shstrndx that are right, and behind them anything."""
    image = bytearray(multiboot())
    count = len(content) // 40
    struct.pack_into("<I", image, 32, len(image))
    struct.pack_into("<HHH", image, 46, 40, count, 0)
    try_to_load(bytes(image) + content)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 512), st.lists(st.integers(0, 300 * 1024), max_size=8), st.sampled_from([multiboot(), SEEDS[4]]))
def test_whatever_is_handed_over_is_apart(pages, sizes, data):
    """Modules and structures overlap neither each other nor the image, or there is no room for them."""
    memory = Memory(MIB + pages * PAGE)
    pieces = []
    write = memory.write
    memory.write = lambda gpa, content: (pieces.append((gpa, gpa + len(content))), write(gpa, content))
    try:
        load(peek(data), data, memory, handover=Handover("line", [Module(bytes(size)) for size in sizes]))
    except GuestImageError as error:
        assert "--memory" in str(error)
        assert pieces == []
        return
    pieces = sorted(piece for piece in pieces if piece[0] < piece[1])
    assert all(a[1] <= b[0] for a, b in pairwise(pieces))
