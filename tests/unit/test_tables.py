"""ACPI and MP tables as a guest finds them in memory, for any number of vCPUs; and as firmware links them."""

import shutil
import struct
import subprocess

import pytest

from pykvm import ConfigError, GuestMemory
from pykvm.tables.acpi import acpi_tables
from pykvm.tables.aml import _length, eisa_id, integer
from pykvm.tables.linker import FSEG, HIGH, linker_script
from pykvm.tables.mptable import mp_table
from pykvm.tables.place import place_tables

CPUS = [1, 2, 17, 254]
SIGNATURE, FEATURES = 0x00A20F10, 0x178BFBFF


def zero(data):
    return sum(data) & 0xFF == 0


def find(memory, signature, first):
    """As guests do: every 16 bytes up to 1 MiB."""
    return next(gpa for gpa in range(first, 0x100000, 16) if memory.read(gpa, len(signature)) == signature)


def acpi(memory):
    """Signature to content, by the RSDT and by the XSDT; a table's checksum is checked on the way."""
    rsdp = memory.read(find(memory, b"RSD PTR ", 0xE0000), 36)
    assert zero(rsdp[:20]) and zero(rsdp) and rsdp[15] == 2
    rsdt, length, xsdt = struct.unpack("<IIQ", rsdp[16:32])
    assert length == 36

    def table(gpa):
        data = memory.read(gpa, memory.read_u32(gpa + 4))
        assert zero(data), data[:4]
        return data

    def listed(gpa, size):
        body = table(gpa)[36:]
        return [table(int.from_bytes(body[i : i + size], "little")) for i in range(0, len(body), size)]

    tables = listed(rsdt, 4)
    assert tables == listed(xsdt, 8)
    fadt = next(t for t in tables if t[:4] == b"FACP")
    dsdt = table(int.from_bytes(fadt[40:44], "little"))
    assert int.from_bytes(fadt[140:148], "little") == int.from_bytes(fadt[40:44], "little")
    facs = int.from_bytes(fadt[36:40], "little")
    assert facs % 64 == 0
    return {**{t[:4]: t for t in tables}, b"DSDT": dsdt, b"FACS": memory.read(facs, 64)}


def entries(data, at):
    """(type, content) of a MADT's entries."""
    while at < len(data):
        assert data[at + 1] >= 2
        yield data[at], data[at : at + data[at + 1]]
        at += data[at + 1]


@pytest.fixture(params=CPUS)
def placed(request):
    with GuestMemory.of_size("2M") as memory:
        place_tables(memory, acpi_tables(request.param), mp_table(request.param, SIGNATURE, FEATURES))
        yield memory, request.param


def test_madt(placed):
    memory, cpus = placed
    madt = acpi(memory)[b"APIC"]
    assert struct.unpack("<II", madt[36:44]) == (0xFEE00000, 1)
    every = list(entries(madt, 44))
    lapics = [content for kind, content in every if kind == 0]
    assert [struct.unpack("<BBI", lapic[2:]) for lapic in lapics] == [(n, n, 1) for n in range(cpus)]
    assert [content for kind, content in every if kind == 1] == [struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0)]
    overrides = {struct.unpack("<BBIH", content[2:]) for kind, content in every if kind == 2}
    assert overrides == {(0, 0, 2, 0), (0, 9, 9, 0xD)}


def test_fadt(placed):
    fadt = acpi(placed[0])[b"FACP"]
    assert len(fadt) == 244
    assert struct.unpack_from("<H", fadt, 46) == (9,)
    assert struct.unpack_from("<I", fadt, 48) == (0,)  # no SMI command: ACPI is always on
    assert [struct.unpack_from("<I", fadt, at)[0] for at in (56, 60, 64, 68, 72, 76, 80, 84)] == [0x600, 0, 0x604, 0, 0, 0x608, 0, 0]
    assert list(fadt[88:93]) == [4, 2, 0, 4, 0]
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)
    for at, bits, port in ((148, 32, 0x600), (172, 16, 0x604), (208, 32, 0x608)):
        space, width, offset, _, address = struct.unpack_from("<BBBBQ", fadt, at)
        assert (space, width, offset, address) == (1, bits, 0, port)
    assert struct.unpack_from("<I", fadt, 112)[0] & (1 << 8 | 1 << 10) == 1 << 10  # a 24-bit timer, a reset register


