"""Guest pages as addresses in this process, for native code that looks into guest memory between two KVM_RUNs (native/trace.c, step.c).

A page counts for as long as the page table entries that led to it are what they were; native code compares them each time.
"""

from __future__ import annotations

from pykvm.abi import ffi, lib
from pykvm.debug.pagetables import paging_name
from pykvm.units import PAGE_SIZE
from pykvm.x86.paging import walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.memory import GuestMemory

__all__ = ["HostPages", "fill"]


def fill(entry: Any, memory: GuestMemory, page: int, s: Any) -> list[Any]:
    """Have ``entry``, a struct pykvm_code_page, say where the guest's ``page`` is under the control registers in ``s``. Returns what keeps
    that host memory mapped, even when its slot goes."""
    keep: list[Any] = []
    entry.known = 0
    entry.gva, entry.cr0, entry.cr3, entry.cr4, entry.efer = page, s.cr0, s.cr3, s.cr4, s.efer
    found = walk(memory, page, cr0=s.cr0, cr3=s.cr3, cr4=s.cr4, efer=s.efer)
    entry.entries, entry.entry_size = len(found.entries), 4 if paging_name(s.cr0, s.cr4, s.efer) == "32-bit" else 8
    for i, one in enumerate(found.entries):
        entry.entry[i], entry.value[i] = _pointer(memory, one.gpa, entry.entry_size, keep), one.value
    entry.host = ffi.NULL if found.gpa is None else _pointer(memory, found.gpa, PAGE_SIZE, keep)
    entry.known = 1
    return keep


def _pointer(memory: GuestMemory, gpa: int, size: int, keep: list[Any]) -> Any:
    slot = memory.find(gpa)
    if slot is None or gpa + size > slot.gpa + slot.size:
        return ffi.NULL
    keep.append(ffi.from_buffer("uint8_t[]", slot.map))
    return ffi.addressof(keep[-1], gpa - slot.gpa)


class HostPages:
    """Fills ``table``, PYKVM_CODE_PAGES of them."""

    def __init__(self, memory: GuestMemory, table: Any) -> None:
        self.memory, self.table = memory, table
        self._kept: dict[int, list[Any]] = {}
        self._slots = memory.slots

    def learn(self, page: int, s: Any) -> None:
        """Note a page."""
        index = page // PAGE_SIZE % lib.PYKVM_CODE_PAGES
        self._kept[index] = fill(self.table[index], self.memory, page, s)

    def check(self) -> None:
        """Forget all pages when guest memory has become other host memory."""
        if self.memory.slots != self._slots:
            self.forget()

    def forget(self) -> None:
        """None is known."""
        self._slots = self.memory.slots
        for index in self._kept:
            self.table[index].known = 0
        self._kept.clear()
