"""Live migration measured: how fast memory moves, beside a C copy of the same bytes with the same checksum in the same round, how long a
guest stands still that is idle, or writes all the time, and how many bytes it takes.

The destination is a process of its own (``pykvm receive``); so the C copy has a thread at either end of its socket.
"""

from __future__ import annotations

import os
import subprocess
import sys
from tempfile import TemporaryDirectory
from threading import Thread
from time import monotonic

from pykvm.abi import lib
from pykvm.assemble import asm
from pykvm.bench.paired import Estimate, Interrupted, estimate, measure, ratio
from pykvm.errors import KvmError, MigrationError
from pykvm.machine import Machine
from pykvm.state.migrate import DOWNTIME, migrate
from pykvm.units import PAGE_SIZE, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["DIRTY_RATE", "MigrationRow", "bench_migration"]

LOAD_GPA = 0x100000
DATA_GPA = 2 << 20
COUNT_GPA = DATA_GPA - 8  # where the busy guest counts the pages that it has written
PIECE = 256 << 10  # of the C copy: what a page frame holds
DIRTY_RATE = 50e6  # bytes a second
_WRITTEN = 64 << 20  # bytes that the busy guest goes round in
_RUN = 600.0
IDLE = "1: sti; hlt; jmp 1b"
BUSY = f"""
        rdtsc                       # the first page is due now
        shl rdx, 32
        lea rbx, [rax + rdx]
        mov rsi, {DATA_GPA + _WRITTEN}
round:  mov rdi, {DATA_GPA}
page:   inc qword ptr [rdi]
        inc qword ptr [{COUNT_GPA}]
1:      rdtsc
        shl rdx, 32
        or rax, rdx
        cmp rax, rbx                # not before the next page is due
        jb 1b
        lea rcx, [rax - {{most}}]   # what was missed meanwhile is made up for, but not more than a little
        cmp rbx, rcx
        cmovb rbx, rcx
        add rbx, {{pace}}
        add rdi, {PAGE_SIZE}
        cmp rdi, rsi
        jb page
        jmp round
"""


