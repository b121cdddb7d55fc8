"""KVM_GUESTDBG_SINGLESTEP sets the guest's own RFLAGS.TF: what the stepped instruction has saved of RFLAGS must not keep it.

PUSHF, SYSCALL and the frame of an exception would hand it to the guest, which takes #DB as soon as it gets its flags back.
"""

from __future__ import annotations

from pykvm.x86.regs import EFER, RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.vcpu import VCPU
    from pykvm.x86.view import CpuView

__all__ = ["hide_trap_flag"]

_PUSHF = (b"\x9c", b"\x66\x9c", b"\x48\x9c")
_SYSCALL = b"\x0f\x05"


def hide_trap_flag(before: CpuView, code: bytes, vcpu: VCPU, in_handler: bool) -> None:
    """After a step of ``code`` from ``before``; ``in_handler``: it has led to the handler of an exception or interrupt."""
    if before.regs.rflags & RFLAGS.TF or not (in_handler or code.startswith((*_PUSHF, _SYSCALL))):
        return
    from pykvm.x86.view import CpuView

    now = CpuView(vcpu, before.memory)
    if in_handler:
        at = _saved_flags(before, now)
        if at is not None:
            _clear(now, at)
    elif code.startswith(_SYSCALL):
        now.regs.r11 &= ~RFLAGS.TF
        vcpu.set_regs(now.regs)
    elif now.regs.rsp != before.regs.rsp:
        _clear(now, _stack(now))


def _stack(view: CpuView) -> int:
    return int(view.regs.rsp if view.bits == 64 else view.sregs.ss.base + view.regs.rsp & 0xFFFFFFFF)


def _saved_flags(before: CpuView, now: CpuView) -> int | None:
    """Where the frame on the stack has RFLAGS: behind RIP and CS, and an error code for some vectors (SDM vol. 3 section 6.12.1)."""
    top = _stack(now)
    for size in (2,) if now.mode == "real" else (8,) if now.sregs.efer & EFER.LMA else (4, 2):
        for at in (top, top + size):
            frame = now.read(at, 3 * size)
            rip, cs = int.from_bytes(frame[:size], "little"), int.from_bytes(frame[size : size + 2], "little")
            if len(frame) == 3 * size and cs == before.sregs.cs.selector and 0 <= rip - (before.regs.rip & (1 << 8 * size) - 1) < 16:
                return at + 2 * size
    return None


def _clear(view: CpuView, at: int) -> None:
    gpa = view.walk(at + 1).gpa  # TF is bit 0 of the second byte
    if gpa is not None and view.memory.contains(gpa, 1):
        view.memory.write_u8(gpa, view.memory.read_u8(gpa) & ~(RFLAGS.TF >> 8))
