"""Many VMs alive at once in one process: what each costs in time and memory, beside plain C that keeps the same ones.

Each crowd lives in a child process of its own, so that nothing of one is left for the next.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

from pykvm.abi import lib
from pykvm.bench.start import Alive, AliveInC
from pykvm.errors import PykvmError
from pykvm.machine import Machine
from pykvm.memory import GuestMemory
from pykvm.system import System
from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = ["Crowd", "bench_many"]

COUNTS = (1, 10, 100, 1000)
_FDS = 2  # of one VM: its own and its vCPU's
_SPARE_FDS = 64
_VCPUS, _SLOTS = 32, 256


class Crowd:
    """``count`` VMs of one sort ("C", "bare objects", "Machine"; or vCPUs or slots of one VM): microseconds, and bytes resident, each.

    ``resident``: anonymous memory of this process, which holds what the guest has touched of its RAM too. ``beyond_c``: what of that plain
    C does not need. ``wanted``: how many it should have been.
    """

    def __init__(
        self, sort: str, count: int, wanted: int, us: float, resident: float, *, beyond_c: float | None = None, why: str = ""
    ) -> None:
        self.sort, self.count, self.wanted, self.us, self.resident = sort, count, wanted, us, resident
        self.beyond_c, self.why = beyond_c, why

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "sort": self.sort, "count": self.count, "wanted": self.wanted, "us_each": self.us, "resident_each": self.resident,
            "beyond_c_each": self.beyond_c, "why": self.why,
        }  # fmt: skip

    def __str__(self) -> str:
        if not self.count:
            return f"{self.wanted:>5} {self.sort}: {self.why}"
        beyond = "" if self.beyond_c is None else f", {self.beyond_c / 1024:>6.1f} KiB more than C"
        fewer = "" if self.count == self.wanted else f"  ({self.wanted} were wanted: {self.why})"
        return f"{self.count:>5} {self.sort:<14} {self.us:>8.0f} µs and {self.resident / 1024:>6.1f} KiB resident each{beyond}{fewer}"


def bench_many(most: int = 1000) -> Iterator[Crowd]:
    """1, 10, 100, 1000 VMs at once, up to ``most``, each sort; then what a vCPU and what a slot takes."""
    sorts: dict[str, Callable[[System], Any]] = {"C": AliveInC, "bare objects": Alive, "Machine": _machine}
    for wanted in [*(count for count in COUNTS if count < most), most]:
        count, why = _room(wanted)
        in_c = 0.0
        for sort, make in sorts.items():
            crowd = _in_child(partial(_vms, make, count), sort, wanted, why)
            if sort == "C":
                in_c = crowd.resident
            elif crowd.count:
                crowd.beyond_c = crowd.resident - in_c
            yield crowd
    yield _in_child(_vcpus, "vCPUs of a VM", _VCPUS, "")
    yield _in_child(_slots, "slots of a VM", _SLOTS, "")


def _room(wanted: int) -> tuple[int, str]:
    """How many VMs this process may have fds for, after asking for as many as it may have; and what to say if these are fewer."""
    from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit

    soft, hard = getrlimit(RLIMIT_NOFILE)
    need = wanted * _FDS + _SPARE_FDS
    if soft != RLIM_INFINITY and soft < need:
        soft = need if hard == RLIM_INFINITY else min(need, hard)
        setrlimit(RLIMIT_NOFILE, (soft, hard))
    room = wanted if soft == RLIM_INFINITY else min(wanted, (soft - _SPARE_FDS) // _FDS)
    return max(1, room), f"RLIMIT_NOFILE allows {hard} file descriptors: raise it with ulimit -Hn"


def _in_child(measure: Callable[[], tuple[int, float, float]], sort: str, wanted: int, why: str) -> Crowd:
    """A Crowd from what ``measure()`` gives in a forked child."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(ours)
            try:
                told = json.dumps(measure())
            except (PykvmError, OSError, MemoryError) as error:
                told = json.dumps([0, 0, str(error) or "out of memory"])
            os.write(theirs, told.encode())
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    try:
        with open(ours, "rb") as pipe:
            heard = pipe.read()
    finally:
        _, status = os.waitpid(child, 0)
    if not heard:
        return Crowd(sort, 0, wanted, 0, 0, why=f"its process ended with status {os.waitstatus_to_exitcode(status)}")
    count, us, resident = json.loads(heard)
    return Crowd(sort, count, wanted, us, resident if count else 0, why=why if count else str(resident))


def _anonymous() -> int:
    """Bytes of anonymous memory that are resident."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) * 1024


def _machine(system: System) -> Machine:
    machine = Machine(b"\xf4", mode="real", system=system, memory="1M")
    machine.run()
    return machine


def _vms(make: Callable[[System], Any], count: int) -> tuple[int, float, float]:
    rdtsc = lib.pykvm_rdtsc
    with System() as system:
        first = make(system)  # what is needed once
        khz = system.create_vm().create_vcpu().get_tsc_khz()
        alive: list[Any] = []
        before, start = _anonymous(), rdtsc()
        for _ in range(count):
            alive.append(make(system))
        taken, resident = rdtsc() - start, _anonymous() - before
        for one in (first, *alive):
            one.close()
    return count, taken / khz * 1e3 / count, resident / count


def _vcpus() -> tuple[int, float, float]:
    with System() as system, system.create_vm() as vm:
        khz = vm.create_vcpu().get_tsc_khz()
        before, start = _anonymous(), lib.pykvm_rdtsc()
        for _ in range(_VCPUS):
            vm.create_vcpu()
        return _VCPUS, (lib.pykvm_rdtsc() - start) / khz * 1e3 / _VCPUS, (_anonymous() - before) / _VCPUS


def _slots() -> tuple[int, float, float]:
    with System() as system, GuestMemory() as memory, system.create_vm() as vm:
        khz = vm.create_vcpu().get_tsc_khz()
        before, start = _anonymous(), lib.pykvm_rdtsc()
        for i in range(_SLOTS):
            vm.add_slot(memory.add(2 * i * PAGE_SIZE, PAGE_SIZE))
        return _SLOTS, (lib.pykvm_rdtsc() - start) / khz * 1e3 / _SLOTS, (_anonymous() - before) / _SLOTS
