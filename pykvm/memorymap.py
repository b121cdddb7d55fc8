"""The guest's memory map, as a PC's firmware reports it (INT 15h, AX=E820h): what is RAM, and what a guest must leave alone.

Multiboot, PVH, Linux' zero page and fw_cfg each have a form of their own for it; all are made from this list.
Source: ACPI 6.5 section 15.1 and table 15.4 (types).
"""

from __future__ import annotations

from pykvm.platform import BIOS_END, BIOS_GPA, EBDA_END, EBDA_GPA, IDENTITY_MAP_GPA, LOW_RAM_END, MMIO_HOLE_END

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.memory import GuestMemory

__all__ = ["RAM", "RESERVED", "Region", "e820", "memory_map"]

RAM, RESERVED = 1, 2


class Region:
    """``size`` bytes from ``gpa``; ``type`` is RAM or RESERVED (or another of ACPI's numbers)."""

    __slots__ = ("gpa", "size", "type")

    def __init__(self, gpa: int, size: int, type: int) -> None:
        self.gpa, self.size, self.type = gpa, size, type

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and (self.gpa, self.size, self.type) == (other.gpa, other.size, other.type)

    def __hash__(self) -> int:
        return hash((self.gpa, self.size, self.type))

    def __repr__(self) -> str:
        what = {RAM: "RAM", RESERVED: "reserved"}.get(self.type, f"type {self.type}")
        return f"<Region {self.gpa:#x}-{self.gpa + self.size - 1:#x} {what}>"


# From LOW_RAM_END to 1 MiB a PC has the EBDA, the video card's memory, option ROMs and the BIOS. The tables of a platform are there, and
# what the map does not mention is not to be used either.
_FIRMWARE = ((EBDA_GPA, EBDA_END), (BIOS_GPA, BIOS_END))


def memory_map(memory: GuestMemory) -> list[Region]:
    """The regions by rising gpa, none overlapping.

    RAM is every slot the guest can write, without the PC's hole from LOW_RAM_END to 1 MiB; readonly slots are reserved, and so are the
    EBDA, the BIOS area where the tables are, and the pages that KVM itself uses below 4 GiB.
    """
    regions: list[Region] = []
    for slot in memory.slots:
        end = slot.gpa + slot.size
        if slot.readonly and slot.gpa < IDENTITY_MAP_GPA:  # firmware is in what is reserved there anyway
            regions.append(Region(slot.gpa, slot.size, RESERVED))
        if slot.readonly:
            continue
        for low, high, type in (
            (0, LOW_RAM_END, RAM),
            *((low, high, RESERVED) for low, high in _FIRMWARE),
            (BIOS_END, 1 << 64, RAM),
        ):
            first, last = max(slot.gpa, low), min(end, high)
            if first < last:
                regions.append(Region(first, last - first, type))
    regions.append(Region(IDENTITY_MAP_GPA, MMIO_HOLE_END - IDENTITY_MAP_GPA, RESERVED))
    return sorted(regions, key=lambda region: region.gpa)


def e820(regions: list[Region]) -> bytes:
    """As the array of 20-byte entries that INT 15h and fw_cfg's etc/e820 have: 64-bit base and length, 32-bit type."""
    return b"".join(
        region.gpa.to_bytes(8, "little") + region.size.to_bytes(8, "little") + region.type.to_bytes(4, "little") for region in regions
    )
