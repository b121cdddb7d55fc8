"""The state of one vCPU as the kernel's own structures: captured from KVM, and put into a new vCPU in the order that KVM needs.

**The order.** CPUID decides what the rest may hold (CR4, XCR0, MSRs), so it comes first, when the vCPU is new: KVM takes no other after
a run. Then the TSC's frequency; IA32_FEATURE_CONTROL, which nested state needs; sregs (paging, EFER, the APIC base, which the LAPIC needs)
and nested state; XCR0 and the XSAVE area; general and debug registers; the LAPIC before the MSRs, for IA32_TSC_DEADLINE counts only while
the LAPIC's timer is in that mode, and that MSR after IA32_TSC, which it is compared with; mp_state after sregs, which may change it; and
last the events, for KVM_SET_REGS drops exceptions that wait. Without an in-kernel LAPIC, CR8 is also in kvm_run, where KVM takes it from.

x87 and SSE registers are in the XSAVE area (KVM_SET_FPU before the first run is lost on some hosts).
Sources: api.rst 4.1 to 4.43, 4.131 (sregs2), 4.134 (xsave2).
"""

from __future__ import annotations

from functools import cache

from pykvm.abi import Struct, ffi, lib
from pykvm.errors import KvmError, StateError
from pykvm.probe import tr_reads_busy
from pykvm.vcpu import MsrTable
from pykvm.x86.msr import MSRS, msr_name
from pykvm.x86.regs import AVAILABLE_TSS, BUSY_TSS, EFER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container
    from typing import Any

    from pykvm.cpuid import Cpuid
    from pykvm.system import System
    from pykvm.vcpu import VCPU
    from pykvm.vm import VM

__all__ = ["VcpuStructs", "capability_msrs", "capture", "msr_indices", "nested_of", "put", "tr_as_loaded"]

TSC, TSC_DEADLINE, FEATURE_CONTROL = 0x10, 0x6E0, 0x3A
HYPERV, HYPERV_GUEST_OS_ID = range(0x40000000, 0x40000200), 0x40000000

# MTRRs are state that KVM_GET_MSR_INDEX_LIST does not have.
_MTRRS = [number for name, number in MSRS.items() if name.startswith("IA32_MTRR_") and number <= 0x2FF]


class VcpuStructs:
    """One vCPU. ``sregs`` is a ``struct kvm_sregs2``, or a ``struct kvm_sregs`` where KVM_CAP_SREGS2 is missing; ``xcrs`` is None without
    KVM_CAP_XCRS, ``lapic`` without an in-kernel one, ``nested`` for a guest that uses no VMX or SVM; ``xsave`` is in this host's layout;
    ``msrs`` values by index; ``tsc_khz`` 0 where KVM does not say."""

    __slots__ = (
        "_msr_table", "asked", "debugregs", "events", "lapic", "mp_state", "msrs", "nested", "regs", "sregs", "tsc_khz", "xcrs", "xsave",
    )  # fmt: skip

    def __init__(
        self,
        *,
        asked: Cpuid,
        tsc_khz: int,
        regs: Struct,
        sregs: Struct,
        xcrs: Struct | None,
        xsave: bytes,
        debugregs: Struct,
        lapic: Struct | None,
        msrs: dict[int, int],
        mp_state: int,
        events: Struct,
        nested: bytes | None,
    ) -> None:
        self.asked, self.tsc_khz, self.regs, self.sregs, self.xcrs, self.xsave = asked, tsc_khz, regs, sregs, xcrs, xsave
        self.debugregs, self.lapic, self.msrs, self.mp_state, self.events, self.nested = debugregs, lapic, msrs, mp_state, events, nested
        self._msr_table: MsrTable | None = None

    def msr_table(self) -> MsrTable:
        """The MSRs as put() writes them: IA32_TSC first, IA32_TSC_DEADLINE last."""
        if self._msr_table is None:
            msrs = self.msrs
            first = [(TSC, msrs[TSC])] if TSC in msrs else []
            late = [(TSC_DEADLINE, msrs[TSC_DEADLINE])] if TSC_DEADLINE in msrs else []
            self._msr_table = MsrTable([*first, *(row for row in msrs.items() if row[0] not in (TSC, TSC_DEADLINE)), *late])
        return self._msr_table

    def leave_out(self, msrs: Container[int]) -> None:
        """Of these MSRs the vCPU that is written to has the right value by itself."""
        self.msrs = {index: value for index, value in self.msrs.items() if index not in msrs}
        self._msr_table = None


def capture(vm: VM, vcpu: VCPU) -> VcpuStructs:
    """All of it. The vCPU's last access must be complete (Runner.settle). Raises KvmError."""
    has = vm.system.check_extension
    return VcpuStructs(
        asked=vcpu.get_cpuid2() if vcpu.asked is None else vcpu.asked,
        tsc_khz=vcpu.get_tsc_khz() if has("KVM_CAP_GET_TSC_KHZ") else 0,
        regs=vcpu.get_regs(),
        sregs=vcpu.get_sregs2() if has("KVM_CAP_SREGS2") else vcpu.get_sregs(),
        xcrs=vcpu.get_xcrs() if has("KVM_CAP_XCRS") else None,
        xsave=vcpu.get_xsave(),
        debugregs=vcpu.get_debugregs(),
        lapic=None if vm.irqchip == "none" else vcpu.get_lapic(),
        msrs=_msrs_of(vm.system, vcpu),
        mp_state=vcpu.get_mp_state(),
        events=_events_of(vcpu),
        nested=nested_of(vm.system, vcpu),
    )


