"""What exits cost: for each kind the same guest through plain C, the native loop, the Python loop into a Python device, and, for plain
accesses, the loop one would first write with cffi; and what the guest's own clock says.

A batch is many exits in one run, timed from outside. A sample is one exit, timed by the guest with RDTSC, less the least that an empty pair
of RDTSCs takes. Kinds take turns: each is measured in several blocks of rounds, spread over the whole time, so that an interval has in it
how the machine changes. Within a round all loops run, in turn first, so that differences are of the same few milliseconds.
"""

from __future__ import annotations

import os
from array import array
from errno import EINTR

from pykvm import exits
from pykvm.abi import lib
from pykvm.bench.kind import BATCH, EMPTY, MAX_SAMPLES, SAMPLE_GPA, SAMPLES, TOUCHES, Kind
from pykvm.bench.paired import Estimate, Interrupted, estimate, measure, median, paired
from pykvm.bench.setup import NAIVE, Bank, Prepared, why_not
from pykvm.bench.stats import quantile, quantiles
from pykvm.errors import KvmError
from pykvm.runner import HEARTBEAT
from pykvm.system import System

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Guest", "Row", "bench_exits"]

BLOCKS = 4  # in which the rounds of a kind are measured
MOST_SAMPLES = 250  # of one loop in one round
ATTEMPTS = 5
LONG_BATCH = 10_000  # C notices a signal only while it is in the guest: in a batch that takes this long a timer sees to it
BOUNDARY = "boundary"


class Guest:
    """What the guest's clock says of one kind through one loop: TSC units of one exit, the overhead taken off."""

    def __init__(self, medians: list[float], samples: list[int], overhead: int) -> None:
        self.overhead = overhead
        self.medians = [value - overhead for value in medians]  # of each round
        self.median: Estimate = estimate(self.medians)
        self.quantiles = [value - overhead for value in quantiles(samples)]
        self.p99 = quantile(self.quantiles, 0.99)
        self.count = len(samples)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.median.as_dict(), "p99": self.p99, "samples": self.count, "overhead": self.overhead, "quantiles": self.quantiles}


class Row:
    """One kind. TSC units an exit (of REP, an instruction); ``unavailable`` says why nothing was measured."""

    def __init__(self, kind: Kind, tsc_khz: int, unavailable: str | None = None) -> None:
        self.of, self.kind, self.tsc_khz, self.unavailable = kind, kind.name, tsc_khz, unavailable
        self.values: dict[str, list[float]] = {}  # loop -> one value a round
        self.samples: dict[str, list[int]] = {}  # loop -> the guest's, not yet less the overhead
        self.overhead: int | None = None
        self.exits_each = 1.0  # exits that one instruction makes

    @property
    def rounds(self) -> int:
        """How many were complete."""
        return min((len(values) for values in self.values.values()), default=0)

    @property
    def c(self) -> Estimate | None:
        """Through the plain C loop."""
        return estimate(self.values["C"]) if self.values.get("C") else None

    @property
    def over_c(self) -> dict[str, Estimate]:
        """What each other loop takes more than C."""
        return {name: paired(self.values[name], self.values["C"]) for name in ("native", "python", NAIVE) if self.values.get(name)}

    @property
    def guest(self) -> dict[str, Guest]:
        """By the guest's clock, for each loop; "kernel" where nothing reaches user space."""
        return {
            name: Guest(self.values[f"guest {name}"], samples, self.overhead or 0)
            for name, samples in self.samples.items()
            if self.values.get(f"guest {name}")
        }

    @property
    def decomposition(self) -> dict[str, Estimate]:
        """Where the time of an exit goes: hardware and KVM, the boundary of the ioctl, what the native loop and what Python add."""
        if not self.values.get("C") or not self.values.get(BOUNDARY):
            return {}
        boundary = [value * self.exits_each for value in self.values[BOUNDARY]]
        parts = {"hardware and KVM": paired(self.values["C"], boundary), "ioctl boundary": estimate(boundary)}
        if self.values.get("native"):
            parts["native loop"] = paired(self.values["native"], self.values["C"])
        if self.values.get("python"):
            parts["Python"] = paired(self.values["python"], self.values["C"])
        return parts

    def as_dict(self) -> dict[str, Any]:
        """For JSON; TSC units."""
        about = {
            "kind": self.kind,
            "mode": self.of.mode,
            "reaches": self.of.reaches,
            "note": self.of.note,
            "unit": "tsc",
            "tsc_khz": self.tsc_khz,
        }
        if self.unavailable is not None:
            return {**about, "unavailable": self.unavailable}
        c = self.c
        return {
            **about,
            "rounds": self.rounds,
            "exits_each": self.exits_each,
            "c": None if c is None else c.as_dict(),
            "over_c": {name: e.as_dict() for name, e in self.over_c.items()},
            "decomposition": {name: e.as_dict() for name, e in self.decomposition.items()},
            "guest": {name: g.as_dict() for name, g in self.guest.items()},
            "values": {
                name: [value - (self.overhead or 0) for value in values] if name.startswith("guest ") else values
                for name, values in self.values.items()
            },
        }


