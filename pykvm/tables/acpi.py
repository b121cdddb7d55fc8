"""The ACPI tables of the PC test platform: RSDP, RSDT and XSDT, FADT, FACS, MADT, and a DSDT with processors, COM1, RTC and fw_cfg.

They describe what devices/acpipm.py, KVM's irqchip and the other devices are. Source: ACPI 6.5 sections 5.2.5 to 5.2.12; "4.0" layouts
(FADT revision 4) are used, which everything reads.
"""

from __future__ import annotations

from pykvm.devices.acpipm import S3, S5
from pykvm.platform import (
    ACPI_PM,
    COM1,
    COM1_GSI,
    FW_CFG,
    IOAPIC_GPA,
    LAPIC_GPA,
    RESET_CONTROL,
    RTC_GSI,
    RTC_INDEX,
    SCI_GSI,
    TIMER_PIN,
)
from pykvm.tables import aml
from pykvm.tables.blob import Blob

__all__ = ["acpi_tables"]

OEM, OEM_TABLE, CREATOR = b"PYKVM ", b"PCTEST  ", b"PYKV"
HEADER = 36
CHECKSUM_AT = 9
FACS_SIZE = 64
FADT_SIZE = 244
# FADT flags (table 5.10): WBINVD works, C1 on all processors, the sleep button is no fixed hardware, a reset register.
FLAGS = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 10
LEGACY_DEVICES, NO_VGA = 1 << 0, 1 << 2  # IA-PC boot flags (table 5.11); without the bit for an 8042
RESET_VALUE = 0x06
PM_CONTROL, PM_TIMER = 4, 8  # from ACPI_PM
LEVEL_HIGH = 0xD  # MPS INTI flags: active high, level triggered
ENABLED = 1


def acpi_tables(cpus: int, *, pic: bool = True) -> tuple[Blob, Blob]:
    """(tables, RSDP) for ``cpus`` processors whose APIC ids count from 0; ``pic``: there is a pair of 8259s too."""
    tables, rsdp = Blob("etc/acpi/tables", align=64), Blob("etc/acpi/rsdp")
    # First, so that it is at platform.FACS_GPA when it is placed.
    facs = tables.append((b"FACS" + FACS_SIZE.to_bytes(4, "little")).ljust(32, b"\0") + b"\1" + bytes(31), align=64)
    dsdt = _table(tables, b"DSDT", 2, _dsdt(cpus))
    fadt = _fadt(tables, facs, dsdt)
    madt = _table(tables, b"APIC", 3, _madt(cpus, pic))
    rsdt = _list(tables, b"RSDT", 4, (fadt, madt))
    xsdt = _list(tables, b"XSDT", 8, (fadt, madt))
    rsdp.append(b"RSD PTR \0" + OEM + b"\2" + bytes(4) + (36).to_bytes(4, "little") + bytes(12))
    rsdp.point(16, 4, tables, rsdt)
    rsdp.point(24, 8, tables, xsdt)
    rsdp.checksum(8, 0, 20)
    rsdp.checksum(32, 0, 36)
    return tables, rsdp


def _table(blob: Blob, signature: bytes, revision: int, body: bytes) -> int:
    """A table with its header (5.2.6); returns its offset."""
    length = HEADER + len(body)
    header = signature + length.to_bytes(4, "little") + bytes((revision, 0)) + OEM + OEM_TABLE
    at = blob.append(header + (1).to_bytes(4, "little") + CREATOR + (1).to_bytes(4, "little") + body, align=16)
    blob.checksum(at + CHECKSUM_AT, at, length)
    return at


def _list(blob: Blob, signature: bytes, size: int, targets: tuple[int, ...]) -> int:
    """RSDT or XSDT: pointers of ``size`` bytes."""
    at = _table(blob, signature, 1, bytes(size * len(targets)))
    for i, target in enumerate(targets):
        blob.point(at + HEADER + size * i, size, blob, target)
    return at


def _dsdt(cpus: int) -> bytes:
    hid = aml.name("_HID", aml.string("ACPI0007"))
    processors = [aml.device(f"C{id:03X}", hid, aml.name("_UID", aml.integer(id))) for id in range(cpus)]
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.io_ports(COM1, 8), aml.interrupt(COM1_GSI))),
    )
    rtc = aml.device(
        "RTC_",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resources(aml.io_ports(RTC_INDEX, 2), aml.interrupt(RTC_GSI))),
    )
    fw_cfg = aml.device(
        "FWCF",
        aml.name("_HID", aml.string("QEMU0002")),
        aml.name("_STA", aml.integer(0x0B)),  # there, enabled, works; not for a user interface
        aml.name("_CRS", aml.resources(aml.io_ports(FW_CFG, 12))),
    )
    s3, s5 = (aml.name(name, aml.package(*map(aml.integer, (type, type, 0, 0)))) for name, type in (("_S3_", S3), ("_S5_", S5)))
    return s3 + s5 + aml.scope("\\_SB_", *processors, com1, rtc, fw_cfg)


def _madt(cpus: int, pic: bool) -> bytes:
    """5.2.12: LAPICs, the IOAPIC, where ISA interrupts are not where they would be, and NMI at LINT1."""
    body = LAPIC_GPA.to_bytes(4, "little") + int(pic).to_bytes(4, "little")
    for id in range(cpus):
        body += bytes((0, 8, id, id)) + ENABLED.to_bytes(4, "little")
    body += bytes((1, 12, 0, 0)) + IOAPIC_GPA.to_bytes(4, "little") + bytes(4)
    if pic:
        body += bytes((2, 10, 0, 0)) + TIMER_PIN.to_bytes(4, "little") + bytes(2)
    body += bytes((2, 10, 0, SCI_GSI)) + SCI_GSI.to_bytes(4, "little") + LEVEL_HIGH.to_bytes(2, "little")
    return body + bytes((4, 6, 0xFF, 0, 0, 1))


def _fadt(blob: Blob, facs: int, dsdt: int) -> int:
    """5.2.9. Offsets are the specification's."""
    table = bytearray(FADT_SIZE)

    def put(offset: int, size: int, value: int) -> None:
        table[offset : offset + size] = value.to_bytes(size, "little")

    def register(offset: int, bits: int, port: int, access: int) -> None:
        """A generic address structure in I/O space (5.2.3.2)."""
        table[offset : offset + 12] = bytes((1, bits, 0, access)) + port.to_bytes(8, "little")

    put(46, 2, SCI_GSI)
    put(56, 4, ACPI_PM)
    put(64, 4, ACPI_PM + PM_CONTROL)
    put(76, 4, ACPI_PM + PM_TIMER)
    put(88, 1, 4)  # bytes of the PM1 event block, ...
    put(89, 1, 2)  # ... of its control block
    put(91, 1, 4)  # ... and of the timer
    put(96, 2, 0xFFF)  # C2 and C3 take too long: there are none
    put(98, 2, 0xFFF)
    put(108, 1, 0x32)  # the century, in CMOS
    put(109, 2, LEGACY_DEVICES | NO_VGA)
    put(112, 4, FLAGS)
    register(116, 8, RESET_CONTROL, 1)
    put(128, 1, RESET_VALUE)
    register(148, 32, ACPI_PM, 2)
    register(172, 16, ACPI_PM + PM_CONTROL, 2)
    register(208, 32, ACPI_PM + PM_TIMER, 3)
    at = _table(blob, b"FACP", 4, bytes(table[HEADER:]))
    blob.point(at + 36, 4, blob, facs)
    blob.point(at + 40, 4, blob, dsdt)
    blob.point(at + 140, 8, blob, dsdt)
    return at
