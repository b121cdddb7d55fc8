"""Tables into guest memory, where guests look for them: the area of a PC's BIOS below 1 MiB."""

from __future__ import annotations

from pykvm.errors import ConfigError
from pykvm.platform import BDA_GPA, BIOS_END, BIOS_GPA, EBDA_GPA, LOW_RAM_END, MP_GPA, MP_TABLE_GPA, NO_SERVICE_GPA, RSDP_GPA
from pykvm.units import KIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.memory import GuestMemory
    from pykvm.tables.blob import Blob

__all__ = ["place_tables"]


def place_tables(memory: GuestMemory, acpi: tuple[Blob, Blob], mp: tuple[Blob, Blob]) -> list[tuple[int, int]]:
    """Write both, and the two words of the BIOS data area that say where the EBDA is and how much low RAM there is.

    Returns where the tables are, as (start, end).
    Guests look for the RSDP and for the MP floating pointer at every 16 bytes from 0xF0000. Raises ConfigError when memory ends below
    1 MiB.
    """
    if not memory.is_writable(BIOS_GPA, BIOS_END - BIOS_GPA):
        raise ConfigError("the PC test platform's tables are below 1 MiB: give it at least that much memory, such as --memory 16M")
    (tables, rsdp), (table, pointer) = acpi, mp
    places = (tables, BIOS_GPA, RSDP_GPA), (rsdp, RSDP_GPA, MP_GPA), (pointer, MP_GPA, MP_TABLE_GPA), (table, MP_TABLE_GPA, NO_SERVICE_GPA)
    for blob, gpa, end in places:
        assert gpa + len(blob.data) <= end
        blob.gpa = gpa
    for blob, gpa, _ in places:
        memory.write(gpa, blob.resolved())
    memory.write_u16(BDA_GPA + 0x0E, EBDA_GPA >> 4)
    memory.write_u16(BDA_GPA + 0x13, LOW_RAM_END // KIB)
    return [(gpa, gpa + len(blob.data)) for blob, gpa, _ in places]
