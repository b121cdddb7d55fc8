"""The state of one vCPU as plain data: read from KVM, and written to a new vCPU in the order that KVM needs.

**The order.** CPUID decides what the rest may hold (CR4, XCR0, MSRs), so it comes first, when the vCPU is new: KVM takes no other after
a run. Then the TSC's frequency; IA32_FEATURE_CONTROL, which nested state needs; sregs (paging, EFER, the APIC base, which the LAPIC needs)
and nested state; XCR0 and the XSAVE area; general and debug registers; the LAPIC before the MSRs, for IA32_TSC_DEADLINE counts only while
the LAPIC's timer is in that mode, and that MSR after IA32_TSC, which it is compared with; mp_state after sregs, which may change it; and
last the events, for KVM_SET_REGS drops exceptions that wait. Without an in-kernel LAPIC, CR8 is also in kvm_run, where KVM takes it from.

x87 and SSE registers are in the XSAVE area (KVM_SET_FPU before the first run is lost on some hosts). Its components lie where the CPU that
made it has them (CPUID leaf 0xD): AMD has AVX-512 elsewhere than Intel, so a state carries that layout too, and they are moved.
Sources: api.rst 4.1 to 4.43, 4.131 (sregs2), 4.134 (xsave2); SDM vol. 1 section 13.4 (XSAVE area).
"""

from __future__ import annotations

from functools import cache

from pykvm.abi import ffi, lib
from pykvm.cpuid import Cpuid
from pykvm.errors import KvmError, StateError
from pykvm.state.plain import Fields, Hex, Int, Kernel, List, Optional, Row, plain, struct
from pykvm.x86.msr import MSRS, msr_name
from pykvm.x86.regs import EFER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pykvm.system import System
    from pykvm.vcpu import VCPU
    from pykvm.vm import VM

__all__ = ["SHAPE", "capability_msrs", "msr_indices", "read", "write", "xsave_layout"]

TSC, TSC_DEADLINE, FEATURE_CONTROL = 0x10, 0x6E0, 0x3A
HYPERV, HYPERV_GUEST_OS_ID = range(0x40000000, 0x40000200), 0x40000000
_XSAVE_MOST = 1 << 16
_LEGACY, _HEADER = 512, 64  # bytes of an XSAVE area: FXSAVE's part, and the header, which begins with XSTATE_BV
_ROW = List(Int(32), count=7)
SHAPE = Fields({
    "id": Int(32), "asked": List(_ROW, 256), "cpuid": List(_ROW, 256), "tsc_khz": Int(32), "regs": Kernel("struct kvm_regs"),
    "sregs": Kernel("struct kvm_sregs2"), "xcrs": List(Row(Int(32), Int(64)), 16), "xsave": Hex(_XSAVE_MOST),
    "debugregs": Kernel("struct kvm_debugregs"), "lapic": Optional(Hex(4096)), "msrs": List(Row(Int(32), Int(64)), 1024),
    "mp_state": Int(8), "events": Kernel("struct kvm_vcpu_events"), "nested": Optional(Hex(1 << 16)),
})  # fmt: skip

# MTRRs are state that KVM_GET_MSR_INDEX_LIST does not have.
_MTRRS = [number for name, number in MSRS.items() if name.startswith("IA32_MTRR_") and number <= 0x2FF]


@cache
def capability_msrs() -> frozenset[int]:
    """MSRs that say what the CPU or KVM is, not what the guest has done: where a host has others, the guest sees those."""
    names = (
        "IA32_ARCH_CAPABILITIES", "MSR_PLATFORM_INFO", "IA32_MISC_ENABLE", "IA32_BIOS_SIGN_ID", "IA32_PERF_CAPABILITIES", "IA32_MCG_CAP",
        "IA32_MCG_CTL", "IA32_MTRRCAP", "IA32_CORE_CAPABILITIES", "MSR_KVM_POLL_CONTROL", "DE_CFG", "IA32_SMBASE", "IA32_FEATURE_CONTROL",
        "IA32_MONITOR_FILTER_SIZE", "HWCR", "PATCH_LOADER", "TSC_RATIO",
    )  # fmt: skip
    return frozenset(number for name, number in MSRS.items() if name in names or name.startswith("IA32_VMX_"))


