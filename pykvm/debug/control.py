"""Run control over a Machine: step, breakpoints, watchpoints, memory and registers, the same on every host.

>>> with Machine("hello") as m:
...     control = Control(m)
...     control.add_breakpoint(m.symbols().address("puts"))
...     control.cont()
<Stopped breakpoint at 0x100022 on vCPU 0>

KVM_SET_GUEST_DEBUG does what it does well on a host, by probe; where it does not, the same is done another way:

- a step is KVM_GUESTDBG_SINGLESTEP, else a temporary breakpoint wherever the next instruction can be (successors.py);
- a breakpoint is a planted byte (planted.py), or one of four debug registers;
- a watchpoint is a debug register, else steps with a look at the memory after each.

All vCPUs stop together. A step moves one of them only. Planted bytes are there only while the guest runs: whoever reads memory
between two runs finds what the guest put there. A guest that reads its own code while it runs can find one.
"""

from __future__ import annotations

from _thread import RLock
from time import monotonic

from pykvm import exits, probe
from pykvm.abi import lib, new
from pykvm.debug.manysteps import ManySteps, Until
from pykvm.debug.planted import OUT, Planted, WatchedBus
from pykvm.debug.registers import read_register, write_register
from pykvm.debug.stepping import NOT_STARTED, Stepper, Stopped, Watchpoint
from pykvm.errors import ConfigError
from pykvm.runner import Stop
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.debug.stepping import Access
    from pykvm.machine import Machine
    from pykvm.memory import MemSlot

    _Addresses = set[int]
    _Slots = set[MemSlot]

__all__ = ["Control", "Stopped", "Watchpoint"]

DEBUG_REGISTERS = 4
_TURN, _ALONE = 64, 1 << 20  # steps of one vCPU at a time
_DR7_LENGTH = {1: 0, 2: 1, 4: 3, 8: 2}
_DR7_ACCESS = {"write": 1, "read": 3, "access": 3}


