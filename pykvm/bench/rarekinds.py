"""The kinds of exits that need something special of the machine (special.py), and those that few hosts or none can make.

With kinds.py's, each KVM_EXIT_ that KVM has on x86 has a row, which is measured or says why it is not. Where a reason has qualifiers that
KVM makes in different ways (a suberror, a type of event), each has its own.
"""

from __future__ import annotations

from pykvm.bench.kind import (
    BARE,
    EOI,
    GPA,
    LAPIC_ON,
    PORT,
    RING_GPA,
    RING_PAGES,
    TOUCH_GPA,
    VECTOR,
    WAIT,
    Kind,
)
from pykvm.platform import LAPIC_GPA

__all__ = ["RARE"]

_UNKNOWN_MSR, _EFER = 0xC0DE0002, 0xC0000080
# Microsoft's Hypervisor Top-Level Functional Specification: synthetic MSRs, and the hypercall that posts a message
_HV_GUEST_OS_ID, _HV_HYPERCALL, _HV_RESET = 0x40000000, 0x40000001, 0x40000003
_HV_SCONTROL, _HV_SYNDBG_CONTROL, _HV_CRASH_CTL = 0x40000080, 0x400000F1, 0x40000105
_HV_POST_MESSAGE, _HV_PAGE = 0x5C, 0x142000
_XEN_VERSION = 17
_SPLIT_LOCK = "lock inc dword ptr [SCRATCH + 62]"  # across two cache lines


def _write_msr(index: int, value: int) -> str:
    return f"mov ecx, {index:#x}; mov eax, {value & 0xFFFFFFFF:#x}; mov edx, {value >> 32:#x}"


