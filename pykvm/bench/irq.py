"""What an interrupt costs: the guest asks at a port, the host pulses a GSI, the guest's handler runs and ends it; beside the same in C.

One round trip is a PIO exit, two KVM_IRQ_LINE, the injection, the handler's EOI and IRETQ.
"""

from __future__ import annotations

from errno import EINTR

from pykvm.abi import lib
from pykvm.assemble import asm
from pykvm.bench.paired import Estimate, Interrupted, estimate, measure, ratio
from pykvm.errors import KvmError
from pykvm.machine import Machine
from pykvm.x86.idt import GATE_SIZE, gate, use_idt
from pykvm.x86.modes import CODE64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.irq import IrqLine

__all__ = ["IrqRow", "bench_irq"]

ASK_PORT, STOP_PORT, GSI, VECTOR = 0x300, 0xF4, 10, 0x41
CODE_GPA, HANDLER_GPA, IDT_GPA = 0x100000, 0x100010, 0x101000
LOST = 1  # exit code: an interrupt did not come

_GUEST = f"""
        jmp start
        .balign 16
handler:
        mov dword ptr [r12 + 0xb0], 0
        inc ebx
        iretq
start:  mov al, 0xff                    # the PICs have the line too
        out 0x21, al
        out 0xa1, al
        mov r12d, 0xfee00000            # LAPIC on
        mov dword ptr [r12 + 0xf0], 0x1ff
        mov r13d, 0xfec00000            # IOAPIC pin: fixed, edge, to LAPIC 0
        mov dword ptr [r13], 0x10 + 2 * {GSI}
        mov dword ptr [r13 + 0x10], {VECTOR}
        sti
again:  mov ebp, {{batch}}
        mov edx, {ASK_PORT}
next:   mov ebx, 0
        out dx, al
        cmp ebx, 1                      # the interrupt comes before this
        jne lost
        dec ebp
        jnz next
        xor eax, eax
        out {STOP_PORT}, al
        jmp again
lost:   mov al, {LOST}
        out {STOP_PORT}, al
        jmp again
"""


class IrqRow:
    """TSC units a round trip in C and through the Python loop, and their ratio."""

    def __init__(self, taken: dict[str, list[float]], tsc_khz: int) -> None:
        self.tsc_khz = tsc_khz
        self.c: Estimate = estimate(taken["C"])
        self.python: Estimate = estimate(taken["python"])
        self.ratio: Estimate = ratio(taken["python"], taken["C"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON; TSC units."""
        return {
            "tsc_khz": self.tsc_khz,
            "c": self.c.as_dict(),
            "python": self.python.as_dict(),
            "ratio": self.ratio.as_dict(),
        }


class _Asked:
    def __init__(self, line: IrqLine) -> None:
        self.line = line

    def write(self, offset: int, size: int, value: int) -> None:
        self.line.pulse()


def bench_irq(batch: int = 500, rounds: int = 40, progress: Callable[[int, int], None] | None = None) -> IrqRow:
    """``rounds`` rounds of ``batch`` interrupts each way, paired. Needs KVM_CAP_IRQCHIP."""
    code = asm(_GUEST.format(batch=batch), bits=64, org=CODE_GPA)
    with Machine(code, mode="long", memory="2M", loop="python", irqchip="kernel") as machine:
        native, vm, rdtsc = machine.vcpu.native, machine.vm, lib.pykvm_rdtsc
        machine.memory.write(IDT_GPA + GATE_SIZE * VECTOR, gate(HANDLER_GPA, CODE64))
        use_idt(machine.vcpu, IDT_GPA)
        machine.add_device(_Asked(machine.irq(GSI)), port=ASK_PORT)

        def python() -> float:
            start = rdtsc()
            stop = machine.runner.run()
            taken = float(rdtsc() - start) / batch
            if stop.code:
                raise KvmError("KVM_IRQ_LINE", 5, "an interrupt did not reach the guest")
            return taken

        def c() -> float:
            start = rdtsc()
            taken = -EINTR
            while taken == -EINTR:
                taken = lib.pykvm_bench_irq(vm.fd, native.fd, native.run, GSI, ASK_PORT, STOP_PORT)
            if taken < 0:
                raise KvmError("KVM_RUN", -taken, "in the plain C loop")
            return float(rdtsc() - start) / batch

        python()  # the guest sets itself up
        khz = machine.vcpu.get_tsc_khz()
        try:
            return IrqRow(measure({"C": c, "python": python}, rounds, progress), khz)
        except Interrupted as interrupt:
            raise Interrupted(IrqRow(interrupt.measured, khz)) from None
