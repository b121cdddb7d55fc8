"""The way through the IDT: why an exception did not reach a handler (SDM vol. 3 sections 6.11 to 6.14; real mode 21.1)."""

from __future__ import annotations

from pykvm.debug.causes.memory import canonical, page_fault
from pykvm.x86.modes import HAS_ERROR_CODE, REAL_MODE_LIMIT
from pykvm.x86.regs import EFER, RFLAGS
from pykvm.x86.view import Descriptor, Gate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.view import CpuView

__all__ = ["came_by", "undeliverable"]


def undeliverable(view: CpuView, vector: int, software: bool = False) -> str:
    """Why ``vector`` cannot be delivered; empty when nothing is in its way. ``software``: it comes from INT n."""
    table = view.sregs.idt
    if view.mode == "real":
        return f"beyond the vector table's limit {table.limit:#x}" if 4 * vector + 3 > table.limit else ""
    if table.limit == 0:
        return "the IDT limit is 0, so there are no handlers"
    if (table.base, table.limit) == (0, REAL_MODE_LIMIT):
        return f"the guest has loaded no IDT: IDTR still holds the real-mode vectors (base 0, limit {REAL_MODE_LIMIT:#x})"
    gate = view.gate_entry(vector)
    if isinstance(gate, str):
        return f"its IDT entry is {gate}"
    long = bool(view.sregs.efer & EFER.LMA)
    if gate.type not in ((14, 15) if long else (5, 6, 7, 14, 15)):
        return f"its IDT entry is of a type that is no gate here: {gate.kind} (type {gate.type:#x})"
    if software and gate.dpl < view.cpl:
        return f"its gate's DPL {gate.dpl} keeps CPL {view.cpl} from calling it"
    if not gate.p:
        return "its gate is not present (P = 0)"
    if gate.type == 5:
        return ""  # a task gate: the task switch is not followed here
    return _handler(view, vector, gate, long)


def _handler(view: CpuView, vector: int, gate: Gate, long: bool) -> str:
    said = f"its gate's code segment {gate.selector:#x} is "
    if gate.selector & ~3 == 0:
        return f"{said}null"
    found = view.entry(gate.selector)
    if isinstance(found, str):
        return said + found
    if not found.is_code:
        return f"{said}{found.kind}, no code"
    if found.dpl > view.cpl:
        return f"{said}less privileged (DPL {found.dpl}) than CPL {view.cpl}"
    if not found.p:
        return f"{said}not present"
    if long and (not found.l or found.db):
        return f"{said}{found.kind}, and handlers in long mode are 64-bit"
    stack = _stack(view, vector, gate, found, long)
    if stack:
        return stack
    if long and not canonical(view, gate.offset):
        return f"its handler {gate.offset:#x} is not canonical"
    if not long and gate.offset > found.limit:
        return f"its handler {gate.offset:#x} is beyond the limit {found.limit:#x} of its code segment"
    return ""


def _stack(view: CpuView, vector: int, gate: Gate, code: Descriptor, long: bool) -> str:
    """Where the frame is to be pushed, and whether it can be."""
    inner = not code.is_conforming and code.dpl < view.cpl
    name, rsp = "RSP", int(view.regs.rsp)
    if long:
        at = 28 + 8 * gate.ist if gate.ist else 4 + 8 * code.dpl if inner else 0
        if at:
            name = f"IST{gate.ist}" if gate.ist else f"RSP{code.dpl}"
            value = _from_tss(view, at, 8)
            if isinstance(value, str):
                return f"its stack is {name} of the TSS, {value}"
            rsp, name = value, f"{name} of the TSS"
        size = 8 * (5 + (vector in HAS_ERROR_CODE))
        rsp &= ~15
        if not canonical(view, rsp - size & (1 << 64) - 1):
            return f"its frame goes below {name} = {rsp:#x}, which is not canonical"
        base = 0
    else:
        width = 4 if gate.type & 8 else 2
        size = width * (3 + (vector in HAS_ERROR_CODE))
        ss = view.sregs.ss
        base = int(ss.base)
        if inner:
            size += 2 * width
            name = f"ESP{code.dpl} of the TSS"
            value = _from_tss(view, 4 + 8 * code.dpl, 4)
            selector = _from_tss(view, 8 + 8 * code.dpl, 2)
            if isinstance(value, str) or isinstance(selector, str):
                return f"its stack is {name}, {value}"
            found = view.entry(selector)
            if isinstance(found, str):
                return f"its stack segment, SS{code.dpl} of the TSS, is {selector:#x}: {found}"
            rsp, base = value, found.base
        else:
            rsp &= 0xFFFFFFFF if ss.db else 0xFFFF
            if rsp - size < 0 or (ss.type & 0xC != 4 and rsp - 1 > ss.limit) or (ss.type & 0xC == 4 and rsp - size <= ss.limit):
                return f"its frame goes below ESP = {rsp:#x}, outside SS, whose limit is {ss.limit:#x}"
    top = base + rsp & ((1 << 64) - 1 if long else 0xFFFFFFFF)
    first = top - size & ((1 << 64) - 1 if long else 0xFFFFFFFF)
    at, why = page_fault(view, first, size, write=True, system=True)
    if why:
        return f"its frame goes below {name} = {rsp:#x}, and {at:#x} cannot be written: {why}"
    gpa = view.walk(first).gpa
    if gpa is not None and not view.backed(gpa):
        return f"its frame goes below {name} = {rsp:#x}, to gpa {gpa:#x}, where there is no memory"
    return ""


