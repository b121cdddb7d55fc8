"""What QEMU's pc-testdev has for test kernels such as kvm-unit-tests: ports that keep 32 bits, interrupt lines as ports, a page flush.

| where               |                                                                                     |
|---------------------|-------------------------------------------------------------------------------------|
| ports 0xE0-0xE3     | keep 32 bits (EchoPorts)                                                            |
| port 0xE4           | a 32-bit gpa: KVM forgets how it has mapped that page (FlushPort)                   |
| ports 0xE8-0xEB     | the same 32 bits as at 0xE0 (BytePorts)                                             |
| ports 0x2000-0x2017 | a byte each: the level of interrupt line 0 to 23 (IrqLines)                         |
| gpa 0xFF000000      | 64 KiB that keep what is written, but every access exits (devices/scratch.py)       |

Source: what QEMU 7.2's device does, as kvm-unit-tests use it.
"""

from __future__ import annotations

from pykvm.devices.saved import Saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.devices.debugconsole import DebugConsole

__all__ = ["BytePorts", "EchoPorts", "FlushPort", "IrqLines"]

LINES = 24
MMIO_LENGTH = 0x10000


class EchoPorts:
    """Four bytes that keep what is written. With ``shared``, they are another one's."""

    name = "test ports"

    def __init__(self, shared: EchoPorts | None = None) -> None:
        self.bytes: bytearray = bytearray(4) if shared is None else shared.bytes

    def read(self, offset: int, size: int) -> int:
        """The bytes at ``offset``; beyond the end all ones."""
        return int.from_bytes(bytes(self.bytes[offset : offset + size]).ljust(size, b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep them."""
        data = value.to_bytes(size, "little")[: 4 - offset]
        self.bytes[offset : offset + len(data)] = data

    def save(self) -> dict[str, Any]:
        """The bytes."""
        return {"version": 1, "bytes": self.bytes.hex()}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        self.bytes[:] = Saved(state, self.name, 1).bytes("bytes", 4, 4)


class BytePorts(EchoPorts):
    """The same bytes at 0xE8-0xEB, but a single byte at 0xE9 is the debug ``console``'s (devices/debugconsole.py), which QEMU has there too
    when it is asked to."""

    def __init__(self, shared: EchoPorts, console: DebugConsole) -> None:
        super().__init__(shared)
        self.console = console

    def read(self, offset: int, size: int) -> int:
        """The bytes, or 0xE9."""
        return self.console.read(0, 1) if (offset, size) == (1, 1) else super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep them, or print."""
        if (offset, size) == (1, 1):
            self.console.write(0, 1, value)
        else:
            super().write(offset, size, value)


class FlushPort:
    """``flush(gpa)`` is called for a 32-bit write."""

    name = "page flush"

    def __init__(self, flush: Callable[[int], object]) -> None:
        self.flush = flush

    def save(self) -> dict[str, Any]:
        """There is nothing to keep."""
        return {"version": 1}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        Saved(state, self.name, 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Flush the page of this gpa."""
        if offset == 0 and size == 4:
            self.flush(value & ~0xFFF)


class IrqLines:
    """``drive(line, level)`` sets an interrupt line."""

    name = "test interrupt lines"

    def __init__(self, drive: Callable[[int, int], object]) -> None:
        self.drive = drive
        self.levels = [0] * LINES

    def write(self, offset: int, size: int, value: int) -> None:
        """One byte, one line: high for anything but 0."""
        if size == 1:
            self.levels[offset] = 1 if value else 0
            self.drive(offset, self.levels[offset])

    def save(self) -> dict[str, Any]:
        """The levels."""
        return {"version": 1, "levels": list(self.levels)}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        self.levels = Saved(state, self.name, 1).numbers("levels", 1, LINES)
