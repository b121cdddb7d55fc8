"""The ways a PC guest resets itself: the reset control register at 0xCF9, the keyboard controller at 0x64, system control port A at 0x92.

Sources: Intel ICH datasheets, "Reset Control Register" (RST_CNT) and "Fast A20 and Init Register" (PORT92); IBM PC/AT technical reference,
8042 command 0xFE.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["KeyboardController", "PortA", "ResetControl"]

RST_CPU = 1 << 2  # a 0 to 1 change of this bit resets; bit 1 chooses soft or hard, bit 3 a full power cycle
_IDLE = 0x1C  # self test passed, not locked, last write was a command, both buffers empty: what a guest's probe wants to see


class ResetControl:
    """RST_CNT, one byte at 0xCF9: writing 0x06 or 0x0E resets, after 0x02 or 0x0A chose how."""

    name = "reset control"

    def __init__(self, stop: Callable[[str, int | None], object]) -> None:
        self.stop = stop
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        """The bits last written, without the trigger."""
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        """Resets on bit 2."""
        if value & RST_CPU:
            self.stop("reset", None)
        self.value = value & 0x0A

    def save(self) -> dict[str, Any]:
        """The bits last written."""
        return {"version": 1, "value": self.value}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        from pykvm.devices.saved import Saved

        self.value = Saved(state, self.name, 1).number("value", 0x0A)


class KeyboardController:
    """Just enough of an 8042 at ports 0x60-0x64: idle status, no keyboard, and command 0xFE, which pulses the reset line."""

    name = "keyboard controller"

    def __init__(self, stop: Callable[[str, int | None], object]) -> None:
        self.stop = stop

    def read(self, offset: int, size: int) -> int:
        """Offset 4 is the status register; no key was ever pressed. The ports between are not the 8042's: all ones, as on an open bus."""
        return _IDLE if offset == 4 else 0 if offset == 0 else 0xFF

    def save(self) -> dict[str, Any]:
        """There is nothing to keep."""
        return {"version": 1}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        from pykvm.devices.saved import Saved

        Saved(state, self.name, 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Commands go to offset 4."""
        if offset == 4 and value & 0xFF == 0xFE:
            self.stop("reset", None)


class PortA:
    """System control port A, one byte at 0x92: bit 1 is the A20 gate, which gates nothing here, and bit 0 resets when it becomes 1."""

    name = "system control port A"

    def __init__(self, stop: Callable[[str, int | None], object]) -> None:
        self.stop = stop
        self.a20 = 2

    def read(self, offset: int, size: int) -> int:
        """The A20 bit; the reset bit reads as 0."""
        return self.a20

    def write(self, offset: int, size: int, value: int) -> None:
        """Resets on bit 0."""
        if value & 1:
            self.stop("reset", None)
        self.a20 = value & 2

    def save(self) -> dict[str, Any]:
        """The A20 bit."""
        return {"version": 1, "a20": self.a20}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        from pykvm.devices.saved import Saved

        self.a20 = Saved(state, self.name, 1).number("a20", 2) & 2
