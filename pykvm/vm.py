"""A VM: its memory slots, interrupts and vCPUs. Methods are the VM ioctls without their KVM_ (api.rst 4)."""

from __future__ import annotations

import os

from pykvm.abi import Struct, capability, enable_cap, ffi, flexible, ioctl, ioctl_value, lib, new
from pykvm.errors import CapabilityError, ConfigError, KvmError
from pykvm.lifetime import Closes
from pykvm.platform import IDENTITY_MAP_GPA, TSS_ADDR_GPA
from pykvm.units import format_size
from pykvm.vcpu import VCPU

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Literal

    from pykvm.debug.pagetables import PageTables
    from pykvm.irq import Route
    from pykvm.memory import GuestMemory, MemSlot
    from pykvm.system import System

__all__ = ["VM"]


class VmHandle:
    """The fd of a VM and the memory that KVM has of it. VM and VCPU objects share it: it goes when the last of them does."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.slots: dict[int, MemSlot] = {}  # by KVM's number

    def close(self) -> None:
        """Close the fd, then let go of the memory."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
            for slot in self.slots.values():
                slot.release()
            self.slots.clear()

    def __del__(self) -> None:
        self.close()


class VM(Closes):
    """A VM fd, a context manager; made by ``System.create_vm()``.

    >>> with System() as system, GuestMemory.of_size("64K") as ram, system.create_vm() as vm:
    ...     vm.add_memory(ram)
    ...     vcpu = vm.create_vcpu()

    Closing it closes its vCPUs first. Guest memory belongs to the caller; what KVM has of it stays mapped until the VM is closed or the
    slot removed, whatever the caller does.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.vcpus: list[VCPU] = []
        self.memory: GuestMemory | None = None
        self.irqchip: Literal["none", "kernel", "split"] = "none"
        self.routes: list[Route] | None = None  # of set_gsi_routing(); KVM does not tell
        self._run_size = system.run_size
        self.sync_regs = system.check_extension("KVM_CAP_SYNC_REGS")
        self.coalesced_page = system.check_extension("KVM_CAP_COALESCED_MMIO")  # where in the kvm_run area its ring is
        self.handle = VmHandle(ioctl_value(system.fd, "KVM_CREATE_VM", 0))
        try:
            # Hosts without unrestricted guest run real mode in a virtual-8086 task: it needs a TSS and an identity map
            # in the guest's address space (api.rst 4.36, 4.40). Harmless elsewhere.
            self.set_tss_addr(TSS_ADDR_GPA)
            self.set_identity_map_addr(IDENTITY_MAP_GPA)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """The file descriptor, -1 once it is closed."""
        return self.handle.fd

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
        slots = self.handle.slots
        number = 0
        while number in slots:
            number += 1
        self.set_user_memory_region(number, flags, slot.gpa, slot.size, slot.hva)
        slots[number] = slot
        slot.retain()

    def remove_slot(self, slot: MemSlot) -> None:
        """Take a slot away from the guest: a region of size 0."""
        number = self._number(slot)
        self.set_user_memory_region(number, 0, slot.gpa, 0, slot.hva)
        del self.handle.slots[number]
        slot.release()

    def set_user_memory_region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        """KVM_SET_USER_MEMORY_REGION (api.rst 4.35): ``size`` bytes at host address ``hva`` become the guest's ``gpa``."""
        region = ffi.new("struct kvm_userspace_memory_region *", (slot, flags, gpa, size, hva))
        try:
            ioctl(self.fd, "KVM_SET_USER_MEMORY_REGION", region)
        except KvmError as error:
            error.detail = f"slot {slot}: {format_size(size)} at gpa {gpa:#x}"
            raise

    def log_dirty_pages(self, slot: MemSlot, on: bool = True) -> None:
        """KVM_MEM_LOG_DIRTY_PAGES for a slot that the guest has; vCPUs may run. get_dirty_log() then says what was written."""
        flags = (lib.KVM_MEM_READONLY if slot.readonly else 0) | (lib.KVM_MEM_LOG_DIRTY_PAGES if on else 0)
        self.set_user_memory_region(self._number(slot), flags, slot.gpa, slot.size, slot.hva)

    def get_dirty_log(self, slot: MemSlot, bitmap: Any) -> None:
        """KVM_GET_DIRTY_LOG (api.rst 4.8) into ``bitmap``, a buffer with a bit for each page, in whole 64-bit words.

        The pages then count as clean, but with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 enabled only after clear_dirty_log().
        """
        log = ffi.new("struct kvm_dirty_log *", {"slot": self._number(slot), "dirty_bitmap": ffi.from_buffer(bitmap)})
        ioctl(self.fd, "KVM_GET_DIRTY_LOG", log, repr(slot))

    def clear_dirty_log(self, slot: MemSlot, bitmap: Any, first: int, pages: int) -> None:
        """KVM_CLEAR_DIRTY_LOG (api.rst 4.117): those of ``pages`` pages from ``first`` on whose bit in ``bitmap`` is set count as clean.

        ``bitmap`` begins at ``first``, which must be a multiple of 64, and so must ``pages`` but at the slot's end.
        """
        log = ffi.new("struct kvm_clear_dirty_log *", {"slot": self._number(slot), "first_page": first, "num_pages": pages})
        log.dirty_bitmap = ffi.from_buffer(bitmap)
        ioctl(self.fd, "KVM_CLEAR_DIRTY_LOG", log, f"{pages} pages from {first} of {slot!r}")

    def _number(self, slot: MemSlot) -> int:
        """KVM's number of a slot."""
        number = next((n for n, known in self.handle.slots.items() if known is slot), None)
        if number is None:
            raise ConfigError(f"{slot!r} is none of this VM's{'; it is closed' if self.fd < 0 else ''}")
        return number

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages below 4 GiB that no slot may use."""
        ioctl_value(self.fd, "KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page below 4 GiB that no slot may use."""
        ioctl(self.fd, "KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", gpa))

    def page_tables(self, cr3: int | None = None, vcpu: VCPU | None = None) -> PageTables:
        """What the page tables at ``cr3`` (by default the vCPU's own) map, as ranges. ``vcpu``, by default the first, says which paging."""
        from pykvm.debug.pagetables import page_tables
        from pykvm.debug.translate import SlotMemory

        s = (vcpu or self.vcpus[0]).get_sregs()
        return page_tables(SlotMemory(self.handle.slots), cr0=s.cr0, cr3=s.cr3 if cr3 is None else cr3, cr4=s.cr4, efer=s.efer)

    # --- interrupts --------------------------------------------------------------------------------------------------

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP (api.rst 4.24): PIC, IOAPIC and, in each vCPU made after it, a LAPIC. HLT does not exit any more."""
        self.system.require("KVM_CAP_IRQCHIP", "an in-kernel irqchip")
        ioctl_value(self.fd, "KVM_CREATE_IRQCHIP", 0, "before any vCPU is made")
        self.irqchip = "kernel"

    def create_split_irqchip(self, pins: int = 24) -> None:
        """KVM_CAP_SPLIT_IRQCHIP (api.rst 7.5): LAPICs in the kernel; PIC and IOAPIC are user space's, the latter with ``pins`` GSIs."""
        self.system.require("KVM_CAP_SPLIT_IRQCHIP", "a split irqchip")
        self.enable_cap("KVM_CAP_SPLIT_IRQCHIP", pins)
        self.irqchip = "split"

    def create_pit2(self) -> None:
        """KVM_CREATE_PIT2 (api.rst 4.71): the i8254 at ports 0x40-0x43, on GSI 0; the speaker's port 0x61 answers too."""
        self.system.require("KVM_CAP_PIT2", "an in-kernel PIT")
        config = new("struct kvm_pit_config")
        config.flags = lib.KVM_PIT_SPEAKER_DUMMY
        ioctl(self.fd, "KVM_CREATE_PIT2", config.cdata, "an in-kernel irqchip must be there")

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE (api.rst 4.25): drive ``gsi`` high (1) or low (0). A level stays until it is changed; an edge needs both."""
        error = lib.pykvm_ioctl(self.handle.fd, lib.KVM_IRQ_LINE, ffi.new("struct kvm_irq_level *", (gsi, level)))
        if error < 0:
            raise KvmError("KVM_IRQ_LINE", -error, f"GSI {gsi}: is there an irqchip?")

    def set_gsi_routing(self, routes: Iterable[Route]) -> None:
        """KVM_SET_GSI_ROUTING (api.rst 4.52): where each GSI leads; replaces all routes (irq.default_routes() are KVM's own)."""
        self.system.require("KVM_CAP_IRQ_ROUTING", "GSI routing")
        entries = self.routes = list(routes)
        table = flexible("struct kvm_irq_routing", "entries", len(entries))
        table.nr = len(entries)
        for entry, route in zip(table.entries, entries, strict=False):
            route.fill(entry)
        ioctl(self.fd, "KVM_SET_GSI_ROUTING", table, f"{len(entries)} routes")

    def signal_msi(self, address: int, data: int) -> bool:
        """KVM_SIGNAL_MSI (api.rst 4.70): deliver a message at once. False: the guest has that interrupt blocked."""
        self.system.require("KVM_CAP_SIGNAL_MSI", "MSIs from user space")
        message = ffi.new("struct kvm_msi *")
        message.address_lo, message.address_hi = address & 0xFFFFFFFF, address >> 32
        message.data = data
        return ioctl(self.fd, "KVM_SIGNAL_MSI", message, f"MSI {data:#x} to {address:#x}") > 0

    def irqfd(self, gsi: int, fd: int, resample_fd: int = -1) -> None:
        """KVM_IRQFD (api.rst 4.75): each write to the eventfd ``fd`` is an interrupt on ``gsi``, without a system call to KVM.

        ``resample_fd``: the GSI is level triggered; it stays high until the guest ends the interrupt, which signals this eventfd
        (KVM_CAP_IRQFD_RESAMPLE).
        """
        self.system.require("KVM_CAP_IRQFD", "irqfd")
        request = ffi.new("struct kvm_irqfd *")
        request.fd, request.gsi = fd, gsi
        if resample_fd >= 0:
            self.system.require("KVM_CAP_IRQFD_RESAMPLE", "a level-triggered irqfd")
            request.flags, request.resamplefd = lib.KVM_IRQFD_FLAG_RESAMPLE, resample_fd
        ioctl(self.fd, "KVM_IRQFD", request, f"GSI {gsi}: is there an irqchip?")

    def remove_irqfd(self, gsi: int, fd: int) -> None:
        """Take an irqfd away."""
        request = ffi.new("struct kvm_irqfd *")
        request.fd, request.gsi, request.flags = fd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN
        ioctl(self.fd, "KVM_IRQFD", request, f"GSI {gsi}")

    def flush_irqfd(self, gsi: int, fd: int, resample_fd: int = -1) -> None:
        """Have an interrupt arrive that this irqfd was signalled for: KVM delivers some from a work queue of its own.

        Taking an irqfd away waits for its work, and it is given back. The last one with resample of a GSI lowers the line as it goes, so
        another one stands in meanwhile. Nobody must signal ``fd`` until this returns.
        """
        if resample_fd < 0:
            self.remove_irqfd(gsi, fd)
            self.irqfd(gsi, fd)
            return
        from pykvm.irq import EventFd

        with EventFd() as other, EventFd() as others_resample:
            self.irqfd(gsi, other.fd, others_resample.fd)
            try:
                self.remove_irqfd(gsi, fd)
                self.irqfd(gsi, fd, resample_fd)
            finally:
                self.remove_irqfd(gsi, other.fd)

    def get_irqchip(self, chip: int) -> Struct:
        """KVM_GET_IRQCHIP (api.rst 4.26): ``struct kvm_irqchip`` of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
        state = new("struct kvm_irqchip")
        state.chip_id = chip
        ioctl(self.fd, "KVM_GET_IRQCHIP", state.cdata)
        return state

    def set_irqchip(self, state: Struct) -> None:
        """KVM_SET_IRQCHIP (api.rst 4.27)."""
        ioctl(self.fd, "KVM_SET_IRQCHIP", state.cdata)

    def get_pit2(self) -> Struct:
        """KVM_GET_PIT2 (api.rst 4.73): ``struct kvm_pit_state2`` (KVM_CAP_PIT_STATE2)."""
        state = new("struct kvm_pit_state2")
        ioctl(self.fd, "KVM_GET_PIT2", state.cdata)
        return state

    def set_pit2(self, state: Struct) -> None:
        """KVM_SET_PIT2 (api.rst 4.74): its channels count from their initial counts again."""
        ioctl(self.fd, "KVM_SET_PIT2", state.cdata)

    # --- exits that need no user space --------------------------------------------------------------------------------

    def ioeventfd(self, space: str, at: int, length: int, fd: int, datamatch: int | None = None, *, remove: bool = False) -> None:
        """KVM_IOEVENTFD (api.rst 4.59): a guest's write of ``length`` bytes at ``at`` signals the eventfd ``fd`` and does not exit.

        ``space``: "pio" or "mmio". ``length``: 1, 2, 4 or 8, or 0 for any. ``datamatch``: only a write of that value. ``remove``: no more.
        """
        self.system.require("KVM_CAP_IOEVENTFD", "ioeventfd")
        request = ffi.new("struct kvm_ioeventfd *")
        request.addr, request.len, request.fd = at, length, fd
        if space == "pio":
            request.flags |= lib.KVM_IOEVENTFD_FLAG_PIO
        if datamatch is not None:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
            request.datamatch = datamatch
        if remove:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        ioctl(self.fd, "KVM_IOEVENTFD", request, f"{space} {at:#x}, length {length}")

    def coalesce(self, space: str, at: int, length: int, *, remove: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO (api.rst 4.116): writes there wait in a ring until the next exit; VCPU.coalesced() takes them out.

        ``space``: "mmio" (KVM_CAP_COALESCED_MMIO) or "pio" (KVM_CAP_COALESCED_PIO).
        """
        pio = space == "pio"
        self.system.require("KVM_CAP_COALESCED_PIO" if pio else "KVM_CAP_COALESCED_MMIO", f"coalesced {space} writes")
        zone = ffi.new("struct kvm_coalesced_mmio_zone *")
        zone.addr, zone.size, zone.pio = at, length, pio
        name = "KVM_UNREGISTER_COALESCED_MMIO" if remove else "KVM_REGISTER_COALESCED_MMIO"
        ioctl(self.fd, name, zone, f"{space} {at:#x}, length {length:#x}")

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD (api.rst 4.133): an fd that kvmstats.read_stats() reads; the caller closes it (KVM_CAP_BINARY_STATS_FD)."""
        self.system.require("KVM_CAP_BINARY_STATS_FD", "KVM's counters")
        return ioctl_value(self.fd, "KVM_GET_STATS_FD")

    # --- time and MSRs -----------------------------------------------------------------------------------------------

    def get_clock(self) -> Struct:
        """KVM_GET_CLOCK (api.rst 4.29): kvmclock, in nanoseconds (``struct kvm_clock_data``; KVM_CAP_ADJUST_CLOCK)."""
        data = new("struct kvm_clock_data")
        ioctl(self.fd, "KVM_GET_CLOCK", data.cdata)
        return data

    def set_clock(self, nanoseconds: int) -> None:
        """KVM_SET_CLOCK (api.rst 4.30): kvmclock goes on from here."""
        data = new("struct kvm_clock_data")
        data.clock = nanoseconds
        ioctl(self.fd, "KVM_SET_CLOCK", data.cdata)

    def set_msr_filter(self, ranges: Iterable[tuple[int, int, bytes]], *, default_allow: bool = True) -> None:
        """KVM_X86_SET_MSR_FILTER (api.rst 4.97): which MSR accesses KVM may carry out; the others exit, or are #GP.

        ``ranges``: up to 16 of (flags, first MSR, bitmap), flags KVM_MSR_FILTER_READ and _WRITE; a 1 in the bitmap allows. No ranges and
        ``default_allow``: no filter. Needs KVM_CAP_X86_MSR_FILTER.
        """
        self.system.require("KVM_CAP_X86_MSR_FILTER", "MSR filters")
        table = new("struct kvm_msr_filter")
        table.flags = lib.KVM_MSR_FILTER_DEFAULT_ALLOW if default_allow else lib.KVM_MSR_FILTER_DEFAULT_DENY
        keep = []
        for row, (flags, base, bitmap) in zip(table.cdata.ranges, ranges, strict=False):
            bits = ffi.new("uint8_t[]", bitmap + bytes(-len(bitmap) % 8))
            keep.append(bits)
            row.flags, row.base, row.nmsrs, row.bitmap = flags, base, 8 * len(bitmap), bits
        ioctl(self.fd, "KVM_X86_SET_MSR_FILTER", table.cdata, f"{len(keep)} ranges")

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
        enable_cap(self.fd, cap, *args)

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the vCPUs, then the VM."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.handle.close()

    def __repr__(self) -> str:
        state = "closed" if self.fd < 0 else f"fd {self.fd}"
        return f"<VM {state}, {len(self.vcpus)} vCPU{'s' * (len(self.vcpus) != 1)}, memory {self.memory!r}>"
