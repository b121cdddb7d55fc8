"""Selectors: segment loads, far jumps, calls and returns, IRET, LTR, LLDT (SDM vol. 2 by name, vol. 3 chapter 5)."""

from __future__ import annotations

from pykvm.debug.causes import Cause
from pykvm.debug.causes.memory import canonical, data_cause, table_cause
from pykvm.x86.regs import EFER, RFLAGS
from pykvm.x86.view import Descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.operation import Operation
    from pykvm.x86.view import CpuView

__all__ = ["segment_cause"]

_DATA = ("ds", "es", "fs", "gs")
_SEGMENTS = ("ss", *_DATA)
_LOADS = {"lds": "ds", "les": "es", "lfs": "fs", "lgs": "gs", "lss": "ss"}


def segment_cause(op: Operation) -> Cause | None:
    """What is wrong with the selectors that an instruction loads. Its own memory is looked at first: that is where they come from."""
    name, view = op.mnemonic, op.view
    loads = (name in ("mov", "pop") and op.target in _SEGMENTS) or name in _LOADS
    far = name in ("lcall", "ljmp") or (op.opcode[0] == 0xFF and op.insn.modrm >> 3 & 7 in (3, 5))
    if not (loads or far or name in ("ltr", "lldt", "retf", "retfq", "iret", "iretd", "iretq")):
        return None
    for access in op.accesses():
        cause = data_cause(op, access)
        if cause:
            return cause
    if view.mode == "real":
        return None
    if loads:
        segment = _LOADS.get(name) or op.target
        selector = _loaded(op, segment)
        return None if selector is None else _load(op, segment, selector)
    if far:
        return _far(op)
    if name in ("ltr", "lldt"):
        value = op.value(op.operands[0])
        return None if value is None else _system(op, name, value & 0xFFFF)
    return _iret(op) if name.startswith("iret") else _retf(op)


def _table(op: Operation, selector: int) -> Cause | None:
    """A page fault where the descriptor is."""
    table = op.view.sregs.ldt if selector & 4 else op.view.sregs.gdt
    at = table.base + (selector & ~7)
    if (selector & ~7) + 7 > table.limit or (selector & 4 and (table.unusable or not table.present)):
        return None
    return table_cause(op.view, at, 8, f"`{op}` loads selector {selector:#x}, whose entry in the {'LDT' if selector & 4 else 'GDT'}")


def _described(op: Operation, what: str, selector: int) -> tuple[Descriptor | None, Cause | None]:
    """The descriptor, or why there is none to load."""
    table = _table(op, selector)
    if table:
        return None, table
    found = op.view.entry(selector)
    if isinstance(found, str):
        return None, Cause(13, f"`{op}` loads {what} with selector {selector:#x}, which is {found}")
    return found, None


def _loaded(op: Operation, segment: str) -> int | None:
    if op.mnemonic == "pop":
        return (op.slots(0, 1, 2) or [None])[0]
    if op.mnemonic in _LOADS:
        memory = op.address(op.operands[1])
        data = op.view.read(memory.linear + memory.size - 2, 2)
        return int.from_bytes(data, "little") if len(data) == 2 else None
    value = op.value(op.operands[1])
    return None if value is None else value & 0xFFFF


def _load(op: Operation, segment: str, selector: int, cpl: int | None = None) -> Cause | None:
    """SDM vol. 2 at MOV: loading SS, or DS, ES, FS, GS. ``cpl``: of where a return goes."""
    view = op.view
    cpl = view.cpl if cpl is None else cpl
    name, rpl = segment.upper(), selector & 3
    if selector & ~3 == 0:
        if segment != "ss":
            return None
        if view.bits == 64 and cpl < 3 and rpl == cpl:
            return None
        return Cause(13, f"`{op}` loads SS with a null selector ({selector:#x})")
    found, cause = _described(op, name, selector)
    if cause or found is None:
        return cause
    said = f"`{op}` loads {name} with selector {selector:#x}, "
    if segment == "ss":
        if rpl != cpl:
            return Cause(13, f"{said}whose RPL is {rpl}, and CPL is {cpl}")
        if not found.is_writable:
            return Cause(13, f"{said}which is {found.kind}, no writable data segment")
        if found.dpl != cpl:
            return Cause(13, f"{said}whose DPL is {found.dpl}, and CPL is {cpl}")
        return None if found.p else Cause(12, f"{said}which is not present")
    if not found.is_readable:
        return Cause(13, f"{said}which is {found.kind}: no data, and no code that may be read")
    if not found.is_conforming and max(rpl, cpl) > found.dpl:
        return Cause(13, f"{said}whose DPL is {found.dpl}: too privileged for RPL {rpl} and CPL {cpl}")
    return None if found.p else Cause(11, f"{said}which is not present")


def _system(op: Operation, name: str, selector: int) -> Cause | None:
    """LTR and LLDT."""
    view = op.view
    if selector & ~3 == 0:
        return Cause(13, f"`{op}`: LTR of a null selector ({selector:#x})") if name == "ltr" else None
    said = f"`{op}` with selector {selector:#x}: {name.upper()} of "
    if selector & 4:
        return Cause(13, f"{said}a selector of the LDT, where only the GDT's are allowed")
    table = _table(op, selector)
    if table:
        return table
    found = view.entry(selector)
    if isinstance(found, str):
        return Cause(13, f"{said}an entry {found}")
    if name == "lldt":
        if found.s or found.type != 2:
            return Cause(13, f"{said}what is {found.kind}, no LDT")
    elif not found.s and found.type in (3, 11):
        return Cause(
            13, f"{said}a busy TSS (its descriptor's type is {found.type:#x}: it is loaded already, or was never marked available)"
        )
    elif found.s or found.type not in ((9,) if view.sregs.efer & EFER.LMA else (1, 9)):
        return Cause(13, f"{said}what is {found.kind}, no available TSS")
    return None if found.p else Cause(11, f"{said}what is not present")


