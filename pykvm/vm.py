"""A VM: its memory slots and its vCPUs. Methods are the VM ioctls without their KVM_ (api.rst 4)."""

from __future__ import annotations

import os

from pykvm.abi import capability, ffi, ioctl, ioctl_value, lib
from pykvm.errors import CapabilityError
from pykvm.platform import IDENTITY_MAP_GPA, TSS_ADDR_GPA
from pykvm.units import format_size
from pykvm.vcpu import VCPU

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from pykvm.memory import GuestMemory, MemSlot
    from pykvm.system import System

__all__ = ["VM"]


class VM:
    """A VM fd, a context manager; made by ``System.create_vm()``.

    >>> with System() as system, GuestMemory.of_size("64K") as ram, system.create_vm() as vm:
    ...     vm.add_memory(ram)
    ...     vcpu = vm.create_vcpu()

    Closing it closes its vCPUs first. Guest memory belongs to the caller and must outlive the VM.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.fd = -1
        self.vcpus: list[VCPU] = []
        self.memory: GuestMemory | None = None
        self._run_size = system.get_vcpu_mmap_size()
        self.sync_regs = system.check_extension("KVM_CAP_SYNC_REGS")
        self.fd = ioctl_value(system.fd, "KVM_CREATE_VM", 0)
        try:
            # Hosts without unrestricted guest run real mode in a virtual-8086 task: it needs a TSS and an identity map
            # in the guest's address space (api.rst 4.36, 4.40). Harmless elsewhere.
            self.set_tss_addr(TSS_ADDR_GPA)
            self.set_identity_map_addr(IDENTITY_MAP_GPA)
        except BaseException:
            self.close()
            raise

    # --- memory ------------------------------------------------------------------------------------------------------

    def add_memory(self, memory: GuestMemory) -> None:
        """Give KVM all slots of ``memory``."""
        self.memory = memory
        for slot in memory.slots:
            self.add_slot(slot)

    def add_slot(self, slot: MemSlot) -> None:
        """KVM_SET_USER_MEMORY_REGION for one slot; readonly ones need KVM_CAP_READONLY_MEM."""
        flags = 0
        if slot.readonly:
            if not self.check_extension("KVM_CAP_READONLY_MEM"):
                raise CapabilityError("KVM_CAP_READONLY_MEM", f"the read-only {slot!r}")
            flags = lib.KVM_MEM_READONLY
        self.set_user_memory_region(slot.id, flags, slot.gpa, slot.size, slot.hva)

    def remove_slot(self, slot: MemSlot) -> None:
        """Take a slot away from the guest: a region of size 0."""
        self.set_user_memory_region(slot.id, 0, slot.gpa, 0, slot.hva)

    def set_user_memory_region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        """KVM_SET_USER_MEMORY_REGION (api.rst 4.35): ``size`` bytes at host address ``hva`` become the guest's ``gpa``."""
        region = ffi.new("struct kvm_userspace_memory_region *", (slot, flags, gpa, size, hva))
        ioctl(self.fd, "KVM_SET_USER_MEMORY_REGION", region, f"slot {slot}: {format_size(size)} at gpa {gpa:#x}")

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages below 4 GiB that no slot may use."""
        ioctl_value(self.fd, "KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page below 4 GiB that no slot may use."""
        ioctl(self.fd, "KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", gpa))

    # --- vCPUs and capabilities --------------------------------------------------------------------------------------

    def create_vcpu(self, id: int | None = None) -> VCPU:
        """KVM_CREATE_VCPU; ``id`` is its APIC id, by default the next free number."""
        if id is None:
            id = len(self.vcpus)
        vcpu = VCPU(self, id, self._run_size)
        self.vcpus.append(vcpu)
        return vcpu

    def check_extension(self, cap: str) -> int:
        """KVM_CHECK_EXTENSION on the VM: like System's, but some answers depend on the VM."""
        return ioctl_value(self.fd, "KVM_CHECK_EXTENSION", capability(cap), cap)

    def enable_cap(self, cap: str, *args: int) -> None:
        """KVM_ENABLE_CAP (api.rst 4.37) with up to four arguments."""
        request = ffi.new("struct kvm_enable_cap *")
        request.cap = capability(cap)
        for i, value in enumerate(args):
            request.args[i] = value
        ioctl(self.fd, "KVM_ENABLE_CAP", request, cap)

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the vCPUs, then the VM."""
        for vcpu in self.vcpus:
            vcpu.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> VM:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.fd < 0 else f"fd {self.fd}"
        return f"<VM {state}, {len(self.vcpus)} vCPU{'s' * (len(self.vcpus) != 1)}, memory {self.memory!r}>"