class Control:
    """Run control over ``machine``. Its methods raise ConfigError for what cannot be, and what Machine.run() raises but GuestCrash."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.memory = machine, machine.memory
        self.breakpoints: dict[int, bool] = {}  # gva -> whether a debug register was asked for
        self.watchpoints: list[Watchpoint] = []
        self._planted = Planted(machine)
        self._stepper = Stepper(machine, self._planted)
        self._many = ManySteps(self._stepper)
        self._hardware: list[int | Watchpoint] = []  # what DR0 to DR3 hold while the guest runs
        self._waiting: list[Stopped] = []  # what other vCPUs stopped for at the same moment
        self._hits: _Addresses = set()  # where breakpoints were reported
        self._own_int3: _Addresses = set()
        self._busy = False
        self._lock = RLock()

    # --- breakpoints and watchpoints ---------------------------------------------------------------------------------

    def add_breakpoint(self, gva: int, *, hardware: bool = False, cpu: int = 0) -> None:
        """Stop before the instruction at ``gva`` runs, on whichever vCPU. ``hardware``: by a debug register, where this host's do for it.

        A planted one is there whenever the page is mapped at the moment the guest goes on. Raises ConfigError where it can be neither.
        """
        self._check_idle()
        if self._by_register(hardware):
            self._check_registers(1)
        else:
            try:
                view = self.view(cpu)
                self._planted.check(view, gva, view.cpl == 3)
            except ConfigError:
                if not probe.breakpoints("hardware") or probe.cpl0_emulated():
                    raise
                self._check_registers(1)
                hardware = True
        self.breakpoints[gva] = hardware

    def remove_breakpoint(self, gva: int) -> None:
        """Take one back. Raises ConfigError where there is none."""
        self._check_idle()
        if gva not in self.breakpoints:
            raise ConfigError(f"there is no breakpoint at {gva:#x}")
        del self.breakpoints[gva]

    def add_watchpoint(self, gva: int, size: int, access: Access = "write") -> Watchpoint:
        """Stop after an instruction that has written ``size`` bytes at ``gva`` (1, 2, 4 or 8, aligned), or read or written them.

        By a debug register, or where this host's do not fire by steps: every instruction then costs some ten microseconds, and only
        writes of another value are seen. To see reads each instruction is decoded, which costs hundreds.
        """
        self._check_idle()
        if access not in _DR7_ACCESS:
            raise ConfigError(f"unknown kind of access {access!r}: use one of {', '.join(_DR7_ACCESS)}")
        if not 1 <= size <= 4096:
            raise ConfigError(f"a watchpoint of {size} bytes: give 1 to 4096")
        watchpoint = Watchpoint(gva, size, access)
        if not self._watched_by_register(watchpoint):
            self.read(gva, size)
        else:
            self._check_registers(1)
        self.watchpoints.append(watchpoint)
        return watchpoint

    def remove_watchpoint(self, gva: int, size: int, access: Access = "write") -> None:
        """Take one back. Raises ConfigError where there is none."""
        self._check_idle()
        for watchpoint in self.watchpoints:
            if (watchpoint.gva, watchpoint.size, watchpoint.access) == (gva, size, access):
                self.watchpoints.remove(watchpoint)
                return
        raise ConfigError(f"there is no such watchpoint at {gva:#x}")

    def _by_register(self, wanted: bool) -> bool:
        # Where CPL0 code is emulated, debug registers do nothing at CPL3: a planted breakpoint is a breakpoint everywhere.
        return wanted and not probe.cpl0_emulated() and probe.breakpoints("hardware")

    def _watched_by_register(self, watchpoint: Watchpoint) -> bool:
        return watchpoint.size in _DR7_LENGTH and watchpoint.gva % watchpoint.size == 0 and probe.watchpoints()

    def _check_registers(self, more: int) -> None:
        used = sum(self.breakpoints.values()) + sum(self._watched_by_register(w) for w in self.watchpoints)
        if used + more > DEBUG_REGISTERS:
            raise ConfigError(f"all {DEBUG_REGISTERS} debug registers are in use: remove a watchpoint or a hardware breakpoint")

    # --- memory and registers ----------------------------------------------------------------------------------------

    def view(self, cpu: int = 0) -> CpuView:
        """Registers and memory as vCPU ``cpu`` sees them."""
        return CpuView(self._stepper.vcpu(cpu), self.memory)

    def translate(self, gva: int, cpu: int = 0) -> int:
        """The gpa of a linear address. Raises ConfigError with the reason why there is none."""
        found = self.view(cpu).walk(gva)
        if found.gpa is None:
            raise ConfigError(f"gva {gva:#x}: {found.fault}")
        return found.gpa

    def read(self, gva: int, size: int, cpu: int = 0) -> bytes:
        """``size`` bytes at a linear address. Raises ConfigError (not mapped) and GuestMemoryError (no memory there)."""
        self._check_idle()
        return b"".join(self.memory.read(gpa, n) for gpa, n in self._pieces(gva, size, cpu))

    def write(self, gva: int, data: bytes, cpu: int = 0) -> None:
        """Write at a linear address, whatever the page's rights: all of it or, on an error, nothing."""
        self._check_idle()
        pieces = self._pieces(gva, len(data), cpu)
        for gpa, n in pieces:
            self.memory.read(gpa, n)
        done = 0
        for gpa, n in pieces:
            self.write_physical(gpa, data[done : done + n])
            done += n

    def read_physical(self, gpa: int, size: int) -> bytes:
        """``size`` bytes at ``gpa``. Raises GuestMemoryError."""
        self._check_idle()
        return self.memory.read(gpa, size)

    def write_physical(self, gpa: int, data: bytes) -> None:
        """Write at ``gpa``. Raises GuestMemoryError.

        KVM's shadow of the guest's page tables does not see what the host writes to them: the memslot goes and comes back.
        """
        self._check_idle()
        self.memory.write(gpa, data)
        touched: _Slots = {slot for at in (gpa, gpa + max(len(data), 1) - 1) if (slot := self.memory.find(at)) is not None}
        for slot in touched:
            self.machine.vm.remove_slot(slot)
            self.machine.vm.add_slot(slot)

    def _pieces(self, gva: int, size: int, cpu: int) -> list[tuple[int, int]]:
        view, pieces = self.view(cpu), []
        while size > 0:
            found = view.walk(gva)
            if found.gpa is None:
                raise ConfigError(f"gva {gva:#x}: {found.fault}")
            n = min(size, 4096 - (gva & 4095))
            pieces.append((found.gpa, n))
            gva, size = gva + n, size - n
        return pieces

    def get(self, name: str, cpu: int = 0) -> int:
        """A register by name (registers.py): rax, rip, eflags, cs, fs_base, cr3, efer, xmm0, st0, mxcsr, ..."""
        return read_register(self._stepper.vcpu(cpu), name)

    def set(self, name: str, value: int, cpu: int = 0) -> None:
        """Set a register by name. Raises ConfigError for a name that is none, and for what cannot be set."""
        self._check_idle()
        write_register(self._stepper.vcpu(cpu), name, value)

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self, cpu: int = 0, timeout: float | None = None, count: int = 1, within: tuple[int, int] | None = None) -> Stopped:
        """Run exactly one instruction of one vCPU, or ``count``; the others stand still. Interrupts wait until the guest goes on.

        ``within`` (first address, end): go on, ``count`` steps at most, until one leads out of there. Many steps end at a breakpoint too.

        A device's answer is part of it. An exception leads to the first instruction of its handler. Of a REP instruction it is one
        element or all of them, by host. Raises ConfigError for a vCPU that waits for SIPI.
        """
        with self._run():
            deadline = None if timeout is None else monotonic() + timeout
            if count <= 1:
                return self._stepper.step(cpu, deadline)
            until = Until(self.breakpoints, within)
            while True:
                done, stopped = self._many.run(cpu, count, deadline, until)
                count -= done
                if stopped.reason == "step" and stopped.rip in self.breakpoints and count > 0:
                    stopped.reason = "breakpoint"
                    self._hits.add(stopped.rip)
                if stopped.reason != "step" or count <= 0 or until.has(stopped.rip):
                    return stopped

    # --- going on ----------------------------------------------------------------------------------------------------

    def cont(self, timeout: float | None = None) -> Stopped:
        """Let all vCPUs go on until one stops, or for ``timeout`` seconds. A breakpoint where a vCPU stands is stepped over."""
        with self._run():
            while self._waiting:
                waiting = self._waiting.pop(0)
                if self.view(waiting.cpu).rip == waiting.rip and (waiting.reason != "breakpoint" or waiting.rip in self.breakpoints):
                    return waiting
            return self._cont(None if timeout is None else monotonic() + timeout)

    def _cont(self, deadline: float | None) -> Stopped:
        if any(not self._watched_by_register(w) for w in self.watchpoints):
            return self._cont_by_steps(deadline)
        over = self._hits | set(self.breakpoints)
        self._hits = set()
        while True:
            for cpu in self._started() if over else ():
                if self.view(cpu).rip in over:
                    stopped = self._stepper.step(cpu, deadline)
                    if stopped.reason != "step":
                        return stopped
            found = self._go(deadline)
            if found:
                self._waiting = found[1:]
                return found[0]
            over = self._own_int3
            if self._stepper.asked:
                return self._stopped("interrupted", 0)

    def _started(self) -> list[int]:
        if self.machine.cpus == 1:
            return [0]
        return [i for i, vcpu in enumerate(self.machine.vcpus) if vcpu.get_mp_state() not in NOT_STARTED]

    def _go(self, deadline: float | None) -> list[Stopped]:
        """All vCPUs with everything armed, until one stops: what each that did stopped for. Empty: only INT3s of the guest's own did."""
        machine = self.machine
        self._own_int3 = set()
        self._arm()
        try:
            if deadline is not None and deadline <= monotonic():
                return [self._stopped("timeout", 0, Stop("timeout"))]
            stop = machine.group.run(None if deadline is None else deadline - monotonic())
            ends = [end for end in (machine.group.ends if machine.cpus > 1 else [stop]) if isinstance(end, Stop)]
            found = []
            for end in [stop, *(end for end in ends if end is not stop)]:
                cpu = machine.vcpus.index(end.vcpu or machine.vcpu)
                stopped = self._of_stop(end, cpu)
                if stopped is not None and (end is stop or stopped.reason != "interrupted"):
                    found.append(stopped)
            return found
        finally:
            self._disarm()

    def _arm(self) -> None:
        machine, planted = self.machine, self._planted
        self._hardware = [w for w in self.watchpoints if self._watched_by_register(w)]
        views = [self.view(cpu) for cpu in self._started()]
        left = [gva for gva, hardware in self.breakpoints.items() if not self._by_register(hardware)]
        self._hardware += [gva for gva in self.breakpoints if gva not in left]
        for view in views:
            left = planted.insert(view, left)
        for watchpoint in self.watchpoints:
            watchpoint.last = self._look_at(watchpoint)
        debug = new("struct kvm_guest_debug")
        if self.breakpoints or self.watchpoints:
            debug.control = lib.KVM_GUESTDBG_ENABLE | (lib.KVM_GUESTDBG_USE_SW_BP if planted.byte != OUT else 0)
        if self._hardware:
            debug.control |= lib.KVM_GUESTDBG_USE_HW_BP
            registers = debug.cdata.arch.debugreg
            registers[7] = 0x400
            for i, what in enumerate(self._hardware[:DEBUG_REGISTERS]):
                registers[i] = what if isinstance(what, int) else what.gva
                kind = 0 if isinstance(what, int) else _DR7_ACCESS[what.access] | _DR7_LENGTH[what.size] << 2
                registers[7] |= 2 << 2 * i | kind << 16 + 4 * i
        for runner in machine.runners:
            runner.vcpu.set_guest_debug(debug)
            if planted.byte == OUT and self.breakpoints:
                runner.bus = WatchedBus(machine.bus, runner, planted)

    def _disarm(self) -> None:
        """Nothing of ours is left in the guest's memory, its debug registers or the run loops."""
        self._planted.remove()
        for runner in self.machine.runners:
            runner.vcpu.set_guest_debug(0)
            runner.bus = self.machine.bus
            runner.take_back_stop()

    def _look_at(self, watchpoint: Watchpoint) -> bytes:
        return self.view(0).read(watchpoint.gva, watchpoint.size)

    # --- watching by steps -------------------------------------------------------------------------------------------

    def _cont_by_steps(self, deadline: float | None) -> Stopped:
        """Some instructions of each vCPU in turn, and a look at what is watched after each."""
        for watchpoint in self.watchpoints:
            watchpoint.last = self._look_at(watchpoint)
        until = Until(self.breakpoints, watched=self.watchpoints)
        for_reads = [watchpoint for watchpoint in self.watchpoints if watchpoint.access != "write"]
        while True:
            started = self._started()
            turn = 1 if for_reads else _ALONE if len(started) == 1 else _TURN
            for cpu in started:
                if self.machine.cpus > 1 and self._stepper.vcpu(cpu).get_mp_state() == lib.KVM_MP_STATE_HALTED:
                    stopped = self._stepper.step(cpu, monotonic() + 1e-3)
                    if stopped.reason in ("timeout", "halted") and not self._all_idle():
                        continue
                else:
                    touched = self._touched(cpu, for_reads) if for_reads else None
                    _, stopped = self._many.run(cpu, turn, deadline, until)
                    if touched is not None and stopped.reason == "step":
                        return self._watched(touched, self._look_at(touched), cpu)
                if stopped.reason != "step":
                    return stopped
                for watchpoint in self.watchpoints:
                    now = self._look_at(watchpoint)
                    if now != watchpoint.last and watchpoint.access != "read":
                        return self._watched(watchpoint, now, cpu)
                if stopped.rip in self.breakpoints:
                    stopped.reason = "breakpoint"
                    return stopped
            if deadline is not None and monotonic() >= deadline:
                return self._stopped("timeout", 0, Stop("timeout"))

    def _touched(self, cpu: int, watchpoints: list[Watchpoint]) -> Watchpoint | None:
        """The watchpoint that the next instruction reads, or (those for both) writes."""
        from pykvm.x86.operation import Operation

        operation = Operation.here(self.view(cpu))
        accesses = [] if operation is None else operation.accesses()
        for w in watchpoints:
            places = [a for a in accesses if a.read or w.access == "access"]
            if any(a.linear < w.gva + w.size and w.gva < a.linear + a.size for a in places):
                return w
        return None

    def _all_idle(self) -> bool:
        return not self.machine.pc.asleep and all(
            self._stepper.vcpu(cpu).get_mp_state() == lib.KVM_MP_STATE_HALTED and not self._stepper.vcpu(cpu).native.run.if_flag
            for cpu in self._started()
        )

    def _watched(self, watchpoint: Watchpoint, now: bytes, cpu: int) -> Stopped:
        stopped = self._stopped("watchpoint", cpu)
        stopped.watchpoint, stopped.old, stopped.new = watchpoint, watchpoint.last, now
        watchpoint.last = now
        return stopped

    # --- why it stopped ----------------------------------------------------------------------------------------------

    def _stopped(self, reason: str, cpu: int, stop: Stop | None = None) -> Stopped:
        stopped = self._stepper.stopped(reason, cpu, stop)
        if reason == "breakpoint":
            self._hits.add(stopped.rip)
        return stopped

    def _of_stop(self, stop: Stop, cpu: int) -> Stopped | None:
        """What a Stop of the run loop means here; None for an INT3 of the guest's own, which it shall have."""
        bus = self._stepper.runner(cpu).bus
        if isinstance(bus, WatchedBus) and bus.hit is not None:
            self._stepper.undo_out(cpu, bus.hit)
            return self._stopped("breakpoint", cpu)
        if stop.reason == "crash" and isinstance(stop.exit, exits.Debug):
            return self._of_debug(stop.exit, cpu)
        return self._stepper.of_stop(stop, cpu)

    def _of_debug(self, exit: exits.Debug, cpu: int) -> Stopped | None:
        view = self.view(cpu)
        if exit.exception == 3 and not self._planted.is_at(view, view.rip):
            self._own_int3.add(view.rip)
            return None
        if exit.exception == 1:
            for i, what in enumerate(self._hardware):
                if exit.dr6 >> i & 1 and isinstance(what, Watchpoint):
                    return self._watched(what, self._look_at(what), cpu)
        return self._stopped("breakpoint", cpu)

    def explain(self, stopped: Stopped) -> str:
        """Why it crashed, or where it was stopped, in words (debug/explain.py)."""
        from pykvm.debug.explain import explain_stop

        return explain_stop(self.machine, stopped.stop or Stop("timeout"))

    # --- from another thread -----------------------------------------------------------------------------------------

    def interrupt(self) -> bool:
        """From another thread: have the step() or cont() in progress return "interrupted". False: there is none."""
        with self._lock:
            if not self._busy:
                return False
            self._stepper.asked = True
            self.machine.group.stop("interrupted")
        return True

    def detach(self) -> None:
        """No breakpoints and no watchpoints any more."""
        self._check_idle()
        self.breakpoints.clear()
        self.watchpoints.clear()
        self._waiting.clear()

    def _check_idle(self) -> None:
        if self._busy:
            raise ConfigError("the guest is running: interrupt() it first")

    def _run(self) -> _Running:
        return _Running(self)


class _Running:
    """The guest runs, and its clock does."""

    def __init__(self, control: Control) -> None:
        self.control = control

    def __enter__(self) -> None:
        control = self.control
        with control._lock:
            if control._busy:
                raise ConfigError("the guest is running: interrupt() it first")
            control._busy, control._stepper.asked = True, False
        control.machine._turn_clock(running=True)

    def __exit__(self, *_: object) -> None:
        control = self.control
        control.machine._turn_clock(running=False)
        with control._lock:
            control._busy = control._stepper.asked = False
            for runner in control.machine.runners:
                runner.take_back_stop()
