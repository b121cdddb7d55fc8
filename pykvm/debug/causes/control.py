"""Privilege, control registers, MSRs, XCR0, division, INT n: what else an instruction may be refused for (SDM vol. 2 and 3, by name)."""

from __future__ import annotations

from pykvm.debug.causes import Cause
from pykvm.debug.causes.memory import canonical
from pykvm.errors import KvmError, PykvmError
from pykvm.x86.msr import MSRS, msr_name
from pykvm.x86.regs import CR0, CR4, EFER, RFLAGS, bit_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.operation import Operation
    from pykvm.x86.view import CpuView

__all__ = ["control_cause", "divide_cause"]

# SDM vol. 3 section 5.9
_PRIVILEGED = (
    "hlt", "lgdt", "lidt", "lldt", "ltr", "lmsw", "clts", "invd", "wbinvd", "invlpg", "invpcid", "rdmsr", "wrmsr", "xsetbv", "swapgs",
    "sysexit", "sysexitq", "sysret", "sysretq", "vmxon", "vmxoff", "vmlaunch", "vmresume", "vmrun", "stgi", "clgi",
)  # fmt: skip
_IOPL = ("cli", "sti")
_IO = ("in", "out", "insb", "insw", "insd", "outsb", "outsw", "outsd")
# bit of CR4 -> CPUID (leaf, register, bit) that it needs
_CR4_NEEDS = {
    CR4.LA57: (7, "ecx", 16), CR4.UMIP: (7, "ecx", 2), CR4.FSGSBASE: (7, "ebx", 0), CR4.PCIDE: (1, "ecx", 17), CR4.OSXSAVE: (1, "ecx", 26),
    CR4.SMEP: (7, "ebx", 7), CR4.SMAP: (7, "ebx", 20), CR4.PKE: (7, "ecx", 3), CR4.VMXE: (1, "ecx", 5),
}  # fmt: skip
_CR4_RESERVED = 1 << 15 | 0xFFFF_FFFF_F000_0000
_ADDRESSES = {
    MSRS[n]
    for n in ("IA32_FS_BASE", "IA32_GS_BASE", "IA32_KERNEL_GS_BASE", "IA32_LSTAR", "IA32_CSTAR", "IA32_SYSENTER_ESP", "IA32_SYSENTER_EIP")
}
_EFER_KNOWN = EFER.SCE | EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 18 | 1 << 20 | 1 << 21


def control_cause(op: Operation) -> Cause | None:
    """What is wrong with it, beside its memory and its selectors."""
    name = op.mnemonic
    for find in (_privilege, _software_interrupt):
        cause = find(op)
        if cause:
            return cause
    if name == "mov" and len(op.names) == 2 and op.names[0].startswith("cr"):
        return _control_register(op, op.names[0], op.register(op.names[1]))
    if name == "mov" and op.names[:1] in (["dr6"], ["dr7"]) and op.register(op.names[1]) >> 32:
        return Cause(13, f"`{op}`: bits 63 to 32 of {op.names[0].upper()} are reserved")
    if name in ("wrmsr", "rdmsr"):
        return _msr(op)
    if name == "xsetbv":
        return _xsetbv(op)
    return None


def _privilege(op: Operation) -> Cause | None:
    view, name = op.view, op.mnemonic
    if view.cpl == 0 and not view.regs.rflags & RFLAGS.VM:
        return None
    system = name == "mov" and any(r[:2] in ("cr", "dr") for r in op.names)
    if name in _PRIVILEGED or system:
        return Cause(13, f"`{op}` is privileged, and CPL is {view.cpl}")
    iopl = view.regs.rflags >> 12 & 3
    if name in _IO:
        denied = _bitmap_denies(op)
        if denied and view.cpl > iopl:
            return Cause(13, f"`{op}`: CPL {view.cpl} is above IOPL {iopl}, and {denied}")
        if denied and not _iopl_counts():
            return Cause(13, f"`{op}`: {denied}, and this host ignores IOPL")
    if name in _IOPL and view.cpl > iopl:
        return Cause(13, f"`{op}` needs CPL <= IOPL, and CPL is {view.cpl}, IOPL {iopl}")
    if name in ("rdtsc", "rdtscp") and view.sregs.cr4 & CR4.TSD:
        return Cause(13, f"`{op}`: CR4.TSD keeps it from CPL{view.cpl}")
    return None


def _iopl_counts() -> bool:
    """Whether this host's KVM lets IOPL grant ports; asked only when it matters."""
    from pykvm.probe import cpl3_ports

    try:
        return cpl3_ports("iopl")
    except PykvmError:
        return True