# --- reading ---------------------------------------------------------------------------------------------------------


def read(vm: VM, vcpu: VCPU, msrs: Iterable[int]) -> dict[str, Any]:
    """All of it; ``msrs`` are those to read (msr_indices()). The vCPU's last access must be complete (Runner.settle)."""
    has = vm.system.check_extension
    if has("KVM_CAP_SREGS2"):
        sregs = plain(vcpu.get_sregs2())
    else:
        sregs = plain(vcpu.get_sregs()) | {"flags": 0, "pdptrs": [0, 0, 0, 0]}
        del sregs["interrupt_bitmap"]  # an interrupt that waits is in the events too
    given = vcpu.get_cpuid2().rows()
    asked = given if vcpu.asked is None else vcpu.asked.rows()  # whole: KVM may fill in a row that asks for zeros
    xcrs = []
    if has("KVM_CAP_XCRS"):
        got = vcpu.get_xcrs()
        xcrs = [[row.xcr, row.value] for row in got.xcrs[: got.nr_xcrs]]
    return {
        "id": vcpu.id,
        "asked": asked,
        "cpuid": [row for row in given if any(row[3:])],
        "tsc_khz": vcpu.get_tsc_khz() if has("KVM_CAP_GET_TSC_KHZ") else 0,
        "regs": plain(vcpu.get_regs()),
        "sregs": sregs,
        "xcrs": xcrs,
        "xsave": _canonical(vcpu.get_xsave(), xsave_layout(vm.system.get_supported_cpuid())).rstrip(b"\0").hex(),
        "debugregs": plain(vcpu.get_debugregs()),
        "lapic": None if vm.irqchip == "none" else _with_ppr(vcpu.get_lapic().to_bytes()).hex(),
        "msrs": _read_msrs(vcpu, msrs),
        "mp_state": vcpu.get_mp_state(),
        "events": events_of(vcpu),
        "nested": nested_of(vm.system, vcpu),
    }


def msr_indices(system: System) -> list[int]:
    """The MSRs to save: those of KVM_GET_MSR_INDEX_LIST, and MTRRs."""
    return list(dict.fromkeys([*system.get_msr_index_list(), *_MTRRS]))


def xsave_layout(cpuid: Cpuid) -> list[list[int]]:
    """(component, offset, size) of each component beyond x87 and SSE that leaf 0xD places in the standard format."""
    return [[index, ebx, eax] for function, index, _, eax, ebx, *_ in cpuid.rows() if function == 0xD and index > 1 and ebx]


def _read_msrs(vcpu: VCPU, indices: Iterable[int]) -> list[list[int]]:
    """(MSR, value); Hyper-V's only from a guest that has said that it knows them: they are clocks and frequencies of the host else."""
    values = vcpu.get_msrs(indices)
    if not values.get(HYPERV_GUEST_OS_ID):
        values = {index: value for index, value in values.items() if index not in HYPERV}
    return [[index, value] for index, value in values.items()]


def events_of(vcpu: VCPU) -> dict[str, Any]:
    """Without KVM_CAP_EXCEPTION_PAYLOAD, an exception that is pending is also injected, and is taken back as that alone."""
    events = plain(vcpu.get_vcpu_events())
    if not events["flags"] & lib.KVM_VCPUEVENT_VALID_PAYLOAD:
        events["exception"]["pending"] = 0
    return events


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


def nested_of(system: System, vcpu: VCPU) -> str | None:
    """Nested state, if there is any: None for a guest that has made no use of VMX or SVM."""
    size = system.check_extension("KVM_CAP_NESTED_STATE")
    if not size:
        return None
    data = vcpu.get_nested_state(size)
    state = ffi.cast("struct kvm_nested_state *", ffi.from_buffer(data))
    if state.format == lib.KVM_STATE_NESTED_FORMAT_VMX:
        used = state.hdr.vmx.vmxon_pa != (1 << 64) - 1
    else:
        # The global interrupt flag is set in every vCPU that has not executed CLGI (APM vol. 2 section 15.17).
        other = state.flags & ~lib.KVM_STATE_NESTED_GIF_SET
        no_interrupts = other == state.flags and vcpu.get_sregs().efer & EFER.SVME
        used = other != 0 or bool(no_interrupts) or state.hdr.svm.vmcb_pa != 0
    return data.hex() if used else None


