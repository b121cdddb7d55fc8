"""Reading back what a device has saved: each field checked, for the file that it comes from is hostile.

A device's ``save()`` gives a dictionary of JSON's types with its ``version``; ``load(state)`` takes it back. It drives no line and calls
nothing: what a line's level did is part of the interrupt controller's own state.
"""

from __future__ import annotations

from pykvm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Saved"]


class Saved:
    """The state of the device ``name``, of ``version`` or an older one. Raises StateError that names the field."""

    def __init__(self, state: Any, name: str, version: int) -> None:
        self._state, self._name = state, name
        if not isinstance(state, dict):
            raise StateError(name, f"its state is {type(state).__name__}, not fields by name")
        self.version = self.number("version", 1 << 16)
        if self.version > version:
            raise StateError(name, f"its state is of version {self.version}, this pykvm knows up to {version}: use a newer pykvm")

    def _field(self, field: str) -> Any:
        if field not in self._state:
            raise StateError(f"{self._name}.{field}", "it is missing")
        return self._state[field]

    def number(self, field: str, most: int, least: int = 0) -> int:
        """An integer from ``least`` to ``most``."""
        value = self._state.get(field)
        if type(value) is int and least <= value <= most:
            return value
        return self._check(self._field(field), field, most, least)

    def _check(self, value: Any, field: str, most: int, least: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise StateError(f"{self._name}.{field}", f"{str(value)[:40]} is no integer from {least} to {most:#x}")
        return value

    def flag(self, field: str) -> bool:
        """True or False."""
        value = self._field(field)
        if type(value) is not bool:
            raise StateError(f"{self._name}.{field}", f"{str(value)[:40]} is neither true nor false")
        return value

    def numbers(self, field: str, most: int, count: int | None = None, at_most: int = 1 << 20) -> list[int]:
        """A list of integers up to ``most``: ``count`` of them, or ``at_most``."""
        values = self._field(field)
        if not isinstance(values, list) or len(values) > at_most or (count is not None and len(values) != count):
            raise StateError(f"{self._name}.{field}", f"it is no list of {at_most if count is None else count} numbers")
        return [self._check(value, f"{field}[{i}]", most, 0) for i, value in enumerate(values)]

    def pairs(self, field: str, most: int, at_most: int = 1 << 16) -> list[tuple[int, int]]:
        """A list of pairs of integers up to ``most``."""
        values = self._field(field)
        if not isinstance(values, list) or len(values) > at_most or not all(isinstance(v, list) and len(v) == 2 for v in values):
            raise StateError(f"{self._name}.{field}", "it is no list of pairs")
        return [(self._check(a, f"{field}[{i}]", most, 0), self._check(b, f"{field}[{i}]", most, 0)) for i, (a, b) in enumerate(values)]

    def rows(self, field: str, columns: int, at_most: int) -> list[list[Any]]:
        """A list of lists of so many columns, whose content is still to be checked."""
        values = self._field(field)
        if not isinstance(values, list) or len(values) > at_most or not all(isinstance(v, list) and len(v) == columns for v in values):
            raise StateError(f"{self._name}.{field}", f"it is no list of rows of {columns}")
        return values

    def bytes(self, field: str, at_most: int, count: int | None = None) -> bytes:
        """Bytes, which are written in hex."""
        text = self._field(field)
        try:
            data = bytes.fromhex(text)
        except (TypeError, ValueError):
            raise StateError(f"{self._name}.{field}", "it is no text of hex digits") from None
        if len(data) > at_most or (count is not None and len(data) != count):
            raise StateError(f"{self._name}.{field}", f"{len(data)} bytes, where {at_most if count is None else count} belong")
        return data
