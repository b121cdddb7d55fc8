"""A checkpoint of a machine, and reset() to it: registers, devices and the pages that were written since, for fuzzing and grading loops.

The pages are those of KVM's dirty log and those that the host has written (hostwrites.py); native/state.c puts them and the vCPUs back in
one call. Devices are asked for their state once; those that the guest has not touched since are left alone.

**Page tables.** Neither KVM's shadows of the guest's page tables nor the CPU's TLB hear of what the host writes, and any page that is put
back may have been one, if only for a while. So the TLB is flushed by each reset that has put something back; where KVM has shadows (no EPT
or NPT: probe.shadow_paging), it is made to forget them, which takes longer. A program in user mode cannot change its kernel's page tables
nor have others used, and is spared that, as long as the host leaves the kernel's pages, sregs and MSRs alone.

What is not put back: clocks (the TSC, a PIT's count goes on from its start), counters of exits, and what no device states of itself.
"""

from __future__ import annotations

import mmap
from functools import partial

from pykvm.abi import ffi, lib
from pykvm.errors import ConfigError, KvmError, StateError
from pykvm.platform import GDT_GPA, IDT_GPA, PAGE_TABLES_END, PAGE_TABLES_GPA
from pykvm.probe import shadow_paging
from pykvm.state.save import device_places, settle
from pykvm.state.vcpustructs import TSC, capture, tr_as_loaded
from pykvm.units import PAGE_SIZE
from pykvm.x86.msr import MSRS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.bus import Range
    from pykvm.machine import Machine
    from pykvm.state.vcpustructs import VcpuStructs
    from pykvm.vcpu import VCPU

__all__ = ["Checkpoint"]

_ENTRIES = [MSRS[name] for name in ("IA32_SYSENTER_CS", "IA32_LSTAR", "IA32_CSTAR")]  # where CPL3 enters CPL0 without a gate


