"""The state of one vCPU as plain data, and the kernel's structures (vcpustructs.py) made of it.

The components of the XSAVE area lie where the CPU that made it has them (CPUID leaf 0xD): AMD has AVX-512 elsewhere than Intel, so a state
carries that layout too, and they are moved. Source: SDM vol. 1 section 13.4.
"""

from __future__ import annotations

from pykvm.abi import ffi, lib
from pykvm.cpuid import Cpuid
from pykvm.errors import StateError
from pykvm.state.plain import Fields, Hex, Int, Kernel, List, Optional, Row, plain, struct
from pykvm.state.vcpustructs import VcpuStructs, capture

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.vcpu import VCPU
    from pykvm.vm import VM

__all__ = ["SHAPE", "moved", "read", "structs_of", "xsave_layout"]

_XSAVE_MOST = 1 << 16
_LEGACY, _HEADER = 512, 64  # bytes of an XSAVE area: FXSAVE's part, and the header, which begins with XSTATE_BV
_VMCB_COPIES = (0x568, 0x668)  # DR6 and G_PAT, 8 bytes each (APM vol. 2 appendix B)
_VMCS12_LEFT = (0x1A0,)  # the guest-linear address
_ROW = List(Int(32), count=7)
SHAPE = Fields({
    "id": Int(32), "asked": List(_ROW, 256), "cpuid": List(_ROW, 256), "tsc_khz": Int(32), "regs": Kernel("struct kvm_regs"),
    "sregs": Kernel("struct kvm_sregs2"), "xcrs": List(Row(Int(32), Int(64)), 16), "xsave": Hex(_XSAVE_MOST),
    "debugregs": Kernel("struct kvm_debugregs"), "lapic": Optional(Hex(4096)), "msrs": List(Row(Int(32), Int(64)), 1024),
    "mp_state": Int(8), "events": Kernel("struct kvm_vcpu_events"), "nested": Optional(Hex(1 << 16)),
})  # fmt: skip


# --- reading ---------------------------------------------------------------------------------------------------------


def read(vm: VM, vcpu: VCPU, layout: list[list[int]]) -> dict[str, Any]:
    """All of it; ``layout`` is this host's (xsave_layout()). The vCPU's last access must be complete (Runner.settle)."""
    structs = capture(vm, vcpu)
    sregs = plain(structs.sregs)
    if "interrupt_bitmap" in sregs:  # a struct kvm_sregs; an interrupt that waits is in the events too
        del sregs["interrupt_bitmap"]
        sregs |= {"flags": 0, "pdptrs": [0, 0, 0, 0]}
    xcrs = structs.xcrs
    return {
        "id": vcpu.id,
        "asked": structs.asked.rows(),  # whole: KVM may fill in a row that asks for zeros
        "cpuid": [row for row in vcpu.get_cpuid2().rows() if any(row[3:])],
        "tsc_khz": structs.tsc_khz,
        "regs": plain(structs.regs),
        "sregs": sregs,
        "xcrs": [] if xcrs is None else [[row.xcr, row.value] for row in xcrs.xcrs[: xcrs.nr_xcrs]],
        "xsave": _canonical(structs.xsave, layout).rstrip(b"\0").hex(),
        "debugregs": plain(structs.debugregs),
        "lapic": None if structs.lapic is None else _with_ppr(structs.lapic.to_bytes()).hex(),
        "msrs": [[index, value] for index, value in structs.msrs.items()],
        "mp_state": structs.mp_state,
        "events": plain(structs.events),
        "nested": None if structs.nested is None else _settled(structs.nested).hex(),
    }


def xsave_layout(cpuid: Cpuid) -> list[list[int]]:
    """(component, offset, size) of each component beyond x87 and SSE that leaf 0xD places in the standard format."""
    return [[index, ebx, eax] for function, index, _, eax, ebx, *_ in cpuid.rows() if function == 0xD and index > 1 and ebx]


def _canonical(area: bytes, layout: list[list[int]]) -> bytes:
    """The area with XSTATE_BV's bits off for components in their initial state, which CPUs may or may not do by themselves."""
    in_use = int.from_bytes(area[_LEGACY : _LEGACY + 8], "little")
    keep = in_use & ~sum(1 << component for component, offset, size in layout if not any(area[offset : offset + size]))
    if not any(area[160:416]) and area[24:28] == b"\x80\x1f\0\0":  # XMM registers; KVM takes MXCSR only with SSE's or AVX's bit
        keep &= ~2
    if not any(area[2:24]) and area[:2] == b"\x7f\3" and not any(area[32:160]):
        keep &= ~1
    return area[:_LEGACY] + keep.to_bytes(8, "little") + area[_LEGACY + 8 :]


