"""What can be wrong with the memory that an instruction touches (SDM vol. 3 sections 4.6, 4.7, 5.3; vol. 1 section 3.3.7.1)."""

from __future__ import annotations

from pykvm.debug.causes import Cause
from pykvm.x86.regs import CR0, CR4, EFER, RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.operation import Access, Operation
    from pykvm.x86.paging import Walk
    from pykvm.x86.view import CpuView

__all__ = ["canonical", "data_cause", "page_fault", "table_cause"]


def canonical(view: CpuView, address: int) -> bool:
    """Whether an address of 64-bit mode is canonical."""
    top = 56 if view.sregs.cr4 & CR4.LA57 else 47
    return address >> top in (0, (1 << 64 - top) - 1)


def page_fault(view: CpuView, linear: int, size: int, *, write: bool = False, fetch: bool = False, system: bool = False) -> tuple[int, str]:
    """(address, why) of the page fault that an access makes; why is empty when it makes none. ``system``: done as CPL0 whatever CPL is."""
    if not view.paging:
        return linear, ""
    user = view.cpl == 3 and not system
    wp = bool(view.sregs.cr0 & CR0.WP)
    last = linear + max(size, 1) - 1
    for at in (linear,) if linear >> 12 == last >> 12 else (linear, last & ~0xFFF):
        walk = view.walk(at)
        why = walk.denies(write=write, user=user, fetch=fetch and bool(view.sregs.efer & EFER.NXE), wp=wp)
        if not why and walk.user and not user:
            if fetch and view.sregs.cr4 & CR4.SMEP:
                why = "the page is the user's, and CR4.SMEP keeps the supervisor from executing it"
            elif not fetch and view.sregs.cr4 & CR4.SMAP and not view.regs.rflags & RFLAGS.AC:
                why = "the page is the user's, and CR4.SMAP with RFLAGS.AC clear keeps the supervisor from it"
        if why:
            return at, why + _loop(walk)
    return linear, ""


def _loop(walk: Walk) -> str:
    """A remark when a table is met twice on the way down."""
    seen: dict[int, str] = {}
    for entry in walk.entries:
        table = entry.gpa & ~0xFFF
        if table in seen and len(walk.entries) > 2:
            return f"; the tables loop: the {seen[table]} at gpa {table:#x} is its own {entry.level}"
        seen[table] = entry.level
    return ""


def table_cause(view: CpuView, linear: int, size: int, what: str) -> Cause | None:
    """A page fault on the CPU's own way to a descriptor table."""
    at, why = page_fault(view, linear, size, system=True)
    return Cause(14, f"{what} at {at:#x} cannot be read: {why}", at) if why else None


def data_cause(op: Operation, access: Access) -> Cause | None:
    """What is wrong with one access, in the CPU's order: segment or canonical form, alignment, pages."""
    return _segment(op, access) or _alignment(op, access) or _pages(op, access)


def _segment(op: Operation, access: Access) -> Cause | None:
    view, name = op.view, access.segment
    vector = 12 if name == "ss" else 13
    what = f"`{op}` {'pushes to' if access.stack and access.write else 'pops from' if access.stack else 'uses'}"
    if view.bits == 64:
        if not canonical(view, access.linear):
            return Cause(vector, f"{what} {access.linear:#x}, which is not canonical")
        return None
    segment = getattr(view.sregs, name)
    title = name.upper()
    if view.mode != "real" and (segment.unusable or (segment.selector & ~3 == 0 and not segment.present)):
        return Cause(vector if name == "ss" else 13, f"`{op}` uses {title}, which holds a null selector ({segment.selector:#x})")
    if view.mode != "real":
        code = segment.type & 8
        if access.write and (code or not segment.type & 2):
            return Cause(13, f"`{op}` writes through {title} ({segment.selector:#x}), a {'code' if code else 'read-only data'} segment")
        if not access.write and code and not segment.type & 2:
            return Cause(13, f"`{op}` reads through {title} ({segment.selector:#x}), a code segment that may only be executed")
    last, limit = access.offset + access.size - 1, int(segment.limit)
    if view.mode != "real" and segment.type & 0xC == 4:  # expand-down: the limit is the last offset outside
        top = 0xFFFFFFFF if segment.db else 0xFFFF
        if access.offset <= limit or last > top:
            return Cause(
                vector,
                f"`{op}` reaches offset {access.offset:#x} of {title} ({segment.selector:#x}), an expand-down segment, "
                f"which holds only offsets above its limit {limit:#x}",
            )
    elif last > limit:
        return Cause(vector, f"`{op}` reaches offset {last:#x} of {title} ({segment.selector:#x}), beyond the segment's limit {limit:#x}")
    return None


def _alignment(op: Operation, access: Access) -> Cause | None:
    need = op.alignment(access.size)
    if access.linear % need:
        base = next((op.insn.reg_name(o.mem.base) for o in op.operands if o.type == 3 and o.mem.base), "")
        holds = f"{base.upper()} is {op.register(base):#x}" if base and base != "rip" else f"it is at {access.linear:#x}"
        if base and op.register(base) != access.linear and base != "rip":
            holds += f", so it is at {access.linear:#x}"
        return Cause(13, f"`{op}` needs a {need}-byte aligned operand and {holds}")
    checked = op.view.cpl == 3 and op.view.sregs.cr0 & CR0.AM and op.view.regs.rflags & RFLAGS.AC
    if checked and access.size in (2, 4, 8) and access.linear % access.size:
        return Cause(17, f"`{op}` uses {access.linear:#x}, which is not aligned, while CR0.AM and RFLAGS.AC check it")
    return None


def _pages(op: Operation, access: Access) -> Cause | None:
    at, why = page_fault(op.view, access.linear, access.size, write=access.write)
    if not why:
        return None
    does = ("pushes to" if access.write else "pops from") if access.stack else "writes to" if access.write else "reads"
    return Cause(14, f"`{op}` {does} {at:#x}: {why}", at)