class Checkpoint:
    """Where a machine stood. One at a time for each machine: KVM keeps one dirty log.

    ``pages``: how many the last reset() has put back; ``flushes``: resets that have had page tables forgotten.
    Raises ConfigError, StateError (nested virtualization in use) and KvmError.
    """

    def __init__(self, machine: Machine) -> None:
        settle(machine)
        self._machine = machine
        self._keep: list[Any] = []  # cffi objects that the native structure points at
        self._copies: list[mmap.mmap] = []
        self._undo: list[Callable[[], object]] = []
        self._touched: set[int] = set()
        self._native = ffi.new("struct pykvm_reset *")
        try:
            self._add_slots()
            self._add_vcpus()
            self._add_chips()
            self._add_devices()
        except BaseException:
            self.close()
            raise
        self._clock = machine.clock
        self._vectors = [list(runner.vectors) for runner in machine.runners]
        self._console, self._dropped = len(machine.console.data), machine.console.dropped
        self._services = None if machine.services is None else machine.services.save()
        self._sealed = machine.info.mode == "user" and all(map(_is_sealed, machine.vcpus))
        self._system_writes = [vcpu.system_writes for vcpu in machine.vcpus]

    @property
    def pages(self) -> int:
        """Put back by the last reset()."""
        return int(self._native.pages)

    @property
    def flushes(self) -> int:
        """Resets that have had page tables forgotten."""
        return int(self._native.flushes)

    # --- making it ---------------------------------------------------------------------------------------------------

    def _add_slots(self) -> None:
        machine = self._machine
        vm, memory = machine.vm, machine.memory
        self._slots = {number: slot for number, slot in vm.handle.slots.items() if not slot.readonly}
        self._all_slots = dict(vm.handle.slots)
        rows = ffi.new("struct pykvm_reset_slot[]", len(self._slots))
        self._keep.append(rows)
        self._log = memory.log_writes()
        self._undo.append(memory.stop_log)
        self._marks = []
        for row, (number, slot) in zip(rows, self._slots.items(), strict=False):
            vm.log_dirty_pages(slot)
            self._undo.append(partial(_stop_logging, machine, slot))
            words = -(-slot.size // PAGE_SIZE // 64)
            dirty, host = ffi.new("uint64_t[]", words), ffi.new("uint64_t[]", words)
            copy = mmap.mmap(-1, slot.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
            self._copies.append(copy)
            base = ffi.from_buffer("uint8_t[]", copy)
            lib.pykvm_copy_pages(base, ffi.cast("uint8_t *", slot.hva), slot.size, slot.file)
            self._keep += [dirty, host, base]
            row.region = (number, lib.KVM_MEM_LOG_DIRTY_PAGES, slot.gpa, slot.size, slot.hva)
            row.base, row.dirty, row.host = base, dirty, host
            self._marks.append((slot, host))
        native = self._native
        native.vm_fd, native.slots, native.slot, native.shadows = vm.fd, len(self._slots), rows, shadow_paging()
        last = max(self._all_slots.values(), key=lambda slot: slot.gpa)
        native.spare = (max(self._all_slots) + 1, 0, last.gpa + last.size, PAGE_SIZE, last.hva)
        for slot in self._slots.values():  # clean from now on
            vm.get_dirty_log(slot, bytearray(-(-slot.size // PAGE_SIZE // 64) * 8))

    def _add_vcpus(self) -> None:
        machine, native = self._machine, self._native
        cells = ffi.new("struct pykvm_reset_vcpu[]", machine.cpus)
        self._keep.append(cells)
        wanted = lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS | lib.KVM_SYNC_X86_EVENTS
        # A vCPU that waits for INIT takes no registers from kvm_run; those with a LAPIC are written by ioctls.
        native.syncs = machine.vm.irqchip == "none" and machine.vm.sync_regs & wanted == wanted
        native.vcpus, native.vcpu = machine.cpus, cells
        for cell, vcpu in zip(cells, machine.vcpus, strict=False):
            structs = capture(machine.vm, vcpu)
            if structs.nested is not None:
                raise StateError(f"vcpus[{vcpu.id}]", "nested virtualization is in use: a checkpoint cannot hold that")
            self._fill_vcpu(cell, vcpu, structs)

    def _fill_vcpu(self, cell: Any, vcpu: VCPU, structs: VcpuStructs) -> None:
        cell.v = vcpu.native
        cell.regs, cell.sregs = structs.regs.cdata[0], vcpu.get_sregs().cdata[0]
        tr_as_loaded(cell.sregs)
        cell.events, cell.debugregs, cell.has_debugregs = structs.events.cdata[0], structs.debugregs.cdata[0], 1
        cell.mp_state.mp_state = structs.mp_state
        if structs.xcrs is not None:
            cell.xcrs, cell.has_xcrs = structs.xcrs.cdata[0], 1
        xsave = ffi.new("char[]", structs.xsave)
        cell.xsave = xsave
        self._keep.append(xsave)
        if structs.lapic is not None:
            cell.lapic = structs.lapic.cdata
            self._keep.append(structs.lapic)
        structs.leave_out((TSC,))
        refused = vcpu.set_msrs(structs.msr_table())  # what KVM does not take, the guest cannot have changed
        structs.leave_out([index for index, _ in refused])
        msrs = structs.msr_table()
        cell.msrs = msrs.cdata
        self._keep.append(msrs)

    def _add_chips(self) -> None:
        vm, native = self._machine.vm, self._native
        if vm.irqchip != "kernel":
            return
        chips = ffi.new("struct kvm_irqchip[]", 3)
        for i in range(3):
            chips[i] = vm.get_irqchip(i).cdata[0]
        pit = vm.get_pit2()
        self._keep += [chips, pit]
        native.irqchips, native.irqchip, native.pit = 3, chips, pit.cdata

    def _add_devices(self) -> None:
        """Each device's state, and a note of who is asked from now on."""
        bus = self._machine.bus
        self._devices = [
            (device, device.save())
            for _, _, _, device in device_places(self._machine)
            if hasattr(device, "save") and hasattr(device, "load")
        ]
        places = {id(device): i for i, (device, _) in enumerate(self._devices)}
        for space in (bus.pio, bus.mmio):
            for claimed in space.ranges:
                place = places.get(id(claimed.device))
                if place is not None:
                    self._undo.append(_watch(claimed, place, self._touched))
            space.version += 1  # the run loops ask for the methods again
        self._machine._on_bus_change()
        # Time passes for devices that interrupt: those are put back each time.
        self._always = self._machine.vm.irqchip != "none"
        self._queue = bytes(self._machine.uart.queue)

    def _guard(self) -> None:
        """The pages that must not have changed if what is remembered of page tables is to be right."""
        machine, native = self._machine, self._native
        if self._sealed and [vcpu.system_writes for vcpu in machine.vcpus] == self._system_writes:
            native.guarded, native.guarded_end = GDT_GPA, PAGE_TABLES_END
        else:
            native.guarded, native.guarded_end = 0, (1 << 64) - 1

    # --- using it ----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Put the machine back; it must stand still. Raises ConfigError, StateError for what cannot be put back, KvmError."""
        machine = self._machine
        for runner in machine.runners:
            if runner.vcpu.native.tid:
                raise ConfigError("the machine is running: stop() the run first")
        if machine.vm.handle.slots != self._all_slots:
            raise StateError("slots", "memory slots have come or gone since the checkpoint: take another one")
        if self._services is not None and machine.services is not None and machine.services.save() != self._services:
            raise StateError("services", "the guest has set up interrupts or MSRs by hypercall since the checkpoint: take another one")
        self._take_host_writes()
        self._guard()
        error = lib.pykvm_reset(self._native)
        if error:
            raise KvmError(
                ffi.string(self._native.failed).decode(), -error, "a reset to the checkpoint: the machine is between two states now"
            )
        self._put_devices()
        console = machine.console
        del console.data[self._console :]
        console.dropped = self._dropped
        for runner, vectors in zip(machine.runners, self._vectors, strict=True):
            runner.take_back_stop()
            runner.vectors = vectors
        if self._clock is not None:
            machine.clock = self._clock

    def _take_host_writes(self) -> None:
        memory = self._machine.memory
        memory.mark_views()
        for slot, bitmap in self._marks:
            for page in self._log.pages(slot):
                bitmap[page // 64] |= 1 << page % 64

    def _put_devices(self) -> None:
        if self._always or self._machine.uart.queue != self._queue:
            for device, state in self._devices:
                device.load(state)
        elif self._touched:
            for place in self._touched:
                device, state = self._devices[place]
                device.load(state)
        self._touched.clear()

    def close(self) -> None:
        """Forget it: no more dirty log, and the memory it held is given back."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._keep.clear()
        for copy in self._copies:
            try:
                copy.close()
            except BufferError:
                pass  # it goes with the last reference
        self._copies.clear()


def _is_sealed(vcpu: VCPU) -> bool:
    """Whether the program of modes.UserMode comes to CPL0 by exceptions alone, and there to the kernel's own stubs.

    SYSENTER raises #GP, and SYSCALL #UD, or #PF at 0, where nothing is mapped (some hosts have EFER.SCE always set).
    """
    sregs = vcpu.get_sregs()
    as_made = sregs.cs.dpl == 3 and sregs.cr3 == PAGE_TABLES_GPA and (sregs.idt.base, sregs.gdt.base) == (IDT_GPA, GDT_GPA)
    return bool(as_made) and not any(vcpu.get_msrs(_ENTRIES).values())


def _stop_logging(machine: Machine, slot: Any) -> None:
    if slot in machine.vm.handle.slots.values():
        try:
            machine.vm.log_dirty_pages(slot, False)
        except KvmError:
            pass  # the VM is gone, and its log with it


def _watch(claimed: Range, place: int, touched: set[int]) -> Callable[[], object]:
    """Note whether the range's device is asked; returns what undoes it."""
    read, write = claimed.read, claimed.write
    note = touched.add

    def read_noted(offset: int, size: int) -> int:
        note(place)
        return read(offset, size)

    def write_noted(offset: int, size: int, value: int) -> object:
        note(place)
        return write(offset, size, value)

    def undo() -> None:
        claimed.read, claimed.write = read, write

    claimed.read, claimed.write = read_noted, write_noted
    return undo
