"""The run loop: one KVM_RUN after another until the guest stops, each exit given to the device that claims it.

The hot path makes no objects but the value written. ``lib.pykvm_step`` answers the previous exit, enters the guest and returns the
next one as a slot (native/runloop.h); what a write writes lies in memory beside it. Slots are given to accesses as they are first
met, and ``_handlers`` has the device's bound method for each. Everything else is 0 and goes through ``_look``: unclaimed and REP
accesses, HLT, errors.

Both loops are this one. With ``loop="native"`` the C side may carry out what a range's ``Native`` action says and come back less
often; exits and records are the same.
"""

from __future__ import annotations

from _thread import RLock, get_native_id
from time import monotonic

import pykvm
from pykvm.abi import EAGAIN, EBUSY, EINTR, EIO, ffi, lib
from pykvm.errors import ConfigError, KvmError
from pykvm.units import PAGE_SIZE
from pykvm.vcpu import FOREVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import pykvm.exits
    from pykvm.bus import Bus, Range
    from pykvm.exits import Exit
    from pykvm.msrs import MsrHandlers
    from pykvm.records import RecordRing
    from pykvm.smp import DeviceLock, Gate
    from pykvm.vcpu import VCPU

__all__ = ["HEARTBEAT", "LOOPS", "Runner", "Stop"]

LOOPS = ("python", "native")
HEARTBEAT = 0.1  # seconds; KVM_RUN comes back this often so that Python's signal handlers run and the time limit is seen
WATCHFUL = 0.02  # the same where HLT does not exit: a guest that halts for good is noticed so late
SHORTEST = 1e-3  # seconds between two ticks: a timer as fast as its own signal's handler would leave no time for anything else
_SINK_SIZE = 4096
_ERROR = lib.PYKVM_ERROR
_FIRST_WRITE = 128  # slots 1 to 127 are reads, 128 to 253 writes


class Stop:
    """Why a run ended. ``reason``: "halted", "exit", "reset", "power-off", "stopped", "timeout" or "crash"; ``code`` goes with "exit";
    ``exit`` is the exit that ended it, when one did, and ``vcpu`` the vCPU that it ended on."""

    __slots__ = ("code", "exit", "reason", "vcpu")

    def __init__(self, reason: str, code: int | None = None, exit: Exit | None = None) -> None:
        self.reason, self.code, self.exit = reason, code, exit
        self.vcpu: VCPU | None = None

    def __repr__(self) -> str:
        code = "" if self.code is None else f" code={self.code}"
        return f"<Stop {self.reason}{code}{'' if self.exit is None else f' {self.exit!r}'}>"


def _no_session(offset: int, size: int, value: int) -> None:
    """Where the loop lands in a child that a device has forked: the vCPU belongs to the parent."""
    raise KvmError("KVM_RUN", EIO, "this process was forked by the one that runs the vCPU, and cannot go on with it")


def _bad_reply(offset: int, size: int, value: int) -> None:
    raise TypeError("a device answered a read with more bits than the guest has read")


