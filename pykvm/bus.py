"""Two address spaces, I/O ports and MMIO, and the devices that claim ranges of them.

A device is any object with ``read(offset, size) -> int`` and/or ``write(offset, size, value)``; ``offset`` counts from the base it
is registered at, ``size`` is 1, 2, 4 or 8 bytes. It never sees KVM. The run loop asks ``Space.ranges`` once and dispatches on
its own; ``Bus.read`` and friends serve the rest: REP counts, wide or straddling accesses, and those that nobody claims.
"""

from __future__ import annotations

from _bisect import bisect_right  # less to import at each start than bisect is

from pykvm.errors import ConfigError, DeviceOverlapError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar, Literal, Protocol

    SpaceName = Literal["pio", "mmio"]

    class Readable(Protocol):
        """A device that answers reads."""

        def read(self, offset: int, size: int) -> int:
            """The value at ``offset``, 0 to 2**(8 * size) - 1."""

    class Writable(Protocol):
        """A device that takes writes."""

        def write(self, offset: int, size: int, value: int) -> object:
            """``value`` was written at ``offset``."""

    Device = Readable | Writable

__all__ = ["Bus", "Native", "Range", "Space"]

_UNCLAIMED_LIMIT = 256


class Native:
    """What the native run loop may do with a range on its own: ``IGNORE`` (reads give all ones), ``constant(value)``, ``append(sink)``.

    The device must do the same in Python: which loop runs is not to be seen by the guest.
    """

    __slots__ = ("kind", "sink", "value")
    IGNORE: ClassVar[Native]

    def __init__(self, kind: str, value: int = 0, sink: Any = None) -> None:
        self.kind, self.value, self.sink = kind, value, sink

    @classmethod
    def constant(cls, value: int) -> Native:
        """Reads give ``value``, 0 to 2**64 - 1, cut to the access's size; writes vanish."""
        if not 0 <= value < 1 << 64:
            raise ConfigError(f"a constant of 64 bits, please, not {value}")
        return cls("constant", value)

    @classmethod
    def append(cls, sink: Any) -> Native:
        """Each byte written is added to ``sink`` with ``sink.extend(bytes)``; reads go to the device."""
        return cls("append", 0, sink)

    def __repr__(self) -> str:
        return f"<Native {self.kind}>"


Native.IGNORE = Native("constant", (1 << 64) - 1)


class Range:
    """``length`` ports or bytes from ``base`` to below ``end`` that belong to ``device``; ``read`` and ``write`` are its bound methods.

    ``undo``: what whoever registered it has to do when it goes.
    """

    __slots__ = ("base", "device", "end", "length", "name", "native", "read", "undo", "write")

    def __init__(self, base: int, length: int, device: Device, name: str | None, native: Native | None) -> None:
        self.base, self.length, self.end, self.device, self.native = base, length, base + length, device, native
        self.name: str = name or getattr(device, "name", None) or type(device).__name__
        self.undo: list[Callable[[], object]] = []
        self.read: Callable[[int, int], int] = getattr(device, "read", _all_ones)
        self.write: Callable[[int, int, int], object] = getattr(device, "write", _ignore)
        if self.read is _all_ones and self.write is _ignore:
            raise ConfigError(f"{device!r} is no device: it has neither read(offset, size) nor write(offset, size, value)")

    def __repr__(self) -> str:
        return f"<{self.name} at {self.base:#x}-{self.base + self.length - 1:#x}>"


def _all_ones(offset: int, size: int) -> int:
    return (1 << 8 * size) - 1


def _ignore(offset: int, size: int, value: int) -> None:
    pass


def _parts(at: int, size: int) -> list[tuple[int, int]]:
    """(where, size) of each device access: one, but KVM cuts MMIO at page ends, and what is left can be 3, 5, 6 or 7 bytes."""
    if size in (1, 2, 4, 8):
        return [(0, size)]
    parts, i = [], 0
    while i < size:
        part = next(n for n in (4, 2, 1) if (at + i) % n == 0 and i + n <= size)
        parts.append((i, part))
        i += part
    return parts


