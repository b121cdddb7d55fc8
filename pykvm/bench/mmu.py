"""What virtual memory costs a guest: page-table changes, address-space switches, TLB misses and first touches, beside a process.

| workload      | one operation                                                       | in a process                                     |
|---------------|---------------------------------------------------------------------|--------------------------------------------------|
| chase         | a dependent read on another page (CPL3)                             | the same machine code                            |
| random        | an independent read anywhere (CPL3)                                 | the same machine code                            |
| first_touch   | a write to a page that the host has to find (CPL3)                  | the same machine code                            |
| first_map     | the same where the host's page is there and only KVM's entry is not | no counterpart                                   |
| map_unmap     | PTE written, page touched, PTE cleared, INVLPG (CPL0)               | mprotect of all pages, each touched, and back    |
| switch        | MOV CR3 and a read of 8 pages (CPL0)                                | a pipe to another process that does so, same CPU |

A batch of operations is one KVM_RUN up to an OUT, timed by RDTSC around it in C, so 1/batch of an exit is in each operation. Rounds are
interleaved (paired.py). Counters are differences of KVM_GET_STATS_FD over the measured batches, less the exit that ends each.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from resource import RUSAGE_SELF, getrusage

from pykvm.abi import lib
from pykvm.assemble import asm
from pykvm.bench import walkcost
from pykvm.bench.mmuguest import (
    DATA_GPA,
    FUNCTIONS,
    HUGE,
    RESULT_GPA,
    STOP_PORT,
    TABLES_GPA,
    WINDOW,
    Function,
    Guest,
    Kernel,
    Ram,
    fill_chain,
    kernel_tables,
    user_guest,
)
from pykvm.bench.paired import Estimate, Interrupted, estimate, measure, paired, ratio
from pykvm.errors import ConfigError, KvmError, PykvmError
from pykvm.memory import GuestMemory
from pykvm.platform import LOAD_GPA
from pykvm.system import System
from pykvm.units import MIB, PAGE_SIZE, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = ["SCHEMA", "WORKLOADS", "Report", "Row", "bench_mmu", "describe_host"]

SCHEMA = 1
LARGEST = 512 * MIB
OPERATIONS = 65536  # of chase and random in a batch, or once around the working set
FIRST_TOUCH = 16 * MIB  # at most
MAP_PAGES, MAP_PASSES = 512, 4
SWITCH_PAGES, SWITCH_PAIRS = 8, 1024
_MAP_UNMAP = f"""
    again:  mov ebp, {{passes}}
    pass:   mov ebx, {{pt}}
            movabs rsi, {WINDOW}
            mov eax, {DATA_GPA} + 0x63      # present, writable, accessed, dirty
            mov ecx, {MAP_PAGES}
    1:      mov [rbx], rax
            mov [rsi], rax
            add rbx, 8
            add rsi, 4096
            add rax, 4096
            dec ecx
            jnz 1b
            mov ebx, {{pt}}
            movabs rsi, {WINDOW}
            xor eax, eax
            mov ecx, {MAP_PAGES}
    2:      mov [rbx], rax
            invlpg [rsi]
            add rbx, 8
            add rsi, 4096
            dec ecx
            jnz 2b
            dec ebp
            jnz pass
            out {STOP_PORT}, al
            jmp again
"""
_VISIT = "; ".join(f"mov rax, [rsi + {PAGE_SIZE * i}]" for i in range(SWITCH_PAGES))
_SWITCH = f"""
            movabs rsi, {WINDOW}
    again:  mov ecx, {SWITCH_PAIRS}
    1:      mov cr3, rbx
            {_VISIT}
            mov cr3, rdx
            {_VISIT}
            dec ecx
            jnz 1b
            out {STOP_PORT}, al
            jmp again
