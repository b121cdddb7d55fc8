"""What the host itself writes into guest memory, page by page: KVM's dirty log knows of the guest's writes alone.

The rule, which holds whatever devices do: what goes through GuestMemory.write() and clear() is marked when it has happened. A numpy view
may be written through at any time, so its pages count as written for as long as it lives, and once more when it goes. Code that writes
through an hva (a system call's buffer, a thread of its own) takes a view for as long, or calls GuestMemory.mark_written().
"""

from __future__ import annotations

from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    import numpy as np

    from pykvm.memory import MemSlot

__all__ = ["HostWrites"]


class HostWrites:
    """Marks by slot, one byte a page (a byte is stored at once, where a bit would be read, changed and stored by two threads)."""

    def __init__(self, slots: tuple[MemSlot, ...]) -> None:
        self._marks = {slot: bytearray(slot.size // PAGE_SIZE) for slot in slots}

    def add(self, slot: MemSlot) -> None:
        """A slot that has come since."""
        self._marks[slot] = bytearray(slot.size // PAGE_SIZE)

    def mark(self, slot: MemSlot, offset: int, size: int) -> None:
        """``size`` bytes from ``offset`` of the slot have been written. A slot that nobody has add()ed is not in the log."""
        marks = self._marks.get(slot)
        if marks is not None and size:
            first, last = offset // PAGE_SIZE, (offset + size - 1) // PAGE_SIZE
            if first == last:
                marks[first] = 1
            else:
                marks[first : last + 1] = b"\1" * (last + 1 - first)

    def pages(self, slot: MemSlot) -> Iterator[int]:
        """The same as take(), one by one, for who does without numpy."""
        marks = self._marks[slot]
        page = marks.find(1)
        while page >= 0:
            marks[page] = 0
            yield page
            page = marks.find(1, page)

    def __bool__(self) -> bool:
        """Whether anything is marked."""
        return any(1 in marks for marks in self._marks.values())

    def take(self, slot: MemSlot) -> np.ndarray[Any, Any] | None:
        """Indices of the slot's pages that were marked since the last take(); None for a slot that is not in the log.

        The marks go before the caller reads the pages: what is written meanwhile is read, or marked again, or both.
        """
        import numpy as np

        if slot not in self._marks:
            return None
        marks = np.frombuffer(self._marks[slot], np.uint8)
        pages = np.flatnonzero(marks)
        marks[pages] = 0
        return pages
