"""Every exit of a machine: captured as it happens, looked at in batches.

The run loop keeps a record of each exit (records.py) and beside it a moment (native/trace.c): all registers, the code around RIP and what
else the kernel has said, of just before the next KVM_RUN. That takes no Python. When ``batch`` of them are there, at each heartbeat and at
the end, an Event is made of each; with ``batch=1`` before the guest goes on. What C cannot keep is looked at there and then: code in a
page that it has not met, REP string instructions, PIO with more than 256 bytes of data, and all exits where the host has no
KVM_CAP_SYNC_REGS.

>>> with Capture(machine, print):
...     machine.run(5)
"""

from __future__ import annotations

from _thread import RLock
from heapq import heappop, heappush
from struct import Struct as Layout

from pykvm import exits
from pykvm.abi import Struct, ffi, lib
from pykvm.debug.hostpages import HostPages
from pykvm.debug.names import Names
from pykvm.errors import ConfigError
from pykvm.records import RecordRing
from pykvm.units import PAGE_SIZE
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from pykvm.exits import Exit
    from pykvm.machine import Machine
    from pykvm.runner import Runner
    from pykvm.vcpu import VCPU

__all__ = ["BATCH", "Capture", "Event", "Frozen", "MomentView"]

BATCH = 256  # exits; 200 KiB for each vCPU
_WAITING = 1 << 16  # events of several vCPUs that wait for their turn, at most
_RECORD = Layout("<6QIIHBBI")  # struct pykvm_record
_IO, _MMIO, _RDMSR, _WRMSR = 2, 6, 29, 30


def _offset(field: str) -> int:
    return int(ffi.offsetof("struct pykvm_moment", field))


_REGS, _SREGS, _CODE_AT, _CODE, _DETAIL = map(_offset, ("regs", "sregs", "code_gva", "code", "detail"))
_CS = _SREGS
_CS_END = _CS + ffi.sizeof("struct kvm_segment")
_CONTROLS, _CONTROLS_END = (_SREGS + ffi.offsetof("struct kvm_sregs", name) for name in ("cr0", "apic_base"))
_MSR_VALUE = _DETAIL + ffi.offsetof("kvm_exit_msr", "data")
_SIZES = Layout("<QIII")  # code_gva, code_first, code_end, detail_size


class Frozen:
    """Stands in for a VCPU whose registers are those of an earlier moment (for CpuView, Translator); the rest is the VCPU's."""

    def __init__(self, vcpu: VCPU, regs: Struct, sregs: Struct) -> None:
        self._vcpu, self._regs, self._sregs = vcpu, regs, sregs

    def get_regs(self) -> Struct:
        """The registers of then."""
        return self._regs.copy()

    def get_sregs(self) -> Struct:
        """The system registers of then."""
        return self._sregs.copy()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vcpu, name)


class _Saved:
    """What is left of a vCPU's kvm_run, for decode()."""

    def __init__(self, reason: int, detail: bytes) -> None:
        self.run = ffi.new("struct kvm_run *")
        self.run.exit_reason = reason
        ffi.memmove(ffi.addressof(self.run, "hw"), detail, len(detail))


