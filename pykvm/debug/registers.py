"""Registers of a stopped vCPU by name, as integers: general, segment, control, x87, SSE and AVX.

>>> read_register(vcpu, "rip"), read_register(vcpu, "xmm0")
(1048576, 0)

x87, SSE and AVX come from KVM_GET_XSAVE in its standard format (SDM vol. 1 sections 13.4, 10.5.1), or from KVM_GET_FPU where KVM has no
XSAVE; segment bases are fs_base and gs_base, those of the others cannot be set in 64-bit mode.
"""

from __future__ import annotations

from pykvm.abi import ioctl, new
from pykvm.errors import ConfigError, KvmError
from pykvm.x86.regs import CR0

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.vcpu import VCPU

__all__ = ["GENERAL", "SEGMENTS", "read_register", "registers", "write_register"]

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)), "rip")
SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
BASES = tuple(f"{name}_base" for name in SEGMENTS)
DEBUG = (*(f"dr{n}" for n in range(4)), "dr6", "dr7")
# name -> offset and size in the legacy region of an XSAVE area (SDM vol. 1 table 13-1); the tag word is abridged there
_LEGACY = {
    "fctrl": (0, 2), "fstat": (2, 2), "fop": (6, 2), "fioff": (8, 4), "fiseg": (12, 4), "fooff": (16, 4), "foseg": (20, 4),
    "mxcsr": (24, 4),
    **{f"st{n}": (32 + 16 * n, 10) for n in range(8)},
    **{f"xmm{n}": (160 + 16 * n, 16) for n in range(16)},
}  # fmt: skip
_XSTATE_BV, _AVX_AT = 512, 576
_AVX = {f"ymm{n}h": (_AVX_AT + 16 * n, 16) for n in range(16)}


def registers() -> tuple[str, ...]:
    """All names."""
    return (*GENERAL, "eflags", *SEGMENTS, *BASES, *CONTROL, *DEBUG, "ftag", *_LEGACY, *_AVX)


class XState:
    """x87, SSE and AVX of a vCPU: read once, changed, set back."""

    def __init__(self, vcpu: VCPU) -> None:
        self.vcpu = vcpu
        self.area = new("struct kvm_xsave")
        ioctl(vcpu.fd, "KVM_GET_XSAVE", self.area.cdata)
        self.data = bytearray(self.area.to_bytes()[:4096])

    def read(self, name: str) -> int:
        """A field; 0 for state that is in its initial configuration."""
        if name == "ftag":
            return self._full_tag()
        at, size = _LEGACY.get(name) or _AVX[name]
        if not self.present(at) and name not in ("mxcsr", "fctrl"):
            return 0
        if name == "fctrl" and not self.present(at):
            return 0x37F
        return int.from_bytes(self.data[at : at + size], "little")

    def present(self, at: int) -> bool:
        """Whether XSTATE_BV says that the component at this offset is there."""
        bit = 2 if at >= _AVX_AT else 1 if at >= 160 or at == 24 else 0
        return bool(int.from_bytes(self.data[_XSTATE_BV : _XSTATE_BV + 8], "little") >> bit & 1)

    def write(self, name: str, value: int) -> None:
        """Change a field and give all of it to KVM."""
        if name == "ftag":
            abridged = sum(1 << n for n in range(8) if value >> 2 * n & 3 != 3)
            self.data[4] = abridged
            at = 0
        else:
            at, size = _LEGACY.get(name) or _AVX[name]
            if not self.present(at) and at < 160 and at != 24:
                self.data[0:24] = (0x37F).to_bytes(2, "little") + bytes(22)
            self.data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        bv = int.from_bytes(self.data[_XSTATE_BV : _XSTATE_BV + 8], "little")
        bv |= 4 if at >= _AVX_AT else 2 if at >= 160 or at == 24 else 1
        self.data[_XSTATE_BV : _XSTATE_BV + 8] = bv.to_bytes(8, "little")
        for i in range(1024):
            self.area.cdata.region[i] = int.from_bytes(self.data[4 * i : 4 * i + 4], "little")
        ioctl(self.vcpu.fd, "KVM_SET_XSAVE", self.area.cdata, f"{name} = {value:#x}")

    def _full_tag(self) -> int:
        """The tag word of FSAVE from FXSAVE's bit a register (SDM vol. 1 section 10.5.1.1): 0 valid, 1 zero, 2 special, 3 empty."""
        if not self.present(0):
            return 0xFFFF
        top = self.data[3] >> 3 & 7
        word = 0
        for n in range(8):
            at = 32 + 16 * ((n - top) & 7)
            exponent, mantissa = int.from_bytes(self.data[at + 8 : at + 10], "little") & 0x7FFF, self.data[at : at + 8]
            if not self.data[4] >> n & 1:
                tag = 3
            elif exponent == 0 and not any(mantissa):
                tag = 1
            elif exponent in (0, 0x7FFF) or not mantissa[7] & 0x80:
                tag = 2
            else:
                tag = 0
            word |= tag << 2 * n
        return word


