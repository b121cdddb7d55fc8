"""Why an instruction faults, and why nobody handled it: derived from segments, control registers, gates and page tables.

``first_exception(view)`` checks what the CPU checks, in its order (SDM vol. 3 table 6-2): the fetch, the decoding, whether the instruction
exists here (features.py), what it may do (control.py, segments.py), then its memory (memory.py). ``undeliverable()`` does
the same for the way through the IDT (delivery.py). Nothing is guessed: no reason found is said so.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["VECTORS", "Cause", "name_of"]

# SDM vol. 3 table 6-1
VECTORS: Final = {
    0: "#DE (divide error)", 1: "#DB (debug)", 2: "NMI", 3: "#BP (breakpoint)", 4: "#OF (overflow)", 5: "#BR (bound range)",
    6: "#UD (invalid opcode)", 7: "#NM (no x87)", 8: "#DF (double fault)", 10: "#TS (invalid TSS)",
    11: "#NP (segment not present)", 12: "#SS (stack fault)", 13: "#GP (general protection)", 14: "#PF (page fault)",
    16: "#MF (x87 error)", 17: "#AC (alignment check)", 18: "#MC (machine check)", 19: "#XM (SIMD error)", 21: "#CP (control protection)",
}  # fmt: skip


def name_of(vector: int) -> str:
    """#GP and the like; "vector n" for those without a name."""
    return VECTORS.get(vector, f"vector {vector}").partition(" (")[0]


class Cause:
    """Why an instruction cannot go on: the ``vector`` that it raises, and ``why``, a sentence. ``linear``: the address of a page fault.

    ``software``: raised by INT n, INT3, INTO, which must pass the gate's DPL.
    """

    __slots__ = ("linear", "software", "vector", "why")

    def __init__(self, vector: int | None, why: str, linear: int | None = None, software: bool = False) -> None:
        self.vector, self.why, self.linear, self.software = vector, why, linear, software

    def __str__(self) -> str:
        name = "" if self.vector is None else name_of(self.vector)
        return self.why if not name or name in self.why or self.software else f"{self.why} ({name})"

    def __repr__(self) -> str:
        return f"<Cause {self}>"
