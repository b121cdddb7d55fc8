"""QEMU's linker script: how firmware is told, through fw_cfg, to put tables into memory, and where pointers and checksums go.

Each command has 128 bytes. Source: QEMU hw/acpi/bios-linker-loader.c as SeaBIOS and OVMF read it: 1 allocates a file, 2 adds a pointer,
3 a checksum.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.tables.blob import Blob

__all__ = ["SCRIPT", "linker_script"]

SCRIPT = "etc/table-loader"
ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3
HIGH, FSEG = 1, 2  # anywhere below 4 GiB, or where guests look for an RSDP
NAME, COMMAND = 56, 128


def linker_script(*blobs: tuple[Blob, int]) -> bytes:
    """For blobs, each with its zone, HIGH or FSEG; pointers lead from one to another or into itself."""
    commands = [_command(ALLOCATE, _name(blob), blob.align.to_bytes(4, "little"), bytes((zone,))) for blob, zone in blobs]
    for blob, _ in blobs:
        for offset, size, target in blob.pointers:
            commands.append(_command(ADD_POINTER, _name(blob), _name(target), offset.to_bytes(4, "little"), bytes((size,))))
        for numbers in blob.checksums:
            commands.append(_command(ADD_CHECKSUM, _name(blob), *(n.to_bytes(4, "little") for n in numbers)))
    return b"".join(commands)


def _name(blob: Blob) -> bytes:
    return blob.name.encode("ascii").ljust(NAME, b"\0")


def _command(number: int, *fields: bytes) -> bytes:
    return (number.to_bytes(4, "little") + b"".join(fields)).ljust(COMMAND, b"\0")