class Runner:
    """Runs one vCPU against a bus.

    A device stops the run through ``stop()``; so may another thread. KVM is not entered again then: the guest stays at the access, which
    is answered, and goes on behind it in the next ``run()``. An exception from a device reaches the caller of ``run()``
    with the guest as it was at the access, which the next ``run()`` gives to the device again.

    ``lock``, where other vCPUs share the bus: held while a device is asked. Exits that are no access go to ``msrs``, ``on_hypercall(nr,
    args) -> int``, ``on_eoi(vector)`` and ``on_emulation_failure(vcpu, exit) -> bool``, where they are set. ``is_idle()`` is asked at each
    heartbeat: True ends the run as halted.
    """

    def __init__(self, vcpu: VCPU, bus: Bus, loop: str = "native", ring: RecordRing | None = None, lock: DeviceLock | None = None) -> None:
        if loop not in LOOPS:
            raise ConfigError(f"unknown loop {loop!r}: use one of {', '.join(LOOPS)}")
        self.vcpu, self.bus, self.loop, self.ring = vcpu, bus, loop, ring
        self.lock = lock
        self.heartbeat = HEARTBEAT
        self.gate: Gate | None = None  # where a paused vCPU waits
        self.msrs: MsrHandlers | None = None
        self.on_hypercall: Callable[[int, tuple[int, ...]], int] | None = None
        self.on_eoi: Callable[[int], object] | None = None
        self.on_emulation_failure: Callable[[VCPU, pykvm.exits.InternalError], bool] | None = None  # True: the instruction is done
        self.is_idle: Callable[[], bool] | None = None
        self._messages: list[Callable[[], object]] = []  # what others want done between two entries
        self._holding = False
        self._vectors: list[int] = []  # interrupts that wait, without an in-kernel irqchip
        self.on_records: Callable[[RecordRing], None] | None = None
        self.on_heartbeat: Callable[[], None] | None = None
        self._deadline: float | None = None
        self._stop: Stop | None = None
        self._settling = False  # the run ends at the first EINTR
        # What the last write writes. A memoryview costs less than an attribute of cffi's, and than a second half of the slot's integer.
        self._written = memoryview(ffi.buffer(ffi.addressof(vcpu.native, "value"))).cast("Q")
        self._handlers: list[tuple[Any, int, int]] = [  # slot -> (method, offset, size)
            *[(None, 0, 0)] * lib.PYKVM_BAD_REPLY, (_bad_reply, 0, 0), (_no_session, 0, 0)
        ]  # fmt: skip
        self._slots: dict[int, int] = {}  # name of an access -> its slot
        self._ranges: list[Range] = []
        self._table: list[Any] = []  # cffi objects that the native table is made of
        self._sinks: list[tuple[Any, Any]] = []
        self._version = (-1, -1)
        self._lent: tuple[Any, ...] | None = None
        self._table_lock = RLock()  # who changes the bus may be in any thread
        bus.on_change = self.sync_table
        if ring is not None:
            vcpu.want_sync_regs()

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self, timeout: float | None = None) -> Stop:
        """Run until the guest stops or ``timeout`` seconds have passed. Raises what devices raise, and KvmError."""
        native = self.vcpu.native
        run, step, handlers, written, first_write = lib.pykvm_run, lib.pykvm_step, self._handlers, self._written, _FIRST_WRITE
        if timeout is not None:
            timeout = min(timeout, FOREVER)
        self._deadline = None if timeout is None else monotonic() + timeout
        interval = self.heartbeat if timeout is None else timeout / max(1, -(-timeout // self.heartbeat))
        if native.tid == get_native_id():
            raise KvmError("preparing KVM_RUN", EBUSY, f"vCPU {self.vcpu.id} is running: one of its devices asked for this run")
        try:
            with self._table_lock:  # from here on, others who change the bus leave the table to this thread
                self.sync_table()
                self.vcpu.begin(max(interval, 1e-6), max(interval, SHORTEST))
            native.native = self.loop == "native"
            self._read_messages()
            if self._vectors:
                self._offer_interrupts()
            if self.gate is not None and self.gate.closed and native.last & 0xF == _ERROR:
                self.vcpu.kick()  # KVM completes the last access, comes back at once, and the vCPU waits then
            else:
                self._pause()
            # After an exception the last exit still waits for its answer; a fresh start answers nothing.
            slot = run() if native.last & 0xF == _ERROR else 0
            while True:
                if slot >= first_write:
                    method, offset, size = handlers[slot]
                    method(offset, size, written[0])
                    slot = step(0)
                    continue
                if slot:
                    method, offset, size = handlers[slot]
                    slot = step(method(offset, size))
                    continue
                reply = self._look(native.last)
                if self._stop is not None:
                    lib.pykvm_answer(native, reply)
                    if native.last & 0xF != lib.PYKVM_DRAIN:
                        native.last = _ERROR  # done with: the next run starts afresh
                    stop, self._stop = self._stop, None
                    stop.vcpu = self.vcpu
                    return stop
                slot = step(reply)
        except BaseException as error:
            if isinstance(error, (TypeError, OverflowError)):
                self._blame(native.last, error)
            raise
        finally:
            try:
                if native.tid == get_native_id():
                    lib.pykvm_handled(native)
                    self._drain()
            finally:
                lib.pykvm_end(native)  # when begin was not reached, it does nothing

    def _pause(self) -> None:
        """Wait while the gate is closed, unless the run is to end. The time limit waits too."""
        gate = self.gate
        if gate is not None and gate.shut:
            since = monotonic()
            gate.wait(lambda: self._stop is not None)
            if self._deadline is not None:
                self._deadline += monotonic() - since

    def holding(self, do: Callable[..., Any], *arguments: int) -> Any:
        """What ``do(*arguments)`` gives, with the lock held, where vCPUs share the devices."""
        return do(*arguments) if self.lock is None else self.lock.holding(do, *arguments)

    def stop(self, reason: str = "stopped", code: int | None = None) -> None:
        """End the run: from a device (what it answers still counts) or from another thread."""
        if self._stop is None:
            self._stop = Stop(reason, code)
        self.vcpu.kick()
        if self.gate is not None:
            self.gate.look()

    def take_back_stop(self) -> None:
        """Forget a stop() that came too late for the run it was meant for."""
        self._stop = None

    def settle(self) -> None:
        """Have KVM complete the access that the vCPU has stopped at, without running the guest on: its registers are whole then.

        KVM does so at the next KVM_RUN, also when that comes back at once (api.rst 5, KVM_RUN and immediate_exit). An instruction with
        several accesses makes the others now, and the devices hear of them. While the machine is paused, that is done.
        """
        native = self.vcpu.native
        if native.tid:
            self._check_waits()
            self._read_messages()
            return
        asked, self._stop = self._stop, None  # a stop() that waits for the next run waits on
        self._settling = True
        try:
            while self._settling:  # a device may stop the run before
                self.vcpu.kick()  # from here on KVM_RUN enters no guest, until it has said EINTR
                self.run()
        finally:
            self._settling, self._stop = False, asked

    def _check_waits(self) -> None:
        if self.gate is None or not self.gate.closed:
            raise ConfigError(f"vCPU {self.vcpu.id} is running: pause() the machine first, or stop() it")
        if self.vcpu.native.last & 0xF != _ERROR:
            raise ConfigError(f"vCPU {self.vcpu.id} waits at an access whose device has raised: resume() the machine first")

    @property
    def vectors(self) -> list[int]:
        """Those of interrupt() that still wait."""
        return self._vectors

    @vectors.setter
    def vectors(self, vectors: list[int]) -> None:
        self._vectors[:] = vectors
        self.vcpu.native.run.request_interrupt_window = bool(vectors)

    def serve(self) -> Stop | None:
        """Carry out the exit that ``vcpu.run()`` came back with, for who runs the vCPU without this loop; the Stop that it ends, if any."""
        if self.vcpu.native.coalesced:
            self.holding(self._take_coalesced)
        reply = self.holding(self._unpacked)
        exit = pykvm.exits.decode(self.vcpu.native)
        if isinstance(exit, pykvm.exits.MmioRead):
            exit.reply(reply)
        self._holding = True  # exceptions and NMIs are part of what the device does; interrupts wait for run()
        try:
            self._read_messages()
        finally:
            self._holding = False
        stop, self._stop = self._stop, None
        return stop

    @property
    def has_interrupts(self) -> bool:
        """Whether vectors of interrupt() still wait."""
        return bool(self._vectors)

    def post(self, do: Callable[[], object]) -> None:
        """Have ``do`` called in the vCPU's thread before its next entry: at once from that thread, else after a kick."""
        if self.vcpu.native.tid == get_native_id():
            do()
        else:
            self._messages.append(do)
            self.vcpu.kick()

    def interrupt(self, vector: int) -> None:
        """Deliver ``vector`` as soon as the guest can take it (KVM_INTERRUPT; without an in-kernel irqchip). They queue up."""
        if not 0 <= vector <= 255:
            raise ConfigError(f"an interrupt vector is 0 to 255, not {vector}")

        def queue() -> None:
            self._vectors.append(vector)
            if not self._holding:
                self._offer_interrupts()

        self.post(queue)

    def _read_messages(self) -> bool:
        """Do what others have asked for; whether there was anything."""
        some = bool(self._messages)
        while self._messages:
            self._messages.pop(0)()
        return some

    def _offer_interrupts(self) -> bool:
        """Inject the first that waits if the guest can take one now, and ask for an exit when it can take the next. Whether one went."""
        run, went = self.vcpu.native.run, False
        if self._vectors and run.ready_for_interrupt_injection and run.if_flag:
            self.vcpu.interrupt(self._vectors[0])
            del self._vectors[0]
            run.ready_for_interrupt_injection = 0  # until KVM says so again
            went = True
        run.request_interrupt_window = bool(self._vectors)
        return went

    def _blame(self, packed: int, error: BaseException) -> None:
        """Name the device whose answer was no integer of the access's size."""
        if packed & 0xF in (lib.PYKVM_IN, lib.PYKVM_MMIO_READ) and packed >> 6 & 0x3FF < len(self._ranges):
            claimed = self._ranges[packed >> 6 & 0x3FF]
            error.add_note(f"while {claimed!r} answered a read: read(offset, size) must return an int from 0 to 2**(8 * size) - 1")

    # --- what is not hot ---------------------------------------------------------------------------------------------

    def _look(self, packed: int) -> int:
        """Anything but an access already in the dictionaries. Returns the reply; sets ``_stop`` to end the run."""
        kind = packed & 0xF
        if kind == lib.PYKVM_DRAIN:
            self._make_room()
            return 0
        if kind == _ERROR:
            self._failed(packed >> 32)
            return 0
        if kind != lib.PYKVM_LOOK:
            return self._claimed(packed, kind)
        reply: int = self.holding(self._unpacked)
        return reply

    def _claimed(self, packed: int, kind: int) -> int:
        """An access without a slot yet: give it one while there are any, and carry it out."""
        claimed = self._ranges[packed >> 6 & 0x3FF]
        size, offset = 1 << (packed >> 4 & 3), packed >> 16 & 0xFFFF
        is_write = kind in (lib.PYKVM_OUT, lib.PYKVM_MMIO_WRITE)
        method: Any = claimed.write if is_write else claimed.read
        self._give_slot(packed & 0xFFFFFFFF, (method, offset, size), is_write)
        if is_write:
            self.holding(method, offset, size, self._written[0])
            return 0
        answer: int = self.holding(method, offset, size)
        return answer

    def _give_slot(self, name: int, handler: tuple[Any, int, int], is_write: bool) -> None:
        slot = self._slots.get(name)
        if slot is None:
            used = sum((s >= _FIRST_WRITE) == is_write for s in self._slots.values())
            if used >= 126:
                return  # a guest that touches so many registers pays a little more for the rest
            slot = (_FIRST_WRITE if is_write else 1) + used
            self._slots[name] = slot
            self._handlers[slot] = handler
        lib.pykvm_remember(self.vcpu.native, name, slot)

    def _unpacked(self) -> int:
        """An exit that only kvm_run describes in full."""

        bus = self.bus
        exit = pykvm.exits.decode(self.vcpu.native)
        match exit:
            case pykvm.exits.IoOut():
                bus.out(exit.port, exit.size, exit.data, exit.count)
            case pykvm.exits.IoIn():
                answer = bus.in_(exit.port, exit.size, exit.count)
                exit.reply(answer)
                return int.from_bytes(answer[: exit.size], "little")
            case pykvm.exits.MmioWrite():
                bus.write("mmio", exit.gpa, exit.size, exit.value)
            case pykvm.exits.MmioRead():
                return bus.read("mmio", exit.gpa, exit.size)
            case pykvm.exits.Hlt():
                woken = self._read_messages()
                if not self._offer_interrupts() and not woken:
                    self._stop = Stop("halted", exit=exit)
            case pykvm.exits.IrqWindowOpen():
                self._offer_interrupts()
            case pykvm.exits.RdMsr() if self.msrs is not None:
                exit.reply(self.msrs.read(exit.index))
            case pykvm.exits.WrMsr() if self.msrs is not None:
                if not self.msrs.write(exit.index, exit.value):
                    exit.refuse()
            case pykvm.exits.Hypercall() if self.on_hypercall is not None:
                exit.reply(self.on_hypercall(exit.nr, exit.args))
            case pykvm.exits.IoapicEoi() if self.on_eoi is not None:
                self.on_eoi(exit.vector)
            case pykvm.exits.InternalError() if self.on_emulation_failure is not None and self.on_emulation_failure(self.vcpu, exit):
                pass
            case pykvm.exits.SetTpr() | pykvm.exits.Intr():
                pass
            case _:
                self._stop = Stop("crash", exit=exit)
        return 0

    def _failed(self, errno: int) -> None:
        """KVM_RUN gave an errno: a kick, the heartbeat, the time limit, or an error, which raises KvmError."""
        if errno == EINTR:
            self.sync_table()
            self._read_messages()
            if self.ring is not None and self.on_records is not None:
                lib.pykvm_handled(self.vcpu.native)
                self.on_records(self.ring)
            if self.on_heartbeat is not None:
                self.on_heartbeat()
            self._pause()
            if self._settling and self._stop is None:
                self._settling, self._stop = False, Stop("settled")
            if self._stop is None and self._deadline is not None and monotonic() >= self._deadline:
                self._stop = Stop("timeout")
            if self._stop is None and self.vcpu.native.was_ticked and self.is_idle is not None and self.is_idle():
                self._stop = Stop("halted")
        elif errno != EAGAIN:
            self._stop = Stop("crash", exit=self.vcpu.failed(errno))

    # --- the native table, sinks and records -------------------------------------------------------------------------

    def sync_table(self) -> None:
        """Make the native table again when ranges have come or gone, or when another Runner has had the vCPU."""
        pio, mmio, native = self.bus.pio, self.bus.mmio, self.vcpu.native
        if (pio.version, mmio.version) == self._version and self.vcpu.lent is self._lent:
            return
        with self._table_lock:
            if native.tid not in (0, get_native_id()):
                self.vcpu.kick()  # the vCPU's own thread does it when it comes back
                return
            self._drain_sinks()
            version = (pio.version, mmio.version)
            pio_ranges, mmio_ranges = pio.ranges, mmio.ranges
            ranges = [*pio_ranges, *mmio_ranges]
            if len(ranges) > lib.PYKVM_MAX_RANGES:
                raise ConfigError(f"{len(ranges)} ranges are claimed by devices; the run loop has room for {lib.PYKVM_MAX_RANGES}")
            self._slots.clear()
            lib.pykvm_forget(native)
            self._ranges, self._sinks = ranges, []
            table, rows = self._place_table(len(ranges))
            table.pio_count, table.mmio_count = len(pio_ranges), len(mmio_ranges)
            for index, claimed in enumerate(ranges):
                self._fill(rows[index], index, claimed)
            table.pio, table.mmio = rows, rows + len(pio_ranges)
            native.ring = ffi.NULL if self.ring is None else self.ring.cdata
            native.devices = ffi.NULL if self.lock is None else self.lock.cdata
            self._lent = self.vcpu.lent = (self._table, self.ring, self.lock)
            native.table = table
            self._version = version

    def _place_table(self, count: int) -> tuple[Any, Any]:
        """Room for the table: in the vCPU's own page while it fits (see native/runloop.h), else somewhere else."""
        native = self.vcpu.native
        native.table = ffi.NULL
        start = ffi.cast("char *", native) + ffi.sizeof("struct pykvm_vcpu")
        need = ffi.sizeof("struct pykvm_table") + count * ffi.sizeof("struct pykvm_range")
        if ffi.sizeof("struct pykvm_vcpu") + need > PAGE_SIZE:
            start = ffi.new("char[]", need)
        self._table = [start]
        ffi.memmove(start, bytes(need), need)
        return ffi.cast("struct pykvm_table *", start), ffi.cast("struct pykvm_range *", start + ffi.sizeof("struct pykvm_table"))

    def _fill(self, row: Any, index: int, claimed: Range) -> None:
        row.base, row.length, row.index = claimed.base, claimed.length, index
        native = claimed.native
        if native is None or (native.kind == "append" and self.lock is not None):
            row.action = lib.PYKVM_TO_PYTHON  # what several vCPUs write keeps its order only when it is passed on at once
        elif native.kind == "append":
            row.action = lib.PYKVM_APPEND
            data = ffi.new("uint8_t[]", _SINK_SIZE)
            sink = ffi.new("struct pykvm_sink *", {"capacity": _SINK_SIZE, "data": data})
            row.sink = sink
            self._sinks.append((sink, native.sink))
            self._table += [data, sink]
        else:
            row.action, row.value = lib.PYKVM_CONSTANT, native.value

    def _drain_sinks(self) -> None:
        for sink, target in self._sinks:
            if sink.used:
                data = bytes(ffi.buffer(sink.data, sink.used))
                sink.used = 0
                target.extend(data)

    def _make_room(self) -> None:
        """For DRAIN. With an exit in the stash it is about the sinks: the ring's newest record still waits for its answer."""
        self._drain_sinks()
        if self.vcpu.native.coalesced:
            self.holding(self._take_coalesced)
        if self.ring is None or self.vcpu.native.stashed:
            return
        self._drain()
        if self.ring.cdata.used == self.ring.cdata.capacity:
            raise ConfigError(f"the record ring is full ({self.ring.cdata.capacity}): set on_records to something that drains it")

    def _take_coalesced(self) -> None:
        """Give the devices what the guest has written without an exit, before they hear of this one."""
        for space, at, size, value in self.vcpu.coalesced():
            self.bus.write(space, at, size, value)

    def _drain(self) -> None:
        self._drain_sinks()
        if self.ring is not None and self.on_records is not None:
            self.on_records(self.ring)
