"""The MultiProcessor specification's tables, for guests that know no ACPI: the floating pointer, and processors, IOAPIC and interrupts.

Source: Intel MultiProcessor Specification 1.4, chapter 4.
"""

from __future__ import annotations

from pykvm.platform import IOAPIC_GPA, LAPIC_GPA, SCI_GSI, TIMER_PIN
from pykvm.tables.blob import Blob

__all__ = ["mp_table"]

SPEC = 4  # 1.4
LAPIC_VERSION, IOAPIC_VERSION = 0x14, 0x11  # as KVM's registers say
ISA_BUS = 0
HEADER = 44
ENABLED, BOOTSTRAP = 1, 2
INT, NMI, EXTINT = 0, 1, 3
CONFORMS, LEVEL_HIGH = 0, 0xD
CASCADE = 2
TIMER = 0


def mp_table(cpus: int, signature: int, features: int, *, pic: bool = True) -> tuple[Blob, Blob]:
    """(configuration table, floating pointer) for ``cpus`` processors whose APIC ids count from 0.

    ``signature`` and ``features`` are EAX and EDX of CPUID leaf 1; ``pic``: there is a pair of 8259s too.
    """
    table, pointer = Blob("MP configuration"), Blob("MP floating pointer")
    entries = [_processor(id, signature, features) for id in range(cpus)]
    entries.append(bytes((1, ISA_BUS)) + b"ISA   ")
    entries.append(bytes((2, 0, IOAPIC_VERSION, ENABLED)) + IOAPIC_GPA.to_bytes(4, "little"))
    for irq in range(16):
        if irq == CASCADE or (irq == TIMER and not pic):
            continue
        flags = LEVEL_HIGH if irq == SCI_GSI else CONFORMS
        entries.append(_interrupt(3, INT, flags, irq, 0, TIMER_PIN if irq == TIMER else irq))
    if pic:
        entries.append(_interrupt(4, EXTINT, CONFORMS, 0, 0, 0))  # the 8259s are at the first processor's LINT0
    entries.append(_interrupt(4, NMI, CONFORMS, 0, 0xFF, 1))
    body = b"".join(entries)
    length = HEADER + len(body)
    header = b"PCMP" + length.to_bytes(2, "little") + bytes((SPEC, 0)) + b"PYKVM   " + b"PC-TEST     " + bytes(6)
    table.append(header + len(entries).to_bytes(2, "little") + LAPIC_GPA.to_bytes(4, "little") + bytes(4) + body)
    table.checksum(7, 0, length)
    pointer.append(b"_MP_" + bytes(4) + bytes((1, SPEC)) + bytes(6))
    pointer.point(4, 4, table)
    pointer.checksum(10, 0, 16)
    return table, pointer


def _processor(id: int, signature: int, features: int) -> bytes:
    flags = ENABLED | (BOOTSTRAP if id == 0 else 0)
    return bytes((0, id, LAPIC_VERSION, flags)) + signature.to_bytes(4, "little") + features.to_bytes(4, "little") + bytes(8)


def _interrupt(kind: int, type: int, flags: int, irq: int, apic: int, pin: int) -> bytes:
    """An I/O (3) or local (4) interrupt assignment."""
    return bytes((kind, type)) + flags.to_bytes(2, "little") + bytes((ISA_BUS, irq, apic, pin))
