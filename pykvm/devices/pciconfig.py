"""PCI configuration ports without a PCI bus: whatever a guest selects at 0xCF8, the data at 0xCFC reads as all ones, "nothing there".

The reset control register lies inside the address register's four ports, for byte-wide accesses; 32-bit ones are the address register's.
Source: PCI local bus specification 3.0, section 3.2.2.3.2 (configuration mechanism #1).
"""

from __future__ import annotations

from pykvm.devices.saved import Saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

    from pykvm.devices.reset import ResetControl

__all__ = ["PciConfig"]

LENGTH = 8
RESET_CONTROL = 1


class PciConfig:
    """``reset`` answers byte-wide accesses to 0xCF9."""

    name = "PCI configuration"
    register_names: ClassVar = {0: "address", RESET_CONTROL: "reset control", 4: "data"}

    def __init__(self, reset: ResetControl) -> None:
        self.reset = reset

    def read(self, offset: int, size: int) -> int:
        """All ones: no host bridge, no device."""
        if offset == RESET_CONTROL and size == 1:
            return self.reset.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Only the reset control register keeps something."""
        if offset == RESET_CONTROL and size == 1:
            self.reset.write(0, 1, value)

    def save(self) -> dict[str, Any]:
        """The reset control register's."""
        return {"version": 1, "reset": self.reset.save()}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        Saved(state, self.name, 1)
        self.reset.load(state.get("reset", {}))
