"""The explainer: why a guest stopped, in words. The first line is the cause; evidence follows.

Mode and CPL, registers, disassembly around RIP with symbols, the page walk of RIP (and of the address that faulted), the IDT and GDT
entries concerned. Causes are derived in debug/causes/; docs/debugging.md says what is told on which host.
"""

from __future__ import annotations

from pykvm import exits
from pykvm.abi import lib
from pykvm.debug.causes import VECTORS, Cause, name_of
from pykvm.debug.causes.delivery import undeliverable
from pykvm.debug.causes.first import first_exception, strayed_here, way_here
from pykvm.debug.causes.replay import Replay
from pykvm.debug.insn import insn_rip
from pykvm.disasm import window
from pykvm.errors import GuestImageError, PykvmError
from pykvm.symbols import Symbols
from pykvm.x86.operation import Operation
from pykvm.x86.regs import CR0, CR4, EFER, RFLAGS, format_regs
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.machine import Machine
    from pykvm.runner import Stop

__all__ = ["VECTORS", "explain_stop"]

_RESET = (0xFFFFFFF0, 0xF000)  # linear RIP and CS after a reset
_RESET_SAID = "this host (AMD-V) resets the vCPU at a triple fault"
_PF_BITS = (
    (1, "the page is present but its rights forbid it", "the page is not present"),
    (2, "a write", "a read"),
    (4, "from CPL3", "from the supervisor"),
)


class _Told:
    """A sentence, the vectors whose gates matter, the linear address whose walk matters, and a note on where all this is from."""

    def __init__(self, first: str, vectors: tuple[int, ...] = (), linear: int | None = None, note: str = "") -> None:
        self.first, self.vectors, self.linear, self.note = first, vectors, linear, note


def explain_stop(machine: Machine, stop: Stop) -> str:
    """All of it, as text. ``stop`` is a crash or a time limit."""
    vcpu = stop.vcpu or machine.vcpu
    view = CpuView(vcpu, machine.memory)
    try:
        symbols = machine.symbols()
    except GuestImageError:
        symbols = Symbols({})
    if stop.exit is None and stop.reason == "crash" and stop.code is not None:
        return _reported_exception(view, symbols, stop.code)
    if isinstance(stop.exit, exits.Shutdown) and (view.rip, view.sregs.cs.selector) == _RESET:
        with Replay(machine) as replay:
            if replay.view is None:
                return _text(machine, view, stop, _lost(replay.why), symbols)
            return _text(machine, replay.view, stop, _replayed(replay.view, replay.steps), symbols)
    return _text(machine, view, stop, _cause(machine, view, stop), symbols)


def _text(machine: Machine, view: CpuView, stop: Stop, told: _Told, symbols: Symbols) -> str:
    lines = [told.first, ""]
    if told.note:
        lines += [told.note, ""]
    if isinstance(stop.exit, exits.InternalError):
        why = machine.why_not_assisted(view.vcpu)
        lines += [f"user space did not finish it: {why}", ""] if why else []
    if stop.exit is not None:
        lines.append(f"exit: {stop.exit!r}")
    which = f"vCPU {view.vcpu.id}: " if machine.cpus > 1 else ""
    lines.append(f"{which}{view.mode} mode, {view.bits}-bit code, CPL{view.cpl}")
    lines.append(format_regs(view.regs, view.sregs))
    lines += ["", "code:", window(view.read, _place(machine, view, stop), view.bits, symbols=symbols)]
    if view.paging:
        lines += ["", "walk of RIP:", view.walk(view.rip).explain()]
        if told.linear is not None and told.linear != view.rip:
            lines += [f"walk of {told.linear:#x}:", view.walk(told.linear).explain()]
        if 14 in told.vectors and view.sregs.cr2 not in (told.linear, 0):
            lines += ["walk of CR2:", view.walk(view.sregs.cr2).explain()]
    if told.vectors:
        lines += ["", *(view.gate(vector) for vector in told.vectors)]
    if view.mode != "real":
        lines.append(f"CS: {view.descriptor(view.sregs.cs.selector)}")
    return "\n".join(lines)