RARE: list[Kind] = [
    # --- user space answers
    Kind(
        "SET_TPR",
        "mov cr8, rax",
        arm="mov eax, 5; mov cr8, rax; xor eax, eax",
        mode="long",
        reason="SET_TPR",
        note="CR8 lowered; a batch has raising it in it too, which KVM handles alone",
    ),
    Kind(
        "IOAPIC_EOI",
        f"mov dword ptr [r12 + 0x250], {VECTOR | 1 << 18:#x}; {WAIT}",
        arm="xor ebx, ebx",
        setup=LAPIC_ON,
        handlers={VECTOR: EOI},
        mode="long",
        irqchip="split",
        device="eoi",
        reason="IOAPIC_EOI",
        needs=("cap:KVM_CAP_SPLIT_IRQCHIP",),
        cost=25,
        note="a self-IPI with the vector of a level-triggered pin of user space's IOAPIC; to its handler, the EOI and back",
    ),
    # --- exits that end a run
    Kind(
        "RDMSR, unknown MSR",
        "rdmsr",
        arm=f"mov ecx, {_UNKNOWN_MSR:#x}",
        reaches=BARE,
        reason="X86_RDMSR",
        device="msrs",
        needs=("cap:KVM_CAP_X86_USER_SPACE_MSR",),
        note="KVM_MSR_EXIT_REASON_UNKNOWN",
    ),
    Kind(
        "WRMSR, bad value",
        "wrmsr",
        arm=_write_msr(_EFER, 0xFFFFFFFFFFFFFFFF),
        reaches=BARE,
        reason="X86_WRMSR",
        device="msrs",
        needs=("cap:KVM_CAP_X86_USER_SPACE_MSR",),
        note="KVM_MSR_EXIT_REASON_INVAL",
    ),
    Kind(
        "emulation failure",
        "popcnt eax, dword ptr [rbx]",
        init=f"mov ebx, {GPA:#x}",
        mode="long",
        reaches=BARE,
        limit=True,
        reason="INTERNAL_ERROR",
        device="emulation",
        suberror=1,
        needs=("cap:KVM_CAP_EXIT_ON_EMULATION_FAILURE",),
        note="MMIO by an instruction that KVM's emulator does not know",
    ),
    Kind(
        "delivery failure",
        "ud2",
        setup=f"mov esp, {GPA + 0x800:#x}",
        handlers={6: "iretq"},
        mode="long",
        reaches=BARE,
        limit=True,
        reason="INTERNAL_ERROR",
        suberror=3,
        note="an exception whose stack is MMIO: KVM_INTERNAL_ERROR_DELIVERY_EV",
    ),
    Kind(
        "FAIL_ENTRY", f"out {PORT}, al", mode="long", reaches=BARE, limit=True, reason="FAIL_ENTRY", device="refused", note="CS.L and CS.D"
    ),
    Kind("INTR", reaches=BARE, limit=True, reason="INTR", device="kick", note="a kick that was there before KVM_RUN: immediate_exit"),
    Kind(
        "TPR_ACCESS",
        "mov [ebx], eax",
        arm="xor eax, eax",
        init=f"mov ebx, {LAPIC_GPA + 0x80:#x}",
        reaches=BARE,
        irqchip="kernel",
        reason="TPR_ACCESS",
        device="tpr",
        needs=("cap:KVM_CAP_VAPIC",),
    ),
    Kind(
        "SYSTEM_EVENT, reset",
        "wrmsr",
        arm=_write_msr(_HV_RESET, 1),
        reaches=BARE,
        reason="SYSTEM_EVENT",
        device="hyperv",
        needs=("cap:KVM_CAP_HYPERV",),
        note="through a Hyper-V MSR, as the next four",
    ),
    Kind(
        "SYSTEM_EVENT, crash",
        "wrmsr",
        arm=_write_msr(_HV_CRASH_CTL, 1 << 63),
        reaches=BARE,
        reason="SYSTEM_EVENT",
        device="hyperv",
        needs=("cap:KVM_CAP_HYPERV",),
    ),
    Kind(
        "HYPERV, SynIC",
        "wrmsr",
        arm=_write_msr(_HV_SCONTROL, 1),
        reaches=BARE,
        irqchip="kernel",
        reason="HYPERV",
        device="synic",
        needs=("cap:KVM_CAP_HYPERV_SYNIC2",),
    ),
    Kind(
        "HYPERV, debugger",
        "wrmsr",
        arm=_write_msr(_HV_SYNDBG_CONTROL, 0),
        reaches=BARE,
        reason="HYPERV",
        device="hyperv",
        needs=("cap:KVM_CAP_HYPERV",),
    ),
    Kind(
        "HYPERV, hypercall",
        "call rax",
        setup=f"{_write_msr(_HV_GUEST_OS_ID, 1)}; wrmsr; {_write_msr(_HV_HYPERCALL, _HV_PAGE | 1)}; wrmsr",
        arm=f"mov ecx, {_HV_POST_MESSAGE:#x}; xor edx, edx; mov eax, {_HV_PAGE:#x}",
        mode="long",
        reaches=BARE,
        irqchip="kernel",
        reason="HYPERV",
        device="synic",
        needs=("hypercalls", "cap:KVM_CAP_HYPERV_SYNIC2"),
    ),
    Kind(
        "XEN",
        "vmcall",
        arm=f"mov eax, {_XEN_VERSION}",
        mode="long",
        reaches=BARE,
        reason="XEN",
        device="xen",
        needs=("hypercalls", "cap:KVM_CAP_XEN_HVM"),
        note="a Xen hypercall",
    ),
    Kind(
        "DIRTY_RING_FULL",
        f"out {PORT}, al",
        # Slowly, and fewer pages than the ring has entries: a KVM that emulates CPL0 code looks at the ring once in 1 024 instructions.
        setup=f"""
        mov ebx, {RING_GPA:#x}
        mov edx, {RING_PAGES}
1:      mov [ebx], edx
        add ebx, 4096
        mov ecx, 64
2:      dec ecx
        jnz 2b
        dec edx
        jnz 1b""",
        reaches=BARE,
        limit=True,
        reason="DIRTY_RING_FULL",
        device="ring",
        needs=("cap:KVM_CAP_DIRTY_LOG_RING",),
        note="KVM_RUN before the ring has been emptied",
    ),
    Kind(
        "MEMORY_FAULT",
        "mov eax, [rbx]",
        init=f"mov ebx, {TOUCH_GPA:#x}",
        mode="user",
        reaches=BARE,
        limit=True,
        reason="MEMORY_FAULT",
        device="gone",
        needs=("cap:KVM_CAP_MEMORY_FAULT_INFO",),
        note="a slot whose host memory may not be accessed",
    ),
    Kind(
        "X86_BUS_LOCK",
        _SPLIT_LOCK,
        mode="long",
        reaches=BARE,
        reason="X86_BUS_LOCK",
        device="buslock",
        needs=("cap:KVM_CAP_X86_BUS_LOCK_EXIT",),
        note="a split lock",
    ),
    Kind(
        "EXCEPTION",
        f"{_SPLIT_LOCK}; out {PORT}, al",
        mode="long",
        reaches=BARE,
        limit=True,
        reason="EXCEPTION",
        note="#AC of a split lock, on VT-x with split_lock_detect=fatal",
    ),
    # --- what no guest of pykvm's makes
    Kind(
        "NOTIFY",
        reaches=BARE,
        reason="NOTIFY",
        needs=("cap:KVM_CAP_X86_NOTIFY_VMEXIT",),
        absent="only a guest that keeps its CPU from seeing any event makes it, by an erratum: none is tried",
    ),
    Kind(
        "AP_RESET_HOLD",
        reaches=BARE,
        reason="AP_RESET_HOLD",
        needs=("SEV-ES guests",),
        absent="only SEV-ES guests make it, and pykvm makes none of those",
    ),
    Kind(
        "SNP_REQ_CERTS",
        reaches=BARE,
        reason="SNP_REQ_CERTS",
        needs=("SEV-SNP guests",),
        absent="only SEV-SNP guests make it, and pykvm makes none of those",
    ),
    Kind("TDX", reaches=BARE, reason="TDX", needs=("TDX guests",), absent="only TDX guests make it, and pykvm makes none of those"),
    Kind(
        "UNKNOWN",
        reaches=BARE,
        reason="UNKNOWN",
        absent="KVM has it for an exit of the CPU's that it does not know; nothing makes one on purpose",
    ),
]
