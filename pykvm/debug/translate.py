"""Where an address of the guest's leads, both levels: gva -> gpa by the guest's tables, gpa -> hva by the memslot, hva -> host-physical
by this process's page tables (/proc/self/pagemap, which only root may read in full).

The first level is x86/paging.py's. Here is what it means for one access: protection, SMEP, SMAP, and physical address bits that the
guest's CPU does not have.
"""

from __future__ import annotations

import os

from pykvm.debug.pagetables import paging_name, rights_text
from pykvm.errors import ConfigError, GuestMemoryError
from pykvm.units import PAGE_SIZE, format_size
from pykvm.x86.paging import ADDRESS, RW, US, Walk, walk
from pykvm.x86.regs import CR0, CR4, RFLAGS, cpl_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pykvm.abi import Struct
    from pykvm.memory import MemSlot
    from pykvm.vcpu import VCPU
    from pykvm.x86.paging import Entry

    class Memory(Protocol):
        """GuestMemory, or what a VM has as slots."""

        def read(self, gpa: int, size: int) -> bytes:
            """Bytes at ``gpa``; raises GuestMemoryError."""

        def find(self, gpa: int) -> MemSlot | None:
            """The slot that backs a gpa."""


__all__ = ["ACCESSES", "HostPage", "SlotMemory", "Translation", "Translator", "host_page"]

ACCESSES = ("read", "write", "fetch")
_PFN, _SWAPPED, _PRESENT = (1 << 55) - 1, 1 << 62, 1 << 63


class HostPage:
    """Host-physical address ``hpa`` of a byte, or None with the reason in ``why``."""

    __slots__ = ("hpa", "why")

    def __init__(self, hpa: int | None, why: str = "") -> None:
        self.hpa, self.why = hpa, why

    def __str__(self) -> str:
        return self.why if self.hpa is None else f"{self.hpa:#x}"


_pagemap: tuple[int, int] | None = None  # (process, fd): a forked child's own differs


