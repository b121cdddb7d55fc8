"""Disassembly: single instructions, and windows around an address."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.disasm import disassemble, window
from pykvm.symbols import Symbols

CODE = bytes.fromhex("b82a000000e6f431c90f05f4ebfd")  # mov eax, 42; out 0xf4, al; xor; syscall; hlt; jmp
BASE = 0x1000


def reader(data, base=BASE):
    """As the explainer reads: fewer bytes where memory ends."""

    def read(address, size):
        if not base <= address < base + len(data):
            return b""
        return data[address - base : address - base + size]

    return read


@pytest.mark.parametrize(("bits", "text"), [(16, "mov ax, 0x2a"), (32, "mov eax, 0x2a"), (64, "mov eax, 0x2a")])
def test_bits(bits, text):
    assert str(disassemble(CODE, BASE, bits, 1)[0]) == text


def test_instructions():
    insns = disassemble(CODE, BASE, 64)
    assert [i.mnemonic for i in insns] == ["mov", "out", "xor", "syscall", "hlt", "jmp"]
    assert [i.address for i in insns] == [0x1000, 0x1005, 0x1007, 0x1009, 0x100B, 0x100C]
    assert insns[1].bytes == b"\xe6\xf4"
    assert insns[1].size == 2
    assert "jmp 0x100b" in repr(insns[-1])
    assert len(disassemble(CODE, BASE, 64, 2)) == 2


def test_what_is_no_instruction_ends_the_list():
    assert disassemble(b"", 0, 64) == []
    assert disassemble(b"\x06", 0, 64) == []  # push es, gone in 64-bit mode
    assert [i.mnemonic for i in disassemble(b"\x90\x06\x90", 0, 64)] == ["nop"]


def test_window_marks_rip():
    lines = window(reader(CODE), 0x1007, 64, before=2, after=2).splitlines()
    assert [line[:13] for line in lines] == ["   0x00001000", "   0x00001005", "=> 0x00001007", "   0x00001009"]
    assert lines[2].endswith("xor ecx, ecx")


def test_window_names_symbols():
    symbols = Symbols({"start": BASE, "after": 0x1007})
    text = window(reader(CODE), 0x1007, 64, before=1, after=2, symbols=symbols)
    assert "<start+0x5>" in text
    assert "=> 0x00001007 <after>" in text


def test_window_at_the_first_byte():
    assert window(reader(CODE), BASE, 64).splitlines()[0].startswith("=> ")
    assert window(reader(b"\xf4", 0), 0, 64).splitlines() == ["=> 0x00000000: f4                   hlt"]


def test_window_where_nothing_is():
    assert window(reader(CODE), 0x9000, 64) == "=> 0x00009000: no memory here"


def test_window_on_what_is_no_instruction():
    text = window(reader(b"\x90\x06\x07"), BASE + 1, 64)
    assert text.splitlines()[-1] == "=> 0x00001001: bytes 06 07: not an instruction"


@settings(deadline=None)
@given(st.binary(max_size=80), st.integers(-40, 120), st.sampled_from([16, 32, 64]))
def test_any_bytes(data, offset, bits):
    """Exactly one line is marked, and each line continues where the one before ended."""
    lines = window(reader(data), BASE + offset, bits).splitlines()
    marked = [line for line in lines if line.startswith("=>")]
    assert len(marked) == 1
    assert marked[0].startswith(f"=> {BASE + offset:#010x}")
    addresses = [int(line[3:].split(":")[0], 16) for line in lines]
    assert addresses == sorted(addresses)
