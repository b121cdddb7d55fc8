"""INT n, INT3, INTO, INT1: through the IDT or the real-mode vector table, step by step (SDM vol. 2 at INT n, vol. 3 section 6.12).

KVM_SET_VCPU_EVENTS could inject a software exception, but what RIP it pushes then differs by vendor and kernel.
"""

from __future__ import annotations

from pykvm.x86.assist.cpu import GP, NP, SS, Cpu, Declined, Fault
from pykvm.x86.assist.descriptors import load_code_segment, read_descriptor
from pykvm.x86.regs import EFER, RFLAGS
from pykvm.x86.view import Gate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.assist.finish import Instruction
    from pykvm.x86.operation import Operation

__all__ = ["INSTRUCTIONS"]

_IDT = 2  # error code bit 1: the selector index is one into the IDT (SDM vol. 3 figure 6-7)
_TASK_GATE, _INTERRUPT_16, _TRAP_16, _INTERRUPT, _TRAP = 5, 6, 7, 14, 15


def _int(cpu: Cpu, op: Operation) -> None:
    _deliver(cpu, int(op.operands[0].imm) & 0xFF)


def _int3(cpu: Cpu, op: Operation) -> None:
    _deliver(cpu, 3)


def _int1(cpu: Cpu, op: Operation) -> None:
    _deliver(cpu, 1)


def _into(cpu: Cpu, op: Operation) -> None:
    if cpu.regs.rflags & RFLAGS.OF:
        _deliver(cpu, 4)


def _deliver(cpu: Cpu, vector: int) -> None:
    cpu.jumped = True
    if cpu.mode == "real":
        _through_vector_table(cpu, vector)
    else:
        _through_gate(cpu, vector)


def _through_vector_table(cpu: Cpu, vector: int) -> None:
    """SDM vol. 3 section 21.1.4."""
    if 4 * vector + 3 > cpu.sregs.idt.limit:
        raise Fault(GP)
    entry = cpu.load_linear(int(cpu.sregs.idt.base) + 4 * vector & 0xFFFFFFFF, 4, system=True)
    flags = int(cpu.regs.rflags)
    _push(cpu, [flags, int(cpu.sregs.cs.selector), cpu.next_rip], 2)
    cpu.set_flags(RFLAGS.IF | RFLAGS.TF | RFLAGS.AC, 0)
    cpu.next_rip = int.from_bytes(entry[:2], "little")
    cpu.sregs.cs.selector = int.from_bytes(entry[2:], "little")
    cpu.sregs.cs.base = int(cpu.sregs.cs.selector) << 4
    cpu.sregs_changed = True


def _gate(cpu: Cpu, vector: int, long: bool) -> Gate:
    width = 16 if long else 8
    code = vector << 3 | _IDT
    if width * vector + width - 1 > cpu.sregs.idt.limit:
        raise Fault(GP, code)
    at = int(cpu.sregs.idt.base) + width * vector
    gate = Gate(int.from_bytes(cpu.load_linear(at, width, system=True), "little"), width)
    if gate.type not in ((_INTERRUPT, _TRAP) if long else (_TASK_GATE, _INTERRUPT_16, _TRAP_16, _INTERRUPT, _TRAP)):
        raise Fault(GP, code)
    if not gate.p:  # the gate's DPL is never below CPL here, which is 0
        raise Fault(NP, code)
    if gate.type == _TASK_GATE:
        raise Declined(f"vector {vector} has a task gate")
    return gate


def _through_gate(cpu: Cpu, vector: int) -> None:
    """Without a change of privilege: CPL is 0 already."""
    long = bool(cpu.sregs.efer & EFER.LMA)
    gate = _gate(cpu, vector, long)
    found = read_descriptor(cpu, gate.selector)
    if not found.is_code or found.dpl:
        raise Fault(GP, gate.selector & ~3)
    if not found.p:
        raise Fault(NP, gate.selector & ~3)
    if long and (not found.l or found.db):
        raise Fault(GP, gate.selector & ~3)
    back = [int(cpu.regs.rflags), int(cpu.sregs.cs.selector), cpu.next_rip]
    if long:
        rsp = int(cpu.regs.rsp) if not gate.ist else _interrupt_stack(cpu, gate.ist)
        _push_frame(cpu, rsp & ~15, [int(cpu.sregs.ss.selector), int(cpu.regs.rsp), *back])
        if not cpu.canonical(gate.offset):
            raise Fault(GP, 0)
        cpu.next_rip = gate.offset
    else:
        width = 4 if gate.type & 8 else 2
        offset = gate.offset & (1 << 8 * width) - 1
        _push(cpu, back, width)
        if offset > found.limit:
            raise Fault(GP, 0)
        cpu.next_rip = offset
    load_code_segment(cpu, gate.selector & ~3, found)
    cpu.set_flags(RFLAGS.TF | RFLAGS.NT | RFLAGS.VM | (RFLAGS.IF if gate.type in (_INTERRUPT, _INTERRUPT_16) else 0), 0)


def _interrupt_stack(cpu: Cpu, ist: int) -> int:
    at = 28 + 8 * ist
    if at + 7 > cpu.sregs.tr.limit:
        raise Fault(10, int(cpu.sregs.tr.selector) & ~3)  # #TS
    return int.from_bytes(cpu.load_linear(int(cpu.sregs.tr.base) + at, 8, system=True), "little")


def _push_frame(cpu: Cpu, rsp: int, values: list[int]) -> None:
    """The frame of long mode: 8 bytes each, on a stack that was aligned."""
    rsp = rsp - 8 * len(values) & (1 << 64) - 1
    if not cpu.canonical(rsp) or not cpu.canonical(rsp + 8 * len(values) - 1 & (1 << 64) - 1):
        raise Fault(SS, 0)
    cpu.store_linear(rsp, b"".join(value.to_bytes(8, "little") for value in reversed(values)), system=True)
    cpu.regs.rsp = rsp


def _push(cpu: Cpu, values: list[int], width: int) -> None:
    """Onto the stack of real or protected mode, whose pointer has as many bits as SS says."""
    ss = cpu.sregs.ss
    mask = 0xFFFFFFFF if ss.db and cpu.mode != "real" else 0xFFFF
    rsp = int(cpu.regs.rsp)
    for value in values:
        rsp = rsp & ~mask | rsp - width & mask
        access = cpu.op.place("ss", rsp & mask, width, True, True)
        cpu.store(access, (value & (1 << 8 * width) - 1).to_bytes(width, "little"))
    cpu.regs.rsp = rsp


INSTRUCTIONS: dict[str, Instruction] = {"int": _int, "int3": _int3, "int1": _int1, "into": _into}