def msr_indices(system: System) -> list[int]:
    """The MSRs to save: those of KVM_GET_MSR_INDEX_LIST, and MTRRs."""
    return list(dict.fromkeys([*system.get_msr_index_list(), *_MTRRS]))


def _msrs_of(system: System, vcpu: VCPU) -> dict[int, int]:
    """Hyper-V's only from a guest that has said that it knows them: they are clocks and frequencies of the host else."""
    if vcpu.known_msrs is None:  # which of them there are, the vCPU's CPUID decides
        values = vcpu.get_msrs(msr_indices(system))
        vcpu.known_msrs = list(values)
    else:
        values = vcpu.get_msrs(vcpu.known_msrs)
    if not values.get(HYPERV_GUEST_OS_ID):
        values = {index: value for index, value in values.items() if index not in HYPERV}
    return values


def _events_of(vcpu: VCPU) -> Struct:
    """Without KVM_CAP_EXCEPTION_PAYLOAD, an exception that is pending is also injected, and is taken back as that alone."""
    events = vcpu.get_vcpu_events()
    if not events.cdata.flags & lib.KVM_VCPUEVENT_VALID_PAYLOAD:
        events.cdata.exception.pending = 0
    return events


def nested_of(system: System, vcpu: VCPU) -> bytes | None:
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
    return data if used else None


def put(vm: VM, vcpu: VCPU, state: VcpuStructs) -> list[str]:
    """Into a new vCPU, whose CPUID is set; returns what could not be put back and does not matter, in words.

    Raises StateError for what KVM refuses and does matter.
    """
    system, where = vm.system, f"vcpus[{vcpu.id}]"
    try:
        khz = state.tsc_khz
        if khz and system.check_extension("KVM_CAP_TSC_CONTROL") and khz != vcpu.get_tsc_khz():
            vcpu.set_tsc_khz(khz)
        if state.msrs.get(FEATURE_CONTROL):
            vcpu.set_msrs([(FEATURE_CONTROL, state.msrs[FEATURE_CONTROL])])
        tr_as_loaded(state.sregs.cdata)
        if system.check_extension("KVM_CAP_SREGS2"):
            vcpu.set_sregs2(state.sregs)
        else:
            vcpu.set_sregs(state.sregs)
        vcpu.native.run.cr8 = state.sregs.cdata.cr8
        if state.nested is not None:
            vcpu.set_nested_state(state.nested)
        if state.xcrs is not None and state.xcrs.cdata.nr_xcrs and system.check_extension("KVM_CAP_XCRS"):
            vcpu.set_xcrs(state.xcrs)
        vcpu.set_xsave(state.xsave)
        vcpu.set_regs(state.regs)
        vcpu.set_debugregs(state.debugregs)
        if state.lapic is not None:
            vcpu.set_lapic(state.lapic)
        notes = _put_msrs(vcpu, state, where)
        if state.mp_state != lib.KVM_MP_STATE_RUNNABLE or state.lapic is not None:
            vcpu.set_mp_state(state.mp_state)
        vcpu.set_vcpu_events(state.events)
    except KvmError as error:
        raise StateError(where, f"this host's KVM does not take it: {error}") from error
    return notes


def tr_as_loaded(sregs: Any) -> None:
    """TR in sregs that KVM has read becomes what the CPU has loaded. QEMU's AMD-V lets the I/O bitmap of no busy TSS count."""
    if sregs.tr.type == BUSY_TSS and tr_reads_busy():
        sregs.tr.type = AVAILABLE_TSS


def _put_msrs(vcpu: VCPU, state: VcpuStructs, where: str) -> list[str]:
    """In order. A refused one does not matter when it has that value already, is zero, or only says what the CPU is."""
    refused = vcpu.set_msrs(state.msr_table())
    if not refused:
        return []
    notes, needless, capabilities = [], set(), capability_msrs()
    have = vcpu.get_msrs(index for index, _ in refused)
    for index, value in refused:
        if have.get(index, 0) == value:
            needless.add(index)
            continue
        if index not in capabilities:
            raise StateError(f"{where}.msrs", f"this host's KVM does not take {value:#x} for {msr_name(index)}")
        now = f"it is {have[index]:#x} here" if index in have else "it is not there on this host"
        notes.append(f"{where}: {msr_name(index)} was {value:#x}; {now}")
    state.leave_out(needless)
    return notes


@cache
def capability_msrs() -> frozenset[int]:
    """MSRs that say what the CPU or KVM is, not what the guest has done: where a host has others, the guest sees those."""
    names = (
        "IA32_ARCH_CAPABILITIES", "MSR_PLATFORM_INFO", "IA32_MISC_ENABLE", "IA32_BIOS_SIGN_ID", "IA32_PERF_CAPABILITIES", "IA32_MCG_CAP",
        "IA32_MCG_CTL", "IA32_MTRRCAP", "IA32_CORE_CAPABILITIES", "MSR_KVM_POLL_CONTROL", "DE_CFG", "IA32_SMBASE", "IA32_FEATURE_CONTROL",
        "IA32_MONITOR_FILTER_SIZE", "HWCR", "PATCH_LOADER", "TSC_RATIO",
    )  # fmt: skip
    return frozenset(number for name, number in MSRS.items() if name in names or name.startswith("IA32_VMX_"))
