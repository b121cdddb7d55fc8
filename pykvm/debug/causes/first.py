"""The first exception of the instruction at RIP, found in the order in which the CPU looks (SDM vol. 3 table 6-2)."""

from __future__ import annotations

from pykvm.debug.causes import Cause, name_of
from pykvm.debug.causes.control import control_cause, divide_cause
from pykvm.debug.causes.delivery import came_by
from pykvm.debug.causes.features import feature_cause
from pykvm.debug.causes.memory import canonical, data_cause, page_fault
from pykvm.debug.causes.segments import segment_cause
from pykvm.x86.operation import Operation
from pykvm.x86.regs import RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.view import CpuView

__all__ = ["first_exception", "strayed_here", "way_here"]


def first_exception(view: CpuView) -> Cause:
    """What the instruction at RIP raises; ``vector`` None, with a sentence, when no reason is found."""
    cause = _fetch(view)
    if cause:
        return cause
    op = Operation.here(view)
    if op is None:
        return _undecoded(view)
    for find in (feature_cause, control_cause, segment_cause, _memory, divide_cause, _branch):
        cause = find(op)
        if cause:
            return cause
    if view.regs.rflags & RFLAGS.TF:
        return Cause(1, f"RFLAGS.TF is set, so each instruction ends in #DB; `{op}` at {view.rip:#x} was next")
    said = f"`{op}` at {view.rip:#x} was next, and nothing is found in its operands and the CPU's state that makes it fault"
    for access in op.accesses():
        gpa = view.walk(access.linear).gpa
        if gpa is not None and not view.backed(gpa):
            what = "its stack is at" if access.stack else "it writes to" if access.write else "it reads"
            return Cause(None, f"{said}; {what} gpa {gpa:#x}, where there is no memory, so what it found there is not known")
    return Cause(None, said)


def _fetch(view: CpuView) -> Cause | None:
    rip = int(view.regs.rip)
    if view.bits == 64:
        if not canonical(view, rip):
            return Cause(13, f"RIP {rip:#x} is not canonical{way_here(view)}")
    elif rip > view.sregs.cs.limit:
        return Cause(13, f"RIP {rip:#x} is beyond the limit {view.sregs.cs.limit:#x} of CS{way_here(view)}")
    at, why = page_fault(view, view.rip, 1, fetch=True)
    if why:
        return Cause(14, f"the instruction at {at:#x} cannot be fetched: {why}{way_here(view)}", at)
    gpa = view.walk(view.rip).gpa
    if gpa is not None and not view.backed(gpa):
        return Cause(None, f"RIP {view.rip:#x} is gpa {gpa:#x}, where the guest has no memory{way_here(view)}")
    return None


def _undecoded(view: CpuView) -> Cause:
    data = view.read(view.rip, 15)
    next_page = (view.rip | 0xFFF) + 1
    if len(data) < 15 and view.rip + len(data) == next_page:
        at, why = page_fault(view, next_page, 1, fetch=True)
        if why:
            return Cause(14, f"the instruction at {view.rip:#x} goes on at {at:#x}, which cannot be fetched: {why}", at)
    return Cause(6, f"the bytes {data[:8].hex(' ')} at RIP {view.rip:#x} are no instruction{way_here(view)}")


def _memory(op: Operation) -> Cause | None:
    for access in op.accesses():
        cause = data_cause(op, access)
        if cause:
            return cause
    return None


def _branch(op: Operation) -> Cause | None:
    """A near jump, call or return whose target the CPU refuses before it goes there."""
    if op.mnemonic not in ("jmp", "call", "ret"):
        return None
    view = op.view
    if op.mnemonic == "ret":
        target = op.slots(0, 1, 8 if view.bits == 64 else op.operand_size)[0]
    else:
        target = op.value(op.operands[0])
    if target is None:
        return None
    if view.bits == 64 and not canonical(view, target & (1 << 64) - 1):
        return Cause(13, f"`{op}` goes to {target:#x}, which is not canonical")
    if view.bits != 64 and target & 0xFFFFFFFF > view.sregs.cs.limit:
        return Cause(13, f"`{op}` goes to {target:#x}, beyond the limit {view.sregs.cs.limit:#x} of CS")
    return None


def way_here(view: CpuView) -> str:
    """How RIP came to be what it is, as far as the stack tells: an exception or INT n, a call, or a return."""
    came = came_by(view)
    if came is not None:
        return _led(*came)
    width = 8 if view.bits == 64 else view.bits // 8
    base = 0 if view.bits == 64 else int(view.sregs.ss.base)
    rsp = int(view.regs.rsp) if view.bits != 16 else int(view.regs.rsp) & 0xFFFF
    top = view.read(base + rsp, width)
    if len(top) == width:
        back = int.from_bytes(top, "little")
        for length in (2, 3, 5, 6, 7):
            caller = view.at(rip=back - length) if back >= length else None
            op = None if caller is None else Operation.here(caller)
            if caller is not None and op is not None and op.mnemonic == "call" and len(op.bytes) == length:
                target = op.value(op.operands[0])
                if target is not None and target == view.regs.rip:
                    return f", where `{op}` at {caller.rip:#x} has led"
    if rsp >= width:
        popped = view.read(base + rsp - width, width)
        if len(popped) == width and int.from_bytes(popped, "little") == view.regs.rip:
            return ", which is what a return has found on the stack"
    return ""


def strayed_here(view: CpuView) -> str:
    """The same for a guest that has run on since, through zeros: by which vector it came."""
    came = came_by(view, strayed=True)
    return "" if came is None else _led(*came)


def _led(vector: int, before: CpuView) -> str:
    cause = first_exception(before)
    if cause.vector == vector:
        return f", where vector {vector} has led: {cause}"
    return f", where {name_of(vector)} at {before.rip:#x} has led"
