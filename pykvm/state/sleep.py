"""ACPI's S3, suspend to RAM: vCPUs and interrupt controllers lose their state, memory keeps its, and something wakes the machine.

What a CPU, LAPIC, IOAPIC, PIC and PIT hold after a reset, KVM knows best: it is read from a VM that has never run, and written into this
one. The first vCPU then stands in KVM_MP_STATE_HALTED with interrupts off, so that a sleeping machine runs, pauses and is saved
like any other; the devices notice what ends its sleep (devices/acpipm.py). TSCs go on. Other devices keep their registers.

It goes on, in real mode, at the waking vector that the guest has left in the FACS; firmware at the reset vector, with shutdown status 0xFE
in CMOS, as SeaBIOS knows it from QEMU. Source: ACPI 6.5 sections 5.2.10 (FACS), 7.4.2.3 and 16.3.2 (S3, and what firmware does).
"""

from __future__ import annotations

from pykvm.abi import lib
from pykvm.platform import FACS_GPA, WAKING_VECTOR
from pykvm.state import vmstate
from pykvm.state.vcpustructs import TSC, capture, nested_of, put
from pykvm.units import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.machine import Machine

__all__ = ["fall_asleep", "wake_up"]

SHUTDOWN_STATUS, RESUME = 0x0F, 0xFE  # in CMOS
_KEPT = (TSC, 0x3B, 0x1A0)  # IA32_TSC, IA32_TSC_ADJUST: S3 promises no guest that they are reset; IA32_MISC_ENABLE: a BIOS sets it again


def fall_asleep(machine: Machine) -> None:
    """From a run that has stopped as "sleep": no vCPU is in the guest."""
    for runner in machine.runners:
        runner.settle()
    with machine.system.create_vm() as fresh:
        if machine.ioapic is None:
            fresh.create_irqchip()
            fresh.create_pit2()
        else:
            fresh.create_split_irqchip()
        for vcpu in machine.vcpus:
            new = fresh.create_vcpu(vcpu.id)
            if vcpu.asked is not None:
                new.set_cpuid2(vcpu.asked)
        for vcpu, new in zip(machine.vcpus, fresh.vcpus, strict=True):
            if nested_of(machine.system, vcpu) is not None:  # CR4.VMXE cannot be cleared before
                vcpu.set_nested_state(new.get_nested_state(machine.system.check_extension("KVM_CAP_NESTED_STATE")))
            state = capture(fresh, new)
            state.leave_out(_KEPT)
            put(machine.vm, vcpu, state)
        vmstate.write(machine.vm, vmstate.read(fresh, None))
    if machine.ioapic is not None:
        machine.ioapic.reset()
    if machine.info.protocol == "firmware":
        machine.rtc.ram[SHUTDOWN_STATUS] = RESUME
    machine.vcpu.set_mp_state(lib.KVM_MP_STATE_HALTED)
    machine.pc.fall_asleep()


def wake_up(machine: Machine) -> None:
    """In the first vCPU's thread, between two entries. Without a waking vector below 1 MiB the run ends as "reset"."""
    if machine.info.protocol != "firmware":
        vector = machine.memory.read_u32(FACS_GPA + WAKING_VECTOR)
        if machine.memory.read(FACS_GPA, 4) != b"FACS" or not 0 < vector < MIB:
            machine.stop("reset")
            return
        sregs, regs = machine.vcpu.get_sregs(), machine.vcpu.get_regs()
        sregs.cs.selector, sregs.cs.base, regs.rip = vector >> 4, vector & ~0xF, vector & 0xF
        machine.vcpu.set_sregs(sregs)
        machine.vcpu.set_regs(regs)
    machine.vcpu.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)