def _bitmap_denies(op: Operation) -> str:
    """SDM vol. 1 section 19.5.2."""
    view, tr = op.view, op.view.sregs.tr
    immediate = next((o.imm for o in op.operands if o.type == 2), None)
    port = int(view.regs.rdx) & 0xFFFF if immediate is None else int(immediate) & 0xFF
    size = next((int(o.size) for o in op.operands if o.type in (1, 3) and (o.type == 3 or op.insn.reg_name(o.reg) != "dx")), 1)
    start = int.from_bytes(view.read(tr.base + 102, 2), "little")
    at = start + port // 8
    if at + 1 > tr.limit:
        return f"the TSS's I/O bitmap ends before port {port:#x}"
    bits = int.from_bytes(view.read(tr.base + at, 2), "little")
    denied = bits >> port % 8 & (1 << size) - 1
    return f"the TSS's I/O bitmap denies port {port:#x}{f' ({size} bytes)' * (size > 1)}" if denied else ""


def _software_interrupt(op: Operation) -> Cause | None:
    name = op.mnemonic
    if name == "into":
        if not op.view.regs.rflags & RFLAGS.OF:
            return None
        return Cause(4, f"`{op}` calls vector 4", software=True)
    vector = {"int3": 3, "int1": 1}.get(name)
    if name == "int":
        vector = int(op.operands[0].imm) & 0xFF
    return None if vector is None else Cause(vector, f"`{op}` calls vector {vector}", software=True)


def divide_cause(op: Operation) -> Cause | None:
    """DIV and IDIV, computed (SDM vol. 2); their operand has been looked at."""
    if op.mnemonic not in ("div", "idiv") or not op.operands:
        return None
    size = int(op.operands[0].size)
    divisor = op.value(op.operands[0])
    if divisor is None:
        return None
    regs, mask = op.view.regs, (1 << 8 * size) - 1
    dividend = regs.rax & 0xFFFF if size == 1 else (regs.rdx & mask) << 8 * size | regs.rax & mask
    what = op.insn.op_str
    if not divisor & mask:
        return Cause(0, f"`{op}` divides by zero: {what} is 0")
    if op.mnemonic == "div":
        fits = dividend // divisor <= mask
    else:
        signed, by = _signed(dividend, 16 * size), _signed(divisor, 8 * size)
        quotient = abs(signed) // abs(by) * (1 if (signed < 0) == (by < 0) else -1)
        fits = -(1 << 8 * size - 1) <= quotient < 1 << 8 * size - 1
    return None if fits else Cause(0, f"`{op}` overflows: {dividend:#x} / {divisor:#x} does not fit in {8 * size} bits")


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 & 1 else value


# --- control registers (SDM vol. 2 at MOV to control registers, vol. 3 sections 2.5, 4.1, 9.8.5) --------------------------------------


def _control_register(op: Operation, name: str, value: int) -> Cause | None:
    view = op.view
    if view.bits != 64:
        value &= 0xFFFFFFFF
    find = {"cr0": _cr0, "cr3": _cr3, "cr4": _cr4, "cr8": _cr8}.get(name)
    why = find(view, value) if find else ""
    return Cause(13, f"`{op}` ({name.upper()} = {value:#x}): {why}") if why else None


def _cr0(view: CpuView, value: int) -> str:
    s = view.sregs
    on = value & CR0.PG and not s.cr0 & CR0.PG
    if value >> 32:
        return "bits 63 to 32 are reserved"
    if value & CR0.PG and not value & CR0.PE:
        return "paging (PG) is set without protection (PE)"
    if value & CR0.NW and not value & CR0.CD:
        return "NW is set without CD"
    if on and s.efer & EFER.LME and not s.cr4 & CR4.PAE:
        return "CR0.PG is set with EFER.LME but CR4.PAE clear: long mode needs PAE"
    if on and s.efer & EFER.LME and s.cs.l:
        return "long mode is turned on while CS.L is set"
    if not value & CR0.PG and s.cr0 & CR0.PG:
        if view.bits == 64:
            return "paging cannot be turned off in 64-bit mode"
        if s.cr4 & CR4.PCIDE:
            return "paging cannot be turned off while CR4.PCIDE is set"
    if on and s.cr4 & CR4.PAE and not s.efer & EFER.LME:
        return _pdptes(view, int(s.cr3))
    return ""


def _pdptes(view: CpuView, cr3: int) -> str:
    """PAE paging loads four entries at once (SDM vol. 3 section 4.4.1)."""
    for i in range(4):
        at = (cr3 & 0xFFFF_FFE0) + 8 * i
        raw = view.memory.read(at, 8) if view.backed(at) and view.backed(at + 7) else b"\xff" * 8
        entry = int.from_bytes(raw, "little")
        if entry & 1 and entry & 0xFFF0_0000_0000_01E6:
            return f"PDPT entry {i} at {at:#x} has reserved bits set ({entry:#x})"
    return ""


