"""What looking costs: a trace, single steps, and the walk of one address.

Capture: exits through a run loop, and the same loop with a trace that keeps all it needs for words to be made of each exit later, but makes
none: capture ends where formatting begins. "events" adds an Event object for each, which a filter looks at. Steps: an instruction each,
beside a bare C loop of KVM_RUNs under KVM_GUESTDBG_SINGLESTEP. All variants of a row run in each round, in turn first.
"""

from __future__ import annotations

import os
from errno import EINTR

from pykvm import probe
from pykvm.abi import ffi, lib
from pykvm.assemble import asm
from pykvm.bench.paired import Estimate, Interrupted, estimate, measure, paired, ratio
from pykvm.bus import Native
from pykvm.debug.control import Control
from pykvm.debug.trace import Capture
from pykvm.debug.translate import Translator
from pykvm.errors import KvmError
from pykvm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack
    from typing import Any

__all__ = ["DebugRow", "bench_debug"]

PORT, STOP_PORT = 0x300, 0xF4
_EXITS = "2: mov ecx, {batch}; mov edx, {port}; 1: mov al, cl; out dx, al; dec ecx; jnz 1b; mov al, 0; out {stop}, al; jmp 2b"
_STEPS = "1: inc rax; add rbx, rax; mov [0x180000], rbx; mov rdx, [0x180000]; cmp rdx, rbx; jz 1b; ud2"


class DebugRow:
    """One thing that is measured: TSC units of each way. ``over`` and ``times`` are against the first way, round by round."""

    def __init__(self, what: str, taken: dict[str, list[float]], tsc_khz: int) -> None:
        self.what, self.tsc_khz = what, tsc_khz
        names = list(taken)
        self.units: dict[str, Estimate] = {name: estimate(values) for name, values in taken.items()}
        self.over: dict[str, Estimate] = {name: paired(taken[name], taken[names[0]]) for name in names[1:]}
        self.times: dict[str, Estimate] = {name: ratio(taken[name], taken[names[0]]) for name in names[1:]}

    def as_dict(self) -> dict[str, Any]:
        """For JSON; TSC units."""
        return {
            "what": self.what,
            "tsc_khz": self.tsc_khz,
            "units": {name: e.as_dict() for name, e in self.units.items()},
            "over": {name: e.as_dict() for name, e in self.over.items()},
            "times": {name: e.as_dict() for name, e in self.times.items()},
        }


class _Device:
    def __init__(self) -> None:
        self.value = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


class _Kept(Capture):
    """A capture that nobody looks at."""

    def arrived(self, tap: Any, now: int, records: bytes, moments: bytes, data: bytes | None = None) -> None:
        """They are there, and that is all."""


def bench_debug(batch: int = 1000, rounds: int = 40, progress: Callable[[str, int, int], None] | None = None) -> list[DebugRow]:
    """Measure all: ``rounds`` rounds of ``batch`` exits or steps. Ctrl-C raises Interrupted with the rows so far."""
    from contextlib import ExitStack

    rows: list[DebugRow] = []
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(everywhere)})
    try:
        for what, make, mode in (
            ("an exit, native loop", _captures, "native"),
            ("an exit, Python loop", _captures, "python"),
            ("a step at CPL0", _steps, "long"),
            ("a step at CPL3", _steps, "user"),
            ("the walk of an address", _walks, "long"),
        ):
            with ExitStack() as stack:
                variants, khz = make(stack, mode, batch)
                tick = None if progress is None else (lambda i, n, what=what: progress(what, i, n))
                try:
                    rows.append(DebugRow(what, measure(variants, rounds, tick), khz))
                except Interrupted as interrupt:
                    raise Interrupted([*rows, DebugRow(what, interrupt.measured, khz)]) from None
                except KeyboardInterrupt:
                    if not rows:
                        raise
                    raise Interrupted(rows) from None
    finally:
        os.sched_setaffinity(0, everywhere)
    return rows


_Variants = tuple[dict[str, "Callable[[], float]"], int]


def _captures(stack: ExitStack, loop: str, batch: int) -> _Variants:
    code = asm(_EXITS.format(batch=batch, port=PORT, stop=STOP_PORT), bits=64, org=0x100000)

    def machine() -> Machine:
        made: Machine = stack.enter_context(Machine(code, mode="long", memory="2M", loop=loop))
        made.add_device(_Device(), port=PORT, native=Native.constant(0))
        return made

    def timed(m: Machine) -> Callable[[], float]:
        def run() -> float:
            start = lib.pykvm_rdtsc()
            m.run()
            return float(lib.pykvm_rdtsc() - start) / (batch + 1)

        return run

    plain, kept, looked_at = machine(), machine(), machine()
    stack.enter_context(_Kept(kept, lambda event: None))
    stack.enter_context(Capture(looked_at, lambda event: None))
    return {"plain": timed(plain), "captured": timed(kept), "events": timed(looked_at)}, plain.vcpu.get_tsc_khz()


def _steps(stack: ExitStack, mode: str, batch: int) -> _Variants:
    """Where KVM cannot single-step at CPL3, C steps at CPL0, and ours are breakpoints planted where an instruction leads."""
    code = asm(_STEPS, bits=64, org=0x100000)
    can = probe.single_step(mode)
    ours = batch if can else max(1, batch // 50)
    mine: Machine = stack.enter_context(Machine(code, mode=mode, memory="2M"))
    control = Control(mine)

    def stepped() -> float:
        start = lib.pykvm_rdtsc()
        stopped = control.step(count=ours)
        if stopped.reason != "step":
            raise KvmError("KVM_RUN", 5, f"a step ended as {stopped!r}")
        return float(lib.pykvm_rdtsc() - start) / ours

    khz = mine.vcpu.get_tsc_khz()
    base = mode if can else "long"
    if not probe.single_step(base):
        return {"planted": stepped}, khz
    machine: Machine = stack.enter_context(Machine(code, mode=base, memory="2M"))
    machine.vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
    native = machine.vcpu.native

    def c() -> float:
        taken = -EINTR
        while taken == -EINTR:
            taken = lib.pykvm_bench_traps(native.fd, native.run, 0, batch, 4, 0, ffi.NULL)
        if taken < 0:
            raise KvmError("KVM_RUN", -taken, "in the C loop of single steps")
        return float(taken) / batch

    return {"C" if can else "C at CPL0": c, "many" if can else "planted": stepped}, khz


def _walks(stack: ExitStack, mode: str, batch: int) -> _Variants:
    m: Machine = stack.enter_context(Machine(asm("hlt", bits=64, org=0x100000), mode=mode, memory="2M"))
    translator, batch = Translator(m.vcpu, m.memory), max(1, batch // 10)

    def known() -> float:
        start = lib.pykvm_rdtsc()
        for _ in range(batch):
            translator.walk(0x100000)
        return float(lib.pykvm_rdtsc() - start) / batch

    def asked() -> float:
        start = lib.pykvm_rdtsc()
        for _ in range(batch):
            m.walk(0x100000)
        return float(lib.pykvm_rdtsc() - start) / batch

    return {"registers known": known, "registers asked for": asked}, m.vcpu.get_tsc_khz()