def _place(machine: Machine, view: CpuView, stop: Stop) -> int:
    """Where the instruction is that made the last exit, when one did; else RIP."""
    if view.vcpu is not (stop.vcpu or machine.vcpu):
        return view.rip
    exit = stop.exit if stop.exit is not None or stop.reason == "timeout" else exits.decode(view.vcpu.native)
    at = None if exit is None else insn_rip(view, exit)
    return view.rip if at is None else at


def _cause(machine: Machine, view: CpuView, stop: Stop) -> _Told:
    match stop.exit:
        case exits.Shutdown():
            return _triple_fault(view)
        case exits.InternalError(suberror=1) as error:
            return _emulation_failure(view, error)
        case exits.InternalError() as error:
            return _internal_error(view, error)
        case exits.FailEntry() as failed:
            return _Told(_fail_entry(view, failed))
        case exits.MemoryFault() as fault:
            return _Told(f"the host memory behind gpa {fault.gpa:#x} ({fault.size} bytes) cannot be reached: was its mapping taken away?")
        case None if stop.reason == "timeout" and machine.pc.asleep:
            return _Told("it is suspended (ACPI S3): the RTC's alarm wakes it, if enabled, and pc.acpi.press_power_button() does")
        case None if stop.reason == "timeout":
            return _Told(_time_limit(view))
        case None:
            return _Told(_unclaimed(machine))
        case other:
            return _Told(f"the exit {other!r} is one that this machine does not handle")


# --- triple faults ----------------------------------------------------------------------------------------------------


def _triple_fault(view: CpuView) -> _Told:
    cause = first_exception(view)
    unsupported = _unsupported_paging(view)
    if cause.vector is None:
        if unsupported:
            return _Told(f"triple fault: {unsupported}")
        return _Told(f"triple fault: {cause}{_last_resort(view)}", (13, 8), view.sregs.cr2 or None)
    why = undeliverable(view, cause.vector, cause.software)
    vectors = (cause.vector,) if view.sregs.idt.limit == 0 else tuple(dict.fromkeys((cause.vector, 13, 8)))
    if not why:
        return _Told(f"triple fault: {cause}; no reason is found why its handler could not be entered", vectors, cause.linear)
    return _Told(f"triple fault: {cause}, and no handler could be entered: {why}", vectors, cause.linear, _double_fault(view, why))


def _double_fault(view: CpuView, why: str) -> str:
    """A line on the second chance, the double fault."""
    if view.mode == "real" or view.sregs.idt.limit == 0:
        return ""
    second = undeliverable(view, 8)
    return f"The double fault that followed found no handler either: {second}." if second else ""


def _last_resort(view: CpuView) -> str:
    events = view.vcpu.get_vcpu_events()
    if events.exception.injected or events.exception.pending:
        return f"; {name_of(events.exception.nr)} was on its way, injected from outside"
    if view.paging and view.sregs.cr2:
        denied = view.walk(view.sregs.cr2).denies()
        if denied:
            return f"; the last page fault was at CR2 = {view.sregs.cr2:#x}: {denied}"
    if view.regs.rflags & RFLAGS.IF:
        return "; RFLAGS.IF is set: it may have been an interrupt that found no handler"
    return ""


def _unsupported_paging(view: CpuView) -> str:
    """KVM without hardware virtualization: paging means long mode there."""
    s = view.sregs
    if s.efer & EFER.LME or not _cpl0_emulated():
        return ""
    op = Operation.here(view)
    sets = op is not None and op.mnemonic == "mov" and op.names[:1] == ["cr0"] and op.register(op.names[1]) & CR0.PG
    if view.paging or sets:
        return f"`{op}` turns paging on outside long mode, which this host's KVM does not support" if sets else (
            "paging is on outside long mode, which this host's KVM does not support"
        )  # fmt: skip
    return ""


def _lost(why: str) -> _Told:
    return _Told(
        f"triple fault: an exception found no usable handler; {_RESET_SAID}, so what follows is the reset state and the place is lost. "
        "A guest starts with IDT limit 0: until it loads an IDT, the first exception is a triple fault",
        note=f"Running the image once more to find the place did not help: {why}.",
    )


