"""What a run of a machine gave, for programs and for JSON."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.machine import Machine
    from pykvm.records import StatRow
    from pykvm.runner import Stop

__all__ = ["Result"]


class Result:
    """What a run gave.

    ``reason``: "halted" (HLT), "exit" (debug exit), "reset", "power-off", "stopped" (stop() was called), "timeout" or
    "migrated" (it goes on on another host).
    ``exit_code``: the debug exit's value, 0 when the guest halted or powered off, else None.
    ``console``: what the guest has printed so far. ``debug_port``: what its firmware has logged.
    ``exits``: exits by reason since the machine was made.
    ``assisted``: instructions that KVM's emulator did not know and user space has finished, by mnemonic.
    ``unclaimed``: accesses that no device claimed, (space, address, size, is_write) to their number.
    ``stats``: with ``stats=True``, a row for each kind of exit (records.StatRow), else None.
    ``explanation``: where and why the guest was stopped by the time limit, else an empty string.
    """

    __slots__ = ("_counts", "assisted", "console", "debug_port", "exit_code", "explanation", "reason", "stats", "unclaimed")

    def __init__(self, machine: Machine, stop: Stop) -> None:
        self.reason = stop.reason
        self.exit_code = stop.code if stop.reason == "exit" else 0 if stop.reason in ("halted", "power-off") else None
        self.console, self.debug_port = machine.console.text, machine.debug_port.text
        self._counts = machine.exit_counts()
        self.assisted = machine.assisted()
        self.unclaimed = dict(machine.bus.unclaimed)
        self.stats: list[StatRow] | None = machine.stats_rows()
        self.explanation = ""

    @property
    def exits(self) -> dict[str, int]:
        """Exits by KVM's reason, e.g. {"IO": 23, "HLT": 1}; most frequent first."""
        from pykvm.exit_reason import reason_name

        return {reason_name(r): n for r, n in sorted(self._counts.items(), key=lambda item: -item[1])}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "reason": self.reason,
            "exit_code": self.exit_code,
            "console": self.console,
            "debug_port": self.debug_port,
            "exits": self.exits,
            "assisted": self.assisted,
            "unclaimed": [
                {"space": space, "address": at, "size": size, "direction": "write" if is_write else "read", "count": n}
                for (space, at, size, is_write), n in self.unclaimed.items()
            ],
            "stats": None if self.stats is None else [row.as_dict() for row in self.stats],
            "explanation": self.explanation or None,
        }

    def _repr_html_(self) -> str:
        from pykvm.debug.html import result_html

        return result_html(self)

    def __repr__(self) -> str:
        code = f" code={self.exit_code}" if self.exit_code is not None else ""
        return f"<Result {self.reason}{code}, {sum(self._counts.values())} exits, {len(self.console)} characters>"