def _code(op: Operation, selector: int, *, back: bool = False) -> tuple[Descriptor | None, Cause | None]:
    """The code segment that a far transfer goes to; ``back``: a return, which may go to less privilege."""
    view, rpl = op.view, selector & 3
    verb = "returns to" if back else "goes to"
    if selector & ~3 == 0:
        return None, Cause(13, f"`{op}` {verb} a null CS selector ({selector:#x})")
    table = _table(op, selector)
    if table:
        return None, table
    found = view.entry(selector)
    said = f"`{op}` {verb} CS selector {selector:#x}, "
    if isinstance(found, str):
        return None, Cause(13, f"{said}which is {found}")
    if not found.s and not back and found.type in (4, 5, 12, 9, 1):
        return None, None if not view.sregs.efer & EFER.LMA or found.type == 12 else Cause(13, f"{said}which is {found.kind}")
    if not found.is_code:
        return None, Cause(13, f"{said}which is {found.kind}, no code segment")
    why = ""
    if view.sregs.efer & EFER.LMA and found.l and found.db:
        why = "which has both L and D set"
    elif back and rpl < view.cpl:
        why = f"whose RPL {rpl} is more privileged than CPL {view.cpl}"
    elif back and (found.dpl > rpl if found.is_conforming else found.dpl != rpl):
        why = f"whose DPL is {found.dpl} and whose RPL is {rpl}"
    elif not back and found.is_conforming and found.dpl > view.cpl:
        why = f"whose DPL is {found.dpl}, above CPL {view.cpl}"
    elif not back and not found.is_conforming and (rpl > view.cpl or found.dpl != view.cpl):
        why = f"whose DPL is {found.dpl} and whose RPL is {rpl}, and CPL is {view.cpl}"
    if why:
        return None, Cause(13, said + why)
    return found, None if found.p else Cause(11, f"{said}which is not present")


def _target(op: Operation, found: Descriptor, offset: int) -> Cause | None:
    if op.view.sregs.efer & EFER.LMA and found.l:
        if not canonical(op.view, offset):
            return Cause(13, f"`{op}` goes to RIP {offset:#x}, which is not canonical")
    elif offset > found.limit:
        return Cause(13, f"`{op}` goes to offset {offset:#x}, beyond the limit {found.limit:#x} of its code segment")
    return None


def _far(op: Operation) -> Cause | None:
    if len(op.operands) == 2:
        selector, offset = int(op.operands[0].imm), int(op.operands[1].imm)
    else:
        at = op.address(op.operands[0]).linear
        size = op.operand_size
        data = op.view.read(at, size + 2)
        if len(data) < size + 2:
            return None
        offset, selector = int.from_bytes(data[:size], "little"), int.from_bytes(data[size:], "little")
    found, cause = _code(op, selector & 0xFFFF)
    return cause or (_target(op, found, offset) if found else None)


def _retf(op: Operation) -> Cause | None:
    offset, selector = op.slots(0, 2, op.operand_size)
    if offset is None or selector is None:
        return None
    found, cause = _code(op, selector & 0xFFFF, back=True)
    if cause or found is None:
        return cause
    cpl = selector & 3
    if cpl > op.view.cpl:
        extra = int(op.operands[0].imm) if op.operands else 0
        _, stack = op.slots(2 * op.operand_size + extra, 2, op.operand_size)
        cause = None if stack is None else _returned_stack(op, found, stack & 0xFFFF, cpl)
    return cause or _target(op, found, offset)


def _iret(op: Operation) -> Cause | None:
    view: CpuView = op.view
    if view.regs.rflags & RFLAGS.NT:
        return Cause(13, f"`{op}` with RFLAGS.NT set, in long mode") if view.sregs.efer & EFER.LMA else None
    offset, selector, flags, _, stack = op.slots(0, 5, op.operand_size)
    if offset is None or selector is None or flags is None or (flags & RFLAGS.VM and not view.sregs.efer & EFER.LMA):
        return None
    found, cause = _code(op, selector & 0xFFFF, back=True)
    if cause or found is None:
        return cause
    cpl = selector & 3
    if view.bits == 64 or cpl > view.cpl:
        cause = None if stack is None else _returned_stack(op, found, stack & 0xFFFF, cpl)
    return cause or _target(op, found, offset)


def _returned_stack(op: Operation, code: Descriptor, selector: int, cpl: int) -> Cause | None:
    """The SS of a return (SDM vol. 2 at IRET: null is for 64-bit code below CPL3)."""
    if selector & ~3 == 0:
        if code.l and cpl < 3 and selector & 3 == cpl:
            return None
        to = f"CPL{cpl}" if code.l else "code that is not 64-bit"
        return Cause(13, f"`{op}` returns with a null SS selector ({selector:#x}) to {to}")
    return _load(op, "ss", selector, cpl)