def _replayed(view: CpuView, steps: int) -> _Told:
    note = (
        f"{_RESET_SAID[0].upper()}{_RESET_SAID[1:]}. All this is from running the image once more on a machine of its own, one instruction "
        f"at a time: {steps} instructions, the same exits, the same output, and the same end."
    )
    told = _triple_fault(view)
    cause = first_exception(view)
    if cause.vector is not None and not undeliverable(view, cause.vector, cause.software):
        told.first = f"triple fault in the handler of {name_of(cause.vector)} or behind it: {cause}. {_RESET_SAID}, and the place is lost"
        told.note = note
    else:
        told.note = f"{told.note}\n{note}".strip()
    return told


# --- KVM gives up -----------------------------------------------------------------------------------------------------


def _emulation_failure(view: CpuView, error: exits.InternalError) -> _Told:
    fetch = view.walk(view.rip)
    if fetch.gpa is None:
        return _Told(f"KVM cannot fetch the instruction at RIP {view.rip:#x}: {fetch.fault}{way_here(view)}")
    if not view.backed(fetch.gpa):
        before = view.read(view.rip - 64, 64) if view.rip >= 64 else b""
        if len(before) == 64 and not any(before):
            ends = f"up to {view.rip:#x}, gpa {fetch.gpa:#x}, where there is no memory"
            return _Told(f"the guest ran through memory that holds only zeros, {ends}: it had left its code")
        return _Told(f"the guest jumped to {view.rip:#x}, gpa {fetch.gpa:#x}, where there is no memory{way_here(view)}")
    strayed = _zeros(view)
    if strayed:
        return _Told(strayed)
    op = Operation.here(view)
    if op is None:
        data = error.insn or view.read(view.rip, 15)
        return _Told(f"KVM had to emulate the bytes {data[:8].hex(' ')} at {view.rip:#x}, which are no instruction{way_here(view)}")
    cause = first_exception(view)
    why = "" if cause.vector is None else undeliverable(view, cause.vector, cause.software)
    vectors = () if cause.vector is None else (cause.vector,)
    if cause.vector is not None and "where there is no memory" in why:
        return _Told(f"KVM cannot deliver {name_of(cause.vector)}: {cause}, and no handler could be entered: {why}", vectors, cause.linear)
    if cause.vector is None:
        for access in op.accesses():
            gpa = view.walk(access.linear).gpa
            if gpa is not None and not view.backed(gpa):
                what = "its stack" if access.stack else "MMIO"
                return _Told(f"KVM had to emulate `{op}`, which accesses {what} at gpa {gpa:#x}, and its emulator cannot do that")
    if view.cpl == 0 and _cpl0_emulated():
        said = f"KVM's emulator does not know `{op}`, and this host emulates CPL0 code (see `pykvm doctor`)"
        if cause.vector is None:
            return _Told(said)
        ends = f", and no handler could be entered: {why}" if why else ""
        return _Told(
            f"{said}; a CPU would not get on either: {cause}{ends}" if why else f"{said}; on a CPU: {cause}", vectors, cause.linear
        )
    if cause.vector is not None:
        ends = f", and no handler could be entered: {why}" if why else ""
        return _Told(f"KVM had to emulate `{op}` and cannot; it faults in any case: {cause}{ends}", vectors, cause.linear)
    return _Told(
        f"KVM had to emulate `{op}` and cannot, though it accesses no MMIO itself: either an exception was on its way through an "
        "IDT, GDT, TSS or stack that is not in memory, or this host has to emulate this mode"
    )


