"""Segment descriptors: how far transfers load them, and LAR, LSL, VERR, VERW, which only look (SDM vol. 2; vol. 3 sections 3.4.5, 5.10)."""

from __future__ import annotations

from pykvm.x86.assist.cpu import GP, UD, Cpu, Fault
from pykvm.x86.regs import EFER, RFLAGS
from pykvm.x86.view import Descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.abi import Struct
    from pykvm.x86.assist.finish import Instruction
    from pykvm.x86.operation import Operation

__all__ = ["INSTRUCTIONS", "load_code_segment", "load_segment", "read_descriptor"]

# System descriptors that LAR and LSL take, by type (SDM vol. 2 at LAR, LSL)
_LAR, _LAR_LONG = (1, 2, 3, 4, 5, 9, 11, 12), (2, 9, 11, 12)
_LSL, _LSL_LONG = (1, 2, 3, 9, 11), (2, 9, 11)


def _find(cpu: Cpu, selector: int) -> Descriptor | None:
    """The descriptor of a selector that is not null; None beyond its table's limit."""
    table = cpu.sregs.gdt
    base, limit = int(table.base), int(table.limit)
    if selector & 4:
        ldt = cpu.sregs.ldt
        base, limit = int(ldt.base), int(ldt.limit) if ldt.present and not ldt.unusable else -1
    if (selector & ~7) + 7 > limit:
        return None
    return Descriptor(int.from_bytes(cpu.load_linear(base + (selector & ~7), 8, system=True), "little"))


def read_descriptor(cpu: Cpu, selector: int) -> Descriptor:
    """The descriptor that a far transfer loads; #GP for a selector that leads to none."""
    if selector & ~3 == 0:
        raise Fault(GP, 0)
    found = _find(cpu, selector)
    if found is None:
        raise Fault(GP, selector & ~3)
    return found


def load_code_segment(cpu: Cpu, selector: int, found: Descriptor) -> None:
    """CS; RPL is that of ``selector``."""
    load_segment(cpu, cpu.sregs.cs, selector, found)


def load_segment(cpu: Cpu, segment: Struct, selector: int, found: Descriptor) -> None:
    """A segment register; the descriptor's accessed bit is set (SDM vol. 3 section 3.4.5.1)."""
    if not found.type & 1:
        base = int(cpu.sregs.ldt.base if selector & 4 else cpu.sregs.gdt.base)
        cpu.store_linear(base + (selector & ~7) + 5, bytes((found.value >> 40 & 0xFF | 1,)), system=True)
    segment.selector, segment.base, segment.limit = selector, found.base, found.limit
    segment.type, segment.s, segment.dpl, segment.present = found.type | 1, 1, found.dpl, 1
    segment.l, segment.db, segment.g, segment.avl, segment.unusable = found.l, found.db, found.value >> 55 & 1, found.value >> 52 & 1, 0
    cpu.sregs_changed = True


def _visible(cpu: Cpu, op: Operation, selector: int, system: tuple[int, ...]) -> Descriptor | None:
    """The descriptor, where its type and privilege let it be looked at from CPL0 with the selector's RPL."""
    if cpu.mode == "real":
        raise Fault(UD)
    found = _find(cpu, selector) if selector & ~3 else None
    if found is None or (not found.s and found.type not in system):
        return None
    if not found.is_conforming and found.dpl < selector & 3:
        return None
    return found


def _selector(cpu: Cpu, op: Operation) -> int:
    """The last operand; in memory it has two bytes, whatever the other one's size."""
    operand = op.operands[-1]
    if operand.type == 3:
        access = op.address(operand)
        access.size = 2
        return int.from_bytes(cpu.load(access), "little")
    return cpu.get(operand) & 0xFFFF


def _lar(cpu: Cpu, op: Operation) -> None:
    found = _visible(cpu, op, _selector(cpu, op), _LAR_LONG if cpu.sregs.efer & EFER.LMA else _LAR)
    if found is not None:
        cpu.put(op.operands[0], found.value >> 32 & 0xFFFF00)
    cpu.set_flags(RFLAGS.ZF, RFLAGS.ZF * (found is not None))


def _lsl(cpu: Cpu, op: Operation) -> None:
    found = _visible(cpu, op, _selector(cpu, op), _LSL_LONG if cpu.sregs.efer & EFER.LMA else _LSL)
    if found is not None:
        cpu.put(op.operands[0], found.limit)
    cpu.set_flags(RFLAGS.ZF, RFLAGS.ZF * (found is not None))


def _verr(cpu: Cpu, op: Operation) -> None:
    found = _visible(cpu, op, _selector(cpu, op), ())
    cpu.set_flags(RFLAGS.ZF, RFLAGS.ZF * (found is not None and found.is_readable))


def _verw(cpu: Cpu, op: Operation) -> None:
    found = _visible(cpu, op, _selector(cpu, op), ())
    cpu.set_flags(RFLAGS.ZF, RFLAGS.ZF * (found is not None and found.is_writable))


INSTRUCTIONS: dict[str, Instruction] = {"lar": _lar, "lsl": _lsl, "verr": _verr, "verw": _verw}
