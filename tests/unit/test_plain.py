"""Which instructions native/step.c takes for plain: none that changes what many steps take for granted, or needs a way of its own."""

import capstone
import pytest
from capstone import x86

from pykvm.abi import lib

# What is no plain instruction by its name: control flow that leaves the segment or the mode, the flags as a whole, segments, system
# registers, ports, interrupts, and what waits.
NAMES = (
    "lcall", "ljmp", "retf", "iret", "int", "into", "syscall", "sysret", "sysenter", "sysexit", "pushf", "popf", "cli", "sti",
    "hlt", "in ", "out", "ins", "lgdt", "lidt", "lldt", "ltr", "sgdt", "sidt", "str", "sldt", "lmsw", "smsw", "clts", "invd",
    "wbinvd", "invlpg", "rdmsr", "wrmsr", "rdtsc", "rdpmc", "cpuid", "lds", "les", "lss", "lfs", "lgs", "rsm", "ud2", "ud1", "vm",
    "monitor", "mwait", "xsetbv", "xgetbv", "xsave", "xrstor", "fxsave", "fxrstor", "swapgs", "rdpkru", "wrpkru", "clac", "stac",
    "getsec", "lar", "lsl", "verr", "verw", "rdrand", "rdseed", "skinit", "clgi", "stgi", "invept", "invvpid", "invpcid", "icebp",
    "salc",
)  # fmt: skip
PLAIN_ALL_THE_SAME = ("vmov", "insert", "insd", "intx")
SEGMENTS = {x86.X86_REG_CS, x86.X86_REG_DS, x86.X86_REG_ES, x86.X86_REG_FS, x86.X86_REG_GS, x86.X86_REG_SS}


def codes():
    """All one- and two-byte opcodes, with some prefixes and all kinds of ModRM."""
    for prefix in (b"", b"\x66", b"\xf2", b"\xf3", b"\x48", b"\x48\x40", b"\xf0"):
        for escape in (b"", b"\x0f"):
            for opcode in range(256):
                for modrm in range(0, 256, 8):
                    yield prefix + escape + bytes([opcode, modrm]) + bytes(13)


@pytest.mark.parametrize("bits", [32, 64])
def test_what_is_plain(bits):
    engine = capstone.Cs(capstone.CS_ARCH_X86, {32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits])
    engine.detail = True
    plain = 0
    for code in codes():
        if not lib.pykvm_is_plain(code, len(code), bits == 64):
            continue
        found = next(engine.disasm(code, 0x1000, 1), None)
        if found is None:
            continue  # #UD, which a planted handler sees
        plain += 1
        name = f"{found.mnemonic} {found.op_str}"
        for prefix in ("lock ", "rep ", "repne "):
            name = name.removeprefix(prefix)
        loads = [o for o in found.operands if o.type == x86.X86_OP_REG and o.reg in SEGMENTS and o.access & capstone.CS_AC_WRITE]
        control = [o for o in found.operands if o.type == x86.X86_OP_REG and found.reg_name(o.reg)[:2] in ("cr", "dr")]
        pops = found.mnemonic.startswith("pop") and any(o.type == x86.X86_OP_REG and o.reg in SEGMENTS for o in found.operands)
        named = name.startswith(NAMES) and not name.startswith(PLAIN_ALL_THE_SAME)
        assert not (loads or control or pops or named), f"{code.hex()} {name}"
    assert plain > 10_000


def test_what_is_common_is_plain():
    for text, code in {
        "mov rax, [rbx]": "488b03", "push rbp": "55", "call": "e800000000", "ret": "c3", "jz": "7400", "far jz": "0f8400000000",
        "movzx": "0fb6c0", "lock xadd": "f0480fc103", "rep movsb": "f3a4", "test": "84c0", "inc [rax]": "ff00", "push [rax]": "ff30",
        "movaps": "0f2800", "cmovz": "0f44c1", "imul": "0fafc1", "nop": "0f1f4000", "call rax": "ffd0", "fld1": "d9e8",
    }.items():  # fmt: skip
        assert lib.pykvm_is_plain(bytes.fromhex(code).ljust(15, b"\0"), 15, 1), text
    assert not lib.pykvm_is_plain(b"\x90" * 15, 14, 1)  # it may reach into the next page
