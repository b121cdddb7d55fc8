"""XGETBV, and XSAVE and XRSTOR in all their forms, which the CPU itself executes, with the guest's XCR0 (SDM vol. 1 chapter 13)."""

from __future__ import annotations

from pykvm.x86.assist.compute import raise_in
from pykvm.x86.assist.cpu import GP, NM, UD, Cpu, Declined, Fault
from pykvm.x86.assist.relocate import Encoding
from pykvm.x86.assist.scratch import CODE, DATA
from pykvm.x86.regs import CR0, CR4

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.assist.finish import Instruction
    from pykvm.x86.operation import Operation

__all__ = ["INSTRUCTIONS"]

_LEGACY_AND_HEADER = 576


def _check_enabled(cpu: Cpu) -> None:
    if not cpu.sregs.cr4 & CR4.OSXSAVE:
        raise Fault(UD)


def _xgetbv(cpu: Cpu, op: Operation) -> None:
    _check_enabled(cpu)
    index, value = op.register("ecx"), cpu.view.xcr0
    if index == 1:
        value &= cpu.fpu.present
    elif index:
        raise Fault(GP, cpu.code())
    cpu.regs.rax, cpu.regs.rdx = value & 0xFFFFFFFF, value >> 32


def _area(cpu: Cpu, wanted: int) -> int:
    """Bytes of the standard format with these parts; the compacted one is never longer (SDM vol. 1 section 13.4)."""
    size = _LEGACY_AND_HEADER
    for part in range(2, 63):
        if wanted >> part & 1:
            bytes, offset = cpu.view.cpuid(0xD, "eax", part), cpu.view.cpuid(0xD, "ebx", part)
            if not bytes:
                raise Declined(f"CPUID does not tell where part {part} of the XSAVE area is")
            size = max(size, offset + bytes)
    return size


def _transfer(cpu: Cpu, op: Operation) -> None:
    """What is saved or restored, is: all of the area goes to where the CPU executes it, and comes back."""
    _check_enabled(cpu)
    if cpu.sregs.cr0 & CR0.TS:
        raise Fault(NM)
    xcr0 = cpu.view.xcr0
    access = op.address(op.operands[0])
    access.size = _area(cpu, xcr0 & (int(cpu.regs.rdx) << 32 | int(cpu.regs.rax) & 0xFFFFFFFF))
    saves = op.mnemonic.startswith("xsave")
    if saves:
        cpu.probe_write(access, align=64)
    data = cpu.load(access, align=64)
    vector, data = cpu.scratch.run(Encoding(op.bytes, cpu.bits).moved(CODE, DATA), cpu.regs, cpu.fpu, data, xcr0)
    if vector in (UD, GP):  # reserved bits in what is loaded; KVM may have taken the #GP for something to emulate
        raise Fault(GP, cpu.code())
    if vector is not None:
        raise_in(cpu, vector)
    if saves:
        cpu.store(access, data)


INSTRUCTIONS: dict[str, Instruction] = {
    "xgetbv": _xgetbv,
    **dict.fromkeys(("xsave", "xsave64", "xsaveopt", "xsaveopt64", "xsavec", "xsavec64", "xrstor", "xrstor64"), _transfer),
}
