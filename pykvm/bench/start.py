"""What starting costs: a VM from creation to its first exit and gone again, in-process and as a whole process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time

from pykvm.abi import ffi, lib
from pykvm.assemble import asm
from pykvm.bench.paired import Estimate, Interrupted, estimate, measure, ratio
from pykvm.errors import KvmError
from pykvm.exits import Hlt
from pykvm.machine import Machine
from pykvm.memory import GuestMemory
from pykvm.system import System

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Comparison", "bench_in_process", "bench_phases", "bench_whole_process"]

_CODE = b"\xf4"  # hlt
_MEMORY = 1 << 20
_GREETING = "Hello from long mode.\n"
_QEMU = [
    "qemu-system-x86_64", "-M", "microvm,accel=kvm", "-display", "none", "-nodefaults", "-serial", "stdio", "-no-reboot",
    "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
]  # fmt: skip
# 64 KiB, the last 16 bytes at the reset vector: print the greeting on COM1, then the debug exit.
_QEMU_ROM = """
        mov dx, 0x3f8
        mov si, offset text
        mov ax, cs
        mov ds, ax
        cld
next:   lodsb
        test al, al
        jz done
        out dx, al
        jmp next
done:   out 0xf4, al
        hlt
text:   .asciz "Hello from long mode.\\n"
        .org 0xfff0
        jmp 0
        .org 0xffff
        .byte 0
"""


class Comparison:
    """Variants beside a base: medians in milliseconds, ratios to the base."""

    def __init__(self, title: str, base: str, taken: dict[str, list[float]], to_ms: float) -> None:
        self.title, self.base = title, base
        self.ms: dict[str, Estimate] = {name: estimate(values).scaled(to_ms) for name, values in taken.items()}
        self.ratio: dict[str, Estimate] = {n: ratio(values, taken[base]) for n, values in taken.items() if n != base}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "base": self.base,
            "ms": {name: e.as_dict() for name, e in self.ms.items()},
            "ratio": {name: e.as_dict() for name, e in self.ratio.items()},
        }


class Alive:
    """A VM of the library's bare objects that has run to its first exit; ``marks``: TSC since the start when the VM, the vCPU with its
    memory and registers, and the first exit were there."""

    def __init__(self, system: System) -> None:
        rdtsc = lib.pykvm_rdtsc
        start = rdtsc()
        self.vm = system.create_vm()
        created = rdtsc()
        self.ram = GuestMemory.of_size(_MEMORY)
        self.vm.add_memory(self.ram)
        self.ram.write(0x1000, _CODE)
        self.vcpu = vcpu = self.vm.create_vcpu()
        sregs = vcpu.get_sregs()
        cs = sregs.cs
        cs.base = cs.selector = 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rflags = 0x1000, 2
        vcpu.set_regs(regs)
        ready = rdtsc()
        exit = vcpu.run()
        self.marks = (created - start, ready - start, rdtsc() - start)
        assert isinstance(exit, Hlt)

    def close(self) -> None:
        """Close it all."""
        self.vm.close()
        self.ram.close()


class AliveInC:
    """The same ioctls made by C."""

    def __init__(self, system: System) -> None:
        self._run_size = system.get_vcpu_mmap_size()
        self._handles = ffi.new("uint64_t[7]")
        taken = lib.pykvm_bench_alive(system.fd, self._run_size, _CODE, len(_CODE), _MEMORY, self._handles)
        if taken < 0:
            raise KvmError("starting a VM", -taken, "in plain C")
        self.marks = tuple(self._handles[4:7])

    def close(self) -> None:
        """Close it all."""
        lib.pykvm_bench_gone(self._run_size, _MEMORY, self._handles)


def bench_in_process(rounds: int = 200, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """VM, 1 MiB of RAM, vCPU, real mode, HLT, closed: bare objects and a whole Machine, beside C making the bare objects' ioctls."""
    rdtsc = lib.pykvm_rdtsc
    with System() as system:
        size = system.get_vcpu_mmap_size()

        def c() -> float:
            taken = lib.pykvm_bench_start(system.fd, size, _CODE, len(_CODE), _MEMORY)
            if taken < 0:
                raise KvmError("starting a VM", -taken, "in plain C")
            return float(taken)

        def bare() -> float:
            start = rdtsc()
            Alive(system).close()
            return float(rdtsc() - start)

        def machine() -> float:
            start = rdtsc()
            with Machine("halt", system=system, memory=_MEMORY) as m:
                m.run()
            return float(rdtsc() - start)

        variants = {"C": c, "bare objects": bare, "Machine": machine}
        return _compare("create VM, run to the first exit, close", "C", variants, rounds, progress, 1 / _tsc_khz(system))


