"""What assist knows of instructions before the CPU executes them: sizes of memory operands, and the encoding with another address."""

import re
import subprocess
from types import SimpleNamespace

import pytest

from pykvm import asm
from pykvm.x86.assist.compute import is_computing, memory_size
from pykvm.x86.assist.cpu import Declined
from pykvm.x86.assist.relocate import Encoding
from pykvm.x86.operation import Operation, engine_for

SIZES = {"BYTE": 1, "WORD": 2, "DWORD": 4, "QWORD": 8, "XMMWORD": 16, "YMMWORD": 32, "TBYTE": 10}
NO_SIZE_IN_OBJDUMP = {"fldenv": 28, "fnstenv": 28, "frstor": 108, "fnsave": 108, "lddqu": 16, "vlddqu": (16, 32)}


def opcodes():
    """Every opcode of the maps 0F, 0F38, 0F3A and VEX, and D8 to DF, with each mandatory prefix, and a memory operand."""
    for prefix in (b"", b"\x66", b"\xf3", b"\xf2"):
        for escape in (b"\x0f", b"\x0f\x38", b"\x0f\x3a"):
            for opcode in range(256):
                for reg in range(8) if escape == b"\x0f" and opcode in (0x71, 0x72, 0x73, 0xAE) else (0,):
                    yield prefix + escape + bytes((opcode, reg << 3 | 3, 1))
    for which in range(1 << 5):
        pp, long, w, v = which & 3, which >> 2 & 1, which >> 3 & 1, which >> 4
        for map in (1, 2, 3):
            for opcode in range(256):
                yield bytes((0xC4, 0xE0 | map, w << 7 | (0x0F - v) << 3 | long << 2 | pp, opcode, 3, 1))
    for opcode in range(0xD8, 0xE0):
        for reg in range(8):
            yield bytes((opcode, reg << 3 | 3, 1))


def known():
    """Operation of each that assist would have the CPU execute."""
    engine = engine_for(64)
    for code in opcodes():
        for insn in engine.disasm(code.ljust(15, b"\x90"), 0, 1):
            op = Operation(SimpleNamespace(bits=64), insn)
            encoding = Encoding(op.bytes, 64)
            if encoding.is_memory and is_computing(encoding):
                yield op


def test_sizes_of_memory_operands(tmp_path):
    """capstone's, corrected, are objdump's; where objdump knows no such instruction it does not matter."""
    ops = list(known())
    (tmp_path / "code").write_bytes(b"".join(op.bytes.ljust(16, b"\x90") for op in ops))
    command = ["objdump", "-D", "-b", "binary", "-mi386:x86-64", "-Mintel", "--insn-width=16", str(tmp_path / "code")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {
        int(m[1], 16): (m[3], len(m[2].split())) for m in (re.match(r"\s*([0-9a-f]+):\t([0-9a-f ]+)\t(.*)", line) for line in lines) if m
    }
    checked = 0
    for at, op in enumerate(ops):
        text, length = found.get(16 * at, ("(bad)", 0))
        if "(bad)" in text:
            continue
        assert length == len(op.bytes), (str(op), text)
        said = re.search(r"(\w+) PTR", text)
        want = SIZES[said[1]] if said else NO_SIZE_IN_OBJDUMP[op.mnemonic]
        size = memory_size(op)
        assert size in want if isinstance(want, tuple) else size == want, (str(op), text)
        checked += 1
    assert checked > 1500


ADDRESSES = {
    16: ["[bx]", "[bx + si + 5]", "[bp + di - 300]", "[0x1234]", "fs:[di]", "[eax + ebx * 2 + 4]", "[esp + 8]"],
    32: ["[eax]", "[esp]", "[ebp]", "[ebp + 8]", "[0x12345678]", "[ecx * 4 + 0x100]", "gs:[esi + edi * 8 - 3]", "[esp + 0x1000]"],
    64: ["[rax]", "[r13]", "[rsp + r12 * 8]", "[rip + 0x40]", "fs:[r15 + 0x12345]", "[eax]", "[r8 * 2 + 0x77]", "gs:[0x28]"],
}
FORMS = [
    "movd xmm1, dword ptr M", "paddd xmm7, xmmword ptr M", "fld qword ptr M", "pshufd xmm2, xmmword ptr M, 0x1b", "movss dword ptr M, xmm3",
    "vaddps ymm1, ymm2, ymmword ptr M", "vpermilps xmm4, xmmword ptr M, 7", "vfmadd231sd xmm1, xmm2, qword ptr M",
    "vblendvps xmm1, xmm2, xmmword ptr M, xmm3", "shufpd xmm0, xmmword ptr M, 1", "cvtsi2sd xmm5, dword ptr M", "fistp word ptr M",
]  # fmt: skip


def disassemble_all(code):
    """The instructions of 64-bit code."""
    return list(engine_for(64).disasm(code, 0))


def others(insn):
    """Mnemonic and operands, of memory only the size."""
    return [insn.mnemonic, *(insn.reg_name(o.reg) if o.type == 1 else o.imm if o.type == 2 else o.size for o in insn.operands)]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_another_address(bits):
    """As 64-bit code at another place it is the same instruction, and its memory is where it is wanted."""
    engine, wide = engine_for(bits), engine_for(64)
    right = iter(disassemble_all(asm("; ".join(form.replace("M", "[0]") for form in FORMS for _ in ADDRESSES[bits]), bits=64)))
    insns = [form.replace("M", address, 1).replace("M", address) for form in FORMS for address in ADDRESSES[bits]]
    insns = [re.sub(r"ptr (\w\w):\[", r"ptr \1:[", insn) for insn in insns]
    code = asm("; ".join(insns), bits=bits)
    start, seen = 0, 0
    while start < len(code):
        (insn,) = engine.disasm(code[start : start + 15], start, 1)
        start += insn.size
        (moved,) = wide.disasm(Encoding(bytes(insn.bytes), bits).moved(0x100000, 0x123450), 0x100000, 1)
        mem = next(o for o in moved.operands if o.type == 3)
        assert moved.reg_name(mem.mem.base) == "rip" and not mem.mem.index and not mem.mem.segment
        assert moved.address + moved.size + mem.mem.disp == 0x123450

        assert others(moved) == others(next(right)), (str(insn), str(moved))
        seen += 1
    assert seen == len(insns)


@pytest.mark.parametrize("code", ["62f17c4858c1", "f00f58c1", "0f", "660f3a", "c5", "c4e2", "66"])
def test_what_is_no_such_instruction(code):
    with pytest.raises(Declined):
        Encoding(bytes.fromhex(code), 64)