# --- writing ---------------------------------------------------------------------------------------------------------


def write(vm: VM, vcpu: VCPU, state: dict[str, Any], layout: list[list[int]], here: list[list[int]]) -> list[str]:
    """Into a new vCPU, whose CPUID is set; returns what could not be put back and does not matter, in words.

    ``layout`` is that of the state's XSAVE area, ``here`` this host's. Raises StateError for what KVM refuses and does matter.
    """
    system, where = vm.system, f"vcpus[{vcpu.id}]"
    msrs: dict[int, int] = dict(state["msrs"])
    try:
        khz = state["tsc_khz"]
        if khz and system.check_extension("KVM_CAP_TSC_CONTROL") and khz != vcpu.get_tsc_khz():
            vcpu.set_tsc_khz(khz)
        if msrs.get(FEATURE_CONTROL):
            vcpu.set_msrs([(FEATURE_CONTROL, msrs[FEATURE_CONTROL])])
        _write_sregs(system, vcpu, state["sregs"])
        if state["nested"] is not None:
            vcpu.set_nested_state(bytes.fromhex(state["nested"]))
        _write_xcrs(system, vcpu, state["xcrs"])
        vcpu.set_xsave(moved(bytes.fromhex(state["xsave"]), layout, here))
        vcpu.set_regs(struct("struct kvm_regs", state["regs"]))
        vcpu.set_debugregs(struct("struct kvm_debugregs", state["debugregs"]))
        if state["lapic"] is not None:
            lapic = struct("struct kvm_lapic_state", {})
            ffi.memmove(lapic.cdata, bytes.fromhex(state["lapic"]), ffi.sizeof("struct kvm_lapic_state"))
            vcpu.set_lapic(lapic)
        notes = _write_msrs(vcpu, msrs, where)
        if state["mp_state"] != lib.KVM_MP_STATE_RUNNABLE or state["lapic"] is not None:
            vcpu.set_mp_state(state["mp_state"])
        vcpu.set_vcpu_events(struct("struct kvm_vcpu_events", state["events"]))
    except KvmError as error:
        raise StateError(where, f"this host's KVM does not take it: {error}") from error
    return notes


def _write_sregs(system: System, vcpu: VCPU, data: dict[str, Any]) -> None:
    if system.check_extension("KVM_CAP_SREGS2"):
        vcpu.set_sregs2(struct("struct kvm_sregs2", data))
    else:  # PDPTRs come from memory then
        vcpu.set_sregs(struct("struct kvm_sregs", {name: value for name, value in data.items() if name not in ("flags", "pdptrs")}))
    vcpu.native.run.cr8 = data["cr8"]


def _write_xcrs(system: System, vcpu: VCPU, rows: list[list[int]]) -> None:
    if rows and system.check_extension("KVM_CAP_XCRS"):
        vcpu.set_xcrs(struct("struct kvm_xcrs", {"nr_xcrs": len(rows), "xcrs": [{"xcr": xcr, "value": value} for xcr, value in rows]}))


def _write_msrs(vcpu: VCPU, msrs: dict[int, int], where: str) -> list[str]:
    """In order. A refused one does not matter when it has that value already, is zero, or only says what the CPU is."""
    late = [TSC_DEADLINE] if TSC_DEADLINE in msrs else []
    first = [TSC] if TSC in msrs else []
    order = [*first, *(index for index in msrs if index not in (TSC, TSC_DEADLINE)), *late]
    refused = vcpu.set_msrs((index, msrs[index]) for index in order)
    if not refused:
        return []
    notes, capabilities = [], capability_msrs()
    have = vcpu.get_msrs(index for index, _ in refused)
    for index, value in refused:
        if have.get(index, 0) == value:
            continue
        if index not in capabilities:
            raise StateError(f"{where}.msrs", f"this host's KVM does not take {value:#x} for {msr_name(index)}")
        now = f"it is {have[index]:#x} here" if index in have else "it is not there on this host"
        notes.append(f"{where}: {msr_name(index)} was {value:#x}; {now}")
    return notes


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
