"""Hypercalls where VMCALL does not reach user space: arguments in registers at ports or in MMIO, and a write that makes the call.

| offset | width   | write                      | read                             |
|--------|---------|----------------------------|----------------------------------|
| 0-15   | 32 bits | arguments 0 to 3           | the same                         |
| 16     | 32 bits | the number: makes the call | the result, low 32 bits          |
| 20     | 32 bits | -                          | the result, high 32 bits         |

The result is that of KVM's own hypercalls (Linux Documentation/virt/kvm/x86/hypercalls.rst): 0 or more, or a negative errno as 64 bits.
One set of registers serves all vCPUs: guests with several take a lock around a call.
"""

from __future__ import annotations

from pykvm.devices.saved import Saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["LENGTH", "HypercallPort"]

LENGTH = 24
_NUMBER, _HIGH = 4, 5


class HypercallPort:
    """``call(number, arguments) -> int`` carries a hypercall out."""

    name = "hypercall"

    def __init__(self, call: Callable[[int, tuple[int, ...]], int]) -> None:
        self.call = call
        self.arguments = [0, 0, 0, 0]
        self.result = 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Only aligned 32-bit writes do something."""
        register, odd = divmod(offset, 4)
        if odd or size != 4:
            return
        if register < _NUMBER:
            self.arguments[register] = value
        elif register == _NUMBER:
            self.result = self.call(value, tuple(self.arguments)) & 0xFFFFFFFFFFFFFFFF

    def read(self, offset: int, size: int) -> int:
        """Any part of an argument or of the result."""
        registers = [*self.arguments, self.result & 0xFFFFFFFF, self.result >> 32]
        whole = b"".join(register.to_bytes(4, "little") for register in registers)
        return int.from_bytes(whole[offset : offset + size], "little")

    def save(self) -> dict[str, Any]:
        """The registers. What the calls have set up is whoever's answers them."""
        return {"version": 1, "arguments": list(self.arguments), "result": self.result}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        saved = Saved(state, self.name, 1)
        self.arguments = saved.numbers("arguments", 0xFFFFFFFF, 4)
        self.result = saved.number("result", (1 << 64) - 1)