"""


class Row:
    """One workload on one pair of page sizes: TSC units an operation, the same natively, their ratio, and KVM's counters an operation.

    ``guest_page`` and ``host_page`` are 0 where the workload has no choice. ``mapped`` counts the entries KVM has in its tables by size.
    """

    def __init__(self, workload: str, guest_page: int, host_page: int, backing: str, guest: Guest, values: list[float]) -> None:
        self.workload, self.guest_page, self.host_page, self.backing = workload, guest_page, host_page, backing
        self.values, self.per_op = values, estimate(values)
        self.operations, self.counters, self.mapped = guest.operations, guest.per_op(), guest.mapped()
        self.native: Estimate | None = None
        self.ratio: Estimate | None = None
        self.native_as, self.native_faults = "", 0.0

    def beside(self, native: list[float], described: str, faults: float = 0.0) -> Row:
        """What the same costs in a process, and how many page faults the host handles for it."""
        self.native, self.ratio = estimate(native), ratio(self.values, native)
        self.native_as, self.native_faults = described, faults
        return self

    def as_dict(self) -> dict[str, Any]:
        """For JSON; TSC units."""
        return {
            "workload": self.workload,
            "guest_page": self.guest_page,
            "host_page": self.host_page,
            "backing": self.backing,
            "operations": self.operations,
            "per_op": self.per_op.as_dict(),
            "native": None if self.native is None else self.native.as_dict(),
            "native_as": self.native_as,
            "native_faults_per_op": self.native_faults,
            "ratio": None if self.ratio is None else self.ratio.as_dict(),
            "counters_per_op": self.counters,
            "mapped": self.mapped,
        }


class Report:
    """All rows, with the host they were measured on. ``misses``: what 4 KiB pages add to an access over 2 MiB pages, by workload."""

    def __init__(self, host: dict[str, Any], size: int, rounds: int) -> None:
        self.host, self.size, self.rounds = host, size, rounds
        self.rows: list[Row] = []
        self.misses: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "benchmark": "mmu",
            "unit": "tsc",
            "host": self.host,
            "size": self.size,
            "rounds": self.rounds,
            "rows": [row.as_dict() for row in self.rows],
            "misses": self.misses,
            "walk": walkcost.table(4, self.host["host_levels"]),
            "notes": self.notes,
        }


# --- the host ---------------------------------------------------------------------------------------------------------


def describe_host(emulator: str = "") -> dict[str, Any]:
    """What a report has to say of its host: CPU, kernel, vendor module, and the paging in force ("EPT", "NPT", "shadow" or "unknown").

    ``emulator``: what the host itself runs in, where the caller knows; QEMU's TCG is seen.
    """
    from pykvm import __version__
    from pykvm.doctor import examine
    from pykvm.probe import cpl0_emulated

    facts: dict[str, str] = {}
    for row in examine():
        if row.group not in ("CPU", "module"):
            break
        facts[row.name] = row.value
    two_level = facts.get("two-level paging", "unknown")
    if two_level.endswith(": on"):
        paging = two_level.partition(":")[0]
    else:
        paging = "shadow" if "shadow" in two_level else "unknown"
    cpu = facts.get("CPU model", "unknown")
    with System() as system, system.create_vm() as vm:
        khz = vm.create_vcpu().get_tsc_khz()
    return {
        "cpu": cpu,
        "under_a_hypervisor": facts.get("runs under a hypervisor", "unknown"),
        "emulator": emulator or ("QEMU TCG" if "QEMU TCG" in cpu else ""),
        "kernel": os.uname().release,
        "module": facts.get("vendor module", "unknown"),
        "two_level_paging": two_level,
        "paging": paging,
        "host_levels": _host_levels(paging),
        "cpl0_emulated": cpl0_emulated(),
        "tsc_khz": khz,
        "pykvm": __version__,
    }


def _host_levels(paging: str) -> int:
    """Levels of KVM's two-level tables. NPT has those of the host's own; EPT takes 5 only beyond 48 physical address bits."""
    try:
        with open("/proc/cpuinfo") as file:
            text = file.read()
    except OSError:
        return 4
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    sizes = next((line for line in text.splitlines() if line.startswith("address sizes")), "")
    bits = int(sizes.partition(":")[2].split()[0]) if sizes else 0
    return 5 if "la57" in flags and (paging == "NPT" or (paging == "EPT" and bits > 48)) else 4


# --- workloads ------------------------------------------------------------------------------------------------------


class _Plan:
    """What one workload measures: ``variants`` for measure(), and ``rows`` to make of what it gives."""

    def __init__(self, variants: dict[str, Callable[[], float]], rows: Callable[[dict[str, list[float]]], list[Row]]) -> None:
        self.variants, self.rows = variants, rows
        self.misses: Callable[[dict[str, list[float]]], list[dict[str, Any]]] = lambda taken: []


@contextmanager
def _reads(name: str, system: System, size: int, notes: list[str]) -> Iterator[_Plan]:
    """chase and random: 4 KiB and 2 MiB pages of the guest on 4 KiB and 2 MiB pages of the host, beside a process with either."""
    operations = max(OPERATIONS, size // PAGE_SIZE)
    mask = size - 8 if name == "random" else 0
    with ExitStack() as stack:
        function = Function(asm(FUNCTIONS[name]))
        stack.callback(function.close)
        rams: dict[int, Ram] = {}
        for page in (PAGE_SIZE, HUGE):
            ram = Ram(size, page == HUGE)
            stack.callback(ram.close)
            fill_chain(ram.bytes, size)
            if page == HUGE and not ram.huge_share():
                notes.append(f"{name}: the host gave no 2 MiB pages (see `pykvm doctor`), so there are no rows with them")
            else:
                rams[page] = ram
        variants: dict[str, Callable[[], float]] = {}
        guests: dict[tuple[int, int], Guest] = {}

        def native(ram: Ram) -> Callable[[], float]:
            return lambda: function(ram.hva, operations, mask) / operations

        for page, ram in rams.items():
            variants[f"native {page}"] = native(ram)
        for guest_page in (PAGE_SIZE, HUGE):
            for host_page, ram in rams.items():
                guest = user_guest(system, name, ram, guest_page, operations, mask)
                stack.callback(guest.close)
                guests[guest_page, host_page] = guest
                variants[f"guest {guest_page} {host_page}"] = guest.run

        def rows(taken: dict[str, list[float]]) -> list[Row]:
            made = []
            for (guest_page, host_page), guest in guests.items():
                if guest.memory.read_u64(RESULT_GPA) != function.result:
                    raise PykvmError(f"bench mmu, {name}: the guest read something else than the process did")
                row = Row(name, guest_page, host_page, rams[host_page].describe(), guest, taken[f"guest {guest_page} {host_page}"])
                like = guest_page if guest_page in rams else PAGE_SIZE
                made.append(row.beside(taken[f"native {like}"], f"the same code, {walkcost.PAGE_SIZES[like]} pages"))
            return made

        def misses(taken: dict[str, list[float]]) -> list[dict[str, Any]]:
            if HUGE not in rams:
                return []
            return [
                {
                    "workload": name,
                    "native": paired(taken[f"native {PAGE_SIZE}"], taken[f"native {HUGE}"]).as_dict(),
                    "guest": paired(taken[f"guest {PAGE_SIZE} {PAGE_SIZE}"], taken[f"guest {HUGE} {HUGE}"]).as_dict(),
                }
            ]

        plan = _Plan(variants, rows)
        plan.misses = misses
        yield plan


@contextmanager
def _first_touch(name: str, system: System, size: int, notes: list[str]) -> Iterator[_Plan]:
    """Fresh host memory before each batch. The guest's own pages are 2 MiB, so that its tables are no part of it."""
    size = min(size, FIRST_TOUCH)
    pages = size // PAGE_SIZE
    with ExitStack() as stack:
        function = Function(asm(FUNCTIONS["first_touch"]))
        stack.callback(function.close)
        variants: dict[str, Callable[[], float]] = {}
        guests: dict[int, tuple[Guest, str]] = {}
        faults: dict[int, list[int]] = {}

        def native(ram: Ram, page: int) -> Callable[[], float]:
            seen = faults.setdefault(page, [])

            def run() -> float:
                ram.discard()
                before = getrusage(RUSAGE_SELF).ru_minflt
                taken = function(ram.hva, pages)
                seen.append(getrusage(RUSAGE_SELF).ru_minflt - before)
                return taken / pages

            return run

        def fresh(guest: Guest) -> Callable[[], float]:
            def run() -> float:
                guest.ram.discard()
                return guest.run()

            return run

        for page in (PAGE_SIZE, HUGE):
            own, ram = Ram(size, page == HUGE), Ram(size, page == HUGE)
            stack.callback(own.close)
            stack.callback(ram.close)
            ram.populate()
            if page == HUGE and not ram.huge_share():
                notes.append(f"{name}: the host gave no 2 MiB pages (see `pykvm doctor`), so there is no row with them")
                continue
            variants[f"native {page}"] = native(own, page)
            guest = user_guest(system, "first_touch", ram, HUGE, pages)
            stack.callback(guest.close)
            guests[page] = guest, ram.describe()
            variants[f"guest {page}"] = fresh(guest)

        def rows(taken: dict[str, list[float]]) -> list[Row]:
            return [
                Row(name, HUGE, page, backing, guest, taken[f"guest {page}"]).beside(
                    taken[f"native {page}"],
                    f"the same code on fresh {walkcost.PAGE_SIZES[page]} pages",
                    sum(faults[page]) / len(faults[page]) / pages,
                )
                for page, (guest, backing) in guests.items()
            ]

        yield _Plan(variants, rows)


