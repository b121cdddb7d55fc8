"""The exit ledger: the record of every user-space exit, as a numpy structured array, and the tables made from it.

>>> with pykvm.Machine("hello", ledger=True) as m:
...     m.run(timeout=5)
...     m.ledger.records["tsc_after"] - m.ledger.records["tsc_before"]
...     for row in m.ledger.by("rip"):
...         print(row.name, row.count, row.kvm_median, row.handler_median)
...     m.ledger.save("hello.npy")

The native loop writes the records (``struct pykvm_record`` in native/runloop.h); ``records`` is that memory, not a copy of it. Exits that
found no room are counted in ``lost``. "In KVM" is KVM_RUN from in to out, with the guest's own instructions in it; "handler" is from
there until the answer was ready. RIP in the records is as KVM left it, which differs by host; the tables have the instruction's own
address where it can be told (debug/insn.py), which is found out while the machine is open: when ``by("rip")`` or ``save()`` asks.
"""

from __future__ import annotations

import os
from weakref import ref

import numpy as np

from pykvm import kvmstats
from pykvm.debug.insn import insn_rip
from pykvm.disasm import disassemble
from pykvm.errors import ConfigError
from pykvm.exit_reason import ExitReason, reason_name
from pykvm.exits import Hlt, IoOut, MmioWrite
from pykvm.ledgerfile import (
    RECORD_DTYPE,
    as_mapping,
    as_number,
    as_snapshot,
    as_text,
    checksum,
    json_path,
    read_json,
    read_records,
    write_json,
    write_records,
)
from pykvm.records import RecordRing, StatRow
from pykvm.tracefs import ExitTrace
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Any

    from numpy.typing import NDArray

    from pykvm.exits import Exit
    from pykvm.machine import Machine

    Array = NDArray[Any]

__all__ = ["BY", "DEFAULT_CAPACITY", "RECORD_DTYPE", "Ledger", "Row", "Site"]

DEFAULT_CAPACITY = 1 << 20  # records for each vCPU: 64 MiB, taken page by page
_LARGEST = (1 << 32) - 1
BY = ("reason", "qualifier", "port", "address", "rip", "vcpu")
_SITES = 1024  # instructions looked at, the most frequent first: decoding takes a millisecond each
_FORMAT = 1
_IO, _MMIO = int(ExitReason.IO), int(ExitReason.MMIO)


class Row:
    """What the exits of one kind have in common: ``name``, ``key`` (the number that was grouped by), ``count``, and times in nanoseconds,
    total, median and 99th percentile, for KVM with the guest (``kvm_*``) and for the handlers (``handler_*``). In TSC units where the
    frequency is not known (``Ledger.tsc_khz`` is 0)."""

    __slots__ = ("count", "handler_median", "handler_p99", "handler_total", "key", "kvm_median", "kvm_p99", "kvm_total", "name")

    def __init__(self, name: str, key: int, count: int, kvm: tuple[float, float, float], handler: tuple[float, float, float]) -> None:
        self.name, self.key, self.count = name, key, count
        self.kvm_total, self.kvm_median, self.kvm_p99 = kvm
        self.handler_total, self.handler_median, self.handler_p99 = handler

    def as_dict(self, unit: str = "ns") -> dict[str, Any]:
        """For JSON and CSV; times rounded. ``unit`` is in their names."""
        times = ("kvm_total", "kvm_median", "kvm_p99", "handler_total", "handler_median", "handler_p99")
        return {"name": self.name, "key": self.key, "count": self.count, **{f"{t}_{unit}": round(getattr(self, t)) for t in times}}

    def __repr__(self) -> str:
        return f"<Row {self.name}: {self.count} exits, {self.kvm_total:.0f} ns in KVM, {self.handler_total:.0f} ns in handlers>"


class Site:
    """Where in the guest exits come from: the instruction's linear address, its symbol, its text (the last two may be empty)."""

    __slots__ = ("insn", "insn_rip", "symbol")

    def __init__(self, insn_rip: int, symbol: str = "", insn: str = "") -> None:
        self.insn_rip, self.symbol, self.insn = insn_rip, symbol, insn

    @property
    def name(self) -> str:
        """ "0x100005 _start+0x5 `out dx, al`"."""
        return " ".join(part for part in (hex(self.insn_rip), self.symbol, self.insn and f"`{self.insn}`") if part)


