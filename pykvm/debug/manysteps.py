"""Many instructions of one vCPU, one after the other: plain ones in native code (native/step.c), a KVM_RUN each and next to nothing else,
where KVM can single-step in the vCPU's mode; the others, and all elsewhere, by Stepper.step().
"""

from __future__ import annotations

from time import monotonic

from pykvm import exits, probe
from pykvm.abi import ffi, lib
from pykvm.debug.hostpages import HostPages, fill
from pykvm.debug.planted import OUT, probed_mode
from pykvm.debug.stepping import SLICE
from pykvm.debug.trapflag import hide_trap_flag
from pykvm.runner import Stop
from pykvm.units import PAGE_SIZE
from pykvm.x86.regs import RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pykvm.debug.stepping import Stepper, Stopped, Watchpoint
    from pykvm.x86.view import CpuView

__all__ = ["ManySteps", "Until"]

_MASK = (1 << 64) - 1


class Until:
    """Where many steps come to an end: ``stops``, linear addresses; outside of ``within`` (first, end), when given; when the bytes of
    ``watched`` are not what their ``last`` says."""

    def __init__(self, stops: Iterable[int] = (), within: tuple[int, int] | None = None, watched: Iterable[Watchpoint] = ()) -> None:
        self.stops, self.within, self.watched = frozenset(stops), within, list(watched)

    def has(self, rip: int) -> bool:
        """Whether it is here, for all that an address tells."""
        return rip in self.stops or (self.within is not None and not self.within[0] <= rip < self.within[1])


class ManySteps:
    """Steps of a machine's vCPUs."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.native = ffi.new("struct pykvm_steps *")
        self.pages = HostPages(stepper.machine.memory, self.native.code)

    def run(self, cpu: int, count: int, deadline: float | None, until: Until) -> tuple[int, Stopped]:
        """Some of ``count`` steps, one at least: how many, and what the last one was: "step", or another end of it.

        They stop where ``until`` says, but may stop before: the caller looks, and asks for the rest.
        """
        view = self.stepper.view(cpu)
        if count > 1 and self._can(view):
            done, stopped = self._swiftly(cpu, view, count, deadline, until)
            if done or stopped.reason != "step":
                return done, stopped
        return 1, self.stepper.step(cpu, deadline)

    def _can(self, view: CpuView) -> bool:
        code = view.read(view.rip, 15)
        plain = lib.pykvm_is_plain(code, len(code), view.bits == 64) and not view.regs.rflags & RFLAGS.TF
        return bool(plain) and probe.single_step(probed_mode(view))

    def _swiftly(self, cpu: int, view: CpuView, count: int, deadline: float | None, until: Until) -> tuple[int, Stopped]:
        stepper, native = self.stepper, self.native
        vcpu, handlers, done = stepper.vcpu(cpu), stepper.handlers(view), 0
        keep = self._prepare(view, handlers, until)
        try:
            stepper.planted.insert(view, handlers)
            by_int3 = lib.KVM_GUESTDBG_USE_SW_BP if stepper.planted.byte != OUT else 0
            stepper.guest_debug(vcpu, lib.KVM_GUESTDBG_SINGLESTEP | by_int3)
            while True:
                left = SLICE if deadline is None else deadline - monotonic()
                if left <= 0:
                    return done, stepper.stopped("timeout", cpu, Stop("timeout"))
                native.count = count - done
                exit = vcpu.steps(native, min(left, SLICE))
                done += native.done
                if native.why == lib.PYKVM_STEP_PAGE:
                    self.pages.learn(native.rip & -PAGE_SIZE, native.sregs)
                    continue
                if exit is None:
                    return done, stepper.stopped("step", cpu)
                stopped = stepper.answered(cpu, exit)
                if stopped is None and not isinstance(exit, exits.Intr | exits.Eagain):
                    stopped = stepper.one(cpu, deadline, vcpu)
                if stopped is not None:
                    before = view.at(rip=native.rip - (view.rip - view.regs.rip) & _MASK)
                    hide_trap_flag(before, b"", vcpu, stopped.rip in handlers)
                    return done + (stopped.reason not in ("timeout", "interrupted")), stopped
        finally:
            stepper.planted.remove()
            vcpu.set_guest_debug(0)
            keep.clear()

    def _prepare(self, view: CpuView, handlers: set[int], until: Until) -> list[Any]:
        """Say all of it in the struct pykvm_steps. Returns what must live as long as the steps last."""
        native, sregs = self.native, view.sregs.to_bytes()
        self.pages.check()
        ffi.memmove(ffi.addressof(native, "sregs"), sregs, len(sregs))
        native.rip, native.is_64_bit = view.rip, view.bits == 64
        first, end = until.within or (0, _MASK)
        native.first, native.size = first, end - first
        keep: list[Any] = [ffi.new("uint64_t[]", sorted(until.stops)), ffi.new("uint64_t[]", sorted(handlers))]
        native.stops, native.planted = keep
        native.stop_count, native.planted_count = len(keep[0]), len(keep[1])
        pieces = [(w.gva, w.last) for w in until.watched]
        if handlers:  # where others may come to be
            idt = view.sregs.idt
            pieces.append((idt.base, view.read(idt.base, min(idt.limit + 1, 32 * 16))))
        parts = list(_in_pages(pieces))
        watches = ffi.new("struct pykvm_watch[]", len(parts))
        native.watches, native.watch_count = watches, len(parts)
        keep.append(watches)
        for watch, (gva, data) in zip(watches, parts, strict=True):
            keep += fill(watch.page, self.stepper.machine.memory, gva & -PAGE_SIZE, view.sregs)
            keep.append(ffi.new("uint8_t[]", data))
            watch.before, watch.offset, watch.size = keep[-1], gva % PAGE_SIZE, len(data)
        return keep


def _in_pages(pieces: Iterable[tuple[int, bytes]]) -> Iterable[tuple[int, bytes]]:
    """The same bytes, none across the end of a page."""
    for gva, data in pieces:
        while data:
            n = min(len(data), PAGE_SIZE - gva % PAGE_SIZE)
            yield gva, data[:n]
            gva, data = gva + n & _MASK, data[n:]