@contextmanager
def _first_map(name: str, system: System, size: int, notes: list[str]) -> Iterator[_Plan]:
    """The host has its pages; KVM, whose memslot is made anew before each batch, has no entries."""
    size = min(size, FIRST_TOUCH)
    pages = size // PAGE_SIZE
    with ExitStack() as stack:
        ram = Ram(size, False)
        stack.callback(ram.close)
        ram.populate()
        guest = user_guest(system, "first_touch", ram, HUGE, pages)
        stack.callback(guest.close)

        def run() -> float:
            guest.forget()
            return guest.run()

        yield _Plan({"guest": run}, lambda taken: [Row(name, HUGE, PAGE_SIZE, "4K", guest, taken["guest"])])


def _checked(taken: int, what: str) -> int:
    if taken < 0:
        raise KvmError(what, -taken, "what bench mmu compares with")
    return taken


@contextmanager
def _map_unmap(name: str, system: System, size: int, notes: list[str]) -> Iterator[_Plan]:
    operations = MAP_PAGES * MAP_PASSES
    with ExitStack() as stack:
        ram, own = Ram(HUGE, False), Ram(HUGE, False)
        stack.callback(ram.close)
        stack.callback(own.close)
        ram.populate()
        own.populate()
        memory = GuestMemory.of_size(2 * TABLES_GPA)
        cr3, pt = kernel_tables(memory, TABLES_GPA, DATA_GPA, MAP_PAGES)
        code = asm(_MAP_UNMAP.format(pt=pt, passes=MAP_PASSES), org=LOAD_GPA)
        guest = Guest(system, memory, ram, Kernel(cr3), code, operations)
        stack.callback(guest.close)
        faults: list[int] = []

        def native() -> float:
            before = getrusage(RUSAGE_SELF).ru_minflt
            taken = _checked(lib.pykvm_bench_map_unmap(own.hva, MAP_PAGES, MAP_PASSES), "mprotect")
            faults.append(getrusage(RUSAGE_SELF).ru_minflt - before)
            return taken / operations

        def rows(taken: dict[str, list[float]]) -> list[Row]:
            row = Row(name, PAGE_SIZE, PAGE_SIZE, "4K", guest, taken["guest"])
            like = f"mprotect of {MAP_PAGES} pages, a touch of each, and back"
            return [row.beside(taken["native"], like, sum(faults) / len(faults) / operations)]

        yield _Plan({"native": native, "guest": guest.run}, rows)


