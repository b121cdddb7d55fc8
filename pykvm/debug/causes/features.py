"""Whether an instruction exists in this state: #UD and #NM (SDM vol. 2 sections 2.4 to 2.7, vol. 3 sections 2.5, 13.1; vol. 1 13.3)."""

from __future__ import annotations

from pykvm.debug.causes import Cause
from pykvm.x86.regs import CR0, CR4, EFER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.operation import Operation

__all__ = ["feature_cause"]

# capstone's group -> (CPUID leaf, register, bit)
_CPUID = {
    "avx": (1, "ecx", 28), "avx2": (7, "ebx", 5), "avx512": (7, "ebx", 16), "bmi": (7, "ebx", 3), "bmi2": (7, "ebx", 8),
    "fma": (1, "ecx", 12), "f16c": (1, "ecx", 29), "aes": (1, "ecx", 25), "pclmul": (1, "ecx", 1), "sha": (7, "ebx", 29),
    "sse3": (1, "ecx", 0), "ssse3": (1, "ecx", 9), "sse41": (1, "ecx", 19), "sse42": (1, "ecx", 20),
}  # fmt: skip
_VMX = ("vmlaunch", "vmresume", "vmptrld", "vmptrst", "vmclear", "vmread", "vmwrite", "vmxoff", "invept", "invvpid")
_LOCKABLE = (
    "add", "adc", "and", "btc", "btr", "bts", "cmpxchg", "cmpxchg8b", "cmpxchg16b", "dec", "inc", "neg", "not", "or", "sbb", "sub", "xadd",
    "xchg", "xor",
)  # fmt: skip
_PROTECTED_ONLY = ("lldt", "ltr", "sldt", "str", "verr", "verw", "lar", "lsl", "arpl")


def feature_cause(op: Operation) -> Cause | None:
    """Why the CPU does not know the instruction, or does not let it near the FPU; None when it does."""
    return _plain(op) or _vector(op) or _x87(op)


def _plain(op: Operation) -> Cause | None:
    name, view = op.mnemonic, op.view
    cr4, efer = view.sregs.cr4, view.sregs.efer
    if name in ("ud2", "ud1", "ud0", "ud2b"):
        return Cause(6, f"`{op}` raises #UD on purpose")
    if op.locked and not (op.writes_memory and name in _LOCKABLE):
        return Cause(6, f"`{op}`: LOCK is for instructions that read, change and write memory")
    why = ""
    if name in ("xsetbv", "xgetbv", "xsave", "xsave64", "xrstor", "xrstor64", "xsaveopt", "xsavec", "xsaves", "xrstors"):
        if not cr4 & CR4.OSXSAVE:
            why = "CR4.OSXSAVE is clear"
    elif name in ("syscall", "sysret", "sysretq") and not efer & EFER.SCE:
        why = "EFER.SCE is clear"
    elif name == "rsm":
        why = "it exists in system management mode only"
    elif name in _VMX and not cr4 & CR4.VMXE:
        why = "CR4.VMXE is clear"
    elif name in _PROTECTED_ONLY and view.mode == "real":
        why = "it does not exist in real mode"
    elif name == "mov" and op.target == "cs":
        why = "CS can be loaded by far transfers only"
    elif name == "mov" and any(r in op.names for r in ("cr1", "cr5", "cr6", "cr7", "cr9", "cr10", "cr11", "cr12", "cr13", "cr14", "cr15")):
        why = "there is no such control register"
    elif name == "mov" and cr4 & CR4.DE and ("dr4" in op.names or "dr5" in op.names):
        why = "CR4.DE makes DR4 and DR5 undefined"
    elif name in ("rdfsbase", "rdgsbase", "wrfsbase", "wrgsbase") and not cr4 & CR4.FSGSBASE:
        why = "CR4.FSGSBASE is clear"
    return Cause(6, f"`{op}`: {why}") if why else None


def _vector(op: Operation) -> Cause | None:
    """SSE, AVX and AVX-512: CR0.EM, CR4.OSFXSR, CR4.OSXSAVE, XCR0, CPUID, CR0.TS."""
    view = op.view
    cr0, cr4 = view.sregs.cr0, view.sregs.cr4
    wide = [r for r in op.names if r.startswith(("xmm", "ymm", "zmm"))]
    if not wide and op.mnemonic not in ("ldmxcsr", "stmxcsr", "vzeroupper", "vzeroall", "vldmxcsr", "vstmxcsr"):
        return None
    why = ""
    if op.vex:
        evex = op.bytes[0] == 0x62
        need = 0xE6 if evex else 6
        if view.mode == "real":
            why = "VEX encodings do not exist in real mode"
        elif not cr4 & CR4.OSXSAVE:
            why = f"AVX needs CR4.OSXSAVE, which is clear (CR4 = {cr4:#x})"
        elif view.xcr0 & need != need:
            why = f"{'AVX-512' if evex else 'AVX'} needs bits {need:#x} of XCR0, which is {view.xcr0:#x}"
    elif cr0 & CR0.EM:
        why = f"SSE needs CR0.EM clear (CR0 = {cr0:#x})"
    elif not cr4 & CR4.OSFXSR:
        why = f"SSE needs CR4.OSFXSR, which is clear (CR4 = {cr4:#x})"
    if not why:
        for group in sorted(op.groups & _CPUID.keys()):
            leaf, register, bit = _CPUID[group]
            if not view.cpuid(leaf, register) >> bit & 1:
                why = f"this vCPU's CPUID has no {group.upper()} (leaf {leaf}, {register.upper()} bit {bit})"
    if why:
        return Cause(6, f"`{op}`: {why}")
    return Cause(7, f"`{op}`: CR0.TS is set, so SSE and AVX raise #NM until the state is switched (CLTS)") if cr0 & CR0.TS else None


def _x87(op: Operation) -> Cause | None:
    cr0 = op.view.sregs.cr0
    if op.mnemonic in ("wait", "fwait"):
        both = CR0.MP | CR0.TS
        return Cause(7, f"`{op}`: CR0.MP and CR0.TS are set") if cr0 & both == both else None
    if op.mnemonic == "emms" or any(r.startswith("mm") for r in op.names):
        if cr0 & CR0.EM:
            return Cause(6, f"`{op}`: MMX needs CR0.EM clear (CR0 = {cr0:#x})")
    elif 0xD8 <= op.opcode[0] <= 0xDF:
        if cr0 & CR0.EM:
            return Cause(7, f"`{op}`: CR0.EM is set: there is no x87 to use (CR0 = {cr0:#x})")
    elif not op.mnemonic.startswith(("fxsave", "fxrstor")):
        return None
    return Cause(7, f"`{op}`: CR0.TS is set, so the FPU raises #NM until its state is switched (CLTS)") if cr0 & CR0.TS else None