def test_mp_table_agrees_with_the_madt(placed):
    memory, cpus = placed
    pointer = memory.read(find(memory, b"_MP_", 0xF0000), 16)
    assert zero(pointer) and pointer[8:10] == b"\1\4" and pointer[11] == 0
    gpa = int.from_bytes(pointer[4:8], "little")
    table = memory.read(gpa, memory.read_u16(gpa + 4))
    assert table[:4] == b"PCMP" and table[6] == 4 and zero(table)
    count, lapic = struct.unpack_from("<HI", table, 34)
    assert lapic == 0xFEE00000
    at, found = 44, []
    for _ in range(count):
        size = 20 if table[at] == 0 else 8
        found.append(table[at : at + size])
        at += size
    assert at == len(table)
    processors = [struct.unpack("<BBBBIIQ", entry) for entry in found if entry[0] == 0]
    assert [p[1] for p in processors] == list(range(cpus))
    assert [p[3] for p in processors] == [3] + [1] * (cpus - 1)
    assert {p[4:6] for p in processors} == {(SIGNATURE, FEATURES)}
    pins = {entry[5]: entry[7] for entry in found if entry[0] == 3}
    assert pins == {0: 2, **{irq: irq for irq in range(16) if irq not in (0, 2)}}
    assert [entry[:2] for entry in found if entry[0] == 4] == [b"\4\3", b"\4\1"]


def test_bios_data_area(placed):
    memory = placed[0]
    assert memory.read_u16(0x40E) << 4 == 0x9FC00 and memory.read_u16(0x413) == 639


def test_without_8259s_there_is_no_timer_override():
    with GuestMemory.of_size("2M") as memory:
        place_tables(memory, acpi_tables(1, pic=False), mp_table(1, SIGNATURE, FEATURES, pic=False))
        madt = acpi(memory)[b"APIC"]
        assert struct.unpack("<I", madt[40:44]) == (0,)
        assert [content[3] for kind, content in entries(madt, 44) if kind == 2] == [9]


@pytest.mark.parametrize("size", ["64K", "640K"])
def test_memory_must_reach_1_mib(size):
    with GuestMemory.of_size(size) as memory, pytest.raises(ConfigError, match="1 MiB"):
        place_tables(memory, acpi_tables(1), mp_table(1, 0, 0))


@pytest.mark.parametrize("cpus", [1, 5])
def test_firmware_links_them(cpus):
    """A linker as SeaBIOS has one: allocate, add pointers, add checksums."""
    tables, rsdp = acpi_tables(cpus)
    files = {blob.name: bytes(blob.data) for blob in (tables, rsdp)}
    script = linker_script((tables, HIGH), (rsdp, FSEG))
    assert len(script) % 128 == 0
    with GuestMemory.of_size("4M") as memory:
        where, free = {}, {HIGH: 0x301010, FSEG: 0xF1230}

        def text(data):
            return data.rstrip(b"\0").decode()

        for at in range(0, len(script), 128):
            number, body = int.from_bytes(script[at : at + 4], "little"), script[at + 4 : at + 128]
            if number == 1:
                name, align, zone = text(body[:56]), *struct.unpack_from("<IB", body, 56)
                where[name] = -(-free[zone] // align) * align
                free[zone] = where[name] + len(files[name])
                memory.write(where[name], files[name])
            elif number == 2:
                dest, source, (offset, size) = text(body[:56]), text(body[56:112]), struct.unpack_from("<IB", body, 112)
                gpa = where[dest] + offset
                assert offset + size <= len(files[dest])
                memory.write(gpa, (int.from_bytes(memory.read(gpa, size), "little") + where[source]).to_bytes(size, "little"))
            else:
                assert number == 3
                name, (offset, start, length) = text(body[:56]), struct.unpack_from("<III", body, 56)
                assert start + length <= len(files[name])
                total = sum(memory.read(where[name] + start, length))
                memory.write_u8(where[name] + offset, memory.read_u8(where[name] + offset) - total)
        assert set(acpi(memory)) == {b"FACP", b"APIC", b"DSDT", b"FACS"}


@pytest.mark.parametrize("cpus", [1, 254])
def test_iasl_reads_them(cpus, tmp_path):
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("there is no iasl to check AML with: on Debian, apt-get install acpica-tools")
    with GuestMemory.of_size("2M") as memory:
        place_tables(memory, acpi_tables(cpus), mp_table(cpus, SIGNATURE, FEATURES))
        tables = acpi(memory)
    for signature, data in tables.items():
        name = signature.decode().lower()
        (tmp_path / f"{name}.aml").write_bytes(data)
        done = subprocess.run([iasl, "-d", f"{name}.aml"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "error" not in done.stderr.lower(), done.stdout + done.stderr
    source = (tmp_path / "dsdt.dsl").read_text()
    assert source.count('"ACPI0007"') == cpus
    for text in ("Name (_S5", "PNP0501", "0x03F8", "IRQNoFlags", '"QEMU0002"'):
        assert text in source
    done = subprocess.run([iasl, "dsdt.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and " 0 Errors" in done.stdout + done.stderr, done.stdout + done.stderr


def test_aml_lengths_count_themselves():
    assert _length(0) == b"\1" and _length(62) == b"\x3f"
    assert _length(63) == bytes((0x40 | 65 & 0xF, 65 >> 4))
    assert _length(0xFFD) == b"\x4f\xff" and _length(0xFFE) == bytes((0x80 | 0x1001 & 0xF, 0x00, 0x01))
    assert integer(0) == b"\0" and integer(0x1234) == b"\x0b\x34\x12" and eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"
