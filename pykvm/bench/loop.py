"""Throughput over one to several vCPUs, each on a host CPU of its own: guests that compute at CPL3, and guests that do nothing but exit.

A VM without an irqchip, whose vCPUs all start at once; each runs for the same time, and what all have done together is counted. One
vCPU and several take turns, so that a machine which slows down slows both.
"""

from __future__ import annotations

import os
from time import monotonic

from pykvm.assemble import asm
from pykvm.bench.paired import Estimate, Interrupted, estimate, measure, ratio
from pykvm.bus import Bus, Native
from pykvm.memory import GuestMemory
from pykvm.runner import Runner
from pykvm.smp import DeviceLock, VcpuGroup
from pykvm.system import System
from pykvm.x86.modes import mode_named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["KINDS", "LoopRow", "bench_loop"]

PORT = 0x300
COUNTERS = 0x180000  # a cache line apart
# kind -> (mode, loop, code); RDI holds the vCPU's counter
KINDS = {
    "computing at CPL3": ("user", "native", "1: mov ecx, 10000; 2: dec ecx; jnz 2b; inc qword ptr [rdi]; jmp 1b"),
    "exits, native loop": ("protected", "native", f"mov edx, {PORT}; 1: out dx, al; inc dword ptr [edi]; jmp 1b"),
    "exits, Python loop": ("protected", "python", f"mov edx, {PORT}; 1: out dx, al; inc dword ptr [edi]; jmp 1b"),
}


class _Device:
    def __init__(self) -> None:
        self.value = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


class LoopRow:
    """One kind: how much one vCPU does in a second, and how many times as much several do."""

    def __init__(self, kind: str, taken: dict[str, list[float]]) -> None:
        self.kind = kind
        self.one: Estimate = estimate(taken["1"])
        self.ratios: dict[int, Estimate] = {int(n): ratio(values, taken["1"]) for n, values in taken.items() if n != "1"}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: loops a second of one vCPU, and ratios by number of vCPUs."""
        return {
            "kind": self.kind,
            "one_per_second": self.one.as_dict(),
            "ratios": {str(n): e.as_dict() for n, e in self.ratios.items()},
        }


def bench_loop(
    cpus: int | None = None, seconds: float = 0.2, rounds: int = 10, progress: Callable[[str, int, int], None] | None = None
) -> list[LoopRow]:
    """Each kind with 1 and 2 ... ``cpus`` vCPUs (the host's CPUs that this process may use), ``seconds`` each in each round.

    Ctrl-C raises Interrupted with the rows so far.
    """
    most = cpus or len(os.sched_getaffinity(0))
    rows: list[LoopRow] = []
    with System() as system:
        for kind, (mode, loop, source) in KINDS.items():
            tick = None if progress is None else (lambda i, n, kind=kind: progress(kind, i, n))
            variants = {str(n): _throughput(system, n, mode, loop, source, seconds) for n in range(1, most + 1)}
            try:
                rows.append(LoopRow(kind, measure(variants, rounds, tick)))
            except Interrupted as interrupt:
                raise Interrupted([*rows, LoopRow(kind, interrupt.measured)]) from None
            except KeyboardInterrupt:
                if not rows:
                    raise
                raise Interrupted(rows) from None
    return rows


def _throughput(system: System, cpus: int, mode: str, loop: str, source: str, seconds: float) -> Callable[[], float]:
    """A function that runs so many vCPUs once and gives what they do in a second, all together."""
    code = asm(source, bits=64 if mode == "user" else 32, org=0x100000)

    def run() -> float:
        with GuestMemory.of_size("2M") as ram, system.create_vm() as vm:
            vm.add_memory(ram)
            ram.write(0x100000, code)
            bus = Bus()
            bus.pio.add(PORT, 1, _Device(), native=Native.constant(0))
            lock = DeviceLock() if cpus > 1 else None
            runners = []
            for i in range(cpus):
                vcpu = vm.create_vcpu()
                vcpu.set_cpuid2(system.get_supported_cpuid().as_guest())
                mode_named(mode).apply(vcpu, ram, 0x100000, {"rdi": COUNTERS + 64 * i})
                runners.append(Runner(vcpu, bus, loop, lock=lock))
            bus.on_change = None
            start = monotonic()
            VcpuGroup(runners, pin=True).run(seconds)
            elapsed = monotonic() - start
            return sum(ram.read_u64(COUNTERS + 64 * i) for i in range(cpus)) / elapsed

    return run