_SITE_FIELDS = ("vcpu", "rip", "reason", "is_write", "size")
_SiteKey = tuple[int, int, int, int, int]


class Ledger:
    """The records of a machine's vCPUs (``Machine(ledger=...)``), or of a file (``Ledger.load``).

    ``tsc_khz``: the TSC's frequency, 0 when unknown. ``about``: host, image and mode. ``kvm_before``, ``kvm_after``: KVM's own counters
    at the start of the first run and at the end of the last (kvmstats.snapshot). ``hardware``: with trace(), the CPU's exit reasons.
    """

    def __init__(self, rings: Sequence[RecordRing] = (), records: Array | None = None) -> None:
        self._rings = list(rings)
        self._loaded = records
        self._lost = 0
        self._sites: dict[_SiteKey, Site] = {}
        self._machine: Callable[[], Machine | None] = lambda: None
        self.tsc_khz = 0
        self.about: dict[str, str] = {}
        self.kvm_before: kvmstats.Snapshot = {}
        self.kvm_after: kvmstats.Snapshot = {}
        self.hardware: dict[str, Any] | None = None

    @classmethod
    def of_machine(cls, machine: Machine, capacity: int | bool) -> Ledger:
        """Rings for each vCPU of a machine that is being made. Raises ConfigError."""
        if capacity is True:
            capacity = DEFAULT_CAPACITY
        if not 0 < capacity <= _LARGEST:
            raise ConfigError(f"a ledger of {capacity} exits: give a number from 1 to {_LARGEST}")
        self = cls([RecordRing(capacity, keep=True) for _ in range(machine.cpus)])
        self._machine = ref(machine)
        self.tsc_khz = machine.vcpu.get_tsc_khz() if machine.system.check_extension("KVM_CAP_GET_TSC_KHZ") else 0
        self.about = {**_host(), "image": machine.info.path, "mode": machine.info.mode, "cpus": str(machine.cpus)}
        return self

    def ring(self, vcpu: int) -> RecordRing:
        """Where the loop writes a vCPU's records."""
        return self._rings[vcpu]

    # --- records -----------------------------------------------------------------------------------------------------

    def of_vcpu(self, vcpu: int) -> Array:
        """One vCPU's records so far, oldest first; no copy."""
        if self._rings:
            ring = self._rings[vcpu]
            records: Array = np.frombuffer(ring.buffer, RECORD_DTYPE, ring.cdata.used)
            return records
        assert self._loaded is not None
        if self.vcpus <= 1:
            return self._loaded
        of_it: Array = self._loaded[self._loaded["vcpu"] == vcpu]
        return of_it

    @property
    def vcpus(self) -> int:
        """How many vCPUs the ledger is of."""
        if self._rings:
            return len(self._rings)
        assert self._loaded is not None
        return int(self._loaded["vcpu"].max()) + 1 if len(self._loaded) else 1

    @property
    def records(self) -> Array:
        """The records so far, a structured array of RECORD_DTYPE. Of one vCPU it is the loop's own memory, of several a copy in the order
        of their ``tsc_before``."""
        if self._loaded is not None:
            return self._loaded
        if len(self._rings) == 1:
            return self.of_vcpu(0)
        together = np.concatenate([self.of_vcpu(i) for i in range(len(self._rings))])
        return together[np.argsort(together["tsc_before"], kind="stable")]

    @property
    def lost(self) -> int:
        """Exits that found no room."""
        return self._lost + sum(int(ring.cdata.lost) for ring in self._rings)

    def clear(self) -> None:
        """Begin anew, between runs: no records, none lost, KVM's counters from here. Arrays handed out before change under their owner."""
        for ring in self._rings:
            ring.clear()
        self.kvm_before, self.kvm_after, self.hardware = {}, {}, None

    def __len__(self) -> int:
        return len(self._loaded) if self._loaded is not None else sum(int(ring.cdata.used) for ring in self._rings)

    # --- tables ------------------------------------------------------------------------------------------------------

    @property
    def unit(self) -> str:
        """What times are in: "ns", or "tsc" where the TSC's frequency is not known."""
        return "ns" if self.tsc_khz else "tsc"

    @property
    def _unit(self) -> float:
        """Nanoseconds in a TSC unit."""
        return 1e6 / self.tsc_khz if self.tsc_khz else 1.0

    def by(self, what: str) -> list[Row]:
        """A table, the most frequent first: by "reason", "qualifier" (the reason with its port, gpa, MSR, ...), "port", "address" (gpa),
        "rip" (the instruction) or "vcpu"."""
        if what not in BY:
            raise ConfigError(f"no table by {what!r}: use one of {', '.join(BY)}")
        records = self.records
        if what in ("port", "address"):
            records = records[records["reason"] == (_IO if what == "port" else _MMIO)]
        sites: list[Site] = []
        if what == "reason":
            columns = [records["reason"]]
        elif what == "vcpu":
            columns = [records["vcpu"]]
        elif what == "rip":
            sites, index = self._sites_of(records)
            columns = [index]
        else:
            columns = [records["reason"], records["is_write"] != 0, records["qualifier"]]
        first, group = _groups(columns)
        rows = self._rows(records, first, group)
        for row, i in zip(rows, first, strict=True):
            if what == "reason":
                row.key, row.name = int(records["reason"][i]), reason_name(int(records["reason"][i]))
            elif what == "vcpu":
                row.key, row.name = int(records["vcpu"][i]), f"vCPU {records['vcpu'][i]}"
            elif what == "rip":
                site = sites[int(columns[0][i])]
                row.key, row.name = site.insn_rip, site.name
            else:
                row.key, row.name = int(records["qualifier"][i]), kind_name(records[i])
        return sorted(rows, key=lambda row: (-row.count, row.key, row.name))

    def stat_rows(self) -> list[StatRow]:
        """The rows of ``Machine(stats=True)``, from the records that are here."""
        records = self.records
        is_io = records["reason"] == _IO
        accesses = is_io | (records["reason"] == _MMIO)
        first, group = _groups([records["reason"], accesses & (records["is_write"] != 0), np.where(is_io, records["qualifier"], 0)])
        rows = self._rows(records, first, group)
        for row, i in zip(rows, first, strict=True):
            row.name = kind_name(records[i], of_statistics=True)
        rows.sort(key=lambda row: (-row.count, row.name))
        return [
            StatRow(row.name, row.count, (row.kvm_total, row.kvm_median), (row.handler_total, row.handler_median)) for row in rows
        ]  # fmt: skip

    def _rows(self, records: Array, first: Array, group: Array) -> list[Row]:
        """A row without a name for each group."""
        kvm, handler, handled = _durations(records)
        counts = np.bincount(group, minlength=len(first))
        of_kvm = _spread(kvm, group, len(first)) * self._unit
        of_handler = _spread(handler[handled], group[handled], len(first)) * self._unit
        return [
            Row("", 0, int(counts[i]), tuple(map(float, of_kvm[i])), tuple(map(float, of_handler[i])))  # type: ignore[arg-type]
            for i in range(len(first))
        ]

    def slowest(self, n: int = 10, by: str = "total") -> Array:
        """The ``n`` records that took the longest: "kvm", "handler" or both together ("total"). A copy."""
        if by not in ("total", "kvm", "handler"):
            raise ConfigError(f"slowest by {by!r}: use total, kvm or handler")
        records = self.records
        kvm, handler, _ = _durations(records)
        taken = {"total": kvm + handler, "kvm": kvm, "handler": handler}[by]
        return records[np.argsort(-taken, kind="stable")[: max(0, n)]]

    def summary(self) -> dict[str, Any]:
        """Exits, those lost, and in nanoseconds (``unit``): the time inside KVM (with the guest), in handlers, and between: from the end of
        a handler to the next KVM_RUN, such as from one run() to the next."""
        records = self.records
        kvm, handler, _ = _durations(records)
        first, vcpu = _groups([records["vcpu"]])
        start, end = np.full(len(first), np.inf), np.zeros(len(first))
        np.minimum.at(start, vcpu, records["tsc_before"].astype(np.float64))
        np.maximum.at(end, vcpu, np.maximum(records["tsc_after"], records["tsc_handled"]).astype(np.float64))
        span = float(np.maximum(end - start, 0).sum())
        in_kvm, in_handlers = float(kvm.sum()) * self._unit, float(handler.sum()) * self._unit
        between = max(0.0, span * self._unit - in_kvm - in_handlers)
        times = {"kvm": in_kvm, "handler": in_handlers, "between": between}
        return {
            "exits": len(records),
            "lost": self.lost,
            "tsc_khz": self.tsc_khz,
            **{f"{name}_{self.unit}": round(time) for name, time in times.items()},
        }

    def kvm_counters(self) -> kvmstats.Values:
        """What KVM itself counted between the start of the first run and the end of the last, added up over the vCPUs."""
        return kvmstats.difference(self.kvm_before, self.kvm_after)

    # --- where exits come from ---------------------------------------------------------------------------------------

    def site(self, record: Any) -> Site:
        """The instruction that made an exit."""
        self._look_at_sites(self.records)
        return self._site(record)

    def _site(self, record: Any) -> Site:
        found = self._sites.get(_site_key(record))
        return Site(int(record["rip"])) if found is None else found

    def _sites_of(self, records: Array) -> tuple[list[Site], Array]:
        """(sites, for each record the index of its own)."""
        self._look_at_sites(records)
        first, group = _groups([records[name] for name in _SITE_FIELDS])
        numbers: dict[str, int] = {}
        sites: list[Site] = []
        of_group = np.zeros(len(first), np.int64)
        for g, i in enumerate(first):
            site = self._site(records[i])
            if site.name not in numbers:
                numbers[site.name] = len(sites)
                sites.append(site)
            of_group[g] = numbers[site.name]
        return sites, of_group[group]

    def _look_at_sites(self, records: Array) -> None:
        """Find the instructions of exits that are not known yet, while there is a machine to look into, and nobody runs it."""
        machine = self._machine()
        if machine is None or machine.vm.fd < 0 or any(vcpu.native.tid for vcpu in machine.vcpus):
            return
        first, group = _groups([records[name] for name in _SITE_FIELDS])
        counts = np.bincount(group, minlength=len(first))
        symbols = machine.symbols()
        views: dict[int, CpuView] = {}
        for g in np.argsort(-counts, kind="stable")[:_SITES]:
            record = records[first[g]]
            key = _site_key(record)
            vcpu = key[0]
            if key in self._sites:
                continue
            if vcpu not in views:
                views[vcpu] = CpuView(machine.vcpus[vcpu], machine.memory)
            view = _SiteView(views[vcpu], record)
            exit = _exit_of(record)
            at = view.rip if exit is None else insn_rip(view, exit)
            at = view.rip if at is None else at
            insns = disassemble(view.read(at, 15), at, view.bits, 1)
            insn = f"{insns[0].mnemonic} {insns[0].op_str}".strip() if insns else ""
            self._sites[key] = Site(at, symbols.name(at), insn)

    # --- what the kernel knows ---------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """The machine is about to run."""
        machine = self._machine()
        if not self.kvm_before and machine is not None:
            self.kvm_before = kvmstats.snapshot(machine.vm)

    def end_run(self) -> None:
        """The machine has run."""
        machine = self._machine()
        if machine is not None and machine.vm.fd >= 0:
            self.kvm_after = kvmstats.snapshot(machine.vm)

    def trace(self) -> _Traced:
        """A context manager: runs inside of it are traced (tracefs.py), and ``hardware`` has the CPU's own exit reasons afterwards. Takes
        root, and time at each exit. Raises ConfigError where that is not permitted."""
        return _Traced(self)

    def note_trace(self, trace: ExitTrace) -> None:
        """Keep what a trace has found: how often the CPU exited for each of its reasons, and which exits to user space that led to."""
        reasons: dict[str, dict[str, Any]] = {}
        for _, _, reason in trace.events:
            entry = reasons.setdefault(reason, {"count": 0, "led_to": {}})
            entry["count"] += 1
        if trace.clock == "x86-tsc":
            for i in range(self.vcpus):
                self._match(i, [(time, reason) for time, vcpu, reason in trace.events if vcpu in (i, -1)], reasons)
        self.hardware = {"clock": trace.clock, "lost": trace.lost, "reasons": reasons}

    def _match(self, vcpu: int, events: list[tuple[int, str]], reasons: dict[str, dict[str, Any]]) -> None:
        """The last exit of the CPU's in the time of a KVM_RUN is the one that user space sees."""
        records = self.of_vcpu(vcpu)
        times = np.array([time for time, _ in events], np.uint64)
        last = np.searchsorted(times, records["tsc_after"], side="right") - 1
        there = last >= 0
        there[there] &= times[last[there]] >= records["tsc_before"][there]
        for record, event in zip(records[there], last[there], strict=True):
            kinds = reasons[events[event][1]]["led_to"]
            name = kind_name(record, of_statistics=True)
            kinds[name] = kinds.get(name, 0) + 1

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the records to ``path`` (np.load reads them) and what else is known to the .json beside it. Each file is replaced as a
        whole; nothing is left half-written. Raises OSError."""
        name = os.fspath(path)
        records = np.ascontiguousarray(self.records)
        self._look_at_sites(records)
        about = {
            "format": _FORMAT,
            "records": len(records),
            "crc32": checksum(records),
            "lost": self.lost,
            "tsc_khz": self.tsc_khz,
            "about": self.about,
            "sites": [[*key, site.insn_rip, site.symbol, site.insn] for key, site in self._sites.items()],
            "kvm_before": self.kvm_before,
            "kvm_after": self.kvm_after,
            "hardware": self.hardware,
        }
        write_records(name, records)
        if os.path.isfile(name):  # beside /dev/null and pipes is no place for a second file
            write_json(json_path(name), about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """A ledger that save() wrote. An .npy without its .json gives the records alone, their times in TSC units. Raises ConfigError for
        what is no ledger, and for a .json that belongs to another."""
        name = os.fspath(path)
        records = read_records(name)
        self = cls(records=records)
        about = read_json(json_path(name))
        if about is not None:
            try:
                self._take(about, records)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                why = f"it does not say what it should ({error or type(error).__name__})"
                raise ConfigError(f"{json_path(name)}: {why}") from None
        return self

    def _take(self, about: dict[str, Any], records: Array) -> None:
        """What the .json says. Raises ValueError or TypeError for what makes no sense."""
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']!r}, but this pykvm reads {_FORMAT}")
        if about["records"] != len(records) or about["crc32"] != checksum(records):
            raise ValueError("it belongs to other records")
        self._lost, self.tsc_khz = as_number(about["lost"]), as_number(about["tsc_khz"])
        self.about = {as_text(key): as_text(value) for key, value in as_mapping(about["about"]).items()}
        for *key, at, symbol, insn in about["sites"]:
            if len(key) != 5:
                raise ValueError("a site is five numbers, an address and two texts")
            vcpu, rip, reason, is_write, size = map(as_number, key)
            self._sites[vcpu, rip, reason, is_write, size] = Site(as_number(at), as_text(symbol), as_text(insn))
        self.kvm_before, self.kvm_after = as_snapshot(about["kvm_before"]), as_snapshot(about["kvm_after"])
        if about["hardware"] is not None:
            hardware = as_mapping(about["hardware"])
            reasons: dict[str, dict[str, Any]] = {}
            for name, entry in as_mapping(hardware["reasons"]).items():
                led_to = {as_text(kind): as_number(n) for kind, n in as_mapping(entry["led_to"]).items()}
                reasons[as_text(name)] = {"count": as_number(entry["count"]), "led_to": led_to}
            self.hardware = {"clock": as_text(hardware["clock"]), "lost": as_number(hardware["lost"]), "reasons": reasons}

    def __repr__(self) -> str:
        lost = f", {self.lost} lost" if self.lost else ""
        return f"<Ledger {len(self)} exits{lost}, {self.vcpus} vCPU{'s' * (self.vcpus != 1)}>"


class _Traced:
    """See Ledger.trace()."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._trace = ledger, ExitTrace()

    def __enter__(self) -> ExitTrace:
        return self._trace.__enter__()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._trace.__exit__(kind, value, tb)
        self._ledger.note_trace(self._trace)


