"""Exit records: the ring that native/runloop.c fills, one record as an object, and the statistics made from them.

A record is defined once, as ``struct pykvm_record`` in native/runloop.h; both run loops make the same ones. Times are the
host's TSC; ``Stats`` turns them into nanoseconds with the frequency that KVM reports.
"""

from __future__ import annotations

from pykvm.abi import ffi
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["ExitRecord", "RecordRing", "StatRow", "Stats"]

_FIELDS = (
    "tsc_before", "tsc_after", "tsc_handled", "rip", "qualifier", "value", "reason", "count", "vcpu", "size", "is_write",
)  # fmt: skip


_NORESERVE = 0x4000  # MAP_NORESERVE of <sys/mman.h>: a ring that stays empty is no claim on memory; Python 3.11 has no name for it
_KINDS = 512  # a guest can make an exit of its own for each of 65536 ports: those beyond share a row


class ExitRecord:
    """One exit: the fields of ``struct pykvm_record``, as plain integers.

    ``rip`` is RIP as KVM left it, which differs by host; ``Machine.insn_rip()`` gives the last exit's instruction on all alike.
    """

    __slots__ = _FIELDS

    def __init__(self, cdata: Any) -> None:
        for name in _FIELDS:
            setattr(self, name, getattr(cdata, name))

    if TYPE_CHECKING:
        tsc_before: int
        tsc_after: int
        tsc_handled: int
        rip: int
        qualifier: int
        value: int
        reason: int
        count: int
        vcpu: int
        size: int
        is_write: int

    def __repr__(self) -> str:
        from pykvm.exit_reason import reason_name

        return (
            f"<{reason_name(self.reason)} {'write' if self.is_write else 'read'} {self.qualifier:#x} "
            f"size={self.size} value={self.value:#x} rip={self.rip:#x}>"
        )


class RecordRing:
    """Room for ``capacity`` records. The loop stops for Python when it is full, so none is lost.

    ``keep``: it does not stop; exits that find no room are counted in ``cdata.lost``. Memory for the records is then taken page by page,
    as they come, and ``buffer`` is that memory, which lives as long as anything that was made from it.
    """

    def __init__(self, capacity: int = 4096, *, keep: bool = False) -> None:
        self.buffer: Any = None
        if keep:
            import mmap

            size, flags = capacity * ffi.sizeof("struct pykvm_record"), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            try:
                self.buffer = mmap.mmap(-1, size, flags)
            except (OSError, OverflowError, ValueError):
                raise ConfigError(f"there is no memory for a ledger of {capacity} exits; ask for fewer") from None
            self._data = ffi.from_buffer("struct pykvm_record[]", self.buffer, require_writable=True)
        else:
            self._data = ffi.new("struct pykvm_record[]", capacity)
        self.cdata: Any = ffi.new("struct pykvm_ring *")
        self.cdata.capacity, self.cdata.keep = capacity, keep
        self.cdata.data = self._data

    def clear(self) -> None:
        """Forget the records and the count of those lost. Not while the vCPU runs."""
        self.cdata.used = self.cdata.lost = 0
        self.cdata.open = ffi.NULL

    def drain(self) -> Iterator[Any]:
        """The records so far as cffi structures, valid until the next run; the ring is empty afterwards."""
        used = self.cdata.used
        for i in range(used):
            yield self._data[i]
        self.clear()


class StatRow:
    """What one kind of exit cost: ``count``, and in nanoseconds ``total`` and ``median`` for the guest and KVM together
    (KVM_RUN, in to out) and for the handler (out to answered)."""

    __slots__ = ("count", "handler_median", "handler_total", "kvm_median", "kvm_total", "name")

    def __init__(self, name: str, count: int, kvm: tuple[float, float], handler: tuple[float, float]) -> None:
        self.name, self.count = name, count
        self.kvm_total, self.kvm_median = kvm
        self.handler_total, self.handler_median = handler

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in nanoseconds, rounded."""
        return {
            "exit": self.name,
            "count": self.count,
            "kvm_total_ns": round(self.kvm_total),
            "kvm_median_ns": round(self.kvm_median),
            "handler_total_ns": round(self.handler_total),
            "handler_median_ns": round(self.handler_median),
        }


class _Times:
    """Durations in TSC units: exact count and sum, and a histogram of seven significant bits for the median, so that a
    run of any length needs bounded memory and the median is within 1.6 %."""

    __slots__ = ("bins", "total")

    def __init__(self) -> None:
        self.total = 0
        self.bins: dict[int, int] = {}

    def add(self, duration: int) -> None:
        self.total += duration
        shift = duration.bit_length() - 7
        key = duration if shift <= 0 else duration >> shift << shift
        self.bins[key] = self.bins.get(key, 0) + 1

    def median(self) -> int:
        half = (sum(self.bins.values()) + 1) // 2
        for key in sorted(self.bins):
            half -= self.bins[key]
            if half <= 0:
                return key
        return 0


class Stats:
    """Exits by kind, made from exit records. ``tsc_khz`` is the host's TSC frequency."""

    def __init__(self, tsc_khz: int) -> None:
        self.tsc_khz = tsc_khz
        self._kvm: dict[str, _Times] = {}
        self._handler: dict[str, _Times] = {}
        self._counts: dict[str, int] = {}

    def add(self, record: Any) -> None:
        """Count one record (cffi structure or ExitRecord)."""
        name = kind_of(record)
        if name not in self._counts and len(self._counts) >= _KINDS:
            name = f"IO {'out' if record.is_write else 'in'} elsewhere" if name.startswith("IO ") else name
        if name not in self._counts:
            self._counts[name] = 0
            self._kvm[name], self._handler[name] = _Times(), _Times()
        self._counts[name] += 1
        self._kvm[name].add(max(0, record.tsc_after - record.tsc_before))
        if record.tsc_handled:
            self._handler[name].add(max(0, record.tsc_handled - record.tsc_after))

    @property
    def rows(self) -> list[StatRow]:
        """One row a kind, the most frequent first."""
        ns = 1e6 / self.tsc_khz if self.tsc_khz else 1.0
        rows = []
        for name, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0])):
            kvm, handler = self._kvm[name], self._handler[name]
            rows.append(StatRow(name, count, (kvm.total * ns, kvm.median() * ns), (handler.total * ns, handler.median() * ns)))
        return rows


def kind_of(record: Any) -> str:
    """ "IO out 0x3f8", "MMIO read", "HLT": a reason with what tells its kinds apart."""
    from pykvm.exit_reason import reason_name

    name = reason_name(record.reason)
    if name == "IO":
        return f"IO {'out' if record.is_write else 'in'} {record.qualifier:#x}"
    if name == "MMIO":
        return f"MMIO {'write' if record.is_write else 'read'}"
    return name
