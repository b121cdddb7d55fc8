"""A vCPU: its registers and KVM_RUN. Methods are the vCPU ioctls without their KVM_ (api.rst 4)."""

from __future__ import annotations

import os

import pykvm
from pykvm.abi import EAGAIN, EBADF, EFAULT, EINTR, Struct, enable_cap, ffi, flexible, ioctl, ioctl_value, lib, new
from pykvm.cpuid import Cpuid
from pykvm.errors import ConfigError, KvmError
from pykvm.lifetime import Closes
from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    import pykvm.exits
    from pykvm.bus import SpaceName
    from pykvm.debug.translate import Translation
    from pykvm.vm import VM

__all__ = ["FOREVER", "VCPU", "MsrTable"]

FOREVER = 1e9  # seconds, 31 years: longer time limits are cut to this, so that their nanoseconds have room

_ERROR = lib.PYKVM_ERROR


class MsrTable:
    """``rows`` of (MSR, value), and the ``struct kvm_msrs`` that has them: for VCPU.set_msrs(), again and again."""

    __slots__ = ("cdata", "rows")

    def __init__(self, rows: Iterable[tuple[int, int]]) -> None:
        self.rows = list(rows)
        self.cdata = flexible("struct kvm_msrs", "entries", len(self.rows))
        self.cdata.nmsrs = len(self.rows)
        words = ffi.new("uint64_t[]", [word for row in self.rows for word in row])  # as struct kvm_msr_entry has them
        ffi.memmove(self.cdata.entries, words, ffi.sizeof(words))