class _SiteView(CpuView):
    """A vCPU as it was at a record, as far as that is known: its mode, page tables and memory are those of now, the registers that tell
    accesses apart are as the access would have them where linear and physical addresses are the same."""

    def __init__(self, now: CpuView, record: Any) -> None:
        self.memory, self.sregs, self.bits, self.mode, self.cpl = now.memory, now.sregs, now.bits, now.mode, now.cpl
        self.regs = now.regs.copy()
        self.regs.rip = int(record["rip"])
        base = now.rip - now.regs.rip if now.bits != 64 else 0
        self.rip = self.regs.rip + base & ((1 << 64 if now.bits == 64 else 1 << 32) - 1)
        at, size = int(record["qualifier"]), int(record["size"])
        self.regs.rdx = at & 0xFFFF
        self.regs.rdi = at + size & (1 << 64) - 1
        self.regs.rflags &= ~(1 << 10)  # DF


def _site_key(record: Any) -> _SiteKey:
    vcpu, rip, reason, is_write, size = (int(record[name]) for name in _SITE_FIELDS)
    return vcpu, rip, reason, is_write, size


def _exit_of(record: Any) -> Exit | None:
    """The exit of a record, where RIP may lie past its instruction."""
    reason, at, size, is_write = (int(record[name]) for name in ("reason", "qualifier", "size", "is_write"))
    value = int(record["value"]).to_bytes(8, "little")[:size]
    if reason == _IO and is_write:
        return IoOut(at, size, value, int(record["count"]))
    if reason == _MMIO and is_write:
        return MmioWrite(at, value)
    return Hlt() if reason == ExitReason.HLT else None


