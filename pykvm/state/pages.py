"""Guest memory in PAGES frames: from a dirty log to the stream, and from the stream into memory.

The head of such a frame is a table with a row for each run of pages that follow one another: (first page number, how many, kind), 16
bytes. Zero pages are named only; the bytes of the others are the body, in the table's order. The sender takes a copy of each page, because
the guest may write it while its checksum is made; the receiver reads the body straight into the guest's memory, which nobody uses yet.
"""

from __future__ import annotations

import os
from struct import iter_unpack

from pykvm.abi import ffi, lib
from pykvm.errors import GuestMemoryError, MigrationError
from pykvm.state.stream import MAX_PAGES, MAX_ROWS, PAGES
from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.memory import GuestMemory, MemSlot
    from pykvm.state.dirtylog import DirtyLog
    from pykvm.state.stream import Frame, Stream

__all__ = ["PageReceiver", "PageSender"]

ROOM = MAX_PAGES  # of data in a frame
LOOK = 1 << 14  # dirty pages that are looked at in one go: of zero pages, a frame has room for any number


class PageSender:
    """Sends dirty pages. ``pages`` counts those that were dirty, ``zeros`` those of them that were zero."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = bytearray(ROOM * PAGE_SIZE)
        self._view = memoryview(self._buffer)
        self._rows = ffi.new("struct pykvm_page_run[]", MAX_ROWS)
        self._table = memoryview(ffi.buffer(self._rows))
        self._next, self._used, self._sum = ffi.new("uint64_t *"), ffi.new("uint32_t *"), ffi.new("uint32_t *")
        self._read: set[MemSlot] = set()  # all of whose pages were dirty once: what is dirty after that has been touched
        self.pages = self.zeros = 0

    def send_all(self, log: DirtyLog, check: Callable[[], object]) -> None:
        """All pages that are dirty in the log; ``check()`` is called in between, and may raise."""
        buffer = ffi.from_buffer(self._buffer)
        for slot, bitmap, first, end in log.chunks():
            memory, words = ffi.cast("uint8_t *", slot.hva), ffi.cast("uint64_t *", ffi.from_buffer(bitmap))
            touched = _pagemap(slot, first, end) if slot not in self._read else None
            self._next[0] = first
            while self._next[0] < end:
                check()
                at = self._next[0]
                packed = lib.pykvm_pack_pages(
                    memory, words, end, slot.gpa // PAGE_SIZE, ffi.NULL if touched is None else touched + (at - first), self._next, LOOK,
                    buffer, ROOM, self._rows, MAX_ROWS, self._used, self._sum,
                )  # fmt: skip
                used = self._used[0]
                if used:
                    self._stream.send(PAGES, self._table[: 16 * used], self._view[: packed * PAGE_SIZE], self._sum[0])
                    pages = sum(self._rows[i].count for i in range(used))
                    self.pages, self.zeros = self.pages + pages, self.zeros + pages - packed
        self._read.update(log.dirty)


def _pagemap(slot: MemSlot, first: int, end: int) -> Any:
    """What /proc/self/pagemap says of the slot's pages, a cffi array; None where memory that was not touched need not be zero."""
    if slot.backing != "anonymous":
        return None
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            entries = os.pread(file.fileno(), 8 * (end - first), (slot.hva // PAGE_SIZE + first) * 8)
    except OSError:
        return None
    return ffi.from_buffer("uint64_t[]", entries) if len(entries) == 8 * (end - first) else None


class PageReceiver:
    """Puts pages into ``memory``. A context manager; ``pages`` counts."""

    def __init__(self, stream: Stream, memory: GuestMemory) -> None:
        self._stream, self._memory = stream, memory
        self._maps: dict[MemSlot, memoryview] = {}
        self.pages = 0

    def take(self, frame: Frame) -> None:
        """Receive the body of a PAGES frame. Raises MigrationError: a row is not what it should be, or outside of memory."""
        if len(frame.head) % 16 or not frame.head:
            raise MigrationError("a table of pages has a part of a row")
        rows = list(iter_unpack("<QII", frame.head))
        data, buffers = 0, []
        for page, count, kind in rows:
            gpa, size = page * PAGE_SIZE, count * PAGE_SIZE
            slot = self._memory.find(gpa)
            if slot is None or not count or gpa - slot.gpa + size > slot.size:
                raise MigrationError(f"pages at gpa {gpa:#x}, {size:#x} bytes: this guest has no such memory")
            if kind == lib.PYKVM_RUN_DATA:
                data += count
                if data > MAX_PAGES:
                    break
                buffers.append(self._map(slot)[gpa - slot.gpa : gpa - slot.gpa + size])
            elif kind != lib.PYKVM_RUN_ZERO:
                raise MigrationError(f"a run of pages has kind {kind}, which there is not")
        if data * PAGE_SIZE != frame.size:
            raise MigrationError(f"a table names {data} pages with bytes, and {frame.size} bytes come with it")
        try:
            for page, count, kind in rows:
                if kind == lib.PYKVM_RUN_ZERO:
                    self._memory.clear(page * PAGE_SIZE, count * PAGE_SIZE)
        except GuestMemoryError as why:
            raise MigrationError(f"pages that cannot be written: {why}") from None
        try:
            self._stream.body_into(frame, buffers)
        finally:
            for buffer in buffers:
                buffer.release()
        self.pages += sum(count for _, count, _ in rows)

    def _map(self, slot: MemSlot) -> memoryview:
        view = self._maps.get(slot)
        if view is None:
            view = self._maps[slot] = memoryview(slot.map)
            if view.readonly:
                raise MigrationError(f"pages of {slot!r}, which is a file mapped readonly")
        return view

    def __enter__(self) -> PageReceiver:
        return self

    def __exit__(self, *_: object) -> None:
        for view in self._maps.values():
            view.release()
        self._maps.clear()