def _with_ppr(lapic: bytes) -> bytes:
    """The LAPIC's page with its PPR as TPR and ISR have it, which KVM works out only when it needs it (SDM vol. 3 section 11.8.3.1)."""
    in_service = sum(int.from_bytes(lapic[0x100 + 16 * i : 0x104 + 16 * i], "little") << 32 * i for i in range(8))
    tpr, vector = lapic[0x80], max(in_service.bit_length() - 1, 0)
    ppr = tpr if tpr >> 4 >= vector >> 4 else vector & 0xF0
    return lapic[:0xA0] + ppr.to_bytes(4, "little") + lapic[0xA4:]


def _settled(nested: bytes) -> bytes:
    """While L2 runs, nested state ends with what L1 has asked for: SVM's with its VMCB, VMX's with a VMCS in KVM's layout (struct vmcs12).

    Some fields are no state: the VMCB's DR6 and G_PAT, which KVM writes from debugregs and IA32_PAT and does not take back, and the VMCS's
    guest-linear address, which is whatever the CPU's last VM exit has left.
    """
    state = ffi.from_buffer("struct kvm_nested_state *", nested)
    if not state.flags & lib.KVM_STATE_NESTED_GUEST_MODE:
        return nested
    result = bytearray(nested)
    for offset in _VMCB_COPIES if state.format == lib.KVM_STATE_NESTED_FORMAT_SVM else _VMCS12_LEFT:
        at = ffi.sizeof("struct kvm_nested_state") + offset
        if at + 8 <= len(result):
            result[at : at + 8] = bytes(8)
    return bytes(result)


# --- writing ---------------------------------------------------------------------------------------------------------


def structs_of(state: dict[str, Any], layout: list[list[int]], here: list[list[int]], sregs2: bool) -> VcpuStructs:
    """The structures that a vCPU of this host takes. ``layout`` is that of the state's XSAVE area, ``here`` this host's; ``sregs2``: it has
    KVM_CAP_SREGS2. Raises StateError for a live XSAVE component that has no place here."""
    sregs, xcrs, lapic = state["sregs"], state["xcrs"], None
    if not sregs2:  # PDPTRs come from memory then
        sregs = {name: value for name, value in sregs.items() if name not in ("flags", "pdptrs")}
    if state["lapic"] is not None:
        lapic, size = struct("struct kvm_lapic_state", {}), ffi.sizeof("struct kvm_lapic_state")
        ffi.memmove(lapic.cdata, bytes.fromhex(state["lapic"]).ljust(size, b"\0"), size)
    return VcpuStructs(
        asked=Cpuid.of_rows(state["asked"]),
        tsc_khz=state["tsc_khz"],
        regs=struct("struct kvm_regs", state["regs"]),
        sregs=struct("struct kvm_sregs2" if sregs2 else "struct kvm_sregs", sregs),
        xcrs=struct("struct kvm_xcrs", {"nr_xcrs": len(xcrs), "xcrs": [{"xcr": xcr, "value": value} for xcr, value in xcrs]}),
        xsave=moved(bytes.fromhex(state["xsave"]), layout, here),
        debugregs=struct("struct kvm_debugregs", state["debugregs"]),
        lapic=lapic,
        msrs=dict(state["msrs"]),
        mp_state=state["mp_state"],
        events=struct("struct kvm_vcpu_events", state["events"]),
        nested=None if state["nested"] is None else _whole(bytes.fromhex(state["nested"])),
    )


def _whole(nested: bytes) -> bytes:
    """KVM reads as many bytes as ``struct kvm_nested_state`` says that it has."""
    if len(nested) < ffi.sizeof("struct kvm_nested_state") or ffi.from_buffer("struct kvm_nested_state *", nested).size != len(nested):
        raise StateError("nested", f"its size is not that of its {len(nested)} bytes")
    return nested


def moved(area: bytes, layout: list[list[int]], here: list[list[int]]) -> bytes:
    """An XSAVE area in the layout of this host. Components that are in their initial state are left out.

    Raises StateError for a live component that has no place here.
    """
    if layout == here or len(area) <= _LEGACY:
        return area
    places = {component: (offset, size) for component, offset, size in here}
    in_use = int.from_bytes(area[_LEGACY : _LEGACY + 8], "little")
    result = bytearray(area[: _LEGACY + _HEADER].ljust(_LEGACY + _HEADER, b"\0"))
    known = 3
    for component, offset, size in layout:
        known |= 1 << component
        if not in_use >> component & 1:
            continue
        data = area[offset : offset + size]
        if places.get(component, (0, 0))[1] != size:
            if any(data):
                raise StateError("xsave", f"component {component} is in use, and this host has no place for it")
            in_use &= ~(1 << component)
            continue
        to = places[component][0]
        if len(result) < to + size:
            result.extend(bytes(to + size - len(result)))
        result[to : to + len(data)] = data
    if in_use & ~known:
        raise StateError("xsave", f"components {in_use & ~known:#x} are in use, and the state does not say where they are")
    result[_LEGACY : _LEGACY + 8] = in_use.to_bytes(8, "little")
    return bytes(result)
