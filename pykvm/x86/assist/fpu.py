"""x87, SSE and AVX registers of a vCPU, as KVM_GET_XSAVE gives them: the standard format (SDM vol. 1 sections 10.5.1, 13.4).

A part whose bit in XSTATE_BV is clear is in its initial state (SDM vol. 1 section 13.6); to write it sets the bit.
"""

from __future__ import annotations

from pykvm.abi import ffi, ioctl, new

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.vcpu import VCPU

__all__ = ["AVX", "SSE", "X87", "Fpu"]

X87, SSE, AVX = 1, 2, 4  # bits of XCR0 and XSTATE_BV
_FCW, _FSW, _FIP, _FDP, _MXCSR, _ST, _XMM, _BV, _YMM = 0, 2, 8, 16, 24, 32, 160, 512, 576
MXCSR_INIT, FCW_INIT = 0x1F80, 0x37F


class Fpu:
    """The area as bytes, read once. Raises KvmError where the host has no KVM_CAP_XSAVE."""

    def __init__(self, vcpu: VCPU) -> None:
        self._area = new("struct kvm_xsave")
        self.data = ffi.buffer(self._area.cdata)
        self.load(vcpu)
        self.changed = False

    def load(self, vcpu: VCPU) -> None:
        """KVM_GET_XSAVE; it may be another vCPU than the one whose state this becomes."""
        ioctl(vcpu.fd, "KVM_GET_XSAVE", self._area.cdata)
        self.changed = True
        if not self.present & X87:
            self.data[:24] = FCW_INIT.to_bytes(2, "little") + bytes(22)
            self.data[_ST:_XMM] = bytes(_XMM - _ST)
        if not self.present & (SSE | AVX):
            self.data[_MXCSR : _MXCSR + 4] = MXCSR_INIT.to_bytes(4, "little")
        if not self.present & SSE:
            self.data[_XMM : _XMM + 256] = bytes(256)
        if not self.present & AVX:
            self.data[_YMM : _YMM + 256] = bytes(256)

    def store(self, vcpu: VCPU, always: bool = False) -> None:
        """KVM_SET_XSAVE, if anything has changed."""
        if self.changed or always:
            ioctl(vcpu.fd, "KVM_SET_XSAVE", self._area.cdata)

    @property
    def present(self) -> int:
        """XSTATE_BV: which parts are not in their initial state."""
        return int.from_bytes(self.data[_BV : _BV + 8], "little")

    @property
    def mxcsr_mask(self) -> int:
        """The bits that MXCSR has (SDM vol. 1 section 11.6.6)."""
        return int.from_bytes(self.data[_MXCSR + 4 : _MXCSR + 8], "little") or 0xFFBF

    @property
    def all_masked(self) -> bool:
        """Whether the x87 control word masks every exception."""
        return bytes(self.data[_FCW : _FCW + 1])[0] & 0x3F == 0x3F

    @property
    def pending(self) -> bool:
        """Whether an unmasked x87 exception waits to be raised: FSW.ES."""
        return bytes(self.data[_FSW : _FSW + 1])[0] & 0x80 != 0

    def move_pointers(self, insn: tuple[int, int], data: tuple[int, int]) -> None:
        """FIP and FDP: where they are the first of a pair, they become the second."""
        for at, (old, now) in ((_FIP, insn), (_FDP, data)):
            if int.from_bytes(self.data[at : at + 8], "little") == old:
                self.data[at : at + 8] = now.to_bytes(8, "little")
