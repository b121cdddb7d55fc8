"""One instruction of one vCPU, exactly, on every host: what Control's steps and its steps over breakpoints are.

KVM_GUESTDBG_SINGLESTEP where the probe says that it steps, else a temporary breakpoint where the instruction leads (successors.py). Beside
either, temporary breakpoints at the handlers of exceptions: to enter one clears RFLAGS.TF, and a single step would end behind the handler.
"""

from __future__ import annotations

from time import monotonic

from pykvm import exits, probe
from pykvm.abi import lib
from pykvm.debug.planted import OUT, Planted, probed_mode
from pykvm.debug.successors import check_apart, count_down, handlers, leaves_step, successor
from pykvm.debug.trapflag import hide_trap_flag
from pykvm.errors import ConfigError
from pykvm.runner import Stop
from pykvm.x86.regs import linear_rip
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from pykvm.debug.successors import Next
    from pykvm.machine import Machine
    from pykvm.runner import Runner
    from pykvm.vcpu import VCPU

    Access = Literal["write", "read", "access"]

__all__ = ["NOT_STARTED", "SLICE", "Stepper", "Stopped", "Watchpoint"]

NOT_STARTED = (lib.KVM_MP_STATE_UNINITIALIZED, lib.KVM_MP_STATE_INIT_RECEIVED)
SLICE = 0.1  # seconds that a step waits at a time
_MADE_BY_AN_INSTRUCTION = (exits.IoOut, exits.IoIn, exits.MmioWrite, exits.MmioRead, exits.RdMsr, exits.WrMsr, exits.Hypercall, exits.Hlt)


class Watchpoint:
    """``size`` bytes at ``gva``, watched for ``access``: "write", "read" or "access" (debug registers cannot tell the last two apart)."""

    __slots__ = ("access", "gva", "last", "size")

    def __init__(self, gva: int, size: int, access: Access) -> None:
        self.gva, self.size, self.access = gva, size, access
        self.last = b""  # what was there when the guest last stopped

    def __repr__(self) -> str:
        return f"<Watchpoint {self.access} {self.gva:#x}, {self.size} bytes>"


class Stopped:
    """Why the guest stands still.

    ``reason``: "step", "breakpoint", "watchpoint", "exit" (``code``), "reset", "power-off", "halted", "crash", "timeout" or
    "interrupted". ``cpu`` is the vCPU that it came from, and ``rip`` where that stands, a linear address. ``watchpoint`` is the one that
    fired, ``old`` and ``new`` what was there before and is now. ``stop`` is what the run loop said. ``by_planted_out``: the last exit was
    the debugger's own OUT, and none of the guest's.
    """

    __slots__ = ("by_planted_out", "code", "cpu", "new", "old", "reason", "rip", "stop", "watchpoint")

    def __init__(self, reason: str, cpu: int, stop: Stop | None = None) -> None:
        self.reason, self.cpu, self.stop = reason, cpu, stop
        self.code = None if stop is None else stop.code
        self.rip = 0
        self.by_planted_out = False
        self.watchpoint: Watchpoint | None = None
        self.old = self.new = b""

    def __repr__(self) -> str:
        code = "" if self.code is None else f" {self.code}"
        what = "" if self.watchpoint is None else f" {self.watchpoint!r}"
        return f"<Stopped {self.reason}{code}{what} at {self.rip:#x} on vCPU {self.cpu}>"


