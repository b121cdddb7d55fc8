"""System instructions: RDTSCP, CLAC, STAC, INVPCID, MONITOR, MWAIT, cache hints, and those that are #UD while their feature is off."""

from __future__ import annotations

from pykvm.x86.assist.cpu import GP, UD, Cpu, Declined, Fault
from pykvm.x86.regs import CR4, MSR_TSC, RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.assist.finish import Instruction
    from pykvm.x86.operation import Operation

__all__ = ["INSTRUCTIONS"]

MSR_TSC_AUX = 0xC0000103
SMXE, CET = 1 << 14, 1 << 23  # of CR4


def _rdtscp(cpu: Cpu, op: Operation) -> None:
    tsc, aux = cpu.view.vcpu.get_msr(MSR_TSC), cpu.view.vcpu.get_msr(MSR_TSC_AUX)
    cpu.regs.rax, cpu.regs.rdx, cpu.regs.rcx = tsc & 0xFFFFFFFF, tsc >> 32, aux & 0xFFFFFFFF


def _clac(cpu: Cpu, op: Operation) -> None:
    cpu.set_flags(RFLAGS.AC, 0)


def _stac(cpu: Cpu, op: Operation) -> None:
    cpu.set_flags(RFLAGS.AC, RFLAGS.AC)


def _invpcid(cpu: Cpu, op: Operation) -> None:
    """Whatever its type, all translations go: more than was asked for is allowed (SDM vol. 3 section 4.10.4.1)."""
    kind, descriptor = op.operands
    access = op.address(descriptor)
    access.size = 16
    data = cpu.load(access)
    which, pcid, linear = cpu.get(kind), int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")
    if which > 3 or pcid >> 12 or (which < 2 and pcid and not cpu.sregs.cr4 & CR4.PCIDE):
        raise Fault(GP, cpu.code())
    if which == 0 and cpu.bits == 64 and not cpu.canonical(linear):
        raise Fault(GP, cpu.code())
    before = int(cpu.sregs.cr4)
    cpu.sregs.cr4 = before ^ CR4.PGE  # KVM forgets what it has translated when CR4.PGE changes
    cpu.view.vcpu.set_sregs(cpu.sregs)
    cpu.sregs.cr4 = before
    cpu.sregs_changed = True


def _nothing(cpu: Cpu, op: Operation) -> None:
    """MWAIT may end at once; there is no shadow stack to read."""


def _monitor(cpu: Cpu, op: Operation) -> None:
    """It touches a byte at DS:rAX as a read would; that nothing is watched then is for MWAIT to say, which ends at once."""
    if op.register("ecx"):
        raise Fault(GP, cpu.code())
    width = int(op.insn.addr_size) * 8
    cpu.load(op.place("ds", int(cpu.regs.rax) & (1 << width) - 1, 1, False))


def _cache_hint(cpu: Cpu, op: Operation) -> None:
    """CLWB and the like: memory is coherent here; the address must be one that can be read."""
    access = op.address(op.operands[0])
    access.size = 1
    cpu.load(access)


def _undefined(cpu: Cpu, op: Operation) -> None:
    raise Fault(UD)


def _undefined_without(bit: int) -> Instruction:
    def check(cpu: Cpu, op: Operation) -> None:
        if cpu.sregs.cr4 & bit:
            raise Declined(f"user space does not know `{op}` while it is switched on in CR4")
        raise Fault(UD)

    return check


def _shadow_stack_hint(cpu: Cpu, op: Operation) -> None:
    """RDSSP does nothing while there are no shadow stacks."""
    if cpu.sregs.cr4 & CET:
        raise Declined("shadow stacks are on")


INSTRUCTIONS: dict[str, Instruction] = {
    "rdtscp": _rdtscp, "clac": _clac, "stac": _stac, "invpcid": _invpcid, "monitor": _monitor, "mwait": _nothing,
    "clwb": _cache_hint, "clflushopt": _cache_hint, "rdsspd": _shadow_stack_hint, "rdsspq": _shadow_stack_hint,
    "ud0": _undefined, "ud1": _undefined, "getsec": _undefined_without(SMXE), "incsspd": _undefined_without(CET),
    "incsspq": _undefined_without(CET), "rdpkru": _undefined_without(CR4.PKE), "wrpkru": _undefined_without(CR4.PKE),
}  # fmt: skip
