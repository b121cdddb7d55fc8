"""IRET in 16- and 32-bit protected mode, to the same privilege or to less (SDM vol. 2 at IRET). KVM's emulator has the other modes."""

from __future__ import annotations

from pykvm.x86.assist.cpu import GP, NP, SS, Cpu, Declined, Fault
from pykvm.x86.assist.descriptors import load_code_segment, load_segment, read_descriptor
from pykvm.x86.regs import EFER, RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.assist.finish import Instruction
    from pykvm.x86.operation import Operation

__all__ = ["INSTRUCTIONS"]

_FLAGS = 0x254FD5 | RFLAGS.IOPL | RFLAGS.IF | RFLAGS.NT | RFLAGS.RF  # all that there are but VM, VIF, VIP


def _iret(cpu: Cpu, op: Operation) -> None:
    if cpu.mode == "real" or cpu.sregs.efer & EFER.LMA:
        raise Declined("IRET is done here in protected mode only")
    if cpu.regs.rflags & RFLAGS.NT:
        raise Declined("IRET with RFLAGS.NT set is a task switch")
    width = op.operand_size
    popped = _pop(cpu, op, 3, width)
    ip, selector, flags = popped
    selector &= 0xFFFF
    if width == 4 and flags & RFLAGS.VM:
        raise Declined("IRET goes to virtual-8086 mode")
    found = read_descriptor(cpu, selector)
    rpl = selector & 3
    if not found.is_code or (found.dpl > rpl if found.is_conforming else found.dpl != rpl):
        raise Fault(GP, selector & ~3)
    if not found.p:
        raise Fault(NP, selector & ~3)
    above = 3 * width
    if rpl:
        sp, stack = _pop(cpu, op, 5, width)[3:]
        _load_outer_stack(cpu, stack & 0xFFFF, rpl)
    if ip > found.limit:
        raise Fault(GP, 0)
    load_code_segment(cpu, selector, found)
    if rpl:
        mask = 0xFFFFFFFF if cpu.sregs.ss.db else 0xFFFF
        cpu.regs.rsp = int(cpu.regs.rsp) & ~mask & 0xFFFFFFFF | sp & mask
        _drop_inner_segments(cpu, rpl)
    else:
        mask = 0xFFFFFFFF if cpu.sregs.ss.db else 0xFFFF
        cpu.regs.rsp = int(cpu.regs.rsp) & ~mask | int(cpu.regs.rsp) + above & mask
    cpu.next_rip = ip
    cpu.set_flags(_FLAGS & (1 << 8 * width) - 1, flags)
    cpu.unmasks_nmi, cpu.clears_rf = True, False


def _pop(cpu: Cpu, op: Operation, count: int, width: int) -> list[int]:
    return [int.from_bytes(cpu.load(op.stack(i * width, width, False)), "little") for i in range(count)]


def _load_outer_stack(cpu: Cpu, selector: int, rpl: int) -> None:
    if selector & ~3 == 0:
        raise Fault(GP, 0)
    found = read_descriptor(cpu, selector)
    if selector & 3 != rpl or not found.is_writable or found.dpl != rpl:
        raise Fault(GP, selector & ~3)
    if not found.p:
        raise Fault(SS, selector & ~3)
    load_segment(cpu, cpu.sregs.ss, selector, found)


def _drop_inner_segments(cpu: Cpu, cpl: int) -> None:
    """Segments that the outer level may not use become null (SDM vol. 2 at IRET, RETURN-TO-OUTER-PRIVILEGE-LEVEL)."""
    for name in ("ds", "es", "fs", "gs"):
        segment = getattr(cpu.sregs, name)
        if segment.present and not segment.unusable and segment.dpl < cpl and segment.type & 0xC != 0xC:
            segment.selector, segment.base, segment.limit, segment.type, segment.present, segment.unusable = 0, 0, 0, 0, 0, 1


INSTRUCTIONS: dict[str, Instruction] = {"iretd": _iret, "iret": _iret}