class Event:
    """One exit. ``n`` counts from 1, ``vcpu`` is the vCPU's number; times are in TSC units (``Capture.ns`` turns them into nanoseconds).

    ``qualifier`` and ``value`` are the record's; ``data`` has the elements of a PIO access with a count. Registers and code are those of
    this exit, whenever they are asked for.
    """

    __slots__ = ("_data", "_moment", "count", "is_write", "n", "qualifier", "reason", "rip", "size", "source", "spent",
                 "tsc_after", "tsc_before", "tsc_handled", "value", "vcpu")  # fmt: skip

    def __init__(self, n: int, record: bytes, moment: bytes, source: VCPU) -> None:
        self.n, self._moment, self.source = n, moment, source
        self._data: bytes | None = None
        self.spent = 0
        (
            self.tsc_before, self.tsc_after, self.tsc_handled, self.rip, self.qualifier, self.value,
            self.reason, self.count, self.vcpu, self.size, self.is_write, _,
        ) = _RECORD.unpack(record)  # fmt: skip
        if self.reason in (_RDMSR, _WRMSR) and moment:
            self.value = int.from_bytes(moment[_MSR_VALUE : _MSR_VALUE + 8], "little")
            self.is_write = int(self.reason == _WRMSR)

    @property
    def is_pio(self) -> bool:
        """An access to a port."""
        return bool(self.reason == _IO)

    @property
    def is_mmio(self) -> bool:
        """An access to a gpa without a writable slot."""
        return bool(self.reason == _MMIO)

    @property
    def is_captured(self) -> bool:
        """Whether more is known than the record."""
        return bool(self._moment)

    @property
    def context(self) -> bytes:
        """What decides how code at RIP is found and decoded: CS, the control registers and EFER, as bytes."""
        m = self._moment
        return m[_CS:_CS_END] + m[_CONTROLS:_CONTROLS_END]

    @property
    def code(self) -> tuple[int, bytes]:
        """(linear address, bytes): what lay around RIP, 48 bytes before it and 16 from it on, where there was memory."""
        at, first, end, _ = _SIZES.unpack_from(self._moment, _CODE_AT)
        return at + first & (1 << 64) - 1, self._moment[_CODE + first : _CODE + end]

    @property
    def data(self) -> bytes:
        """The elements of a PIO access with a count, written or read; else nothing."""
        if self._data is not None or self.reason != _IO or not self._moment:
            return self._data or b""
        size = _SIZES.unpack_from(self._moment, _CODE_AT)[3]
        return self._moment[_DETAIL : _DETAIL + size]

    def take_data(self, data: bytes) -> None:
        """The elements, where there are more than a moment has room for."""
        self._data = data

    def frozen(self) -> Frozen:
        """The vCPU with this exit's registers."""
        moment = ffi.new("struct pykvm_moment *")
        ffi.memmove(moment, self._moment, len(self._moment))
        return Frozen(self.source, Struct(moment.regs, moment), Struct(moment.sregs, moment))

    @property
    def exit(self) -> Exit:
        """As an exit of pykvm.exits; reads can not be answered any more."""
        if self.is_pio:
            data = self.data or self.value.to_bytes(8, "little")[: self.size]
            if self.is_write:
                return exits.IoOut(self.qualifier, self.size, data, self.count)
            return exits.IoIn(None, 0, self.qualifier, self.size, self.count)
        if self.is_mmio:
            data = self.value.to_bytes(8, "little")[: self.size]
            return exits.MmioWrite(self.qualifier, data) if self.is_write else exits.MmioRead(None, 0, self.qualifier, self.size)
        return exits.decode(_Saved(self.reason, self._moment[_DETAIL:]))

    def __repr__(self) -> str:
        from pykvm.exit_reason import reason_name

        what = f" {'write' if self.is_write else 'read'} {self.qualifier:#x} value={self.value:#x}" if self.size else ""
        return f"<Event {self.n}: {reason_name(self.reason)}{what} rip={self.rip:#x}>"


class MomentView(CpuView):
    """A vCPU as it was at an event: its registers and the code around RIP are those of then, other memory is that of now."""

    def __init__(self, event: Event, memory: Any) -> None:
        vcpu: Any = event.frozen()
        super().__init__(vcpu, memory)
        self._at, self._code = event.code

    def read(self, gva: int, size: int) -> bytes:
        """As CpuView has it."""
        start = gva - self._at
        if start >= 0 and start + size <= len(self._code):
            return self._code[start : start + size]
        return super().read(gva, size)


class _Tap:
    """One vCPU's ring, and the moments of what is in it."""

    def __init__(self, capture: Capture, runner: Runner) -> None:
        self.capture, self.runner, self.vcpu = capture, runner, runner.vcpu
        self.memory = capture.machine.memory
        self.native = runner.vcpu.native
        self.through = 0  # the TSC until which all its exits have been looked at
        self.ring = RecordRing(capture.batch)
        self._data = ffi.new("struct pykvm_moment[]", capture.batch)
        self._moments = ffi.new("struct pykvm_moments *", {"data": self._data})
        self.ring.cdata.moments = self._moments
        self._pages = HostPages(self.memory, self._moments.pages)
        run = self.native.run
        self._before = (runner.ring, runner.on_records, run.kvm_valid_regs)
        if self._before[0] is not None and self._before[0].cdata.keep:
            raise ConfigError("this machine keeps a ledger, whose records a trace would take: make it without")
        self._also = self._before[1] if self._before[0] is not None else None
        runner.ring, runner.on_records = self.ring, self.take
        runner.vcpu.want_sync_regs()
        if capture.syncs:
            run.kvm_valid_regs |= lib.KVM_SYNC_X86_SREGS
        runner.vcpu.lent = None  # the table is made again, with this ring

    def undo(self) -> None:
        """The vCPU as it was."""
        self.runner.ring, self.runner.on_records = self._before[0], self._before[1]
        if self.vcpu.fd >= 0:
            self.native.run.kvm_valid_regs = self._before[2]
        self.vcpu.lent = None
        self._pages.forget()

    def take(self, ring: RecordRing) -> None:
        """Empty the ring: what the run loop calls when it is full, when an exit has to be looked at, now and then, and at the end."""
        now, used, capture = lib.pykvm_rdtsc(), ring.cdata.used, self.capture
        if not used:
            capture.arrived(self, now, b"", b"")
            return
        data = None
        if self._moments.used != used and not lib.pykvm_keep_moment(self.native, ring.cdata):
            data = self._look(used - 1)
        records = bytes(ffi.buffer(ring.cdata.data, used * ffi.sizeof("struct pykvm_record")))
        moments = bytes(ffi.buffer(self._data, used * ffi.sizeof("struct pykvm_moment")))
        if self._also is not None:
            self._also(ring)
        ring.clear()
        self._moments.used = 0
        self._pages.check()
        capture.arrived(self, now, records, moments, data)

    def _look(self, index: int) -> bytes | None:
        """Complete the newest moment while the vCPU still stands there: its registers, its code, the elements of a PIO access."""
        moment = self._data[index]
        if not self.capture.syncs:
            moment.regs = self.vcpu.get_regs().cdata[0]
            moment.sregs = self.vcpu.get_sregs().cdata[0]
        s = moment.sregs
        view = CpuView(Frozen(self.vcpu, Struct(moment.regs, moment), Struct(s, moment)), self.memory)  # type: ignore[arg-type]
        for at in {max(0, view.rip - lib.PYKVM_CODE_BEFORE), view.rip + 15 & (1 << 64) - 1}:
            self._pages.learn(at & -PAGE_SIZE, s)
        lib.pykvm_keep_code(self._moments, ffi.addressof(moment))
        run, io = self.native.run, self.native.run.io
        length = io.size * io.count
        if run.exit_reason == _IO and io.count > 1 and io.data_offset + length <= self.native.run_size:
            return bytes(ffi.buffer(ffi.cast("char *", run) + io.data_offset, length))
        return None