def _cr3(view: CpuView, value: int) -> str:
    s = view.sregs
    if view.bits == 64:
        width = view.cpuid(0x80000008, "eax") & 0xFF or 36
        reserved = value & ~((1 << width) - 1) & (~(1 << 63) if s.cr4 & CR4.PCIDE else -1)
        return f"bits above the {width} physical address bits are reserved ({reserved:#x})" if reserved else ""
    if s.cr0 & CR0.PG and s.cr4 & CR4.PAE and not s.efer & EFER.LMA:
        return _pdptes(view, value)
    return ""


def _cr4(view: CpuView, value: int) -> str:
    s = view.sregs
    reserved = value & _CR4_RESERVED
    if reserved:
        return f"reserved bits are set ({reserved:#x})"
    for bit, (leaf, register, n) in _CR4_NEEDS.items():
        if value & bit and not view.cpuid(leaf, register) >> n & 1:
            return f"{bit_names('cr4', bit)} is set, and this vCPU's CPUID does not have it"
    if s.efer & EFER.LMA:
        if not value & CR4.PAE:
            return "PAE cannot be cleared in long mode"
        if (value ^ s.cr4) & CR4.LA57:
            return "LA57 cannot be changed in long mode"
    if value & CR4.PCIDE and not s.cr4 & CR4.PCIDE:
        if not s.efer & EFER.LMA:
            return "PCIDE is set outside long mode"
        if s.cr3 & 0xFFF:
            return f"PCIDE is set while bits 11 to 0 of CR3 are {s.cr3 & 0xFFF:#x}"
    return ""


def _cr8(view: CpuView, value: int) -> str:
    return "bits 63 to 4 are reserved" if value >> 4 else ""


# --- MSRs and XCR0 ------------------------------------------------------------------------------------------------------------------


def _msr(op: Operation) -> Cause | None:
    view, index = op.view, int(op.view.regs.rcx) & 0xFFFFFFFF
    name = msr_name(index) if index in MSRS.values() else ""
    what = f"MSR {index:#x}" + (f" ({name})" if name else "")
    verb = "reads" if op.mnemonic == "rdmsr" else "writes"
    try:
        view.vcpu.get_msr(index)
    except KvmError:
        return Cause(13, f"`{op}` {verb} {what}, which this vCPU does not have")
    if verb == "reads":
        return None
    value = (int(view.regs.rdx) & 0xFFFFFFFF) << 32 | int(view.regs.rax) & 0xFFFFFFFF
    why = ""
    if index in _ADDRESSES and not canonical(view, value):
        why = "the address is not canonical"
    elif index == MSRS["IA32_EFER"]:
        why = _efer(view, value)
    elif index == MSRS["IA32_PAT"]:
        bad = [i for i in range(8) if value >> 8 * i & 0xFF not in (0, 1, 4, 5, 6, 7)]
        why = f"entry {bad[0]} is {value >> 8 * bad[0] & 0xFF:#x}, which is no memory type" if bad else ""
    elif index == MSRS["IA32_TSC_AUX"] and value >> 32:
        why = "bits 63 to 32 are reserved"
    return Cause(13, f"`{op}` writes {value:#x} to {what}: {why}") if why else None


def _efer(view: CpuView, value: int) -> str:
    old, cpuid = int(view.sregs.efer), view.cpuid(0x80000001, "edx")
    if value & ~_EFER_KNOWN:
        return f"reserved bits are set ({value & ~_EFER_KNOWN:#x})"
    if value & EFER.NXE and not cpuid >> 20 & 1:
        return "NXE is set, and this vCPU's CPUID does not have it"
    if value & EFER.LME and not cpuid >> 29 & 1:
        return "LME is set, and this vCPU's CPUID does not have it"
    if value & EFER.SVME and not view.cpuid(0x80000001, "ecx") >> 2 & 1:
        return "SVME is set, and this vCPU's CPUID does not have it"
    if (value ^ old) & EFER.LME and view.paging:
        return "LME cannot be changed while paging is on"
    return ""


def _xsetbv(op: Operation) -> Cause | None:
    view, index = op.view, int(op.view.regs.rcx) & 0xFFFFFFFF
    value = (int(view.regs.rdx) & 0xFFFFFFFF) << 32 | int(view.regs.rax) & 0xFFFFFFFF
    offered = view.cpuid(0xD, "eax") | view.cpuid(0xD, "edx") << 32
    why = ""
    if index:
        why = f"ECX is {index:#x}, and there is only XCR0"
    elif not value & 1:
        why = "bit 0 (x87) must be set"
    elif value & 6 == 4:
        why = "bit 2 (AVX) needs bit 1 (SSE)"
    elif value & ~offered:
        why = f"CPUID leaf 0xd offers {offered:#x}, and not {value & ~offered:#x}"
    elif value & 0xE0 and value & 0xE6 != 0xE6:
        why = "AVX-512 needs bits 1, 2 and 5 to 7 together"
    return Cause(13, f"`{op}` writes {value:#x} to XCR{index}: {why}") if why else None
