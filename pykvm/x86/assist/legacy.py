"""Old ones that KVM's emulator lacks: AAA, AAS, DAA, ARPL, BOUND, and ENTER with nesting (SDM vol. 2)."""

from __future__ import annotations

from pykvm.x86.assist.cpu import UD, Cpu, Fault
from pykvm.x86.regs import CR0, RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.assist.finish import Instruction
    from pykvm.x86.operation import Operation

__all__ = ["INSTRUCTIONS"]

BR = 5
_BOTH = RFLAGS.AF | RFLAGS.CF


def _adjust(cpu: Cpu, op: Operation, by: int) -> None:
    """AAA (``by`` 0x106) and AAS: a digit, and AH counts what is carried."""
    ax = op.register("ax")
    carry = (ax & 0xF) > 9 or bool(cpu.regs.rflags & RFLAGS.AF)
    if carry:
        ax += by
    cpu.set_register("ax", ax & 0xFF0F)
    cpu.set_flags(_BOTH, _BOTH * carry)


def _aaa(cpu: Cpu, op: Operation) -> None:
    _adjust(cpu, op, 0x106)


def _aas(cpu: Cpu, op: Operation) -> None:
    _adjust(cpu, op, -0x106)


def _daa(cpu: Cpu, op: Operation) -> None:
    al, flags = op.register("al"), int(cpu.regs.rflags)
    low = (al & 0xF) > 9 or bool(flags & RFLAGS.AF)
    high = al > 0x99 or bool(flags & RFLAGS.CF)
    al = al + 6 * low + 0x60 * high & 0xFF
    cpu.set_register("al", al)
    parity = RFLAGS.PF * (al.bit_count() % 2 == 0)
    value = RFLAGS.AF * low | RFLAGS.CF * high | RFLAGS.ZF * (not al) | RFLAGS.SF * (al >> 7) | parity
    cpu.set_flags(_BOTH | RFLAGS.ZF | RFLAGS.SF | RFLAGS.PF, value)


def _arpl(cpu: Cpu, op: Operation) -> None:
    if cpu.mode == "real":
        raise Fault(UD)
    to, source = op.operands
    selector, rpl = cpu.get(to), cpu.get(source) & 3
    less = selector & 3 < rpl
    if less:
        cpu.put(to, selector & ~3 | rpl)
    cpu.set_flags(RFLAGS.ZF, RFLAGS.ZF * less)


def _bound(cpu: Cpu, op: Operation) -> None:
    index, bounds = op.operands
    size = int(index.size)
    access = op.address(bounds)
    access.size = 2 * size
    data = cpu.load(access)
    lower, upper = (int.from_bytes(data[i : i + size], "little", signed=True) for i in (0, size))
    value = int.from_bytes(cpu.get(index).to_bytes(size, "little"), "little", signed=True)
    if not lower <= value <= upper:
        raise Fault(BR)


def _enter(cpu: Cpu, op: Operation) -> None:
    """The frame pointers of the enclosing procedures are copied from the frame before."""
    room, level = int(op.operands[0].imm) & 0xFFFF, int(op.operands[1].imm) & 31
    flipped = 0x66 in op.prefixes
    width = (2 if flipped else 8) if cpu.bits == 64 else op.operand_size
    mask = (1 << (64 if cpu.bits == 64 else 32 if cpu.sregs.ss.db and cpu.sregs.cr0 & CR0.PE else 16)) - 1
    rsp, rbp = int(cpu.regs.rsp), int(cpu.regs.rbp)
    pushed = [rbp]
    for n in range(1, level):
        pushed.append(int.from_bytes(cpu.load(op.place("ss", rbp - n * width & mask, width, False, True)), "little"))
    frame = rsp - width & mask
    if level:
        pushed.append(frame)
    for n, value in enumerate(pushed, 1):
        access = op.place("ss", rsp - n * width & mask, width, True, True)
        cpu.store(access, (value & (1 << 8 * width) - 1).to_bytes(width, "little"))
    down = rsp - len(pushed) * width - room & mask
    cpu.probe_write(op.place("ss", down, width, True, True))
    kept = (1 << 8 * width) - 1
    cpu.regs.rbp = rbp & ~kept | frame & kept
    cpu.regs.rsp = rsp & ~mask | down


INSTRUCTIONS: dict[str, Instruction] = {
    "aaa": _aaa, "aas": _aas, "daa": _daa, "arpl": _arpl, "bound": _bound, "enter": _enter,
}  # fmt: skip
