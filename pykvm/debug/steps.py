"""``pykvm trace --step``: every instruction, with the registers and the memory that it changed, and the exit it made, if any.

Run control (control.py) moves the vCPU; which memory an instruction writes is read off its operands before it runs, and what is there
is looked at before and after.
"""

from __future__ import annotations

from struct import Struct as Layout
from time import monotonic

from pykvm.abi import ffi
from pykvm.debug.reach import end_of, run_to
from pykvm.debug.trace import Event
from pykvm.debug.trace_text import Formatter, printable
from pykvm.records import RecordRing
from pykvm.x86.operation import Operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.abi import Struct
    from pykvm.debug.control import Control
    from pykvm.debug.tracer import Tracer
    from pykvm.debug.where import Locator, Place
    from pykvm.result import Result
    from pykvm.runner import Runner
    from pykvm.x86.view import CpuView

__all__ = ["Step", "run_steps"]

_SHOWN = 64  # bytes of one write that are shown
_LONGEST = 15
_KNOWN = 1 << 14  # decoded instructions that are kept
_REGS = Layout("18Q")  # struct kvm_regs

_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)))  # as in struct kvm_regs
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_FLAGS = ((1, "CF"), (4, "PF"), (16, "AF"), (64, "ZF"), (128, "SF"), (512, "IF"), (1024, "DF"), (2048, "OF"))


class Step:
    """One instruction that has run: ``place``, ``registers`` {name: (before, after)}, ``memory`` [(gva, before, after)], ``exit``."""

    __slots__ = ("cpu", "exit", "memory", "n", "place", "registers", "regs", "several")

    def __init__(self, n: int, cpu: int, place: Place, several: bool) -> None:
        self.n, self.cpu, self.place, self.several = n, cpu, place, several
        self.registers: dict[str, tuple[int, int]] = {}
        self.memory: list[tuple[int, bytes, bytes]] = []
        self.exit = ""
        self.regs: Any = None  # all of them, as they are after it

    def __str__(self) -> str:
        p = self.place
        where = f"{p.address:#010x}" if p.address is not None else "?"
        if p.symbol:
            where += f" <{printable(p.symbol)}>"
        changes = [_register_text(name, *values) for name, values in self.registers.items()]
        changes += [f"[{gva:#x}] {_memory_text(before, after)}" for gva, before, after in self.memory]
        if self.exit:
            changes.append(printable(self.exit))
        cpu = f" cpu{self.cpu}" if self.several else ""
        source = f"  {p.source}" if p.source else ""
        return f"{self.n:>6}{cpu}  {where:<24}  {p.insn or '?'!s:<32} ; {', '.join(changes)}{source}".rstrip(" ;")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        p = self.place
        return {
            "n": self.n,
            "vcpu": self.cpu,
            "insn_rip": p.address,
            "symbol": p.symbol or None,
            "source": p.source or None,
            "insn": None if p.insn is None else str(p.insn),
            "bytes": None if p.insn is None else p.insn.bytes.hex(),
            "registers": {name: {"before": before, "after": after} for name, (before, after) in self.registers.items()},
            "memory": [{"gva": gva, "before": before.hex(), "after": after.hex()} for gva, before, after in self.memory],
            "exit": self.exit or None,
        }


def _register_text(name: str, before: int, after: int) -> str:
    if name != "rflags":
        return f"{name} {before:#x} => {after:#x}"
    changed = [f"{'+' if after & bit else '-'}{flag}" for bit, flag in _FLAGS if (before ^ after) & bit]
    return " ".join(changed) or f"rflags {before:#x} => {after:#x}"


def _memory_text(before: bytes, after: bytes) -> str:
    if len(after) in (1, 2, 4, 8):
        return f"{int.from_bytes(before, 'little'):#x} => {int.from_bytes(after, 'little'):#x}"
    return f"{before[:_SHOWN].hex(' ')} => {after[:_SHOWN].hex(' ')}"


def run_steps(tracer: Tracer, timeout: float | None) -> Result:
    """The run that Tracer.run() makes with ``step``. The time limit is that of the whole run."""
    from pykvm.debug.control import Control

    machine = tracer.machine
    deadline = None if timeout is None else monotonic() + timeout
    control = Control(machine)
    if tracer.begin_address is not None:
        reason = run_to(machine, tracer.begin_address, timeout, control)
        if reason != "breakpoint":
            return machine.result(reason)
    rings = [_Ring(runner) for runner in machine.runners]
    views = [control.view(cpu) for cpu in range(machine.cpus)]
    formatter, decoder = Formatter(tracer.capture, tracer.locator), _Decoder(tracer.locator)
    try:
        while True:
            for cpu in control._started():
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    return _timed_out(tracer)
                before = views[cpu]
                if before.rip == tracer.until_address:
                    return machine.result("until")
                stopped, step, event = _one(tracer, control, decoder, cpu, before, rings[cpu], left)
                views[cpu] = control.view(cpu)
                _finish(step, before, views[cpu], formatter, event)
                if stopped.reason == "timeout":
                    return _timed_out(tracer)
                tracer.take_step(step, event)
                if tracer.stopped:
                    return machine.result("until")
                if stopped.reason != "step":
                    return end_of(machine, stopped)
    finally:
        for ring in rings:
            ring.undo()
        control.detach()