def host_page(hva: int) -> HostPage:
    """Ask /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst): the PFN is there for CAP_SYS_ADMIN only."""
    global _pagemap
    try:
        if _pagemap is None or _pagemap[0] != os.getpid():
            _pagemap = (os.getpid(), os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
        raw = os.pread(_pagemap[1], 8, hva // PAGE_SIZE * 8)
    except OSError as error:
        return HostPage(None, f"not permitted ({error.strerror})")
    entry = int.from_bytes(raw, "little")
    if entry & _SWAPPED:
        return HostPage(None, "swapped out")
    if not entry & _PRESENT:
        return HostPage(None, "no host page yet")
    if not entry & _PFN:
        return HostPage(None, "not permitted (pagemap hides it without CAP_SYS_ADMIN)")
    return HostPage((entry & _PFN) * PAGE_SIZE | hva % PAGE_SIZE)


class SlotMemory:
    """Guest memory as KVM has it: the slots of a VM, of whichever GuestMemory."""

    def __init__(self, slots: dict[int, MemSlot]) -> None:
        self._slots = slots

    def find(self, gpa: int) -> MemSlot | None:
        """The slot that backs ``gpa``."""
        return next((slot for slot in self._slots.values() if 0 <= gpa - slot.gpa < slot.size), None)

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of one slot; raises GuestMemoryError."""
        slot = self.find(gpa)
        if slot is None or gpa + size > slot.gpa + slot.size:
            raise GuestMemoryError(gpa, size)
        return slot.map[gpa - slot.gpa : gpa - slot.gpa + size]


class Translation:
    """What a walk found: ``walk`` (the guest's level), ``gpa``, ``slot``, ``hva``, ``host``; ``denied``, why the access in question fails,
    and ``error_code``, what #PF would push then (None: no #PF)."""

    def __init__(self, walk: Walk, memory: Memory, paging: str, root: int) -> None:
        self.walk, self.gva, self.gpa, self.fault = walk, walk.gva, walk.gpa, walk.fault
        self.entries, self.page_size = walk.entries, walk.page_size
        self.paging, self.root = paging, root
        self._memory = memory
        self.slot = None if walk.gpa is None else memory.find(walk.gpa)
        self.hva = None if self.slot is None or walk.gpa is None else self.slot.hva + walk.gpa - self.slot.gpa
        self.access = ""
        self.denied = walk.fault
        self.error_code: int | None = None
        self.device = ""

    @property
    def host(self) -> HostPage:
        """The host-physical address, asked for now."""
        return HostPage(None, "there is no host memory") if self.hva is None else host_page(self.hva)

    @property
    def rights(self) -> str:
        """``"rw-"``, ``"r-x user"``: what all levels together allow."""
        return rights_text(self.walk.writable, self.walk.user, self.walk.executable) if self.gpa is not None else ""

    def entry_hva(self, entry: Entry) -> int | None:
        """Where a table's entry is in this process."""
        slot = self._memory.find(entry.gpa)
        return None if slot is None else slot.hva + entry.gpa - slot.gpa

    def _leads_to(self, entry: Entry, last: bool) -> str:
        if not entry.value & 1:
            return "not present"
        if last and self.gpa is not None:
            return f"{format_size(self.page_size)} page at gpa {self.gpa & ~(self.page_size - 1):#x}"
        return "fault" if last else f"table at gpa {self.entries[self.entries.index(entry) + 1].gpa & ~0xFFF:#x}"

    def explain(self) -> str:
        """The walk as lines: each entry with its bits and where it is in the guest, in this process and in the host's memory."""
        lines = [
            f"gva {self.gva:#x}: " + ("paging is off" if self.paging == "off" else f"{self.paging} paging, root at gpa {self.root:#x}")
        ]
        for i, entry in enumerate(self.entries):
            hva = self.entry_hva(entry)
            where = "" if hva is None else f"hva {hva:#x}, hpa {host_page(hva)}"
            to = self._leads_to(entry, i == len(self.entries) - 1)
            lines.append(f"  {entry.level:>4}[{entry.index:>3}] = {entry.value:#018x}  {entry.flags:<18} -> {to}")
            lines.append(f"            at gpa {entry.gpa:#x}, {where}")
        if self.gpa is None:
            lines.append(f"  -> no translation: {self.fault}")
        else:
            page = f"{format_size(self.page_size)} page, {self.rights}" if self.page_size else "linear addresses are physical"
            lines.append(f"  -> gpa {self.gpa:#x}  {page}")
            if self.hva is None or self.slot is None:
                to = f"to the device {self.device!r}" if self.device else "where no device claims it"
                lines.append(f"     no memslot: an access exits to user space, {to}")
            else:
                lines.append(f"  -> hva {self.hva:#x}  {self.slot!r}")
                lines.append(f"  -> hpa {self.host}")
        if self.access:
            lines.append(f"  {self.access}: {self._verdict()}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.denied:
            readonly = self.slot is not None and self.slot.readonly and "write" in self.access
            return "allowed by the guest's tables; the memslot is read-only, so it exits as MMIO" if readonly else "allowed"
        code = "" if self.error_code is None else f" (#PF, error code {self.error_code:#x})"
        return f"fails: {self.denied}{code}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        entries = []
        for entry in self.entries:
            hva = self.entry_hva(entry)
            hpa = None if hva is None else host_page(hva).hpa
            about = {"level": entry.level, "index": entry.index, "gpa": entry.gpa, "value": entry.value}
            entries.append({**about, "bits": entry.flags.split(), "hva": hva, "hpa": hpa})
        host = self.host
        return {
            "gva": self.gva,
            "paging": self.paging,
            "root": self.root,
            "entries": entries,
            "gpa": self.gpa,
            "page_size": self.page_size,
            "rights": self.rights or None,
            "slot": None if self.slot is None else self.slot.id,
            "hva": self.hva,
            "hpa": host.hpa,
            "hpa_why": host.why or None,
            "device": self.device or None,
            "access": self.access or None,
            "denied": self.denied or None,
            "error_code": self.error_code,
        }

    def __repr__(self) -> str:
        to = self.fault if self.gpa is None else f"gpa {self.gpa:#x}" + ("" if self.hva is None else f" -> hva {self.hva:#x}")
        return f"<Translation gva {self.gva:#x} -> {to}>"

    def __str__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        from pykvm.debug.html import text_html

        return text_html(self.explain())


class Translator:
    """Walks with one vCPU's registers, read once: ``walk(gva)`` many times while the guest stands still.

    ``device_at(gpa)`` names what answers where no slot is.
    """

    def __init__(self, vcpu: VCPU, memory: Memory, device_at: Callable[[int], str] | None = None, sregs: Struct | None = None) -> None:
        s = vcpu.get_sregs() if sregs is None else sregs
        self.cr0, self.cr3, self.cr4, self.efer = int(s.cr0), int(s.cr3), int(s.cr4), int(s.efer)
        self.memory = memory
        self.cpl = cpl_of(s)
        self._vcpu, self._device_at = vcpu, device_at
        self._physical_bits = 0

    def walk(self, gva: int, access: str = "", user: bool | None = None) -> Translation:
        """Translate ``gva``. ``access``: "read", "write" or "fetch", for which ``denied`` then says why it fails, if so; ``user``: from
        CPL3, by default from the vCPU's present CPL. Raises ConfigError for another access."""
        if access and access not in ACCESSES:
            raise ConfigError(f"access {access!r}: use one of {', '.join(ACCESSES)}")
        if not 0 <= gva < 1 << 64:
            raise ConfigError(f"gva {gva:#x} has more than 64 bits")
        found = walk(self.memory, gva, cr0=self.cr0, cr3=self.cr3, cr4=self.cr4, efer=self.efer)
        self._check_physical(found)
        result = Translation(found, self.memory, paging_name(self.cr0, self.cr4, self.efer), self.cr3 & ADDRESS)
        if result.gpa is not None and result.slot is None and self._device_at is not None:
            result.device = self._device_at(result.gpa)
        if access:
            from_user = self.cpl == 3 if user is None else user
            result.access = f"{access} from {'user mode (CPL3)' if from_user else 'supervisor mode'}"
            self._judge(result, access, from_user)
        return result

    def _check_physical(self, found: Walk) -> None:
        """Address bits that the guest's CPU lacks are reserved (SDM vol. 3 section 4.5; CPUID 0x80000008)."""
        for i, entry in enumerate(found.entries):
            high = entry.value & ADDRESS
            if entry.value & 1 and high >> 32 and high >> self._bits():
                found.fault = f"reserved bits are set in the {entry.level} entry: this CPU has {self._bits()} physical address bits"
                found.gpa = None
                del found.entries[i + 1 :]
                return

    def _bits(self) -> int:
        if not self._physical_bits:
            leaf = self._vcpu.get_cpuid2().find(0x8000_0008)
            self._physical_bits = leaf.eax & 0xFF if leaf is not None else 36
        return self._physical_bits

    def _judge(self, result: Translation, access: str, user: bool) -> None:
        w = result.walk
        write, fetch = access == "write", access == "fetch"
        if w.fault:
            result.denied = w.fault
            if "canonical" in w.fault:
                return  # #GP, or #SS, without an address
            result.error_code = (1 if "reserved" in w.fault else 0) | 2 * write | 4 * user | (8 if "reserved" in w.fault else 0)
        else:
            result.denied = self._denied(w, write, user, fetch)
            if result.denied:
                result.error_code = 1 | 2 * write | 4 * user
        if result.error_code is not None and fetch and (self.efer & 1 << 11 or self.cr4 & CR4.SMEP):
            result.error_code |= 16

    def _denied(self, w: Walk, write: bool, user: bool, fetch: bool) -> str:
        """SDM vol. 3 section 4.6.1."""
        if user and not w.user:
            return f"the page is for the supervisor only (U/S = 0 in the {_first(w, US)} entry)"
        if write and not w.writable and (user or self.cr0 & CR0.WP):
            return f"the page is read-only (R/W = 0 in the {_first(w, RW)} entry{'' if user else ', and CR0.WP = 1'})"
        if fetch and not w.executable:
            return f"the page is not executable (NX = 1 in the {next(e.level for e in w.entries if e.value >> 63)} entry)"
        if w.page_size and w.user and not user:
            if fetch and self.cr4 & CR4.SMEP:
                return "the supervisor may not run a user page (CR4.SMEP = 1)"
            if not fetch and self.cr4 & CR4.SMAP and not self._vcpu.get_regs().rflags & RFLAGS.AC:
                return "the supervisor may not touch a user page (CR4.SMAP = 1, RFLAGS.AC = 0)"
        return ""


def _first(w: Walk, bit: int) -> str:
    """The level that takes a right away. PAE's own PDPT entries have no such bits."""
    entries = w.entries[1:] if w.entries[0].level == "PDPT" else w.entries
    return next(e.level for e in entries if not e.value & bit)