def _internal_error(view: CpuView, error: exits.InternalError) -> _Told:
    """Suberrors 2 to 4 (api.rst 5, KVM_EXIT_INTERNAL_ERROR)."""
    if error.suberror == 4:
        number = f"{error.data[0]:#x}" if error.data else "of no number"
        return _Told(f"KVM gave up: the CPU left the guest for a reason ({number}) that this KVM does not handle")
    what = "two exceptions at once" if error.suberror == 2 else "an event"
    vector = error.data[0] & 0xFF if error.suberror in (2, 3) and error.data else None
    if vector is None:
        return _Told(
            f"KVM gave up with internal error {error.suberror} while delivering an event: the IDT, TSS or stack is likely broken", (8,)
        )
    why = undeliverable(view, vector)
    cause = first_exception(view)
    reason = f": {cause}" if cause.vector == vector else ""
    ends = f", and no handler could be entered: {why}" if why else ": the IDT, TSS or stack is likely broken"
    return _Told(f"KVM gave up while delivering {what}, {name_of(vector)}{reason}{ends}", (vector,), cause.linear)


def _fail_entry(view: CpuView, failed: exits.FailEntry) -> str:
    reason = failed.hardware_reason & 0xFFFFFFFF
    found, cause = _contradictions(view), first_exception(view)
    which = f": {found}" if found else f"; it was at an instruction that should have faulted: {cause}" if cause.vector == 13 else ""
    if reason == 0x80000021:
        return (
            "the CPU refused to enter the guest: invalid guest state (VMX exit reason 33): segments, CR0, CR4, EFER contradict each "
            f"other{which}"
        )
    if reason == 0xFFFFFFFF:  # -1; KVM's field had 32 bits for long
        return f"the CPU refused to enter the guest: VMEXIT_INVALID (SVM): control registers, EFER or segments contradict each other{which}"
    return f"the CPU refused to enter the guest: hardware reason {reason:#x}{which}"


def _contradictions(view: CpuView) -> str:
    """What the CPU checks at entry (SDM vol. 3 section 26.3.1; APM vol. 2 section 15.5.1), as far as KVM lets it through."""
    s = view.sregs
    found = []
    if s.efer & EFER.LMA and s.cs.l and s.cs.db:
        found.append("CS has both L and D set")
    if s.cr0 & CR0.PG and not s.cr0 & CR0.PE:
        found.append("CR0.PG is set without CR0.PE")
    if s.efer & EFER.LME and s.cr0 & CR0.PG and not s.cr4 & CR4.PAE:
        found.append("EFER.LME and CR0.PG are set without CR4.PAE")
    if s.cr0 & CR0.NW and not s.cr0 & CR0.CD:
        found.append("CR0.NW is set without CR0.CD")
    width = view.cpuid(0x80000008, "eax") & 0xFF
    if width and s.cr0 & CR0.PG and s.cr3 >> width:
        found.append(f"CR3 has bits above the {width} physical address bits ({s.cr3:#x})")
    if view.mode != "real" and not view.regs.rflags & RFLAGS.VM and s.tr.type not in (3, 11):
        found.append(f"TR's type is {s.tr.type:#x}, no busy TSS")
    if view.mode != "real" and not s.cs.type & 8 and s.cs.type != 3:
        found.append(f"CS's type is {s.cs.type:#x}, no code")
    return ", ".join(found)


def _cpl0_emulated() -> bool:
    from pykvm.probe import cpl0_emulated

    try:
        return cpl0_emulated()
    except PykvmError:
        return False


# --- straying and waiting ---------------------------------------------------------------------------------------------


def _zeros(view: CpuView) -> str:
    """The sentence for a guest that has strayed into empty memory; empty when it has not. Zeros are `add [rax], al` to the CPU."""
    around = view.read(max(0, view.rip - 16), 48)
    if len(around) < 48 or any(around):
        return ""
    led = strayed_here(view)
    if not led and view.mode == "real" and not any(view.read(view.sregs.idt.base, 4 * 32)):
        led = "; its interrupt vectors are empty, so any exception or INT n leads to 0000:0000"
    return f"the guest runs through memory that holds only zeros, at {view.rip:#x}: it has left its code{led}"


