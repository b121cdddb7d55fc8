"""What the machine of a rare kind of exit needs beside its devices (rarekinds.py): capabilities before it has vCPUs, and state after."""

from __future__ import annotations

import mmap

from pykvm.abi import ffi, ioctl, lib, new
from pykvm.bench.kind import RING_GPA, RING_PAGES, TOUCH_GPA, VECTOR
from pykvm.cpuid import Cpuid, CpuidEntry
from pykvm.irq import Route, msi_message
from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.machine import Machine
    from pykvm.system import System
    from pykvm.vm import VM

__all__ = ["CAPS", "PREPARE", "Enabling"]

_RING_ENTRIES = 1024
_SLOT = 100  # beyond those that the machine numbers itself
_MSI_LEVEL = 1 << 15  # SDM vol. 3, "Message Data Register Format"
_HV_INTERFACE, _HV_SYNDBG = 0x40000001, 0x40000082  # CPUID leaves of Microsoft's specification
_HV_SIGNATURE, _HV_ALLOW_DEBUGGING = int.from_bytes(b"Hv#1", "little"), 1 << 1

# device word of a kind: the capabilities of its VM
CAPS: dict[str, dict[str, tuple[int, ...]]] = {
    "msrs": {"KVM_CAP_X86_USER_SPACE_MSR": (lib.KVM_MSR_EXIT_REASON_UNKNOWN | lib.KVM_MSR_EXIT_REASON_INVAL,)},
    "emulation": {"KVM_CAP_EXIT_ON_EMULATION_FAILURE": (1,)},
    "ring": {"KVM_CAP_DIRTY_LOG_RING": (_RING_ENTRIES * ffi.sizeof("struct kvm_dirty_gfn"),)},
    "buslock": {"KVM_CAP_X86_BUS_LOCK_EXIT": (lib.KVM_BUS_LOCK_DETECTION_EXIT,)},
}


class Enabling:
    """A System whose VMs have the capabilities of a device word from the start: some can only be enabled while there are no vCPUs."""

    def __init__(self, system: System, word: str) -> None:
        self._system, self._caps = system, CAPS.get(word, {})

    def create_vm(self) -> VM:
        vm = self._system.create_vm()
        try:
            for cap, arguments in self._caps.items():
                vm.enable_cap(cap, *arguments)
        except BaseException:
            vm.close()
            raise
        return vm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system, name)


def _refused(machine: Machine) -> None:
    """A code segment that is of 64 and of 32 bits: no CPU enters the guest (SDM vol. 3 section 26.3.1.2, APM vol. 2 section 15.5.1)."""
    sregs = machine.vcpu.get_sregs()
    sregs.cs.l = sregs.cs.db = 1
    machine.vcpu.set_sregs(sregs)


def _report_tpr(machine: Machine) -> None:
    control = new("struct kvm_tpr_access_ctl")
    control.enabled = 1
    ioctl(machine.vcpu.fd, "KVM_TPR_ACCESS_REPORTING", control.cdata)


def _hyperv(machine: Machine) -> None:
    """CPUID leaves with which KVM lets the guest have Hyper-V's synthetic MSRs."""
    ours = (_HV_INTERFACE, _HV_SYNDBG)
    leaves = [entry for entry in machine.vcpu.get_cpuid2() if entry.function not in ours]
    leaves += [CpuidEntry(_HV_INTERFACE, 0, 0, _HV_SIGNATURE, 0, 0, 0), CpuidEntry(_HV_SYNDBG, 0, 0, _HV_ALLOW_DEBUGGING, 0, 0, 0)]
    machine.vcpu.set_cpuid2(Cpuid.of(leaves))


def _synic(machine: Machine) -> None:
    _hyperv(machine)
    machine.vcpu.enable_cap("KVM_CAP_HYPERV_SYNIC2")


def _xen(machine: Machine) -> None:
    config = new("struct kvm_xen_hvm_config")
    config.flags = lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
    ioctl(machine.vm.fd, "KVM_XEN_HVM_CONFIG", config.cdata)


def _level_triggered(machine: Machine) -> None:
    """The vector is one of a level-triggered pin: KVM tells user space's IOAPIC of each EOI."""
    address, data = msi_message(VECTOR)
    machine.vm.set_gsi_routing([Route.to_msi(0, address, data | _MSI_LEVEL)])


def _logged_slot(machine: Machine) -> mmap.mmap:
    memory = mmap.mmap(-1, RING_PAGES * PAGE_SIZE)
    machine.vm.set_user_memory_region(_SLOT, lib.KVM_MEM_LOG_DIRTY_PAGES, RING_GPA, len(memory), _address(memory))
    return memory


def _gone_slot(machine: Machine) -> mmap.mmap:
    memory = mmap.mmap(-1, PAGE_SIZE, prot=0)
    machine.vm.set_user_memory_region(_SLOT, 0, TOUCH_GPA, PAGE_SIZE, _address(memory))
    return memory


def _address(memory: mmap.mmap) -> int:
    with memoryview(memory) as view:
        return int(ffi.cast("uintptr_t", ffi.from_buffer(view)))


# device word of a kind: what is done to its machine, and gives what has to stay until the machine is closed
PREPARE: dict[str, Callable[[Machine], Any]] = {
    "refused": _refused,
    "tpr": _report_tpr,
    "hyperv": _hyperv,
    "synic": _synic,
    "xen": _xen,
    "eoi": _level_triggered,
    "ring": _logged_slot,
    "gone": _gone_slot,
}
