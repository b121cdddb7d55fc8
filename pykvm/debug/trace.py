"""Every exit of a machine, as it happens: a hook that copies what the kernel left, and events that decode it when somebody looks.

The records are those of ``--stats`` (records.py). With ``exact`` (the default) the ring has room for one: the loop comes to Python after
each exit's answer and before the next KVM_RUN: kvm_run still holds that exit and, with KVM_CAP_SYNC_REGS, all registers. Without it
the ring has ``batch`` places and Python looks once for all of them: next to no cost an exit, but registers, modes and memory are
those of the moment of looking.

>>> with Capture(machine, print):
...     machine.run(5)
"""

from __future__ import annotations

from _thread import RLock
from struct import Struct as Layout

from pykvm import exits
from pykvm.abi import Struct, ffi, lib
from pykvm.errors import ConfigError
from pykvm.records import RecordRing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from pykvm.exits import Exit
    from pykvm.machine import Machine
    from pykvm.runner import Runner
    from pykvm.vcpu import VCPU

__all__ = ["Capture", "Event", "Frozen"]

_RECORD = Layout("<6QIIHBBI")  # struct pykvm_record
_IO, _MMIO, _RDMSR, _WRMSR = 2, 6, 29, 30
_CS = ffi.offsetof("struct kvm_sync_regs", "sregs")
_CONTROLS = _CS + ffi.offsetof("struct kvm_sregs", "cr0")
_CONTROLS_END = _CS + ffi.offsetof("struct kvm_sregs", "apic_base")
_SEGMENT = ffi.sizeof("struct kvm_segment")


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


class Event:
    """One exit. ``n`` counts from 1, ``vcpu`` is the vCPU's number; times are in TSC units (``Capture.ns`` turns them into nanoseconds).

    ``qualifier`` and ``value`` are the record's; ``exit`` is the typed exit where no field tells it all (None for plain accesses), ``data``
    the elements of a REP access. ``exact``: registers are those of this exit.
    """

    __slots__ = ("_saved", "count", "data", "exact", "exit", "is_write", "n", "qualifier", "reason", "rip", "size", "source", "spent",
                 "tsc_after", "tsc_before", "tsc_handled", "value", "vcpu")  # fmt: skip

    def __init__(self, n: int, record: bytes, saved: bytes, source: VCPU, exact: bool, exit: Exit | None = None, data: bytes = b"") -> None:
        self.n, self._saved, self.source, self.exact, self.exit, self.data = n, saved, source, exact, exit, data
        self.spent = 0
        (
            self.tsc_before, self.tsc_after, self.tsc_handled, self.rip, self.qualifier, self.value,
            self.reason, self.count, self.vcpu, self.size, self.is_write, _,
        ) = _RECORD.unpack(record)  # fmt: skip

    @property
    def is_pio(self) -> bool:
        """An access to a port."""
        return bool(self.reason == _IO)

    @property
    def is_mmio(self) -> bool:
        """An access to a gpa without a writable slot."""
        return bool(self.reason == _MMIO)

    @property
    def context(self) -> bytes:
        """What decides how code at RIP is found and decoded: CS, the control registers and EFER, as bytes."""
        s = self._saved
        return s[_CS : _CS + _SEGMENT] + s[_CONTROLS:_CONTROLS_END]

    def frozen(self) -> Frozen:
        """The vCPU with this exit's registers; of a batch, RIP and what the exit tells are this exit's and the rest is later."""
        saved = ffi.new("struct kvm_sync_regs *")
        ffi.memmove(saved, self._saved, len(self._saved))
        regs, sregs = Struct(saved.regs, saved), Struct(saved.sregs, saved)
        if not self.exact:
            regs.rip = self.rip
            if self.is_pio:
                regs.rdx = regs.rdx & ~0xFFFF | self.qualifier
        return Frozen(self.source, regs, sregs)

    def as_exit(self) -> Exit:
        """As an exit of pykvm.exits, for who asks by type; reads can not be answered any more."""
        if self.exit is not None:
            return self.exit
        if self.is_pio:
            data = self.data or self.value.to_bytes(8, "little")[: self.size]
            if self.is_write:
                return exits.IoOut(self.qualifier, self.size, data, self.count)
            return exits.IoIn(None, 0, self.qualifier, self.size, self.count)
        if self.is_mmio:
            data = self.value.to_bytes(8, "little")[: self.size]
            return exits.MmioWrite(self.qualifier, data) if self.is_write else exits.MmioRead(None, 0, self.qualifier, self.size)
        return exits.Hlt() if self.reason == exits.Hlt.reason else exits.UnknownExit(self.reason)

    def __repr__(self) -> str:
        from pykvm.exit_reason import reason_name

        what = f" {'write' if self.is_write else 'read'} {self.qualifier:#x} value={self.value:#x}" if self.size else ""
        return f"<Event {self.n}: {reason_name(self.reason)}{what} rip={self.rip:#x}>"


