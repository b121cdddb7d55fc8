"""Which events are meant: ``reason=io,port=0x3f8`` (all must hold), ``hlt``, ``17`` (the 17th exit).

Keys: reason, port, gpa, msr, size, value, vcpu, rip (numbers, or ranges such as 0x3f8-0x3ff), dir (in, out, read, write), device and
symbol (a part of the name).
"""

from __future__ import annotations

from pykvm.errors import ConfigError
from pykvm.exit_reason import ExitReason, reason_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.debug.names import Names
    from pykvm.debug.trace import Event
    from pykvm.debug.where import Locator

    Test = Callable[[Event], bool]

__all__ = ["KEYS", "Condition", "is_condition", "reason_number"]

_NUMBERS = {
    "port": ExitReason.IO, "gpa": ExitReason.MMIO, "msr": None, "size": None, "value": None, "vcpu": None, "rip": None,
}  # fmt: skip
KEYS = ("reason", *_NUMBERS, "dir", "device", "symbol")
_MSR = (ExitReason.X86_RDMSR, ExitReason.X86_WRMSR)
_SHORT = {"rdmsr": "X86_RDMSR", "wrmsr": "X86_WRMSR", "window": "IRQ_WINDOW_OPEN", "pio": "IO"}


def reason_number(name: str) -> int | None:
    """KVM's number of a reason by its name, in any case, without X86_ if you like."""
    wanted = _SHORT.get(name.lower(), name.upper().replace("-", "_"))
    return next((int(reason) for reason in ExitReason if reason.name == wanted), None)


def is_condition(text: str) -> bool:
    """Whether ``text`` is meant as a condition on exits; else it may be a symbol."""
    return "=" in text or text.isdecimal() or reason_number(text) is not None


class Condition:
    """``matches(event)``. Raises ConfigError for what makes no sense."""

    def __init__(self, text: str, names: Names, locator: Locator | None = None) -> None:
        self.text = text
        self._names, self._locator = names, locator
        self._tests: list[Test] = []
        if text.isdecimal():
            number = int(text)
            self._tests.append(lambda e: e.n == number)
            return
        for part in text.split(","):
            key, equals, value = part.strip().partition("=")
            if not equals:
                key, value = "reason", key
            self._tests.append(self._test(key.strip().lower(), value.strip()))

    def matches(self, event: Event) -> bool:
        """Whether all of it holds."""
        return all(test(event) for test in self._tests)

    def _test(self, key: str, value: str) -> Test:
        if key == "reason":
            number = reason_number(value)
            if number is None:
                from difflib import get_close_matches

                near = get_close_matches(value.upper(), [r.name for r in ExitReason], 1)
                raise ConfigError(
                    f"{self.text!r}: no exit reason {value!r}; " + (f"did you mean {near[0]}?" if near else "use IO, MMIO, HLT ...")
                )
            return lambda e: e.reason == number
        if key in _NUMBERS:
            return self._number(key, value)
        if key == "dir":
            if value not in ("in", "out", "read", "write"):
                raise ConfigError(f"{self.text!r}: dir is in, out, read or write, not {value!r}")
            write = value in ("out", "write")
            return lambda e: bool(e.size) and bool(e.is_write) == write
        if key == "device":
            return lambda e: bool(e.size) and value.lower() in str(self._names.describe(e)).lower()
        if key == "symbol":
            locator = self._locator
            if locator is None:
                raise ConfigError(f"{self.text!r}: symbols are not known here")
            return lambda e: value in locator.place(e).symbol
        raise ConfigError(f"{self.text!r}: unknown key {key!r}; use one of {', '.join(KEYS)}")

    def _number(self, key: str, value: str) -> Test:
        low_text, dash, high_text = value.partition("-")
        try:
            low = int(low_text, 0)
            high = int(high_text, 0) if dash else low
        except ValueError:
            raise ConfigError(f"{self.text!r}: {value!r} is no number, such as 0x3f8, and no range, such as 0x3f8-0x3ff") from None
        reason = _NUMBERS[key]
        if key == "msr":
            return lambda e: e.reason in _MSR and low <= e.qualifier <= high
        if reason is not None:
            return lambda e: e.reason == reason and low <= e.qualifier <= high
        return lambda e: low <= int(getattr(e, key)) <= high

    def __repr__(self) -> str:
        return f"<Condition {self.text}>"


def name_of(event: Event) -> str:
    """ "IO out", "MMIO read", "HLT"."""
    name = reason_name(event.reason)
    if event.is_pio:
        return f"IO {'out' if event.is_write else 'in'}"
    return f"MMIO {'write' if event.is_write else 'read'}" if event.is_mmio else name