@contextmanager
def _switch(name: str, system: System, size: int, notes: list[str]) -> Iterator[_Plan]:
    operations = 2 * SWITCH_PAIRS
    with ExitStack() as stack:
        own = Ram(HUGE, False)
        stack.callback(own.close)
        own.populate()
        there, back = _peer(own, stack)  # before there is a guest: a fork makes all of its memory copy-on-write
        ram = Ram(HUGE, False)
        stack.callback(ram.close)
        ram.populate()
        memory = GuestMemory.of_size(2 * TABLES_GPA)
        a, _ = kernel_tables(memory, TABLES_GPA, DATA_GPA, SWITCH_PAGES)
        b, _ = kernel_tables(memory, TABLES_GPA + 16 * PAGE_SIZE, DATA_GPA + MIB, SWITCH_PAGES)
        code = asm(f"mov ebx, {b}; mov edx, {a}; {_SWITCH}", org=LOAD_GPA)
        guest = Guest(system, memory, ram, Kernel(a), code, operations)
        stack.callback(guest.close)

        def native() -> float:
            return _checked(lib.pykvm_bench_switch(back, there, own.hva, SWITCH_PAGES, SWITCH_PAIRS), "a pipe") / operations

        def rows(taken: dict[str, list[float]]) -> list[Row]:
            row = Row(name, PAGE_SIZE, PAGE_SIZE, "4K", guest, taken["guest"])
            return [row.beside(taken["native"], "a byte through a pipe to another process on the same CPU")]

        yield _Plan({"native": native, "guest": guest.run}, rows)