class VCPU(Closes):
    """A vCPU fd and the kvm_run area it shares with user space; made by ``VM.create_vcpu()``.

    Structures come as ``Struct``: change a field and set it back.

    >>> regs = vcpu.get_regs()
    >>> regs.rip = 0x1000
    >>> vcpu.set_regs(regs)
    """

    def __init__(self, vm: VM, id: int, run_size: int) -> None:
        self.id = id
        self.fd = -1
        self._sync_regs = vm.sync_regs
        self._vm_coalesced_page = vm.coalesced_page
        self._xsave = 0  # bytes of an XSAVE area, once asked for
        self.asked: Cpuid | None = None  # what set_cpuid2() was given
        self.system_writes = 0  # how often user space has set sregs or MSRs
        self.known_msrs: list[int] | None = None  # those that state/vcpustructs.py has found to be there
        self._vm = vm.handle  # the VM's fd and memory stay while this vCPU does
        # What native/runloop.c knows of this vCPU, at the start of a page of its own; the run loop's table shares the page. Whoever has
        # ``native`` keeps the page.
        arena = ffi.new("char[]", 2 * PAGE_SIZE)
        start = -int(ffi.cast("uintptr_t", arena)) % PAGE_SIZE
        self.native: Any = ffi.gc(ffi.cast("struct pykvm_vcpu *", arena + start), lambda _, arena=arena: None)
        self.lent: object = None  # what a Runner had ``native`` point at: it must live as long
        fd = ioctl_value(vm.fd, "KVM_CREATE_VCPU", id, f"vCPU {id}")
        self.fd = fd
        error = lib.pykvm_map_run(self.native, fd, run_size)
        if error < 0:
            self.close()
            raise KvmError("mmap of kvm_run", -error, f"vCPU {id}")
        self.native.id = id

    # --- registers ---------------------------------------------------------------------------------------------------

    def _get(self, name: str, ctype: str) -> Struct:
        value = new(ctype)
        ioctl(self.fd, name, value.cdata)
        return value

    def get_regs(self) -> Struct:
        """KVM_GET_REGS: ``struct kvm_regs``, rax to r15, rip, rflags."""
        return self._get("KVM_GET_REGS", "struct kvm_regs")

    def set_regs(self, regs: Struct) -> None:
        """KVM_SET_REGS."""
        ioctl(self.fd, "KVM_SET_REGS", regs.cdata)

    def get_sregs(self) -> Struct:
        """KVM_GET_SREGS: ``struct kvm_sregs``, segments, tables, control registers, EFER."""
        return self._get("KVM_GET_SREGS", "struct kvm_sregs")

    def set_sregs(self, sregs: Struct) -> None:
        """KVM_SET_SREGS. EINVAL means that the control registers contradict each other."""
        self.system_writes += 1
        ioctl(self.fd, "KVM_SET_SREGS", sregs.cdata, "do CR0, CR4, EFER and CS agree on one mode?")

    def get_sregs2(self) -> Struct:
        """KVM_GET_SREGS2 (api.rst 4.131): ``struct kvm_sregs2``, as sregs and with PAE's PDPTRs (KVM_CAP_SREGS2)."""
        return self._get("KVM_GET_SREGS2", "struct kvm_sregs2")

    def set_sregs2(self, sregs: Struct) -> None:
        """KVM_SET_SREGS2."""
        self.system_writes += 1
        ioctl(self.fd, "KVM_SET_SREGS2", sregs.cdata, "do CR0, CR4, EFER and CS agree on one mode?")

    def get_xsave(self) -> bytes:
        """KVM_GET_XSAVE2 (api.rst 4.134), or KVM_GET_XSAVE where 4096 bytes are enough: the XSAVE area in its standard format
        (KVM_CAP_XSAVE)."""
        size = self._xsave_size()
        area = ffi.new("char[]", size)
        ioctl(self.fd, "KVM_GET_XSAVE2" if size > 4096 else "KVM_GET_XSAVE", area)
        return bytes(ffi.buffer(area))

    def set_xsave(self, area: bytes) -> None:
        """KVM_SET_XSAVE; ``area`` is padded with zeros to the size that KVM reads."""
        ioctl(
            self.fd, "KVM_SET_XSAVE", ffi.new("char[]", area.ljust(self._xsave_size(), b"\0")), "does XSTATE_BV or MXCSR ask for too much?"
        )

    def _xsave_size(self) -> int:
        if not self._xsave:
            self._xsave = max(4096, ioctl_value(self._vm.fd, "KVM_CHECK_EXTENSION", lib.KVM_CAP_XSAVE2))
        return self._xsave

    def get_fpu(self) -> Struct:
        """KVM_GET_FPU: x87 and SSE registers (``struct kvm_fpu``)."""
        return self._get("KVM_GET_FPU", "struct kvm_fpu")

    def get_xcrs(self) -> Struct:
        """KVM_GET_XCRS: XCR0 (KVM_CAP_XCRS)."""
        return self._get("KVM_GET_XCRS", "struct kvm_xcrs")

    def set_xcrs(self, xcrs: Struct) -> None:
        """KVM_SET_XCRS."""
        ioctl(self.fd, "KVM_SET_XCRS", xcrs.cdata)

    def get_vcpu_events(self) -> Struct:
        """KVM_GET_VCPU_EVENTS: exceptions, interrupts, NMIs in flight (``struct kvm_vcpu_events``)."""
        return self._get("KVM_GET_VCPU_EVENTS", "struct kvm_vcpu_events")

    def set_vcpu_events(self, events: Struct) -> None:
        """KVM_SET_VCPU_EVENTS: what they hold is injected at the next entry."""
        ioctl(self.fd, "KVM_SET_VCPU_EVENTS", events.cdata)

    def get_debugregs(self) -> Struct:
        """KVM_GET_DEBUGREGS: DR0-DR3, DR6, DR7 (``struct kvm_debugregs``)."""
        return self._get("KVM_GET_DEBUGREGS", "struct kvm_debugregs")

    def set_debugregs(self, debugregs: Struct) -> None:
        """KVM_SET_DEBUGREGS."""
        ioctl(self.fd, "KVM_SET_DEBUGREGS", debugregs.cdata)

    def get_nested_state(self, size: int) -> bytes:
        """KVM_GET_NESTED_STATE (api.rst 4.114): ``struct kvm_nested_state`` and what follows it, at most ``size`` bytes
        (what KVM_CAP_NESTED_STATE says)."""
        area = ffi.new("char[]", size)
        state = ffi.cast("struct kvm_nested_state *", area)
        state.size = size
        ioctl(self.fd, "KVM_GET_NESTED_STATE", area)
        return bytes(ffi.buffer(area, min(state.size, size)))

    def set_nested_state(self, state: bytes) -> None:
        """KVM_SET_NESTED_STATE (api.rst 4.115)."""
        ioctl(self.fd, "KVM_SET_NESTED_STATE", ffi.new("char[]", state.ljust(ffi.sizeof("struct kvm_nested_state"), b"\0")))

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: a KVM_MP_STATE_ number."""
        return int(self._get("KVM_GET_MP_STATE", "struct kvm_mp_state").mp_state)

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE: a KVM_MP_STATE_ number; an AP that need not wait for SIPI is made RUNNABLE (needs an in-kernel LAPIC)."""
        value = new("struct kvm_mp_state")
        value.mp_state = state
        ioctl(self.fd, "KVM_SET_MP_STATE", value.cdata, f"mp_state {state}")

    # --- interrupts --------------------------------------------------------------------------------------------------

    def get_lapic(self) -> Struct:
        """KVM_GET_LAPIC: the register page of the in-kernel LAPIC (``struct kvm_lapic_state``; api.rst 4.57)."""
        return self._get("KVM_GET_LAPIC", "struct kvm_lapic_state")

    def set_lapic(self, lapic: Struct) -> None:
        """KVM_SET_LAPIC."""
        ioctl(self.fd, "KVM_SET_LAPIC", lapic.cdata)

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT (api.rst 4.16): deliver ``vector`` at the next entry; only without an in-kernel irqchip, and only while
        kvm_run.ready_for_interrupt_injection is set (else ask with kvm_run.request_interrupt_window)."""
        ioctl(
            self.fd,
            "KVM_INTERRUPT",
            ffi.new("struct kvm_interrupt *", (vector,)),
            f"vector {vector}: one is pending, or an irqchip is there",
        )

    def nmi(self) -> None:
        """KVM_NMI (api.rst 4.64): a non-maskable interrupt at the next entry (KVM_CAP_USER_NMI)."""
        ioctl_value(self.fd, "KVM_NMI")

    def inject_exception(self, vector: int, error_code: int | None = None) -> None:
        """Have the guest take an exception at the next entry, as if its instruction had raised it (KVM_SET_VCPU_EVENTS)."""
        events = self.get_vcpu_events()
        exception = events.exception
        exception.injected, exception.nr = 1, vector
        exception.has_error_code, exception.error_code = error_code is not None, error_code or 0
        self.set_vcpu_events(events)

    def get_cpuid2(self) -> Cpuid:
        """KVM_GET_CPUID2: what KVM really gives the guest."""
        table = flexible("struct kvm_cpuid2", "entries", 256)
        table.nent = 256
        ioctl(self.fd, "KVM_GET_CPUID2", table)
        last = table.nent - 1  # older kernels (6.1) leave nent as it was: what follows the entries is zero
        while last and not any(bytes(ffi.buffer(table.entries + last, ffi.sizeof("struct kvm_cpuid_entry2")))):
            last -= 1
        table.nent = last + 1
        return Cpuid(table)

    def set_cpuid2(self, cpuid: Cpuid) -> None:
        """KVM_SET_CPUID2: before the first run; not every host keeps every bit (read get_cpuid2 back)."""
        ioctl(self.fd, "KVM_SET_CPUID2", cpuid.cdata, f"{len(cpuid)} entries")
        self.asked, self.known_msrs = cpuid, None

    def get_msr(self, index: int) -> int:
        """KVM_GET_MSRS for one MSR."""
        msrs = flexible("struct kvm_msrs", "entries", 1)
        msrs.nmsrs = 1
        msrs.entries[0].index = index
        if ioctl(self.fd, "KVM_GET_MSRS", msrs, f"MSR {index:#x}") != 1:
            raise KvmError("KVM_GET_MSRS", 22, f"this host's KVM does not know MSR {index:#x}")
        return int(msrs.entries[0].data)

    def set_msr(self, index: int, value: int) -> None:
        """KVM_SET_MSRS for one MSR."""
        self.system_writes += 1
        msrs = flexible("struct kvm_msrs", "entries", 1)
        msrs.nmsrs = 1
        msrs.entries[0].index, msrs.entries[0].data = index, value
        if ioctl(self.fd, "KVM_SET_MSRS", msrs, f"MSR {index:#x}") != 1:
            raise KvmError("KVM_SET_MSRS", 22, f"this host's KVM does not take {value:#x} for MSR {index:#x}")

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS (api.rst 4.18) for many; those that KVM does not know, or not for this guest, are left out."""
        wanted = list(indices)
        got: dict[int, int] = {}
        msrs = flexible("struct kvm_msrs", "entries", len(wanted))
        while wanted:
            msrs.nmsrs = len(wanted)
            pairs = ffi.cast("uint64_t *", msrs.entries)  # struct kvm_msr_entry: the index, with a reserved word above it, and the data
            ffi.memmove(pairs, ffi.new("uint64_t[]", [word for index in wanted for word in (index, 0)]), 16 * len(wanted))
            done = ioctl(self.fd, "KVM_GET_MSRS", msrs, f"{len(wanted)} MSRs")
            words = ffi.unpack(pairs, 2 * done)
            got.update(zip(words[::2], words[1::2], strict=True))
            del wanted[: done + 1]  # the first that was not read stopped it
        return got

    def set_msrs(self, values: Iterable[tuple[int, int]] | MsrTable) -> list[tuple[int, int]]:
        """KVM_SET_MSRS (api.rst 4.19) for many, in this order; returns those that KVM did not take."""
        self.system_writes += 1
        table, refused = values if isinstance(values, MsrTable) else MsrTable(values), []
        while table.rows:
            done = ioctl(self.fd, "KVM_SET_MSRS", table.cdata, f"{len(table.rows)} MSRs")
            refused += table.rows[done : done + 1]
            if done >= len(table.rows):
                break
            table = MsrTable(table.rows[done + 1 :])
        return refused

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the guest's TSC frequency in kHz (KVM_CAP_GET_TSC_KHZ)."""
        return ioctl_value(self.fd, "KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (api.rst 4.55): the guest's TSC counts so fast from now on (KVM_CAP_TSC_CONTROL, or the host's own)."""
        ioctl_value(self.fd, "KVM_SET_TSC_KHZ", khz, f"{khz} kHz")

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD (api.rst 4.133): an fd that kvmstats.read_stats() reads; the caller closes it (KVM_CAP_BINARY_STATS_FD)."""
        return ioctl_value(self.fd, "KVM_GET_STATS_FD")

    def set_guest_debug(self, debug: int | Struct) -> None:
        """KVM_SET_GUEST_DEBUG (api.rst 4.87) with KVM_GUESTDBG_ flags, or a ``struct kvm_guest_debug`` that has debug registers too."""
        if isinstance(debug, int):
            flags, debug = debug, new("struct kvm_guest_debug")
            debug.control = flags
        ioctl(self.fd, "KVM_SET_GUEST_DEBUG", debug.cdata)

    def translate(self, gva: int) -> int | None:
        """KVM_TRANSLATE: the gpa of a gva under the current page tables, or None."""
        translation = new("struct kvm_translation")
        translation.linear_address = gva
        ioctl(self.fd, "KVM_TRANSLATE", translation.cdata)
        return int(translation.physical_address) if translation.valid else None

    def walk(self, gva: int, access: str = "", user: bool | None = None) -> Translation:
        """Where a linear address leads, level by level: gpa, memslot, hva, host-physical address (debug/translate.py has the rest).

        ``access``: "read", "write" or "fetch": whether that would fail, and why; ``user``: from CPL3, by default as the vCPU stands.
        """
        from pykvm.debug.translate import SlotMemory, Translator

        return Translator(self, SlotMemory(self._vm.slots)).walk(gva, access, user)

    def want_coalesced(self) -> None:
        """From now on an exit that finds writes in the coalesced ring (VM.coalesce) lets Python take them out first."""
        page = self._vm_coalesced_page
        if page:
            ring = ffi.cast("char *", self.native.run) + page * PAGE_SIZE
            self.native.coalesced = ffi.cast("struct kvm_coalesced_mmio_ring *", ring)

    def coalesced(self) -> Iterator[tuple[SpaceName, int, int, int]]:
        """Takes (space, address, size, value) of each coalesced write out of the ring, in the order in which the guest made them.

        The ring belongs to the VM: all vCPUs see the same. A write leaves it when the next one is asked for.
        """
        ring = self.native.coalesced
        if not ring:
            return
        room = (PAGE_SIZE - ffi.sizeof("struct kvm_coalesced_mmio_ring")) // ffi.sizeof("struct kvm_coalesced_mmio")
        while ring.first != ring.last:
            entry = ring.coalesced_mmio[ring.first % room]
            size = min(entry.len, 8)
            value = int.from_bytes(bytes(entry.data[0:size]), "little")
            yield ("pio" if entry.pio else "mmio", entry.phys_addr, size, value)
            ring.first = (ring.first + 1) % room

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, timeout: float | None = None) -> pykvm.exits.Exit:
        """KVM_RUN until its next exit, which comes back as an object of pykvm.exits.

        ``timeout`` in seconds; when it passes, ``Intr(timed_out=True)`` comes back, and so it does after kick() or a signal.
        EAGAIN gives ``Eagain()``. EFAULT gives ``MemoryFault`` where the kernel says what was missing, else KvmError.
        """
        first, interval = (0, 0) if timeout is None else _nanoseconds(timeout, 0.01)
        error = lib.pykvm_run_once(self.native, first, interval)  # answers were stored by Exit.reply()
        if error:
            self._begun(error)
        return self._came_back()

    def steps(self, steps: Any, timeout: float | None = None) -> pykvm.exits.Exit | None:
        """pykvm_steps(): single steps (``steps``: a ``struct pykvm_steps *``) until there is something to look at. The exit that is no
        step's, if that was it, as run() has it; None else."""
        native = self.native
        first, interval = _nanoseconds(timeout, 0.01)
        self._begun(lib.pykvm_steps(native, steps, first, interval))
        if steps.why != lib.PYKVM_STEP_EXIT:
            native.last = _ERROR
            return None
        return self._came_back()

    def _came_back(self) -> pykvm.exits.Exit:
        native = self.native
        packed, native.last = native.last, _ERROR  # the caller has it: nothing is left to answer
        if packed & 0xF == _ERROR:
            return self.failed(packed >> 32)
        return pykvm.exits.decode(native)

    def begin(self, timeout: float | None, interval: float) -> None:
        """Bind the vCPU to this thread; a signal of ours interrupts KVM_RUN after ``timeout`` seconds, then each ``interval``."""
        self._begun(lib.pykvm_begin(self.native, *_nanoseconds(timeout, interval)))

    def _begun(self, error: int) -> None:
        if error == -EBADF:
            raise KvmError("KVM_RUN", EBADF, f"vCPU {self.id} is closed")
        if error < 0:
            raise KvmError("preparing KVM_RUN", -error, f"vCPU {self.id}: is it running in another thread?")

    def failed(self, errno: int) -> pykvm.exits.Exit:
        """What an errno of KVM_RUN means, as an exit; raises KvmError for those that are errors."""
        native = self.native
        if errno == EINTR:
            return pykvm.exits.Intr(bool(native.was_kicked), bool(native.was_ticked))
        if errno == EAGAIN:
            return pykvm.exits.Eagain()
        if errno == EFAULT:
            exit = pykvm.exits.decode(native)
            if isinstance(exit, pykvm.exits.MemoryFault):
                return exit
            raise KvmError("KVM_RUN", errno, "the host memory behind a slot that the guest touched is not mapped or may not be accessed")
        raise KvmError("KVM_RUN", errno, f"vCPU {self.id}")

    def want_sync_regs(self) -> None:
        """Have each exit bring the general registers in kvm_run (KVM_CAP_SYNC_REGS), where the host can: records then have RIP."""
        if self._sync_regs & lib.KVM_SYNC_X86_REGS:
            self.native.run.kvm_valid_regs = lib.KVM_SYNC_X86_REGS

    def enable_cap(self, cap: str, *args: int) -> None:
        """KVM_ENABLE_CAP (api.rst 4.37) with up to four arguments, for the capabilities that a vCPU has."""
        enable_cap(self.fd, cap, *args)

    def kick(self) -> None:
        """From any thread: the current KVM_RUN, or else the next one, ends with ``Intr(kicked=True)``."""
        if self.fd >= 0:
            lib.pykvm_kick(self.native)

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap kvm_run, then close the fd."""
        self._close(0)

    def _close(self, force: int) -> None:
        if self.fd >= 0:
            if lib.pykvm_unmap_run(self.native, force):
                from _thread import get_native_id

                if self.native.tid == get_native_id():
                    raise ConfigError(f"vCPU {self.id} waits for the device that wants to close it: stop() the run, and close it then")
                raise ConfigError(f"vCPU {self.id} is running in another thread: stop that run before closing")
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __del__(self) -> None:
        if self.fd >= 0:
            self._close(1)  # nobody can be running it: a run holds a reference

    def __repr__(self) -> str:
        if self.fd < 0:
            return f"<VCPU {self.id} closed>"
        regs = self.get_regs()
        return f"<VCPU {self.id} fd {self.fd} rip={regs.rip:#x} rsp={regs.rsp:#x} rflags={regs.rflags:#x}>"


def _nanoseconds(timeout: float | None, interval: float) -> tuple[int, int]:
    """When a session's timer fires first, 0 for never, and how often then."""
    return (0, 0) if timeout is None else (max(1, int(min(timeout, FOREVER) * 1e9)), int(min(interval, FOREVER) * 1e9))
