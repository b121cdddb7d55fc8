"""Which memory an instruction reads and writes, as far as its operands and the stack tell: linear addresses, before it runs.

Of a REP it is the first element. What XSAVE, FXSAVE, far transfers and exceptions touch besides is not told, nor are page tables and
descriptors.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.disasm import Insn
    from pykvm.x86.view import CpuView

__all__ = ["SHOWN", "read", "written"]

SHOWN = 64  # bytes of one operand, at most
_GENERAL = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16))}
_NOT_READ = ("lea", "nop", "prefetch")
_WORD = {16: 2, 32: 4, 64: 8}


def written(view: CpuView, insn: Insn | None) -> list[tuple[int, int]]:
    """(linear address, size) of what ``insn``, which is at ``view``, writes."""
    found = _decoded(view, insn)
    if found is None:
        return []
    import capstone

    places = _memory(view, found, capstone.CS_AC_WRITE)
    if found.mnemonic.startswith(("push", "call", "lcall")):
        places.append(_stack(view, -_WORD[view.bits]))
    return places


def read(view: CpuView, insn: Insn | None) -> list[tuple[int, int]]:
    """The same of what it reads."""
    found = _decoded(view, insn)
    if found is None or found.mnemonic.startswith(_NOT_READ):
        return []
    import capstone

    places = _memory(view, found, capstone.CS_AC_READ)
    if found.mnemonic.startswith(("pop", "ret", "iret")):
        places.append(_stack(view, 0))
    elif found.mnemonic == "leave":
        places.append(_stack(view, int(view.regs.rbp) - int(view.regs.rsp)))
    return places


def _decoded(view: CpuView, insn: Insn | None) -> Any:
    import capstone

    if insn is None:
        return None
    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[view.bits]
    engine = capstone.Cs(capstone.CS_ARCH_X86, mode)
    engine.detail = True
    return next(engine.disasm(insn.bytes, insn.address, 1), None)


def _memory(view: CpuView, found: Any, access: int) -> list[tuple[int, int]]:
    from capstone import x86

    result, mask = [], (1 << view.bits) - 1
    for operand in found.operands:
        if operand.type == x86.X86_OP_MEM and operand.access & access:
            m = operand.mem
            address = m.disp + sum(_value(view, found.reg_name(r), found) * scale for r, scale in ((m.base, 1), (m.index, m.scale)) if r)
            segment = _segment(found, m)
            base = int(getattr(view.sregs, segment).base) if view.bits != 64 or segment in ("fs", "gs") else 0
            result.append((base + (address & mask) & (1 << 64 if view.bits == 64 else 1 << 32) - 1, min(operand.size, SHOWN)))
    return result


def _segment(found: Any, m: Any) -> str:
    if m.segment:
        return str(found.reg_name(m.segment))
    base = found.reg_name(m.base) if m.base else ""
    if base in ("edi", "di") and found.mnemonic.rpartition(" ")[2].startswith(("stos", "movs", "ins", "scas", "cmps")):
        return "es"
    return "ss" if base in ("ebp", "esp", "bp") else "ds"


def _stack(view: CpuView, offset: int) -> tuple[int, int]:
    """A word of the stack, so far from RSP."""
    base = 0 if view.bits == 64 else int(view.sregs.ss.base)
    return base + (int(view.regs.rsp) + offset & (1 << view.bits) - 1), _WORD[view.bits]


def _value(view: CpuView, name: str, insn: Any) -> int:
    """A register as an address is made of it."""
    if name in ("rip", "eip"):
        return int(insn.address + insn.size)
    wide = "r" + name[1:] if name.startswith("e") else name
    if wide in _GENERAL:
        return int(getattr(view.regs, wide)) & (0xFFFFFFFF if name.startswith("e") else (1 << 64) - 1)
    if f"r{name}" in _GENERAL:  # bx, si ...
        return int(getattr(view.regs, f"r{name}")) & 0xFFFF
    if name[0] == "r" and name[-1] == "d":
        return int(getattr(view.regs, name[:-1])) & 0xFFFFFFFF
    return 0