class _Measured:
    """A kind's machine, and the functions that measure it."""

    def __init__(self, ready: Prepared, row: Row, batch: int) -> None:
        self.ready, self.row, self.kind = ready, row, ready.kind
        share = self.kind.weight * self.kind.cost
        self.batch = max(1, batch // share)
        self.count = max(1, min(batch, MOST_SAMPLES) // share)
        if ready.slot is not None:
            self.count = min(self.count, TOUCHES)
        self.count = min(self.count, MAX_SAMPLES)

    def variants(self) -> dict[str, Callable[[], float]]:
        kind = self.kind
        run: dict[str, Callable[[], float]] = {}
        if kind.reaches == "guest":
            return {"guest kernel": self._guest("kernel", self._run_group if kind.cpus > 1 else self._run_c)}
        run["C"] = self._timed(self._run_c)
        if kind.reaches == "bare":
            run["python"] = self._timed(self._run_bare)
        else:
            run["native"] = self._timed(self._run_loop("native"))
            run["python"] = self._timed(self._run_loop("python"))
            if not kind.device and kind.mode == "protected" and kind.weight == 1:
                run[NAIVE] = self._timed(self.ready.naive)
        run[BOUNDARY] = _undisturbed(self._boundary)
        if kind.clocked:
            run["guest C"] = self._guest("C", self._run_c)
            if kind.reaches == "loops":
                run["guest native"] = self._guest("native", self._run_loop("native"))
                run["guest python"] = self._guest("python", self._run_loop("python"))
        return run

    def overhead(self) -> None:
        """The least that an empty pair of RDTSCs takes; the fewest over all blocks count."""
        if not self.kind.clocked:
            return
        self.ready.command(EMPTY, 64)
        (self._run_group if self.kind.cpus > 1 else self._run_c)()
        least = min(self._stored(64))
        self.row.overhead = least if self.row.overhead is None else min(least, self.row.overhead)

    # --- one run each -------------------------------------------------------------------------------------------------

    def _timed(self, run: Callable[[], object]) -> Callable[[], float]:
        rdtsc, ready, batch = lib.pykvm_rdtsc, self.ready, self.batch
        counts = ready.vcpu.native.counts
        counting = self.kind.weight > 1 or bool(ready.ring)

        def timed() -> float:
            ready.command(BATCH, batch)
            before = sum(counts) if counting else 0
            start = rdtsc()
            run()
            taken = float(rdtsc() - start) / batch
            if counting and sum(counts) > before:  # not through C, which counts nothing
                self.row.exits_each = (sum(counts) - before) / batch
            return taken

        return _undisturbed(timed)

    def _guest(self, name: str, run: Callable[[], object]) -> Callable[[], float]:
        samples = self.row.samples.setdefault(name, [])

        def guest() -> float:
            self.ready.cool()
            self.ready.command(SAMPLES, self.count)
            run()
            taken = self._stored(self.count)
            samples.extend(taken)
            return median(taken)

        return guest

    def _stored(self, count: int) -> array[int]:
        values = array("I")
        values.frombytes(self.ready.machine.memory.read(SAMPLE_GPA, 4 * count))
        return values

    def _run_c(self) -> None:
        taken, vcpu, long = -EINTR, self.ready.vcpu, self.batch > LONG_BATCH
        if long:
            vcpu.begin(HEARTBEAT, HEARTBEAT)
        try:
            while taken == -EINTR:  # a signal: its handler, here, may raise; else the guest goes on from where it was
                taken = self.ready.c(self.batch)
        finally:
            if long:
                lib.pykvm_end(vcpu.native)
        if taken < 0:
            raise KvmError("KVM_RUN", -taken, f"in the plain C loop, at exit {self.ready.run_area.exit_reason}")

    def _run_loop(self, name: str) -> Callable[[], None]:
        runner = self.ready.machine.runner

        def run() -> None:
            runner.loop = name
            stop = runner.run()
            if stop.reason != "exit":
                raise KvmError("KVM_RUN", 5, f"the guest of {self.kind.name!r} ended as {stop!r}")

        return run

    def _run_group(self) -> None:
        stop = self.ready.machine.group.run()
        if stop.reason != "exit":
            raise KvmError("KVM_RUN", 5, f"the guest of {self.kind.name!r} ended as {stop!r}")

    def _run_bare(self) -> None:
        """VCPU.run(), a typed exit each time."""
        ready, run, area, skip = self.ready, self.ready.vcpu.run, self.ready.run_area, self.ready.skip
        left = self.batch if self.kind.limit else -1
        window, kick = self.kind.device == "window", ready.vcpu.kick if self.kind.device == "kick" else None
        area.request_interrupt_window = window
        while left:
            if kick is not None:
                kick()
                run()
                left -= 1
                continue
            exit = run()
            if isinstance(exit, exits.Intr):
                continue
            if isinstance(exit, exits.IoOut):
                break
            if skip:
                ready.go_on()
            left -= 1
        if window:
            area.request_interrupt_window = 0
        ready.command(BATCH, self.batch)

    def _boundary(self) -> float:
        native = self.ready.vcpu.native
        taken = lib.pykvm_bench_boundary(native.fd, native.run, self.count)
        if taken < 0:
            raise KvmError("KVM_RUN", -taken, "with immediate_exit, which has to give EINTR")
        return float(taken) / self.count


def _undisturbed(measure_once: Callable[[], float]) -> Callable[[], float]:
    """The same, done again, up to ATTEMPTS times, if the kernel has let another process run meanwhile."""
    from resource import RUSAGE_THREAD, getrusage

    def again() -> float:
        for _ in range(ATTEMPTS):
            before = getrusage(RUSAGE_THREAD).ru_nivcsw
            taken = measure_once()
            if getrusage(RUSAGE_THREAD).ru_nivcsw == before:
                break
        return taken

    return again


def bench_exits(
    kinds: list[Kind],
    batch: int = 250,
    rounds: int = 48,
    progress: Callable[[str, int, int], None] | None = None,
    on_block: Callable[[], object] | None = None,
) -> list[Row]:
    """Measure each kind: ``rounds`` rounds of ``batch`` exits a loop. ``on_block`` is called now and then, between two measurements.

    Ctrl-C raises Interrupted with the rows so far.
    """
    rows: list[Row] = []
    open_machines: list[Prepared] = []
    everywhere = os.sched_getaffinity(0)
    try:
        with System() as system:
            work = _prepare(kinds, batch, system, rows, open_machines)
            blocks = max(1, min(BLOCKS, rounds // 4))
            sizes = [rounds // blocks + (i < rounds % blocks) for i in range(blocks)]
            done, total = 0, len(work) * (rounds + blocks)

            def tick(name: str) -> Callable[[int, int], None]:
                def one(i: int, n: int) -> None:
                    nonlocal done
                    done += 1
                    if progress is not None:
                        progress(name, done, total)

                return one

            for size in sizes:
                for measured in work:
                    os.sched_setaffinity(0, everywhere if measured.kind.cpus > 1 else {max(everywhere)})
                    measured.overhead()
                    _block(measured, size, tick(measured.kind.name))
                if on_block is not None:
                    on_block()
    except KeyboardInterrupt:
        rows = [row for row in rows if row.rounds or row.unavailable]
        if not any(row.rounds for row in rows):
            raise
        raise Interrupted(rows) from None
    finally:
        os.sched_setaffinity(0, everywhere)
        for ready in open_machines:
            ready.close()
    return rows


def _prepare(kinds: list[Kind], batch: int, system: System, rows: list[Row], open_machines: list[Prepared]) -> list[_Measured]:
    """A machine for each kind that this host can produce; a row for all."""
    guests, work = Bank(), []
    with system.create_vm() as vm:
        khz = vm.create_vcpu().get_tsc_khz()
    for kind in kinds:
        row = Row(kind, khz)
        rows.append(row)
        row.unavailable = why_not(kind, system)
        if row.unavailable is not None:
            continue
        try:
            ready = Prepared(kind, guests, system)
        except KvmError as error:
            row.unavailable = f"its machine cannot be made: {error}"
            continue
        open_machines.append(ready)
        row.unavailable = ready.trial()
        if row.unavailable is None:
            work.append(_Measured(ready, row, batch))
        else:
            open_machines.pop().close()
    return work


def _block(measured: _Measured, rounds: int, tick: Callable[[int, int], None]) -> None:
    """Some rounds of one kind; what Ctrl-C leaves of them is kept."""

    def keep(taken: dict[str, list[float]]) -> None:
        for name, values in taken.items():
            measured.row.values.setdefault(name, []).extend(values)

    try:
        keep(measure(measured.variants(), rounds, tick))
    except Interrupted as interrupt:
        keep(interrupt.measured)
        raise KeyboardInterrupt from None
