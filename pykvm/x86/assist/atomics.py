"""CMPXCHG16B, and stores of a whole cache line (SDM vol. 2)."""

from __future__ import annotations

from pykvm.abi import ffi, lib
from pykvm.x86.assist.cpu import Cpu
from pykvm.x86.regs import RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.assist.finish import Instruction
    from pykvm.x86.operation import Operation

__all__ = ["INSTRUCTIONS"]


def _cmpxchg16b(cpu: Cpu, op: Operation) -> None:
    """One atomic access to guest memory, with LOCK or without: other vCPUs see all of it or nothing."""
    access = op.address(op.operands[0], True)
    access.size = 16
    cpu.probe_write(access, align=16)
    regs = cpu.regs
    value = ffi.new("uint64_t[2]", (int(regs.rax), int(regs.rdx)))
    gpa, hva = cpu.atomic_place(access)
    equal = lib.pykvm_cmpxchg16(ffi.cast("void *", hva), value, int(regs.rbx), int(regs.rcx))
    cpu.view.memory.mark_written(gpa, 16)
    if not equal:
        regs.rax, regs.rdx = value[0], value[1]
    cpu.set_flags(RFLAGS.ZF, RFLAGS.ZF * equal)


def _movdiri(cpu: Cpu, op: Operation) -> None:
    cpu.put(op.operands[0], cpu.get(op.operands[1]))


def _movdir64b(cpu: Cpu, op: Operation) -> None:
    """64 bytes to ES:register, which is aligned to 64."""
    to, source = op.operands
    read = op.address(source)
    read.size = 64
    offset = op.register(op.insn.reg_name(to.reg)) & (1 << 8 * op.insn.addr_size) - 1
    cpu.store(op.place("es", offset, 64, True), cpu.load(read), align=64)


INSTRUCTIONS: dict[str, Instruction] = {"cmpxchg16b": _cmpxchg16b, "movdiri": _movdiri, "movdir64b": _movdir64b}