class Capture:
    """While it is entered, ``on_event(event)`` is called for every exit of every vCPU, from the thread that runs it, one at a time.

    What ``on_event`` raises reaches the caller of run(). ``count`` is the number of exits so far.
    """

    def __init__(self, machine: Machine, on_event: Callable[[Event], object], *, exact: bool = True, batch: int = 1024) -> None:
        self.machine, self.on_event, self.exact, self.batch = machine, on_event, exact, batch
        self.count = 0
        self.began = 0
        self.spent = 0  # TSC units in on_event: they are in no event's time
        self._khz = 0
        self._lock = RLock()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Capture:
        m = self.machine
        self._khz = m.vcpu.get_tsc_khz() if m.system.check_extension("KVM_CAP_GET_TSC_KHZ") else 0
        for runner in m.runners:
            self._attach(runner)
        self.began = lib.pykvm_rdtsc()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    def ns(self, units: int) -> float:
        """TSC units in nanoseconds; as they are where KVM does not say how fast the TSC is."""
        return units * 1e6 / self._khz if self._khz else float(units)

    def time(self, event: Event) -> float:
        """Nanoseconds from the beginning to the exit, without what was spent on looking at those before."""
        return self.ns(max(0, event.tsc_after - self.began - event.spent))

    def _attach(self, runner: Runner) -> None:
        run = runner.vcpu.native.run
        before = (runner.ring, runner.on_records, run.kvm_valid_regs)
        if before[0] is not None and before[0].cdata.keep:
            raise ConfigError("this machine keeps a ledger, whose records a trace would take: make it without")
        ring = RecordRing(1 if self.exact else self.batch)
        runner.ring, runner.on_records = ring, self._hook(runner, before[1] if before[0] is not None else None)
        runner.vcpu.want_sync_regs()
        if self.exact and self._syncs():
            run.kvm_valid_regs |= lib.KVM_SYNC_X86_SREGS
        runner.vcpu.lent = None  # the table is made again, with this ring

        def undo() -> None:
            runner.ring, runner.on_records = before[0], before[1]
            if runner.vcpu.fd >= 0:
                run.kvm_valid_regs = before[2]
            runner.vcpu.lent = None

        self._undo.append(undo)

    def _hook(self, runner: Runner, also: Callable[[RecordRing], None] | None) -> Callable[[RecordRing], None]:
        vcpu, lock = runner.vcpu, self._lock
        native, size = vcpu.native, ffi.sizeof("struct pykvm_record")
        run = native.run
        saved = ffi.buffer(ffi.addressof(run, "s"), ffi.sizeof("struct kvm_sync_regs")) if self.exact and self._syncs() else None

        def one(ring: RecordRing) -> None:
            """The ring of one place."""
            if not ring.cdata.used:
                return
            reason = run.exit_reason
            state = saved[:] if saved is not None else _read(vcpu)
            record = ffi.buffer(ring.cdata.data, size)[:]
            with lock:
                self.count += 1
                event = Event(self.count, record, state, vcpu, True)
                event.spent = self.spent
                if reason != _IO and reason != _MMIO:
                    event.exit = exits.decode(native)
                    if reason in (_RDMSR, _WRMSR):
                        event.value, event.is_write = int(run.msr.data), int(reason == _WRMSR)
                    if not event.rip and saved is None:
                        event.rip = int.from_bytes(state[128:136], "little")
                elif event.count > 1:
                    event.data = _elements(native)
                finish(ring)
                self.on_event(event)
                self.spent += lib.pykvm_rdtsc() - (event.tsc_handled or event.tsc_after)

        def many(ring: RecordRing) -> None:
            """A batch: one look at the registers for all."""
            used = ring.cdata.used
            if not used:
                return
            records = ffi.buffer(ring.cdata.data, size * used)[:]
            with lock:
                now = lib.pykvm_rdtsc()
                state = _read(vcpu)
                finish(ring)
                for at in range(0, len(records), size):
                    self.count += 1
                    event = Event(self.count, records[at : at + size], state, vcpu, False)
                    event.spent = self.spent
                    self.on_event(event)
                self.spent += lib.pykvm_rdtsc() - now

        def finish(ring: RecordRing) -> None:
            if also is not None:
                also(ring)
            ring.cdata.used = 0

        return one if self.exact else many

    def _syncs(self) -> bool:
        both = lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS
        return bool(self.machine.vm.sync_regs & both == both)


def _read(vcpu: VCPU) -> bytes:
    """The registers by ioctl, laid out as kvm_run has them."""
    return vcpu.get_regs().to_bytes() + vcpu.get_sregs().to_bytes()


def _elements(native: Any) -> bytes:
    """All elements of a REP access: what was written, or what was given for a read."""
    run, io = native.run, native.run.io
    length = io.size * io.count
    if run.exit_reason != _IO or io.data_offset + length > native.run_size:
        return b""
    return bytes(ffi.buffer(ffi.cast("char *", run) + io.data_offset, length))
