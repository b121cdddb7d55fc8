"""The explainer: why a guest stopped, in words. The first line is the likely cause; evidence follows.

Mode and CPL, registers, disassembly around RIP with symbols, the page walk of RIP (and CR2), the IDT and GDT entries concerned.
"""

from __future__ import annotations

from pykvm import exits
from pykvm.debug.insn import insn_rip
from pykvm.debug.view import CpuView
from pykvm.disasm import Insn, disassemble, window
from pykvm.errors import GuestImageError, PykvmError
from pykvm.symbols import Symbols
from pykvm.x86.regs import CR0, EFER, format_regs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.machine import Machine
    from pykvm.runner import Stop

_RESET = (0xFFFFFFF0, 0xF000)  # linear RIP and CS after a reset

__all__ = ["VECTORS", "explain_stop"]

# SDM vol. 3 table 6-1
VECTORS = {
    0: "#DE (divide error)", 1: "#DB (debug)", 2: "NMI", 3: "#BP (breakpoint)", 4: "#OF (overflow)", 5: "#BR (bound range)",
    6: "#UD (invalid opcode)", 7: "#NM (no x87)", 8: "#DF (double fault)", 10: "#TS (invalid TSS)",
    11: "#NP (segment not present)", 12: "#SS (stack fault)", 13: "#GP (general protection)", 14: "#PF (page fault)",
    16: "#MF (x87 error)", 17: "#AC (alignment check)", 18: "#MC (machine check)", 19: "#XM (SIMD error)", 21: "#CP (control protection)",
}  # fmt: skip
_PF_BITS = (
    (1, "the page is present but its rights forbid it", "the page is not present"),
    (2, "a write", "a read"),
    (4, "from CPL3", "from the supervisor"),
)

# SDM vol. 2: what these mostly raise is #GP, for a register's value, a selector or a frame
_LIKELY_GP = ("wrmsr", "rdmsr", "xsetbv", "lldt", "ltr", "retf", "retfq", "iret", "iretd", "iretq")
_LIKELY_GP_MOV = ("cr0,", "cr3,", "cr4,", "cr8,", "ds,", "es,", "fs,", "gs,", "ss,")


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
    cause, vectors = _cause(machine, view, stop)
    lines = [cause, ""]
    if stop.exit is not None:
        lines.append(f"exit: {stop.exit!r}")
    which = f"vCPU {vcpu.id}: " if machine.cpus > 1 else ""
    lines.append(f"{which}{view.mode} mode, {view.bits}-bit code, CPL{view.cpl}")
    lines.append(format_regs(view.regs, view.sregs))
    lines += ["", "code:", window(view.read, _place(machine, view, stop), view.bits, symbols=symbols)]
    if view.paging:
        lines += ["", "walk of RIP:", view.walk(view.rip).explain()]
        if 14 in vectors:
            lines += ["walk of CR2:", view.walk(view.sregs.cr2).explain()]
    if vectors:
        lines += ["", *(view.gate(vector) for vector in vectors)]
    if view.mode != "real":
        lines.append(f"CS: {view.descriptor(view.sregs.cs.selector)}")
    return "\n".join(lines)


def _place(machine: Machine, view: CpuView, stop: Stop) -> int:
    """Where the instruction is that made the last exit, when one did; else RIP."""
    exit = stop.exit if stop.exit is not None or stop.reason == "timeout" else exits.decode((stop.vcpu or machine.vcpu).native)
    at = None if exit is None else insn_rip(view, exit)
    return view.rip if at is None else at


def _cause(machine: Machine, view: CpuView, stop: Stop) -> tuple[str, list[int]]:
    """(the sentence, the vectors whose gates matter)."""
    match stop.exit:
        case exits.Shutdown():
            return _triple_fault(view)
        case exits.InternalError(suberror=1) as error:
            return _emulation_failure(view, error), []
        case exits.InternalError() as error:
            return f"KVM gave up with internal error {error.suberror} while delivering an event: the IDT, TSS or stack is likely broken", [
                8
            ]
        case exits.FailEntry() as failed:
            return _fail_entry(failed), []
        case exits.MemoryFault() as fault:
            return f"the host memory behind gpa {fault.gpa:#x} ({fault.size} bytes) cannot be reached: was its mapping taken away?", []
        case None if stop.reason == "timeout":
            return _time_limit(view), []
        case None:
            return _unclaimed(machine), []
        case other:
            return f"the exit {other!r} is one that this machine does not handle", []


def _here(view: CpuView) -> Insn | None:
    found = disassemble(view.read(view.rip, 15), view.rip, view.bits, 1)
    return found[0] if found else None