def _peer(own: Ram, stack: ExitStack) -> tuple[int, int]:
    """Start the other process, both on one CPU until the stack unwinds: (fd to write to it, fd to read from it)."""
    cpus = os.sched_getaffinity(0)
    stack.callback(os.sched_setaffinity, 0, cpus)
    os.sched_setaffinity(0, {min(cpus)})
    its_in, there = os.pipe()
    back, its_out = os.pipe()
    pid = lib.pykvm_bench_peer(its_in, its_out, own.hva, SWITCH_PAGES)
    os.close(its_in)
    os.close(its_out)
    stack.callback(os.close, back)
    if pid < 0:
        os.close(there)
        raise ConfigError(f"no other process can be made: {os.strerror(-pid)}")
    stack.callback(os.waitpid, pid, 0)
    stack.callback(os.close, there)  # first of the three: the other process ends then
    return there, back


_PLANS: dict[str, Any] = {
    "chase": _reads,
    "random": _reads,
    "first_touch": _first_touch,
    "first_map": _first_map,
    "map_unmap": _map_unmap,
    "switch": _switch,
}
WORKLOADS = tuple(_PLANS)


def bench_mmu(
    workloads: list[str] | tuple[str, ...] = WORKLOADS,
    size: int = 64 * MIB,
    rounds: int = 40,
    emulator: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure each workload, ``size`` bytes of working set. Ctrl-C raises Interrupted with the report so far."""
    check(workloads, size)
    report = Report(describe_host(emulator), size, rounds)
    try:
        with System() as system:
            for name in workloads:
                tick = None if progress is None else (lambda i, n, name=name: progress(name, i, n))
                with _PLANS[name](name, system, size, report.notes) as plan:
                    try:
                        taken = measure(plan.variants, rounds, tick)
                    except Interrupted as interrupt:
                        report.rows += plan.rows(interrupt.measured)
                        raise KeyboardInterrupt from None
                    report.rows += plan.rows(taken)
                    report.misses += plan.misses(taken)
    except KeyboardInterrupt:
        if not report.rows:
            raise
        raise Interrupted(report) from None
    return report


def check(workloads: list[str] | tuple[str, ...], size: int) -> None:
    """Raises ConfigError for a workload or a size that cannot be."""
    for name in workloads:
        if name not in WORKLOADS:
            raise ConfigError(f"unknown workload {name!r}: use one of {', '.join(WORKLOADS)}")
    if size & size - 1 or not HUGE <= size <= LARGEST:
        raise ConfigError(f"a working set of {format_size(size)} is no power of two from 2M to {format_size(LARGEST)}: use --size 64M")
