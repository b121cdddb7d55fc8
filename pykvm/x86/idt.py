"""Interrupt descriptor tables of 64-bit mode, written from outside: SDM vol. 3 section 6.14, APM vol. 2 section 8.9.

>>> machine.memory.write(0x8000 + GATE_SIZE * 0x41, gate(handler, CODE64))
>>> use_idt(machine.vcpu, 0x8000)
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.vcpu import VCPU

__all__ = ["GATE_SIZE", "gate", "use_idt"]

GATE_SIZE = 16
_INTERRUPT_GATE, _PRESENT = 0xE, 1 << 7


def gate(handler: int, selector: int, dpl: int = 0) -> bytes:
    """An interrupt gate to the linear address ``handler`` in the code segment ``selector``; INT n may use it from CPL ``dpl``."""
    low = handler & 0xFFFF | selector << 16 | (_INTERRUPT_GATE | dpl << 5 | _PRESENT) << 40 | (handler >> 16 & 0xFFFF) << 48
    return low.to_bytes(8, "little") + (handler >> 32).to_bytes(8, "little")


def use_idt(vcpu: VCPU, base: int) -> None:
    """Have the vCPU use the 256 gates at the linear address ``base``; where there is 0, a vector is not present."""
    sregs = vcpu.get_sregs()
    sregs.idt.base, sregs.idt.limit = base, 256 * GATE_SIZE - 1
    vcpu.set_sregs(sregs)
