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
_FCW, _FSW, _FTW, _MXCSR, _ST, _XMM, _BV, _YMM = 0, 2, 4, 24, 32, 160, 512, 576
MXCSR_INIT, FCW_INIT = 0x1F80, 0x37F


class Fpu:
    """The area as bytes, read once. Raises KvmError where the host has no KVM_CAP_XSAVE."""

    def __init__(self, vcpu: VCPU) -> None:
        self._area = new("struct kvm_xsave")
        ioctl(vcpu.fd, "KVM_GET_XSAVE", self._area.cdata)
        self.data = ffi.buffer(self._area.cdata)
        self.changed = False
        if not self.present & X87:
            self.data[:24] = FCW_INIT.to_bytes(2, "little") + bytes(22)
            self.data[_ST:_XMM] = bytes(_XMM - _ST)
        if not self.present & SSE:
            self.data[_XMM : _XMM + 256] = bytes(256)
        if not self.present & AVX:
            self.data[_YMM : _YMM + 256] = bytes(256)

    @property
    def present(self) -> int:
        """XSTATE_BV: which parts are not in their initial state."""
        return int.from_bytes(self.data[_BV : _BV + 8], "little")

    def touch(self, parts: int) -> None:
        """These parts are written to."""
        self.data[_BV : _BV + 8] = (self.present | parts).to_bytes(8, "little")
        self.changed = True

    def xmm(self, n: int) -> bytes:
        """XMM``n``."""
        return bytes(self.data[_XMM + 16 * n : _XMM + 16 * n + 16])

    def set_xmm(self, n: int, value: bytes) -> None:
        """XMM``n`` to 16 bytes; what is above them in YMM``n`` stays (SDM vol. 2 section 2.3.10)."""
        self.data[_XMM + 16 * n : _XMM + 16 * n + 16] = value
        self.touch(SSE)

    @property
    def mxcsr(self) -> int:
        """The SSE control and status register."""
        return int.from_bytes(self.data[_MXCSR : _MXCSR + 4], "little")

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self.data[_MXCSR : _MXCSR + 4] = value.to_bytes(4, "little")
        self.touch(SSE)

    @property
    def fcw(self) -> int:
        """The x87 control word."""
        return int.from_bytes(self.data[_FCW : _FCW + 2], "little")

    @property
    def fsw(self) -> int:
        """The x87 status word."""
        return int.from_bytes(self.data[_FSW : _FSW + 2], "little")

    def store(self, vcpu: VCPU) -> None:
        """KVM_SET_XSAVE, if anything has changed."""
        if self.changed:
            ioctl(vcpu.fd, "KVM_SET_XSAVE", self._area.cdata)
