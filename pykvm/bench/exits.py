"""What an exit costs: the same guest through a plain C loop, the native loop, the Python loop into a Python device, and, for
comparison, the loop one would first write with cffi.

The guest makes ``batch`` exits of one kind and then writes to a stop port; all loops run the same vCPU.
"""

from __future__ import annotations

from errno import EINTR

from pykvm.abi import ffi, lib
from pykvm.assemble import asm
from pykvm.bench.paired import Estimate, Interrupted, estimate, measure, paired
from pykvm.bus import Native
from pykvm.errors import KvmError
from pykvm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["KINDS", "Row", "bench_exits"]

STOP_PORT = 0xF4
PORT, GPA = 0x300, 0xD1000000
# kind -> one exit; EBX holds GPA, DX the port
KINDS = {
    "PIO out": "out dx, al",
    "PIO in": "in al, dx",
    "MMIO write": "mov [ebx], eax",
    "MMIO read": "mov eax, [ebx]",
}


class _Device:
    """A device of the usual shape: it keeps what is written and gives it back."""

    def __init__(self) -> None:
        self.value = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value

    def read(self, offset: int, size: int) -> int:
        return self.value


class Row:
    """One kind of exit: TSC units an exit for each loop, and the differences to C."""

    def __init__(self, kind: str, taken: dict[str, list[float]], tsc_khz: int) -> None:
        self.kind, self.tsc_khz = kind, tsc_khz
        self.c: Estimate = estimate(taken["C"])
        self.over_c = {name: paired(values, taken["C"]) for name, values in taken.items() if name != "C"}
        self.rounds = len(taken["C"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON; TSC units."""
        return {
            "kind": self.kind,
            "unit": "tsc",
            "tsc_khz": self.tsc_khz,
            "rounds": self.rounds,
            "c": self.c.as_dict(),
            "over_c": {name: e.as_dict() for name, e in self.over_c.items()},
        }


def _guest(kind: str, batch: int) -> bytes:
    return asm(
        f"again: mov ecx, {batch}; mov ebx, {GPA}; mov edx, {PORT}; 1: {KINDS[kind]}; dec ecx; jnz 1b; out {STOP_PORT}, al; jmp again",
        bits=32,
        org=0x100000,
    )


def bench_exits(
    kinds: list[str], batch: int = 2000, rounds: int = 40, progress: Callable[[str, int, int], None] | None = None
) -> list[Row]:
    """Measure each kind: ``rounds`` rounds of ``batch`` exits a loop. Ctrl-C raises Interrupted with the rows so far."""
    rows: list[Row] = []
    try:
        for kind in kinds:
            with Machine(_guest(kind, batch), mode="protected", memory="2M", loop="python") as machine:
                tick = None if progress is None else (lambda i, n, kind=kind: progress(kind, i, n))
                rows.append(_measure(machine, kind, batch, rounds, tick))
    except Interrupted as interrupt:
        raise Interrupted([*rows, interrupt.measured]) from None
    except KeyboardInterrupt:
        if not rows:
            raise
        raise Interrupted(rows) from None
    return rows


def _measure(machine: Machine, kind: str, batch: int, rounds: int, progress: Callable[[int, int], None] | None) -> Row:
    device = _Device()
    native = machine.vcpu.native
    machine.add_device(device, port=PORT, length=4, native=Native.constant(0))
    machine.add_device(device, gpa=GPA, length=4096, native=Native.constant(0))
    runner, rdtsc = machine.runner, lib.pykvm_rdtsc

    def loop(name: str) -> Callable[[], float]:
        def run() -> float:
            runner.loop = name
            start = rdtsc()
            runner.run()
            return float(rdtsc() - start) / batch

        return run

    def c() -> float:
        start = rdtsc()
        taken = lib.pykvm_bench_exits(native.fd, native.run, STOP_PORT)
        while taken == -EINTR:  # a signal: its handler, here, may raise; else the guest goes on from where it was
            taken = lib.pykvm_bench_exits(native.fd, native.run, STOP_PORT)
            if taken >= 0:
                taken = rdtsc() - start
        if taken < 0:
            raise KvmError("KVM_RUN", -taken, "in the plain C loop")
        return float(taken) / batch

    def naive() -> float:
        ioctl, fd, request, null = lib.pykvm_ioctl, native.fd, lib.KVM_RUN, ffi.NULL
        kvm_run, start = native.run, rdtsc()
        while True:
            ioctl(fd, request, null)
            if kvm_run.exit_reason == 2 and kvm_run.io.port == STOP_PORT:
                return float(rdtsc() - start) / batch

    variants = {"C": c, "native": loop("native"), "python": loop("python"), "naive cffi, no device": naive}
    khz = machine.vcpu.get_tsc_khz()
    try:
        return Row(kind, measure(variants, rounds, progress), khz)
    except Interrupted as interrupt:
        raise Interrupted(Row(kind, interrupt.measured, khz)) from None