def _tsc_khz(system: System) -> int:
    with system.create_vm() as vm:
        return vm.create_vcpu().get_tsc_khz()


def bench_phases(rounds: int = 40, progress: Callable[[int, int], None] | None = None) -> list[Comparison]:
    """The same one step at a time: create the VM; memory, vCPU and registers; run to the first exit; close."""
    rdtsc = lib.pykvm_rdtsc
    titles = ("  create a VM", "  memory, vCPU, registers", "  run to the first exit", "  close")
    taken: list[dict[str, list[float]]] = [{"C": [], "bare objects": []} for _ in titles]
    with System() as system:
        khz = _tsc_khz(system)
        kinds: dict[str, Callable[[System], Alive | AliveInC]] = {"C": AliveInC, "bare objects": Alive}

        def once(name: str) -> Callable[[], float]:
            def run() -> float:
                alive = kinds[name](system)
                start = rdtsc()
                alive.close()
                created, ready, ran = alive.marks
                for phase, value in zip(taken, (created, ready - created, ran - ready, rdtsc() - start), strict=True):
                    phase[name].append(float(value))
                return 0.0

            return run

        interrupted = False
        try:
            measure({name: once(name) for name in kinds}, rounds, progress)
        except Interrupted:
            interrupted = True
    whole = min(len(values) for phase in taken for values in phase.values())
    phases = [
        Comparison(title, "C", {name: values[1:whole] for name, values in phase.items()}, 1 / khz)
        for title, phase in zip(titles, taken, strict=True)
    ]
    if interrupted:
        raise Interrupted(phases)
    return phases


def _compare(
    title: str, base: str, variants: dict[str, Callable[[], float]], rounds: int, progress: Callable[[int, int], None] | None, to_ms: float
) -> Comparison:
    try:
        return Comparison(title, base, measure(variants, rounds, progress), to_ms)
    except Interrupted as interrupt:
        raise Interrupted(Comparison(title, base, interrupt.measured, to_ms)) from None


def bench_whole_process(rounds: int = 30, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """`pykvm run hello` from fork to exit, beside `python -c pass` of the same interpreter.

    Where QEMU is installed, also beside its smallest machine printing the same text from a ROM, on the same /dev/kvm.
    """

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # compiled once, not each time

    def process(*command: str) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            null = subprocess.DEVNULL
            subprocess.run(command, stdout=null, stderr=null, stdin=null, env=environment, check=False)
            return time.perf_counter() - start

        return run

    python = sys.executable
    variants = {
        "python -c pass": process(python, "-c", "pass"),
        "pykvm run hello": process(python, "-c", "from pykvm.cli import leave, main; leave(main(['run', 'hello']))"),
    }
    with tempfile.TemporaryDirectory(prefix="pykvm-bench-") as folder:
        if shutil.which(_QEMU[0]):
            rom = os.path.join(folder, "rom.bin")
            with open(rom, "wb") as file:
                file.write(asm(_QEMU_ROM, bits=16))
            done = subprocess.run([*_QEMU, "-bios", rom], capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
            if done.stdout.decode() == _GREETING:  # else it does not run here, and its time would mean nothing
                variants["qemu -M microvm"] = process(*_QEMU, "-bios", rom)
        return _compare("a whole process", "python -c pass", variants, rounds, progress, 1e3)
