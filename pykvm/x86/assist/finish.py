"""One emulation failure after another: decode, find the instruction's group, carry it out or inject the fault that it raises."""

from __future__ import annotations

from pykvm.abi import lib
from pykvm.errors import KvmError
from pykvm.x86.assist.compute import compute, is_computing
from pykvm.x86.assist.cpu import UD, Cpu, Declined, Fault
from pykvm.x86.assist.relocate import Encoding
from pykvm.x86.assist.scratch import CODE, DATA, Scratch
from pykvm.x86.operation import Operation, engine_for
from pykvm.x86.regs import RFLAGS
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.bus import Bus
    from pykvm.exits import InternalError
    from pykvm.memory import GuestMemory
    from pykvm.vcpu import VCPU

    Instruction = Callable[[Cpu, Operation], None]

__all__ = ["Assist"]

DB = 1
DR6_BS = 1 << 14
_CODE_BYTES = 15
_MOST_DECODED = 4096


def _table() -> dict[str, Instruction]:
    """capstone's mnemonic -> what carries it out."""
    from pykvm.x86.assist import atomics, bits, compute, descriptors, interrupts, legacy, returns, system, xstate

    groups = (atomics, bits, compute, descriptors, interrupts, legacy, returns, system, xstate)
    return {name: do for group in groups for name, do in group.INSTRUCTIONS.items()}


class Assist:
    """What a machine's run loops ask when KVM has given up; one at a time.

    ``counts``: instructions finished, by mnemonic. ``declined``: why the last one of a vCPU, by its id, was not.
    """

    def __init__(self, memory: GuestMemory, bus: Bus | None = None) -> None:
        self.memory, self.bus = memory, bus
        self.counts: dict[str, int] = {}
        self.declined: dict[int, str] = {}
        self.scratch = Scratch()
        self._instructions = _table()
        self._engines: dict[int, Any] = {}
        self._decoded: dict[tuple[int, bytes], Operation] = {}  # bits and bytes -> what they are

    def finish(self, vcpu: VCPU, error: InternalError) -> bool:
        """Carry out the instruction that ``error`` is about; False, with the reason in ``declined``, when it is not to be done here."""
        self.declined.pop(vcpu.id, None)
        try:
            name = self._finish(vcpu, error)
        except Declined as why:
            self.declined[vcpu.id] = str(why)
            return False
        except KvmError as failed:
            self.declined[vcpu.id] = f"KVM refused what it came to: {failed}"
            return False
        self.counts[name] = self.counts.get(name, 0) + 1
        return True

    def _finish(self, vcpu: VCPU, error: InternalError) -> str:
        if error.suberror != lib.KVM_INTERNAL_ERROR_EMULATION:
            raise Declined(f"internal error {error.suberror} is not about an instruction")
        view = CpuView(vcpu, self.memory)
        if view.cpl:
            raise Declined("it is at CPL3, where KVM gives #UD for what its emulator does not know")
        if view.regs.rflags & RFLAGS.VM:
            raise Declined("it is in virtual-8086 mode")
        op = self._decode(view, error.insn)
        do = self._instructions.get(op.mnemonic) or self._computing(op)
        events = vcpu.get_vcpu_events()
        if events.interrupt.injected or (events.exception.injected and events.exception.nr != UD):  # #UD: KVM's own, for this failure
            raise Declined("it was not about the instruction: an exception or interrupt was on its way through the IDT")
        cpu = Cpu(view, op, self.scratch, self.bus)
        trapped = bool(view.regs.rflags & RFLAGS.TF)
        try:
            do(cpu, op)
        except Fault as fault:
            self._raise(vcpu, view, fault)
            return op.mnemonic
        cpu.commit()
        if events.interrupt.shadow or (cpu.unmasks_nmi and events.nmi.masked):
            _end_shadow(vcpu, cpu.unmasks_nmi)
        if trapped and not cpu.jumped:
            _single_step_trap(vcpu)
        return op.mnemonic

    def _computing(self, op: Operation) -> Instruction:
        encoding = Encoding(op.bytes, op.view.bits)
        wide = self._operation(op.view, 64, encoding.moved(CODE, DATA)) if is_computing(encoding) else None
        if wide is None:
            raise Declined(f"user space does not know `{op}` either")
        return lambda cpu, op: compute(cpu, op, encoding, wide)

    def close(self) -> None:
        """Let go of what it keeps."""
        self.scratch.close()

    def _operation(self, view: CpuView, bits: int, code: bytes) -> Operation | None:
        """Decoded, once for each instruction: a guest that needs assist needs it again and again."""
        known = self._decoded.get((bits, code))
        if known is None:
            if bits not in self._engines:
                self._engines[bits] = engine_for(bits)
            known = Operation.here(view, self._engines[bits], code)
            if known is None:
                return None
            if len(self._decoded) >= _MOST_DECODED:
                self._decoded.clear()
            self._decoded[bits, code] = known
        return known.on(view)

    def _decode(self, view: CpuView, code: bytes) -> Operation:
        code = code or view.read(view.rip, _CODE_BYTES)
        if not code:
            raise Declined("its bytes cannot be read")
        op = self._operation(view, view.bits, code)
        if op is None:
            raise Declined(f"the bytes {code[:8].hex(' ')} are no instruction that is known here")
        return op

    def _raise(self, vcpu: VCPU, view: CpuView, fault: Fault) -> None:
        """Have KVM inject it: RIP stays at the instruction (SDM vol. 3 section 6.5)."""
        if fault.cr2 is not None:
            view.sregs.cr2 = fault.cr2
            vcpu.set_sregs(view.sregs)
        vcpu.set_regs(view.regs)  # this drops the #UD that KVM has queued for what it could not emulate
        vcpu.inject_exception(fault.vector, fault.error_code)


def _end_shadow(vcpu: VCPU, unmask_nmi: bool) -> None:
    """The instruction behind STI or MOV SS is done: interrupts may come in (SDM vol. 3 section 6.8.3), and NMIs behind IRET (6.7.1)."""
    events = vcpu.get_vcpu_events()
    events.flags |= lib.KVM_VCPUEVENT_VALID_SHADOW
    events.interrupt.shadow = 0
    if unmask_nmi:
        events.nmi.masked = 0
    vcpu.set_vcpu_events(events)


def _single_step_trap(vcpu: VCPU) -> None:
    """#DB with DR6.BS, as the instruction began with RFLAGS.TF set (SDM vol. 3 section 17.3.1.4)."""
    debug = vcpu.get_debugregs()
    debug.dr6 |= DR6_BS
    vcpu.set_debugregs(debug)
    vcpu.inject_exception(DB)
