"""Real mode's interrupt vectors, for a machine without a BIOS: every service answers that it does not exist.

Kernels that others load go back to real mode to ask the BIOS for memory, disks and a screen; without vectors, that would run what is at
address 0. The handler sets the caller's carry flag, by which most services report failure, and returns.
Sources: SDM vol. 3 section 21.1.4 (interrupt vector table); the stack of INT n in real mode, vol. 2 (INT n).
"""

from __future__ import annotations

from pykvm.platform import NO_SERVICE_GPA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.memory import GuestMemory

__all__ = ["place_vectors"]

# push bp; mov bp, sp; or byte ptr [bp + 6], 1 (FLAGS, above BP, IP and CS); pop bp; iret
_NO_SERVICE = b"\x55\x89\xe5\x80\x4e\x06\x01\x5d\xcf"


def place_vectors(memory: GuestMemory) -> tuple[int, int]:
    """Write the 256 vectors at gpa 0 and the handler at NO_SERVICE_GPA; returns where that is, as (start, end)."""
    memory.write(NO_SERVICE_GPA, _NO_SERVICE)
    segment, offset = (NO_SERVICE_GPA & 0xF0000) >> 4, NO_SERVICE_GPA & 0xFFFF
    memory.write(0, (offset | segment << 16).to_bytes(4, "little") * 256)
    return NO_SERVICE_GPA, NO_SERVICE_GPA + len(_NO_SERVICE)
