"""Which pages of a machine's memory have been written since they were last read: by the guest (KVM's dirty log) and by the host.

It may have pages too many, never too few: with EPT or NPT, KVM maps a page writable when the guest first reads it, and counts it then.
With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 a page is made clean just before it is read, not when the log is: a page that the guest writes again
and again in between is read once. Where KVM offers it, pages also start as dirty without being write-protected first, so that
switching the log on does not stop the guest.
"""

from __future__ import annotations

from pykvm.abi import lib
from pykvm.errors import ConfigError, KvmError
from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    import numpy as np

    from pykvm.hostwrites import HostWrites
    from pykvm.memory import GuestMemory, MemSlot
    from pykvm.vm import VM

    Bitmap = np.ndarray[Any, Any]  # of 64-bit words, one bit a page

__all__ = ["CHUNK_PAGES", "DirtyLog", "count_pages"]

CHUNK_PAGES = 1 << 14  # 64 MiB: so much is made clean at once


class DirtyLog:
    """A context manager; while it is open, every write is noted. At the start every page counts as dirty.

    ``dirty`` has a bitmap for each slot: pages are dirty until chunks() has given them out. Slots may come, go and move meanwhile: all of a
    new one is dirty. One at a time for each VM, for KVM keeps one log; a checkpoint has one too: else ConfigError. Raises KvmError, too.
    """

    def __init__(self, vm: VM, memory: GuestMemory) -> None:
        self.vm, self.memory = vm, memory
        self.manual = False
        self.dirty: dict[MemSlot, Bitmap] = {}
        self._host: HostWrites | None = None

    def __enter__(self) -> DirtyLog:
        offered = self.vm.check_extension("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        offered &= lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | lib.KVM_DIRTY_LOG_INITIALLY_SET
        self._host = self.memory.log_writes()
        try:
            if offered & lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE:
                self.vm.enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", offered)
                self.manual = True
            for slot in self.memory.slots:
                self._begin(slot)
        except BaseException:
            self.close()
            raise
        return self

    def _begin(self, slot: MemSlot) -> None:
        import numpy as np

        self.vm.log_dirty_pages(slot)
        slot.retain()  # what is being read stays mapped, whatever becomes of the slot
        pages = slot.size // PAGE_SIZE
        bitmap = np.zeros(-(-pages // 64), np.uint64)
        bitmap[: pages // 64] = ~np.uint64(0)
        if pages % 64:
            bitmap[-1] = (1 << pages % 64) - 1
        self.dirty[slot] = bitmap

    def close(self) -> None:
        """Note no more. The VM may be gone by now, and its log with it."""
        if self._host is not None:
            self.memory.stop_log()
            self._host = None
        for slot in self.dirty:
            if slot in self.vm.handle.slots.values():
                self._try(self.vm.log_dirty_pages, slot, False)
            slot.release()
        self.dirty.clear()
        if self.manual:
            self._try(self.vm.enable_cap, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", 0)
            self.manual = False

    def _try(self, ioctl: Callable[..., None], *arguments: Any) -> None:
        try:
            ioctl(*arguments)
        except (KvmError, ConfigError):
            if self.vm.fd >= 0:
                raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(self) -> int:
        """Add what was written since the last look. Returns how many pages are dirty now."""
        import numpy as np

        assert self._host is not None
        self._follow_slots(self._host)
        self.memory.mark_views()
        for slot, bitmap in self.dirty.items():
            seen = np.zeros_like(bitmap)
            if not self._ask(self.vm.get_dirty_log, slot, seen):
                continue
            bitmap |= seen
            written = self._host.take(slot)
            if written is not None and len(written):
                np.bitwise_or.at(bitmap, written // 64, np.left_shift(np.uint64(1), (written % 64).astype(np.uint64)))
        return sum(count_pages(bitmap) for bitmap in self.dirty.values())

    def _follow_slots(self, host: HostWrites) -> None:
        slots = self.memory.slots
        for slot in [slot for slot in self.dirty if slot not in slots]:
            del self.dirty[slot]
            slot.release()
        for slot in slots:
            if slot not in self.dirty and slot in self.vm.handle.slots.values():
                host.add(slot)
                self._begin(slot)

    def _ask(self, ioctl: Callable[..., None], slot: MemSlot, *arguments: Any) -> bool:
        """False: the slot has just gone, which the next look() sees. (Who moves a slot may do so in a vCPU's own thread.)"""
        try:
            ioctl(slot, *arguments)
        except (KvmError, ConfigError):
            if slot in self.memory.slots and slot in self.vm.handle.slots.values():
                raise
            return False
        return True

    def chunks(self) -> Iterator[tuple[MemSlot, Bitmap, int, int]]:
        """The dirty pages, as (slot, bitmap, first, end): those of ``bitmap`` between the two are for the caller to read now.

        They count as clean from this moment on, so that what is written while they are read is found by the next look().
        """
        for slot, bitmap in list(self.dirty.items()):
            pages = slot.size // PAGE_SIZE
            for first in range(0, pages, CHUNK_PAGES):
                end = min(first + CHUNK_PAGES, pages)
                words = bitmap[first // 64 : -(-end // 64)]
                if not words.any():
                    continue
                if self.manual and not self._ask(self.vm.clear_dirty_log, slot, words, first, end - first):
                    continue
                yield slot, bitmap, first, end
                words[:] = 0


def count_pages(bitmap: Bitmap) -> int:
    """How many bits are set."""
    return int.from_bytes(bitmap.tobytes(), "little").bit_count()
