"""How many memory references a TLB miss costs, computed: by page size on both sides, natively, with EPT or NPT, and with shadow paging.

A native walk reads one entry a level. With two-level paging every guest physical address on the way, that is each of the guest's entries
and at last the data's own, takes a walk of the host's tables first: (g + 1) * (h + 1) - 1 references for g guest and h host levels.
Shadow tables map guest virtual to host physical addresses: one walk, whose leaf is the smaller of the two page sizes.

These are what the CPU would read with nothing cached. Paging-structure caches skip upper levels, and entries that are read are often in
the data cache, so the numbers bound a miss's cost and do not predict it. Nothing here counts what keeping shadow tables costs: exits.

Sources: SDM vol. 3 sections 4.5 (4- and 5-level paging), 4.10.3 (paging-structure caches), 29.3.2 (EPT translation); APM vol. 2 sections
5.3 (long-mode paging), 15.25 (nested paging); Bhargava et al., Accelerating Two-Dimensional Page Walks for Virtualized Systems,
ASPLOS 2008.
"""

from __future__ import annotations

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["PAGE_SIZES", "native", "nested", "shadow", "table"]

PAGE_SIZES = {4096: "4K", 2 << 20: "2M", 1 << 30: "1G"}
_SKIPPED = {4096: 0, 2 << 20: 1, 1 << 30: 2}  # levels below a leaf of that size


def native(page: int, levels: int = 4) -> int:
    """References of a walk to a page of ``page`` bytes through ``levels``-level tables."""
    if page not in _SKIPPED:
        raise ConfigError(f"a page has {', '.join(map(str, _SKIPPED))} bytes, not {page}")
    if levels not in (4, 5):
        raise ConfigError(f"long-mode tables have 4 or 5 levels, not {levels}")
    return levels - _SKIPPED[page]


def nested(guest_page: int, host_page: int, guest_levels: int = 4, host_levels: int = 4) -> int:
    """References with EPT or NPT: a host walk for each guest entry and for the data, and the guest's entries themselves."""
    return (native(guest_page, guest_levels) + 1) * (native(host_page, host_levels) + 1) - 1


def shadow(guest_page: int, host_page: int, levels: int = 4) -> int:
    """References with shadow paging: a native walk to the smaller of the two pages."""
    return native(min(guest_page, host_page), levels)


def table(guest_levels: int = 4, host_levels: int = 4) -> list[dict[str, Any]]:
    """One row for each pair of page sizes: ``native`` (a process with the guest's pages and levels), ``nested`` and ``shadow``."""
    return [
        {
            "guest_page": guest,
            "host_page": host,
            "native": native(guest, guest_levels),
            "nested": nested(guest, host, guest_levels, host_levels),
            "shadow": shadow(guest, host, guest_levels),
            "tlb_entry": min(guest, host),
        }
        for guest in PAGE_SIZES
        for host in PAGE_SIZES
    ]