class Stepper:
    """Steps the vCPUs of ``machine``; ``asked`` is set by who wants a step to end as "interrupted"."""

    def __init__(self, machine: Machine, planted: Planted) -> None:
        self.machine, self.planted = machine, planted
        self.asked = False
        can = machine.system.check_extension("KVM_CAP_SET_GUEST_DEBUG2")
        self._block_irqs = lib.KVM_GUESTDBG_BLOCKIRQ if can & lib.KVM_GUESTDBG_BLOCKIRQ else 0
        self._known_idt: object = None
        self._known_handlers: set[int] = set()

    def runner(self, cpu: int) -> Runner:
        """The runner of a vCPU. Raises ConfigError where there is none."""
        if not 0 <= cpu < len(self.machine.runners):
            raise ConfigError(f"this machine has vCPUs 0 to {self.machine.cpus - 1}, not {cpu}")
        return self.machine.runners[cpu]

    def vcpu(self, cpu: int) -> VCPU:
        """A vCPU by number."""
        return self.runner(cpu).vcpu

    def view(self, cpu: int) -> CpuView:
        """Registers and memory as it sees them."""
        return CpuView(self.vcpu(cpu), self.machine.memory)

    def stopped(self, reason: str, cpu: int, stop: Stop | None = None) -> Stopped:
        """The vCPU stands where it stands."""
        stopped = Stopped(reason, cpu, stop)
        vcpu = self.vcpu(cpu)
        stopped.rip = linear_rip(vcpu.get_regs(), vcpu.get_sregs())
        return stopped

    def of_stop(self, stop: Stop, cpu: int) -> Stopped:
        """What a Stop of the run loop means that no breakpoint has made."""
        if stop.vcpu is None:
            stop.vcpu = self.vcpu(cpu)
        if stop.reason in ("exit", "reset", "power-off", "stopped", "interrupted"):
            self.settle(cpu)
        return self.stopped("interrupted" if stop.reason == "stopped" else stop.reason, cpu, stop)

    def step(self, cpu: int, deadline: float | None) -> Stopped:
        vcpu = self.vcpu(cpu)
        if self.machine.cpus > 1 and vcpu.get_mp_state() in NOT_STARTED:
            raise ConfigError(f"vCPU {cpu} waits for INIT and SIPI: let the others run")
        view = self.view(cpu)
        can_step = probe.single_step(probed_mode(view))
        targets = self.handlers(view)
        code = view.read(view.rip, 3)
        following = None
        if not can_step or leaves_step(code) or any(view.rip <= at < view.rip + 15 for at in targets):
            following = successor(view, vcpu)
            if not can_step and following.address == view.rip:
                self._count_down(view, vcpu, following)
                return self.stopped("step", cpu)
            if can_step and not leaves_step(code):
                following.address = None  # only its size was asked for
        flags = lib.KVM_GUESTDBG_SINGLESTEP if can_step else 0
        try:
            self._plant_around(view, targets, following)
            self.guest_debug(vcpu, flags | (lib.KVM_GUESTDBG_USE_SW_BP if self.planted.byte != OUT else 0))
            stopped = self.one(cpu, deadline, vcpu)
        finally:
            self.planted.remove()
            vcpu.set_guest_debug(0)
        if can_step:
            hide_trap_flag(view, code, vcpu, stopped.rip in targets or (code[:1] == b"\xcd" and stopped.reason == "step"))
        if code[:1] == b"\xf4" and stopped.reason == "step" and self._halts(view, stopped):
            stopped.reason, stopped.stop = "halted", Stop("halted")
        return stopped

    def _halts(self, view: CpuView, stopped: Stopped) -> bool:
        """Whether a step of HLT, which is a step to some hosts, is the end: there is no irqchip, and no interrupt waits."""
        return self.machine.vm.irqchip == "none" and stopped.rip == view.rip + 1 and not self.runner(stopped.cpu).has_interrupts

    def _count_down(self, view: CpuView, vcpu: VCPU, following: Next) -> None:
        """A branch to itself has nothing to do; LOOP counts."""
        if following.counts:
            view.regs.rcx = count_down(view)
            vcpu.set_regs(view.regs)

    def handlers(self, view: CpuView) -> set[int]:
        """handlers(view), which are asked for at each step and seldom change."""
        idt = view.sregs.idt
        if not idt.limit:
            return set()
        key = (view.mode, view.sregs.gdt.base, idt.base, view.read(idt.base, min(idt.limit + 1, 32 * 16)))
        if key != self._known_idt:
            self._known_idt = key
            self._known_handlers = {at for at in handlers(view) if not idt.base <= at <= idt.base + idt.limit}
        return set(self._known_handlers)

    def _plant_around(self, view: CpuView, targets: set[int], following: Next | None) -> None:
        """Wherever an exception leads, and where the instruction does when nothing else tells that it is done."""
        if following is None:
            self.planted.insert(view, targets)
            return
        here = [(view.rip, following.size), *following.reads]
        self.planted.insert(view, (at for at in targets if not any(start <= at < start + size for start, size in here)))
        if following.address is not None:
            check_apart(following, view.rip, following.address)
            if view.walk(following.address).gpa is not None:
                self.planted.check(view, following.address, following.user)
                self.planted.insert(view, [following.address])

    def one(self, cpu: int, deadline: float | None, vcpu: VCPU) -> Stopped:
        """Enter the guest until it has carried out an instruction, or has come to a planted one."""
        while True:
            left = SLICE if deadline is None else deadline - monotonic()
            if left <= 0:
                return self.stopped("timeout", cpu, Stop("timeout"))
            stopped = self.answered(cpu, vcpu.run(min(left, SLICE)))
            if stopped is not None:
                return stopped

    def answered(self, cpu: int, exit: exits.Exit) -> Stopped | None:
        """What an exit amid a step means, now that it is carried out: the step is over, or (None) goes on."""
        vcpu = self.vcpu(cpu)
        if isinstance(exit, exits.Debug):
            if exit.exception == 3 and not self.planted.is_at(view := self.view(cpu), view.rip):
                vcpu.inject_exception(3)  # the guest's own INT3: it shall have it
                return None
            return self.stopped("step", cpu)
        if self.asked:
            self.settle(cpu)
            return self.stopped("interrupted", cpu)
        if isinstance(exit, exits.Intr | exits.Eagain):
            if self.machine.pc.asleep:
                self.machine.runner.settle()  # time passes, and what wakes it is heard
                return None if self.machine.pc.asleep else self.stopped("step", cpu)
            if vcpu.get_mp_state() == lib.KVM_MP_STATE_HALTED and not vcpu.native.run.if_flag:
                return self.stopped("halted", cpu, Stop("halted"))
            return None
        if isinstance(exit, exits.IoOut) and exit.size != 1 and self._is_planted_out(cpu, exit):
            stopped = self.stopped("step", cpu)
            stopped.by_planted_out = True
            return stopped
        stop = self.runner(cpu).serve()
        if stop is None and isinstance(exit, exits.InternalError):
            return self.stopped("step", cpu)  # KVM gave up on the instruction, and it was finished all the same
        on_sleep = self.machine.group.on_sleep
        if stop is not None and stop.reason == "sleep" and on_sleep is not None:
            on_sleep()
            return self.stopped("step", cpu)
        if stop is not None:
            return self.of_stop(stop, cpu)
        if isinstance(exit, _MADE_BY_AN_INSTRUCTION):
            self.settle(cpu)
            return self.stopped("step", cpu)
        return None

    def _is_planted_out(self, cpu: int, exit: exits.IoOut) -> bool:
        view = self.view(cpu)
        at = self.planted.out_by(view, exit.port)
        if at is None:
            return False
        self.undo_out(cpu, at)
        return True

    def undo_out(self, cpu: int, at: int) -> None:
        """A planted OUT has exited: KVM finishes it, and RIP goes back to it."""
        self.settle(cpu)
        vcpu = self.vcpu(cpu)
        regs = vcpu.get_regs()
        regs.rip = at - (linear_rip(regs, vcpu.get_sregs()) - regs.rip)
        vcpu.set_regs(regs)

    def settle(self, cpu: int) -> None:
        """Have KVM finish the instruction of the last exit, which has its answer, without going on into the guest."""
        runner = self.runner(cpu)
        while True:
            runner.vcpu.kick()
            exit = runner.vcpu.run(SLICE)
            if not isinstance(exit, exits.MmioRead | exits.MmioWrite | exits.IoIn | exits.IoOut):
                return
            runner.serve()  # an access that KVM has cut in two

    def guest_debug(self, vcpu: VCPU, flags: int) -> None:
        """Interrupts wait while a step is under way, where KVM can have them wait."""
        vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | flags | self._block_irqs)
