"""What is behind a read-only memory slot: a write to it vanishes. Reads do not exit, so they do not come here."""

from __future__ import annotations

__all__ = ["Rom"]


class Rom:
    """Takes writes and forgets them."""

    name = "ROM"

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing happens."""