def _time_limit(view: CpuView) -> str:
    if view.vcpu.get_mp_state() == lib.KVM_MP_STATE_HALTED:
        return f"the guest waits in HLT for an interrupt, and none came; it would go on at {view.rip:#x}"
    strayed = _zeros(view)
    if strayed:
        return strayed
    op = Operation.here(view)
    if op is not None and op.mnemonic == "jmp" and op.insn.op_str == hex(view.rip):
        return f"the guest spins at {view.rip:#x}: `{op}` jumps to itself"
    if op is not None and op.mnemonic in ("vmcall", "vmmcall"):
        return f"the guest waits at {view.rip:#x} for a hypercall that this host's KVM does not finish (`{op}`)"
    cause = first_exception(view)
    if cause.vector is not None:
        why = undeliverable(view, cause.vector, cause.software)
        ends = f", and no handler can be entered: {why}" if why else ""
        return f"the guest was still running, at {view.rip:#x}, where it faults: {cause}{ends}"
    doing = f"`{op}`" if op is not None else "unreadable code"
    return f"the guest was still running, at {view.rip:#x}: {doing}"


def _unclaimed(machine: Machine) -> str:
    if not machine.bus.unclaimed:
        return "the guest was stopped by a device that reported a crash"
    space, at, size, is_write = next(reversed(machine.bus.unclaimed))
    where = f"port {at:#x}" if space == "pio" else f"gpa {at:#x}"
    return f"{'a write to' if is_write else 'a read from'} {where} ({size} byte{'s' * (size > 1)}), which no device claims"


# --- user mode --------------------------------------------------------------------------------------------------------


def _reported_exception(view: CpuView, symbols: Symbols, vector: int) -> str:
    """User mode: the stub has left RAX, vector, error code, RIP, CS, RFLAGS, RSP, SS on the kernel's stack."""
    frame = view.read(view.regs.rsp, 64)
    name = VECTORS.get(vector, f"exception {vector}")
    if len(frame) < 64:
        return f"the guest's program raised {name}, and its frame cannot be read"
    rax, _, code, rip, cs, rflags, rsp, ss = (int.from_bytes(frame[i : i + 8], "little") for i in range(0, 64, 8))
    regs = view.regs.copy()
    regs.rax, regs.rip, regs.rflags, regs.rsp = rax, rip, rflags, rsp
    if vector == 3:  # a trap: RIP is past it (SDM vol. 3 section 6.5)
        rip -= 1 if view.read(rip - 1, 1) == b"\xcc" else 2 if view.read(rip - 2, 2) == b"\xcd\x03" else 0
    program = view.at(rip=rip, cs=cs & 0xFFFF, rflags=rflags, rsp=rsp, rax=rax)
    op = Operation.here(program)
    fetch = view.walk(rip)
    if vector == 6 and fetch.gpa is not None and not view.backed(fetch.gpa):
        name += f", having jumped to gpa {fetch.gpa:#x}, where there is no memory"
    lines = [f"the guest's program raised {name}: " + (f"`{op}` at {rip:#x}" if op is not None else f"RIP {rip:#x}")]
    cause = first_exception(program)
    why = _because(cause, vector, op)
    if vector == 14:
        kind = ", ".join(yes if code & bit else no for bit, yes, no in _PF_BITS) + (", an instruction fetch" if code & 16 else "")
        lines[0] += f" touched {view.sregs.cr2:#x} ({kind}){why if cause.linear == view.sregs.cr2 else ''}"
    else:
        lines[0] += why
    lines += ["", f"error code {code:#x}, long mode, CPL{cs & 3}, CS {cs:#x}, SS {ss:#x}", format_regs(regs, view.sregs)]
    lines += ["", "code:", window(view.read, rip, 64, symbols=symbols), "", "walk of RIP:", fetch.explain()]
    if vector == 14:
        lines += ["walk of CR2:", view.walk(view.sregs.cr2).explain()]
    return "\n".join(lines)


def _because(cause: Cause, vector: int, op: Operation | None) -> str:
    """The cause as the end of a sentence that has named the instruction; empty when another vector came of it."""
    if cause.vector != vector:
        if vector == 6 and cause.vector in (7, 12, 13, 14, 17) and _cpl0_emulated():
            return f"; by itself it faults otherwise: {cause}. This host's KVM tried to emulate that, and does not know the instruction"
        return ""
    why = cause.why.removeprefix(f"`{op}`").lstrip(":").strip()
    return f": {why}" if why else ""
