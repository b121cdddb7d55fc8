"""What saved states cost, beside C that makes the same ioctls, mmaps and copies and nothing else: restore, fork, reset, save.

The guest counts in eight pages of its own and exits, again and again, at CPL3 (user mode); its vCPU has no irqchip.
"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from time import perf_counter

from pykvm.abi import ffi, lib
from pykvm.assemble import asm
from pykvm.bench.paired import Interrupted, measure
from pykvm.bench.start import Comparison
from pykvm.errors import ConfigError, KvmError
from pykvm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["bench_saved"]

PAGES = 8
_FIRST = 0x200000
_TIMEOUT = 60.0
_BATCH = 100  # resets at a time: one is shorter than what else a machine does now and then
_CODE = f"""
1:  mov edi, {_FIRST}
    mov ecx, {PAGES}
2:  inc dword ptr [rdi]
    add edi, 4096
    dec ecx
    jnz 2b
    out 0xf4, al
    jmp 1b
"""


def bench_saved(rounds: int, restored: int, saved: int, progress: Callable[[str, int, int], None] | None = None) -> list[Comparison]:
    """A comparison for each; ``restored``: bytes of the guest that is restored and forked, ``saved``: non-zero bytes of the one that is
    saved. Raises Interrupted with those that are complete."""
    done: list[Comparison] = []
    try:
        for name, bench, size in (("restore", _restore, restored), ("fork", _fork, restored), ("reset", _reset, 0), ("save", _save, saved)):
            done.append(bench(size, rounds, None if progress is None else lambda i, n, name=name: progress(name, i, n)))  # type: ignore[misc]
    except KeyboardInterrupt as interrupt:
        raise Interrupted(done) from interrupt
    return done


def _machine(size: int) -> Machine:
    """At its second exit: the first has warmed what paging marks."""
    machine = Machine(asm(_CODE, bits=64), mode="user", memory=max(size, 16 << 20))
    _exit(machine)
    _exit(machine)
    return machine


def _exit(machine: Machine) -> None:
    if machine.group.run(_TIMEOUT).reason != "exit":
        raise ConfigError("the benchmark's guest did not exit")


def _check(error: int, what: str) -> None:
    if error < 0:
        raise KvmError(what, -error, "in plain C")


class _InC:
    """VMs made by C; close() is not part of what is measured."""

    def __init__(self, machine: Machine) -> None:
        self.checkpoint = machine.checkpoint()  # which has the registers as C wants them
        self.vcpu = self.checkpoint._native.vcpu
        asked = machine.vcpu.asked
        assert asked is not None
        self.cpuid = asked.cdata
        self.kvm, self.run_size, self.size = machine.system.fd, machine.system.run_size, machine.memory.size
        self.handles = ffi.new("uint64_t[7]")

    def close(self) -> None:
        lib.pykvm_bench_gone(self.run_size, self.size, self.handles)


def _restore(size: int, rounds: int, progress: Callable[[int, int], None] | None) -> Comparison:
    with TemporaryDirectory(prefix="pykvm-bench-") as place, _machine(size) as machine:
        directory = os.path.join(place, "snap")
        machine.snapshot(directory)
        memory = os.fsencode(os.path.join(directory, "memory-0"))
        c = _InC(machine)

        def in_python() -> float:
            start = perf_counter()
            restored = Machine.restore(directory, verify=False, system=machine.system)  # C has its /dev/kvm open too
            _exit(restored)
            took = perf_counter() - start
            restored.close()
            return took

        def in_c() -> float:
            start = perf_counter()
            _check(lib.pykvm_bench_restore(c.kvm, memory, c.size, c.vcpu, c.cpuid, c.run_size, c.handles), "restoring")
            took = perf_counter() - start
            c.close()
            return took

        taken = measure({"C": in_c, "pykvm": in_python}, rounds, progress)
    return Comparison(f"restore {size >> 20} MiB, to the next exit", "C", taken, 1e3)


def _fork(size: int, rounds: int, progress: Callable[[int, int], None] | None) -> Comparison:
    """After the parent has run: what it shares is made anew each time."""
    with _machine(size) as machine, _machine(size) as other:
        c = _InC(other)
        slot = other.memory.slots[0]

        def in_python() -> float:
            _exit(machine)
            start = perf_counter()
            clone = machine.fork()
            took = perf_counter() - start
            clone.close()
            return took

        origin = lib.PYKVM_ANONYMOUS

        def in_c() -> float:
            nonlocal origin
            _exit(other)
            start = perf_counter()
            _check(lib.pykvm_bench_fork(c.kvm, slot.hva, slot.size, origin, c.vcpu, c.cpuid, c.run_size, c.handles), "forking")
            took = perf_counter() - start
            if origin >= 0:
                os.close(origin)
            origin = c.handles[4]
            c.close()
            return took

        taken = measure({"C": in_c, "pykvm": in_python}, rounds, progress)
    return Comparison(f"fork of {size >> 20} MiB", "C", taken, 1e3)


def _reset(_: int, rounds: int, progress: Callable[[int, int], None] | None) -> Comparison:
    with _machine(0) as machine, _machine(0) as other:
        native = machine.checkpoint()._native
        other.checkpoint()
        khz = machine.vcpu.get_tsc_khz()
        run, reset = other.group.run, other.reset

        def in_python() -> float:
            start = lib.pykvm_rdtsc()
            for _ in range(_BATCH):
                run()
                reset()
            return (lib.pykvm_rdtsc() - start) / _BATCH / khz  # type: ignore[no-any-return]

        def in_c() -> float:
            took = lib.pykvm_bench_resets(native, _BATCH)
            _check(took, "resetting")
            return took / _BATCH / khz  # type: ignore[no-any-return]

        taken = measure({"C": in_c, "pykvm": in_python}, rounds, progress)
    return Comparison(f"run to the next exit, and reset with {PAGES} dirty pages", "C", taken, 1.0)


def _save(size: int, rounds: int, progress: Callable[[int, int], None] | None) -> Comparison:
    with TemporaryDirectory(prefix="pykvm-bench-") as place, _machine(size) as machine:
        slot = machine.memory.slots[0]
        pattern = bytes(range(1, 256)) * 257 + b"\1"
        for gpa in range(4 << 20, slot.size, len(pattern)):
            machine.memory.write(gpa, pattern[: slot.size - gpa])
        sums = ffi.new("uint32_t[]", slot.size // lib.PYKVM_CHUNK + 1)
        target, plain = os.path.join(place, "snap"), os.path.join(place, "plain")

        def in_python() -> float:
            start = perf_counter()
            machine.snapshot(target)
            return perf_counter() - start

        def in_c() -> float:
            start = perf_counter()
            _check(lib.pykvm_bench_save(os.fsencode(plain), ffi.cast("uint8_t *", slot.hva), slot.size, sums), "saving")
            return perf_counter() - start

        taken = measure({"C": in_c, "pykvm": in_python}, rounds, progress)
    return Comparison(f"save {size >> 20} MiB that are not zero, with fsync", "C", taken, 1e3)