def _first_exception(view: CpuView) -> tuple[int | None, str]:
    """(vector, words) of the exception that the instruction at RIP most likely raised."""
    fetch = view.walk(view.rip)
    denied = fetch.denies(user=view.cpl == 3, fetch=True)
    if denied:
        return 14, f"the instruction at {view.rip:#x} cannot be fetched: {denied}"
    insn = _here(view)
    if insn is None:
        if fetch.gpa is not None and not _backed(view, fetch.gpa):
            return None, f"RIP {view.rip:#x} is where the guest has no memory"
        return 6, f"the bytes at RIP {view.rip:#x} are no instruction (#UD)"
    if insn.mnemonic in ("ud2", "ud1", "ud0"):
        return 6, f"`{insn}` raises #UD on purpose"
    if insn.mnemonic in ("int3", "int1", "int"):
        vector = {"int3": 3, "int1": 1}.get(insn.mnemonic)
        vector = int(insn.op_str, 0) if vector is None else vector
        return vector, f"`{insn}` calls vector {vector}"
    if insn.mnemonic in ("div", "idiv"):
        return 0, f"`{insn}` divides by zero or overflows (#DE)"
    for gva in operands(view, insn):
        if view.bits == 64 and view.walk(gva).fault.startswith("the address is not canonical"):
            return 13, f"`{insn}` uses {gva:#x}, which is not canonical (#GP)"
    if insn.mnemonic == "mov" and insn.op_str.startswith("cr0, ") and not view.paging and not view.sregs.efer & EFER.LME:
        value = getattr(view.regs, "r" + insn.op_str[6:])
        if value & CR0.PG and value & CR0.PE and _cpl0_emulated():
            return None, f"`{insn}` turns paging on outside long mode, which this host's KVM does not support"
    if insn.mnemonic in _LIKELY_GP or (insn.mnemonic == "mov" and insn.op_str.startswith(_LIKELY_GP_MOV)):
        return 13, f"`{insn}` was given a value that the CPU refuses, most likely with #GP"
    if view.paging and view.sregs.cr2:
        denied = view.walk(view.sregs.cr2).denies()
        if denied:
            return 14, f"`{insn}` made a page fault at CR2 = {view.sregs.cr2:#x}: {denied}"
    return None, f"`{insn}` raised an exception"


def _backed(view: CpuView, gpa: int) -> bool:
    """Whether a slot backs the byte at ``gpa``."""
    return view.memory.contains(gpa, 1)


def _triple_fault(view: CpuView) -> tuple[str, list[int]]:
    if (view.rip, view.sregs.cs.selector) == _RESET:
        return (
            "triple fault: an exception found no usable handler; this host (AMD-V) has reset the vCPU, so what follows is the reset "
            "state and the place is lost. A guest starts with IDT limit 0: until it loads an IDT, the first exception is a triple fault",
            [],
        )
    vector, what = _first_exception(view)
    limit = view.sregs.idt.limit
    vectors = [v for v in (vector, 13, 8) if v is not None]
    if limit == 0 and view.mode != "real":
        return f"triple fault: IDT limit is 0: the first exception is a triple fault; {what}", vectors[:1]
    if vector is not None:
        return f"triple fault: {what}, and it could not be delivered: {view.gate(vector)}", vectors
    return f"triple fault: {what}, which could not be delivered through the IDT (limit {limit:#x}), nor could the double fault", vectors


def _emulation_failure(view: CpuView, error: exits.InternalError) -> str:
    fetch = view.walk(view.rip)
    if fetch.gpa is None:
        return f"KVM cannot fetch the instruction at RIP {view.rip:#x}: {fetch.fault}"
    if not _backed(view, fetch.gpa):
        return f"the guest jumped to {view.rip:#x}, gpa {fetch.gpa:#x}, where there is no memory"
    strayed = _zeros(view)
    if strayed:
        return strayed
    data = error.insn or view.read(view.rip, 15)
    found = disassemble(data, view.rip, view.bits, 1)
    if not found:
        return f"KVM had to emulate the bytes {data[:8].hex(' ')} at {view.rip:#x}, which are no instruction"
    for gva in operands(view, found[0]):
        gpa = view.walk(gva).gpa
        if gpa is not None and not _backed(view, gpa):
            return f"KVM had to emulate `{found[0]}`, which accesses MMIO at gpa {gpa:#x}, and its emulator does not know this instruction"
    if view.cpl == 0 and _cpl0_emulated():
        return f"KVM's emulator does not know `{found[0]}`, and this host emulates CPL0 code (see `pykvm doctor`)"
    return (
        f"KVM had to emulate `{found[0]}` and cannot, though it accesses no MMIO itself: either an exception was on its way through an "
        "IDT, GDT, TSS or stack that is not in memory, or this host has to emulate this mode"
    )


def _cpl0_emulated() -> bool:
    from pykvm.probe import cpl0_emulated

    try:
        return cpl0_emulated()
    except PykvmError:
        return False