class Capture:
    """While it is entered, ``on_event(event)`` is called for every exit of every vCPU, in their order, from a thread that runs one of them.

    What ``on_event`` raises reaches the caller of run(). ``count`` is the number of exits so far. ``batch``: how many are looked at
    together; 1: each before the guest goes on.
    """

    def __init__(self, machine: Machine, on_event: Callable[[Event], object], *, batch: int = BATCH) -> None:
        self.machine, self.on_event, self.batch = machine, on_event, batch
        self.names = Names(machine.bus)
        self.count = 0
        self.began = 0
        self.spent = 0  # TSC units in on_event, while the only vCPU waits: they are in no event's time
        both = lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS
        self.syncs = bool(machine.vm.sync_regs & both == both)
        self._khz = 0
        self._lock = RLock()
        self._taps: list[_Tap] = []
        self._waiting: list[tuple[int, int, Event]] = []  # a heap, by time; of several vCPUs
        self._arrivals = 0

    def __enter__(self) -> Capture:
        m = self.machine
        self._khz = m.vcpu.get_tsc_khz() if m.system.check_extension("KVM_CAP_GET_TSC_KHZ") else 0
        for runner in m.runners:
            self._taps.append(_Tap(self, runner))
        self.began = lib.pykvm_rdtsc()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for tap in self._taps:
            tap.undo()
        self._taps.clear()
        self.flush()

    def flush(self) -> None:
        """Give away what still waits for its turn. No vCPU may be running."""
        with self._lock:
            self._give(1 << 64)

    def ns(self, units: int) -> float:
        """TSC units in nanoseconds; as they are where KVM does not say how fast the TSC is."""
        return units * 1e6 / self._khz if self._khz else float(units)

    def time(self, event: Event) -> float:
        """Nanoseconds from the beginning to the exit; with one vCPU without what was spent on looking at those before."""
        return self.ns(max(0, event.tsc_after - self.began - event.spent))

    def arrived(self, tap: _Tap, now: int, records: bytes, moments: bytes, data: bytes | None = None) -> None:
        """All exits of a vCPU until ``now`` that have not been there before; ``data`` has the elements of the last one."""
        r, m = _RECORD.size, ffi.sizeof("struct pykvm_moment")
        events = [Event(0, records[i * r : (i + 1) * r], moments[i * m : (i + 1) * m], tap.vcpu) for i in range(len(records) // r)]
        if data is not None:
            events[-1].take_data(data)
        with self._lock:
            tap.through = now
            if len(self._taps) > 1 and self.batch > 1:
                for event in events:
                    self._arrivals += 1
                    heappush(self._waiting, (event.tsc_after, self._arrivals, event))
                self._give(min(tap.through for tap in self._taps))
                return
            spent = self.spent
            for event in events:
                event.spent = spent
                self._one(event)
            if len(self._taps) == 1 and events:
                self.spent += lib.pykvm_rdtsc() - (events[-1].tsc_handled or events[-1].tsc_after)

    def _give(self, until: int) -> None:
        """Those before ``until`` have their turn: no vCPU can have an earlier one any more."""
        while self._waiting and (self._waiting[0][0] <= until or len(self._waiting) > _WAITING):
            self._one(heappop(self._waiting)[2])

    def _one(self, event: Event) -> None:
        self.count += 1
        event.n = self.count
        self.names.see(event)
        self.on_event(event)