def read_register(vcpu: VCPU, name: str) -> int:
    """The value. Raises ConfigError for a name that is none."""
    if name in GENERAL:
        return int(getattr(vcpu.get_regs(), name))
    if name in ("eflags", "rflags"):
        return int(vcpu.get_regs().rflags)
    if name in SEGMENTS:
        return int(getattr(vcpu.get_sregs(), name).selector)
    if name in BASES:
        return int(getattr(vcpu.get_sregs(), name[:2]).base)
    if name in CONTROL:
        return int(getattr(vcpu.get_sregs(), name))
    if name in DEBUG:
        debug = vcpu.get_debugregs()
        return int(debug.db[int(name[2])] if name[2] < "4" else getattr(debug, name))
    if name in _LEGACY or name in _AVX or name == "ftag":
        return XState(vcpu).read(name)
    raise _unknown(name)


def write_register(vcpu: VCPU, name: str, value: int) -> None:
    """Set it. Raises ConfigError for a name that is none and a value that cannot be; KvmError for what KVM refuses."""
    if value < 0:
        raise ConfigError(f"{name} = {value}: registers hold no negative numbers")
    if name in GENERAL or name in ("eflags", "rflags"):
        regs = vcpu.get_regs()
        _fits(name, value, 64)
        setattr(regs, "rflags" if name == "eflags" else name, value)
        vcpu.set_regs(regs)
    elif name in SEGMENTS:
        _set_selector(vcpu, name, value)
    elif name in BASES or name in CONTROL:
        _fits(name, value, 64)
        sregs = vcpu.get_sregs()
        if name in BASES:
            getattr(sregs, name[:2]).base = value
        else:
            setattr(sregs, name, value)
        vcpu.set_sregs(sregs)
    elif name in DEBUG:
        _fits(name, value, 64)
        debug = vcpu.get_debugregs()
        if name[2] < "4":
            debug.db[int(name[2])] = value
        else:
            setattr(debug, name, value)
        ioctl(vcpu.fd, "KVM_SET_DEBUGREGS", debug.cdata, f"{name} = {value:#x}")
    elif name in _LEGACY or name in _AVX or name == "ftag":
        try:
            XState(vcpu).write(name, value)
        except KvmError:
            raise ConfigError(f"KVM does not take {value:#x} for {name}") from None
    else:
        raise _unknown(name)


def _set_selector(vcpu: VCPU, name: str, value: int) -> None:
    """In real mode a selector is a base; in other modes it stands for a descriptor, which is not to be made up here."""
    sregs = vcpu.get_sregs()
    segment = getattr(sregs, name)
    if segment.selector == value:
        return
    if sregs.cr0 & CR0.PE:
        raise ConfigError(f"{name} cannot be set outside real mode: a selector stands for a descriptor")
    _fits(name, value, 16)
    segment.selector, segment.base = value, value << 4
    vcpu.set_sregs(sregs)


def _fits(name: str, value: int, bits: int) -> None:
    if value >> bits:
        raise ConfigError(f"{name} = {value:#x}: it has {bits} bits")


def _unknown(name: str) -> ConfigError:
    from difflib import get_close_matches

    near = get_close_matches(name, registers(), 1)
    return ConfigError(f"unknown register {name!r}; did you mean {near[0]}?" if near else f"unknown register {name!r}")