def operands(view: CpuView, insn: Insn) -> list[int]:
    """The linear addresses that an instruction's memory operands name; empty when it has none or one cannot be told."""
    import re

    if insn.mnemonic in ("lea", "nop"):
        return []
    found = []
    for segment, inside in re.findall(r"(?:\b([cdefgs]s):)?\[([^\]]+)\]", insn.op_str):
        total = 0
        for sign, name, scale, number in re.findall(r"([+-]?)\s*(?:([a-z]\w*)(?:\*(\d))?|(0x[0-9a-f]+|\d+))", inside):
            value = int(number, 0) if number else _register(view, insn, name) * int(scale or 1)
            total += -value if sign == "-" else value
        base = 0
        if view.bits != 64 or segment in ("fs", "gs"):
            default = "ss" if re.match(r"[er]?[bs]p\b", inside) else "ds"
            base = getattr(view.sregs, segment or default).base
        found.append(((total & (1 << view.bits) - 1) + base) & (1 << max(view.bits, 32)) - 1)
    return found


def _register(view: CpuView, insn: Insn, name: str) -> int:
    """A general register by the name it has in an address: rax, eax, r8d, bx, rip."""
    if name in ("rip", "eip"):
        return insn.address + insn.size
    if name.startswith("r"):
        value: int = getattr(view.regs, name.rstrip("d"), 0)
        return value & 0xFFFFFFFF if name.endswith("d") else value
    wide: int = getattr(view.regs, "r" + name.removeprefix("e"), 0)
    return wide & (0xFFFFFFFF if name.startswith("e") else 0xFFFF)


def _fail_entry(failed: exits.FailEntry) -> str:
    reason = failed.hardware_reason
    if reason & 0xFFFFFFFF == 0x80000021:
        return (
            "the CPU refused to enter the guest: invalid guest state (VMX exit reason 33): segments, CR0, CR4, EFER contradict each other"
        )
    if reason & 0xFFFFFFFF == 0xFFFFFFFF:  # -1; KVM's field had 32 bits for long
        return "the CPU refused to enter the guest: VMEXIT_INVALID (SVM): control registers, EFER or segments contradict each other"
    return f"the CPU refused to enter the guest: hardware reason {reason:#x}"


def _zeros(view: CpuView) -> str:
    """The sentence for a guest that has strayed into empty memory; empty when it has not. Zeros are `add [rax], al` to the CPU."""
    around = view.read(max(0, view.rip - 16), 48)
    if len(around) < 48 or any(around):
        return ""
    way = ""
    if view.mode == "real" and not any(view.read(view.sregs.idt.base, 4 * 32)):
        way = "; its interrupt vectors are empty, so any exception or INT n leads to 0000:0000"
    return f"the guest runs through memory that holds only zeros, at {view.rip:#x}: it has left its code{way}"


def _time_limit(view: CpuView) -> str:
    strayed = _zeros(view)
    if strayed:
        return strayed
    insn = _here(view)
    if insn is not None and insn.mnemonic == "jmp" and insn.op_str == hex(insn.address):
        return f"the guest spins at {view.rip:#x}: `{insn}` jumps to itself"
    if insn is not None and insn.mnemonic in ("vmcall", "vmmcall"):
        return f"the guest waits at {view.rip:#x} for a hypercall that this host's KVM does not finish (`{insn}`)"
    doing = f"`{insn}`" if insn is not None else "unreadable code"
    return f"the guest was still running, at {view.rip:#x}: {doing}"


def _unclaimed(machine: Machine) -> str:
    if not machine.bus.unclaimed:
        return "the guest was stopped by a device that reported a crash"
    space, at, size, is_write = next(reversed(machine.bus.unclaimed))
    where = f"port {at:#x}" if space == "pio" else f"gpa {at:#x}"
    return f"{'a write to' if is_write else 'a read from'} {where} ({size} byte{'s' * (size > 1)}), which no device claims"


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
    insn = disassemble(view.read(rip, 15), rip, 64, 1)
    fetch = view.walk(rip)
    if vector == 6 and fetch.gpa is not None and not _backed(view, fetch.gpa):
        name += f", having jumped to gpa {fetch.gpa:#x}, where there is no memory"
    at = f"`{insn[0]}` at {rip:#x}" if insn else f"RIP {rip:#x}"
    lines = [f"the guest's program raised {name}: {at}"]
    if vector == 14:
        why = ", ".join(yes if code & bit else no for bit, yes, no in _PF_BITS) + (", an instruction fetch" if code & 16 else "")
        lines[0] += f" touched {view.sregs.cr2:#x} ({why})"
    lines += ["", f"error code {code:#x}, long mode, CPL{cs & 3}, CS {cs:#x}, SS {ss:#x}", format_regs(regs, view.sregs)]
    lines += ["", "code:", window(view.read, rip, 64, symbols=symbols), "", "walk of RIP:", fetch.explain()]
    if vector == 14:
        lines += ["walk of CR2:", view.walk(view.sregs.cr2).explain()]
    return "\n".join(lines)