class MigrationRow:
    """What was measured: seconds of the C copy and of the migration of ``size`` bytes, and the reports of all migrations."""

    def __init__(self, size: int, taken: dict[str, list[float]], idle: list[dict[str, Any]], busy: list[dict[str, Any]]) -> None:
        self.size, self.idle, self.busy = size, idle, busy
        self.c, self.migration = estimate(taken["C copy"]), estimate(taken["migration"])
        self.ratio = ratio(taken["C copy"], taken["migration"])  # of the two speeds
        self.downtime = estimate([report["downtime"] for report in idle])
        self.bytes = estimate([report["bytes"] / report["memory"] for report in idle])
        self.busy_downtime: Estimate | None = estimate([report["downtime"] for report in busy]) if busy else None
        self.busy_rate: Estimate | None = estimate([report["wrote"] for report in busy]) if busy else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times in seconds."""
        return {
            "size": self.size,
            "c": self.c.as_dict(),
            "migration": self.migration.as_dict(),
            "ratio": self.ratio.as_dict(),
            "downtime_idle": self.downtime.as_dict(),
            "bytes_by_memory": self.bytes.as_dict(),
            "downtime_busy": None if self.busy_downtime is None else self.busy_downtime.as_dict(),
            "dirty_rate_busy": None if self.busy_rate is None else self.busy_rate.as_dict(),
            "goal": DOWNTIME,
            "idle": self.idle,
            "busy": self.busy,
        }

    def __str__(self) -> str:
        def speed(seconds: Estimate) -> str:
            return f"{seconds.value * 1e3:>9.1f} ms  {self.size / seconds.value / 1e9:>6.2f} GB/s"

        def times(e: Estimate, unit: str = "", by: float = 1.0) -> str:
            return f"{e.value * by:.2f}{unit} ({e.low * by:.2f} to {e.high * by:.2f})"

        lines = [
            f"migration of {format_size(self.size)} of memory, none of it zero, over a unix socket to another process",
            f"  plain C, same checksum  {speed(self.c)}",
            f"  migration               {speed(self.migration)}  {times(self.ratio)} × its speed",
            f"  downtime, idle guest    {times(self.downtime, ' ms', 1e3)}",
            f"  bytes sent              {times(self.bytes)} × memory",
        ]
        if self.busy_downtime is not None and self.busy_rate is not None:
            lines.append(
                f"  downtime, busy guest    {times(self.busy_downtime, ' ms', 1e3)}, goal {DOWNTIME * 1e3:g} ms; "
                f"it wrote {times(self.busy_rate, ' MB/s', 1e-6)}"
            )
        return "\n".join(lines)


def bench_migration(size: int, rounds: int, progress: Callable[[int, int], None] | None = None) -> MigrationRow:
    """Raises Interrupted, whose ``measured`` is a MigrationRow, on Ctrl-C."""
    idle: list[dict[str, Any]] = []
    busy: list[dict[str, Any]] = []
    box: list[Machine] = []  # the round's source: both copy its memory

    def c() -> float:
        taken = lib.pykvm_bench_copy(_source(box, size).memory.slots[0].hva, size, PIECE)
        if taken < 0:
            raise KvmError("the C copy", -taken, "a socket pair, and memory for a second copy")
        return int(taken) / 1e9

    def moved() -> float:
        machine = _source(box, size)
        try:
            report = _move(machine)
        finally:
            box.clear()
            machine.close()
        idle.append(report)
        return float(report["seconds"])

    def writes() -> float:
        with Machine(
            asm(BUSY.format(pace=(pace := _pace()), most=200 * pace), bits=64, org=LOAD_GPA),
            entry=LOAD_GPA,
            mode="user",
            memory=4 * _WRITTEN,
        ) as machine:
            report = _move(machine)
            report["wrote"] = machine.memory.read_u64(COUNT_GPA) * PAGE_SIZE / report["ran"]
            busy.append(report)
        return float(busy[-1]["downtime"])

    variants = {"C copy": c, "migration": moved, "busy": writes}
    try:
        taken = measure(variants, rounds, progress)
    except Interrupted as interrupt:
        n = len(interrupt.measured["migration"])
        raise Interrupted(MigrationRow(size, interrupt.measured, idle[1 : n + 1], busy[1 : n + 1])) from None
    finally:
        for machine in box:
            machine.close()
    return MigrationRow(size, taken, idle[1:], busy[1:])


def _source(box: list[Machine], size: int) -> Machine:
    """An idle guest whose memory has no zero page but in the first 2 MiB."""
    if not box:
        import numpy as np

        machine = Machine(asm(IDLE, bits=64, org=LOAD_GPA), entry=LOAD_GPA, mode="long", memory=size, irqchip="kernel")
        box.append(machine)
        words = machine.memory.view(DATA_GPA, (machine.memory.slots[0].size - DATA_GPA) // 8, "u8")
        words[:] = np.arange(1, len(words) + 1, dtype="u8")
    return box[0]


def _pace() -> int:
    """TSC units from one page to the next."""
    with Machine("halt") as machine:
        khz = machine.vcpu.get_tsc_khz() if machine.system.check_extension("KVM_CAP_GET_TSC_KHZ") else 0
    return int((khz or 1_000_000) * 1e3 * PAGE_SIZE / DIRTY_RATE)


def _move(machine: Machine) -> dict[str, Any]:
    """Run it, move it to another process, and end it there; the report."""
    with TemporaryDirectory() as folder:
        where = f"unix:{folder}/there"
        there = subprocess.Popen([sys.executable, "-m", "pykvm", "receive", where, "--timeout", "0.2"], stderr=subprocess.PIPE)
        run = Thread(target=lambda: machine.run(_RUN, explain=False), daemon=True)
        try:
            assert there.stderr is not None
            if not there.stderr.readline().startswith(b"pykvm: waiting"):
                raise MigrationError("pykvm receive does not start")
            began = monotonic()
            run.start()
            while not machine.group.running:
                os.sched_yield()
            report = migrate(machine, where)
            return {**report, "ran": monotonic() - began}
        finally:
            machine.stop()
            if run.ident is not None:
                run.join()
            there.kill()
            there.communicate()