def _timed_out(tracer: Tracer) -> Result:
    from pykvm.debug.explain import explain_stop
    from pykvm.runner import Stop

    result = tracer.machine.result("timeout")
    result.explanation = explain_stop(tracer.machine, Stop("timeout"))
    return result


class _Decoder:
    """Instructions with their places, each decoded once: guests run the same ones again and again."""

    def __init__(self, locator: Locator) -> None:
        self._locator = locator
        self._known: dict[tuple[int, int, bytes], tuple[Place, Operation | None]] = {}

    def here(self, view: CpuView) -> tuple[Place, Operation | None]:
        """The one at RIP, by address and bytes: guests write code too."""
        code = view.read(view.rip, _LONGEST)
        found = self._known.get(key := (view.rip, view.bits, code))
        if found is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            found = self._known[key] = self._locator.at(view, view.rip), Operation.here(view, code=code)
        place, operation = found
        return place, None if operation is None else operation.on(view)


def _one(
    tracer: Tracer, control: Control, decoder: _Decoder, cpu: int, before: CpuView, ring: _Ring, left: float | None
) -> tuple[Any, Step, Event | None]:
    """Step one vCPU; the memory it may write is noted before."""
    place, operation = decoder.here(before)
    tracer.seen += 1
    step = Step(tracer.seen, cpu, place, tracer.machine.cpus > 1)
    touched = [] if operation is None else [(a.linear, min(a.size, _SHOWN)) for a in operation.accesses() if a.write]
    targets = [(gva, before.read(gva, size), size) for gva, size in touched]
    stopped = control.step(cpu, left)
    step.memory = [(gva, was, b"") for gva, was, _ in targets]
    return stopped, step, ring.take(stopped.by_planted_out)


def _finish(step: Step, before: CpuView, after: CpuView, formatter: Formatter, event: Event | None) -> None:
    """What has changed."""
    step.regs = after.regs
    values = zip((*_GENERAL, "rip", "rflags"), _REGS.unpack(before.regs.to_bytes()), _REGS.unpack(after.regs.to_bytes()), strict=True)
    for name, was, now in values:
        if name == "rflags":  # RF and TF are the debugger's
            was, now = was & ~0x10100, now & ~0x10100
        if was != now and name != "rip":
            step.registers[name] = (was, now)
    if before.sregs != after.sregs:
        step.registers.update(_of_the_system(before.sregs, after.sregs))
    changed = [(gva, was, after.read(gva, len(was))) for gva, was, _ in step.memory if was]
    step.memory = [(gva, was, now) for gva, was, now in changed if now]
    if event is not None:
        if not event.is_write and event.is_pio:
            event.value = int(after.regs.rax) & (1 << 8 * event.size) - 1
        formatter.names.see(event)
        known = event.is_write or event.is_pio or not event.size
        step.exit = formatter.what(event) if known else f"{formatter.names.describe(event)} -> (read)"


def _of_the_system(before: Struct, after: Struct) -> dict[str, tuple[int, int]]:
    """Control registers and selectors that have changed."""
    values = {name: (int(getattr(before, name)), int(getattr(after, name))) for name in _CONTROL}
    values |= {name: (int(getattr(before, name).selector), int(getattr(after, name).selector)) for name in _SEGMENTS}
    return {name: (was, now) for name, (was, now) in values.items() if was != now}


class _Ring:
    """Records of what a step's instruction did, apart from those of anyone else."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.before = runner, runner.ring
        self.ring = runner.ring = RecordRing(16)
        runner.vcpu.want_sync_regs()
        runner.vcpu.lent = None
        runner.sync_table()

    def take(self, by_planted_out: bool) -> Event | None:
        """The access or other exit that the last step made, besides the debugger's own: the last one, when a planted OUT
        has ended the step."""
        size = ffi.sizeof("struct pykvm_record")
        records = ffi.buffer(self.ring.cdata.data, size * self.ring.cdata.used)[:]
        self.ring.cdata.used = 0
        vcpu = self.runner.vcpu
        for at in range(0, len(records) - size * by_planted_out, size):
            event = Event(0, records[at : at + size], b"", vcpu)
            if event.reason not in (4, 10):
                return event
        return None

    def undo(self) -> None:
        """As it was."""
        self.runner.ring = self.before
        self.runner.vcpu.lent = None
