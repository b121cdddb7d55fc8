"""MSRs whose accesses user space answers, or refuses: KVM_CAP_X86_USER_SPACE_MSR and KVM_X86_SET_MSR_FILTER.

KVM carries out an access unless the filter denies it; a denied one, and one to an MSR that KVM does not know, exits with X86_RDMSR or
X86_WRMSR. A handler answers; without one the guest gets #GP, as from a CPU that lacks the MSR.
Sources: api.rst 4.97 (filter), 7.21 (user-space MSRs), 5 (KVM_EXIT_X86_RDMSR).
"""

from __future__ import annotations

from pykvm.abi import lib
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.vm import VM

__all__ = ["MsrHandlers"]

_BITMAP = 0x600 * 8  # MSRs that one range can cover (KVM_MSR_FILTER_MAX_BITMAP_SIZE bytes)
_X2APIC = range(0x800, 0x900)


class MsrHandlers:
    """The MSRs of a VM that do not belong to KVM alone. ``refused``: (MSR, is_write) -> how often the guest got #GP."""

    def __init__(self, vm: VM) -> None:
        vm.system.require("KVM_CAP_X86_USER_SPACE_MSR", "MSR exits to user space")
        self._vm = vm
        self._read: dict[int, Callable[[], int | None]] = {}
        self._write: dict[int, Callable[[int], object]] = {}
        self._denied: set[int] = set()
        self.refused: dict[tuple[int, bool], int] = {}
        wanted = lib.KVM_MSR_EXIT_REASON_UNKNOWN | lib.KVM_MSR_EXIT_REASON_INVAL | lib.KVM_MSR_EXIT_REASON_FILTER
        vm.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", wanted)

    def on(self, index: int, read: Callable[[], int | None] | None = None, write: Callable[[int], object] | None = None) -> None:
        """``read()`` gives the MSR's 64-bit value, or None for #GP; ``write(value)`` takes it, False means #GP. Without one: #GP."""
        self._deny(index)
        if read is not None:
            self._read[index] = read
        if write is not None:
            self._write[index] = write

    def deny(self, index: int) -> None:
        """The guest gets #GP from RDMSR and WRMSR of it."""
        self._deny(index)

    def _deny(self, index: int) -> None:
        if not 0 <= index < 1 << 32:
            raise ConfigError(f"an MSR's number has 32 bits: {index:#x}")
        if index in _X2APIC:
            raise ConfigError(f"MSR {index:#x} belongs to the x2APIC, and KVM filters none of those (0x800-0x8ff)")
        self._denied.add(index)
        try:
            self._vm.set_msr_filter(self._ranges())
        except BaseException:
            self._denied.discard(index)
            raise

    def _ranges(self) -> list[tuple[int, int, bytes]]:
        """As few ranges as cover the denied MSRs: a 0 bit denies, so all others are 1."""
        groups: list[list[int]] = []
        for index in sorted(self._denied):
            if groups and index - groups[-1][0] < _BITMAP:
                groups[-1].append(index)
            else:
                groups.append([index])
        if len(groups) > lib.KVM_MSR_FILTER_MAX_RANGES:
            raise ConfigError(f"KVM filters MSRs in up to {lib.KVM_MSR_FILTER_MAX_RANGES} ranges; these need {len(groups)}")
        ranges = []
        for group in groups:
            bitmap = bytearray(b"\xff" * ((group[-1] - group[0]) // 8 + 1))
            for index in group:
                bitmap[(index - group[0]) // 8] &= ~(1 << (index - group[0]) % 8)
            ranges.append((lib.KVM_MSR_FILTER_READ | lib.KVM_MSR_FILTER_WRITE, group[0], bytes(bitmap)))
        return ranges

    # --- what the run loop asks --------------------------------------------------------------------------------------

    def read(self, index: int) -> int | None:
        """The value for a RDMSR that has exited, or None: #GP."""
        handler = self._read.get(index)
        value = None if handler is None else handler()
        if value is None:
            self._refuse(index, False)
            return None
        return value & 0xFFFFFFFFFFFFFFFF

    def write(self, index: int, value: int) -> bool:
        """Whether a WRMSR that has exited is accepted; if not, #GP."""
        handler = self._write.get(index)
        if handler is None or handler(value) is False:
            self._refuse(index, True)
            return False
        return True

    def _refuse(self, index: int, is_write: bool) -> None:
        key = (index, is_write)
        if key in self.refused or len(self.refused) < 256:
            self.refused[key] = self.refused.get(key, 0) + 1

    def __repr__(self) -> str:
        return f"<MsrHandlers {', '.join(f'{index:#x}' for index in sorted(self._denied)) or 'none'}>"
