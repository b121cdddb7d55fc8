"""Names for the bits of control registers, EFER and RFLAGS, the MSRs pykvm touches, and registers as text.

Sources: Intel SDM vol. 3 sections 2.2.1 (EFER), 2.5 (control registers), vol. 1 section 3.4.3 (RFLAGS).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.abi import Struct

__all__ = ["CR0", "CR4", "EFER", "RFLAGS", "cpl_of", "format_regs", "insn_bits", "mode_of"]


class CR0:
    """Control register 0."""

    PE, MP, EM, TS, ET, NE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
    WP, AM, NW, CD, PG = 1 << 16, 1 << 18, 1 << 29, 1 << 30, 1 << 31


class CR4:
    """Control register 4."""

    VME, PVI, TSD, DE, PSE, PAE, MCE, PGE = (1 << n for n in range(8))
    PCE, OSFXSR, OSXMMEXCPT, UMIP, LA57, VMXE = 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13
    FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP, PKE = 1 << 16, 1 << 17, 1 << 18, 1 << 20, 1 << 21, 1 << 22


class EFER:
    """Extended feature enable register (MSR 0xC0000080)."""

    SCE, LME, LMA, NXE, SVME = 1 << 0, 1 << 8, 1 << 10, 1 << 11, 1 << 12


class RFLAGS:
    """Flags; FIXED is bit 1, which always reads as 1."""

    CF, FIXED, PF, AF, ZF, SF, TF, IF, DF, OF = 1, 2, 4, 16, 64, 128, 256, 512, 1024, 2048
    IOPL, NT, RF, VM, AC, ID = 3 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18, 1 << 21


MSR_TSC = 0x10
AVAILABLE_TSS, BUSY_TSS = 0x9, 0xB  # types of 32- and 64-bit TSSs (SDM vol. 3 table 3-2)
MSR_STAR, MSR_LSTAR, MSR_SFMASK = 0xC0000081, 0xC0000082, 0xC0000084

_BITS = {
    "cr0": {n: getattr(CR0, n) for n in ("PE", "MP", "EM", "TS", "ET", "NE", "WP", "AM", "NW", "CD", "PG")},
    "cr4": {n: v for n, v in vars(CR4).items() if n.isupper()},
    "efer": {n: v for n, v in vars(EFER).items() if n.isupper()},
    "rflags": {n: v for n, v in vars(RFLAGS).items() if n.isupper() and n not in ("FIXED", "IOPL")},
}


def bit_names(register: str, value: int) -> str:
    """The names of the bits set in cr0, cr4, efer or rflags."""
    return " ".join(name for name, bit in _BITS[register].items() if value & bit) or "-"


def mode_of(sregs: Struct) -> str:
    """The mode a vCPU is in: "real", "protected", "long" or "compatibility".

    Virtual-8086 mode shows only in RFLAGS and is reported as protected.
    """
    if not sregs.cr0 & CR0.PE:
        return "real"
    if sregs.efer & EFER.LMA:
        return "long" if sregs.cs.l else "compatibility"
    return "protected"


def cpl_of(sregs: Struct) -> int:
    """The current privilege level, 0 to 3: the DPL of SS (SDM vol. 3 section 5.5)."""
    return int(sregs.ss.dpl) if sregs.cr0 & CR0.PE else 0


def insn_bits(sregs: Struct) -> int:
    """16, 32 or 64: how instructions at CS:RIP are decoded."""
    if sregs.cr0 & CR0.PE and sregs.efer & EFER.LMA and sregs.cs.l:
        return 64
    return 32 if sregs.cr0 & CR0.PE and sregs.cs.db else 16


def linear_rip(regs: Struct, sregs: Struct) -> int:
    """RIP as a linear address: CS.base is added outside 64-bit mode."""
    if insn_bits(sregs) == 64:
        return int(regs.rip)
    return int((sregs.cs.base + regs.rip) & 0xFFFFFFFF)


def format_regs(regs: Struct, sregs: Struct) -> str:
    """All registers as text, with the control registers' bits named."""
    lines = []
    general = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
    for i in range(0, 16, 4):
        lines.append("  ".join(f"{name:>3}={getattr(regs, name):016x}" for name in general[i : i + 4]))
    lines.append(f"rip={regs.rip:016x}  rflags={regs.rflags:08x} [{bit_names('rflags', regs.rflags)}]")
    lines.append(f"cr0={sregs.cr0:08x} [{bit_names('cr0', sregs.cr0)}]  cr2={sregs.cr2:x}  cr3={sregs.cr3:x}")
    lines.append(f"cr4={sregs.cr4:08x} [{bit_names('cr4', sregs.cr4)}]  efer={sregs.efer:x} [{bit_names('efer', sregs.efer)}]")
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr"):
        s = getattr(sregs, name)
        size = "64" if s.l else "32" if s.db else "16"
        unusable = " unusable" if s.unusable else ""
        lines.append(f" {name}={s.selector:04x} base={s.base:016x} limit={s.limit:08x} type={s.type:x} dpl={s.dpl} {size}-bit{unusable}")
    lines.append(f"gdt={sregs.gdt.base:x} limit={sregs.gdt.limit:x}  idt={sregs.idt.base:x} limit={sregs.idt.limit:x}")
    return "\n".join(lines)