def kind_name(record: Any, *, of_statistics: bool = False) -> str:
    """ "IO out 0x3f8", "MMIO read 0xd0000000", "X86_RDMSR 0x10", "HLT"; ``of_statistics``: as in --stats, where MMIO has no address."""
    reason, at = int(record["reason"]), int(record["qualifier"])
    name = reason_name(reason)
    if reason == _IO:
        return f"IO {'out' if record['is_write'] else 'in'} {at:#x}"
    if reason == _MMIO:
        return f"MMIO {'write' if record['is_write'] else 'read'}" + ("" if of_statistics else f" {at:#x}")
    return name if of_statistics or not at else f"{name} {at:#x}"


def _durations(records: Array) -> tuple[Array, Array, Array]:
    """(in KVM, in the handler, whether there is an end of it), in TSC units as floats; never negative."""

    def between(start: str, end: str) -> Array:
        later = records[end] > records[start]
        return np.where(later, records[end] - records[start], 0).astype(np.float64)

    return between("tsc_before", "tsc_after"), between("tsc_after", "tsc_handled"), records["tsc_handled"] != 0


def _groups(columns: list[Array]) -> tuple[Array, Array]:
    """Records alike in all columns: (index of the first of each group, for each record the number of its group)."""
    length = len(columns[0])
    if not length:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.lexsort(columns)
    new = np.zeros(length, bool)
    new[0] = True
    for column in columns:
        new[1:] |= column[order[1:]] != column[order[:-1]]
    group = np.zeros(length, np.int64)
    group[order] = np.cumsum(new) - 1
    return order[new], group


def _spread(durations: Array, group: Array, groups: int) -> Array:
    """Of each group: total, median, 99th percentile (nearest rank)."""
    result = np.zeros((groups, 3))
    if not len(durations):
        return result
    counts = np.bincount(group, minlength=groups)
    there = counts > 0
    durations = durations[np.lexsort((durations, group))]
    start = np.cumsum(counts) - counts
    result[:, 0] = np.bincount(np.repeat(np.arange(groups), counts), durations, groups)
    result[there, 1] = durations[(start + (counts - 1) // 2)[there]]
    result[there, 2] = durations[(start + np.ceil(0.99 * counts).astype(np.int64) - 1)[there]]
    return result


def _host() -> dict[str, str]:
    """What the measurements were made on."""
    system = os.uname()
    model = ""
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        pass
    modules = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if os.path.isdir(f"/sys/module/{name}")]
    return {"kernel": f"{system.sysname} {system.release}", "cpu": model, "module": " ".join(modules)}