def _from_tss(view: CpuView, at: int, size: int) -> int | str:
    """A field of the TSS, or why there is none."""
    tr = view.sregs.tr
    if tr.unusable or tr.selector & ~3 == 0:
        return f"and no TSS is loaded (TR = {tr.selector:#x})"
    if at + size - 1 > tr.limit:
        return f"beyond the TSS's limit {tr.limit:#x}"
    walk = view.walk(tr.base + at)
    data = view.read(tr.base + at, size)
    if len(data) < size:
        return f"and the TSS at {tr.base:#x} cannot be read: {walk.fault or 'there is no memory'}"
    return int.from_bytes(data, "little")


def came_by(view: CpuView, strayed: bool = False) -> tuple[int, CpuView] | None:
    """When RIP is the first instruction of a handler whose frame is on the stack: the vector, and the CPU as it was interrupted.

    ``strayed``: RIP may have gone on from there, through zeros.
    """
    if view.mode == "real":
        return _came_by_ivt(view, strayed)
    long = bool(view.sregs.efer & EFER.LMA)
    width = 16 if long else 8
    for vector in range(min(256, (view.sregs.idt.limit + 1) // width)):
        gate = view.gate_entry(vector)
        if isinstance(gate, str):
            return None
        if gate.p and gate.type & 0x17 in (6, 7) and gate.offset == view.regs.rip and gate.selector & ~3 == view.sregs.cs.selector & ~3:
            slot = 8 if long else 4 if gate.type & 8 else 2
            start = int(view.regs.rsp) + (0 if long else int(view.sregs.ss.base)) + slot * (vector in HAS_ERROR_CODE)
            data = view.read(start, 5 * slot)
            if len(data) < 5 * slot:
                return None
            rip, cs, flags, rsp, _ = (int.from_bytes(data[i * slot : (i + 1) * slot], "little") for i in range(5))
            if not isinstance(view.entry(cs & 0xFFFF), Descriptor):
                return None
            if not long and cs & 3 == view.cpl:
                rsp = int(view.regs.rsp) + slot * (3 + (vector in HAS_ERROR_CODE))
            return vector, view.at(rip=rip, cs=cs & 0xFFFF, rflags=flags, rsp=rsp)
    return None


def _came_by_ivt(view: CpuView, strayed: bool) -> tuple[int, CpuView] | None:
    cs, ss, sp = int(view.sregs.cs.selector), view.sregs.ss, int(view.regs.rsp) & 0xFFFF
    data = view.read(int(ss.base) + sp, 6)
    if len(data) < 6:
        return None
    ip, from_cs, flags = (int.from_bytes(data[i : i + 2], "little") for i in (0, 2, 4))
    if not flags & RFLAGS.FIXED:
        return None  # no frame: bit 1 of FLAGS is always set
    here = int(view.regs.rip) & 0xFFFF

    def led(vector: int) -> bool:
        target = view.read(view.sregs.idt.base + 4 * vector, 4)
        offset, segment = int.from_bytes(target[:2], "little"), int.from_bytes(target[2:], "little")
        return len(target) == 4 and segment == cs and (offset <= here if strayed else offset == here)

    before = view.at(rip=ip, cs=from_cs, rflags=flags, rsp=sp + 6)
    called = view.read(before.rip - 2, 2)
    if len(called) == 2 and called[0] == 0xCD and led(called[1]):
        return called[1], view.at(rip=ip - 2, cs=from_cs, rflags=flags, rsp=sp + 6)
    from pykvm.debug.causes.first import first_exception

    vector = first_exception(before).vector
    return None if vector is None or not led(vector) else (vector, before)
