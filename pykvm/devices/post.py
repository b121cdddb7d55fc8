"""Port 0x80, where firmware writes power-on self test codes, and Linux writes to pass a microsecond."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["PostPort"]


class PostPort:
    """Keeps the newest ``history`` codes in ``codes``; a read gives the last one, as the latch on a PC does."""

    name = "POST port"

    def __init__(self, history: int = 256) -> None:
        self.codes: list[int] = []
        self.history = history

    def read(self, offset: int, size: int) -> int:
        """The last code."""
        return self.codes[-1] & ((1 << 8 * size) - 1) if self.codes else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A code."""
        self.codes.append(value)
        if len(self.codes) > self.history:
            del self.codes[0]

    def save(self) -> dict[str, Any]:
        """The codes."""
        return {"version": 1, "codes": list(self.codes)}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        from pykvm.devices.saved import Saved

        self.codes = Saved(state, self.name, 1).numbers("codes", (1 << 64) - 1, at_most=self.history)

    def __repr__(self) -> str:
        return f"<POST port: {' '.join(f'{code:02x}' for code in self.codes[-8:]) or 'no codes'}>"