class Space:
    """One address space: ``name`` "pio" (16 bits) or "mmio" (52 bits)."""

    def __init__(self, name: SpaceName, limit: int, changed: Callable[[], None]) -> None:
        self.name, self.limit = name, limit
        self.version = 0
        self._ranges: list[Range] = []
        self._bases: list[int] = []  # theirs
        self._changed = changed

    def add(self, base: int, length: int, device: Device, *, name: str | None = None, native: Native | None = None) -> Range:
        """Claim [base, base + length) for ``device``. Raises DeviceOverlapError, ConfigError (outside the space, no methods)."""
        end, ranges, bases = base + length, self._ranges, self._bases
        if length <= 0 or base < 0 or end > self.limit:
            raise ConfigError(f"{self.name} {base:#x}, length {length:#x}, is not inside 0-{self.limit - 1:#x}")
        new = Range(base, length, device, name, native)
        at = bisect_right(bases, base)
        if (at and ranges[at - 1].end > base) or (at < len(bases) and bases[at] < end):
            other = ranges[at - 1] if at and ranges[at - 1].end > base else ranges[at]
            raise DeviceOverlapError(f"{self.name}: {new!r} overlaps {other!r}: give one of the two another base")
        ranges.insert(at, new)
        bases.insert(at, base)
        self.version += 1
        try:
            self._changed()
        except BaseException:
            self._take_out(new)
            raise
        return new

    def remove(self, claimed: Range) -> None:
        """Give a range up."""
        self._take_out(claimed)
        self._changed()

    def _take_out(self, claimed: Range) -> None:
        at = self._ranges.index(claimed)
        del self._ranges[at], self._bases[at]
        self.version += 1

    @property
    def ranges(self) -> tuple[Range, ...]:
        """All ranges by rising base."""
        return tuple(self._ranges)

    def find(self, at: int, size: int) -> Range | None:
        """The range that holds all of [at, at + size); an access that leaves its range belongs to nobody."""
        i = bisect_right(self._bases, at) - 1
        if i < 0:
            return None
        claimed = self._ranges[i]
        return claimed if at + size <= claimed.base + claimed.length else None

    def __repr__(self) -> str:
        return f"<Space {self.name}: {', '.join(map(repr, self._ranges)) or 'empty'}>"


class Bus:
    """Both spaces, and what the guest did to addresses that no device claims.

    ``unclaimed`` counts accesses by (space, address, size, is_write), at most 256 different ones; what passes that is in
    ``unclaimed_more``. ``on_unclaimed`` is called for the first of each, ``on_change`` when ranges come or go.
    """

    def __init__(self) -> None:
        self.pio = Space("pio", 1 << 16, self._on_change)
        self.mmio = Space("mmio", 1 << 52, self._on_change)
        self.unclaimed: dict[tuple[str, int, int, bool], int] = {}
        self.unclaimed_more = 0
        self.on_unclaimed: Callable[[str, int, int, bool, int], None] | None = None
        self.on_change: Callable[[], None] | None = None

    def _on_change(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def read(self, space: SpaceName, at: int, size: int) -> int:
        """What a read gives: the device's answer, or all ones. Raises TypeError for an answer that is no integer of ``size`` bytes."""
        claimed = (self.pio if space == "pio" else self.mmio).find(at, size)
        if claimed is None:
            self._note(space, at, size, False, 0)
            return (1 << 8 * size) - 1
        value = 0
        for i, part in _parts(at, size):
            offset = at - claimed.base + i
            answer = claimed.read(offset, part)
            if not hasattr(answer, "__index__") or not 0 <= answer < 1 << 8 * part:
                raise TypeError(f"{claimed!r}: read(offset={offset:#x}, size={part}) gave {answer!r}, not an int of {part} bytes")
            value |= answer.__index__() << 8 * i  # numpy's integers would overflow
        return value

    def write(self, space: SpaceName, at: int, size: int, value: int) -> None:
        """Carry out a write; one that nobody claims vanishes."""
        claimed = (self.pio if space == "pio" else self.mmio).find(at, size)
        if claimed is None:
            self._note(space, at, size, True, value)
        else:
            for i, part in _parts(at, size):
                claimed.write(at - claimed.base + i, part, value >> 8 * i & (1 << 8 * part) - 1)

    def out(self, port: int, size: int, data: bytes, count: int = 1) -> None:
        """A (REP) OUT: ``count`` elements of ``size`` bytes, one device access each."""
        for i in range(count):
            self.write("pio", port, size, int.from_bytes(data[i * size : (i + 1) * size], "little"))

    def in_(self, port: int, size: int, count: int = 1) -> bytes:
        """A (REP) IN: ``count`` elements of ``size`` bytes."""
        return b"".join(self.read("pio", port, size).to_bytes(size, "little") for _ in range(count))

    def _note(self, space: str, at: int, size: int, is_write: bool, value: int) -> None:
        key = (space, at, size, is_write)
        seen = self.unclaimed.get(key)
        if seen is not None:
            self.unclaimed[key] = seen + 1
        elif len(self.unclaimed) < _UNCLAIMED_LIMIT:
            self.unclaimed[key] = 1
            if self.on_unclaimed is not None:
                self.on_unclaimed(space, at, size, is_write, value)
        else:
            self.unclaimed_more += 1

    def __repr__(self) -> str:
        return f"<Bus {self.pio!r} {self.mmio!r}>"
