"""KVM's exit reasons, ``KVM_EXIT_*`` of <linux/kvm.h> in kernel spelling. They are KVM's, not the CPU's own."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitReason", "reason_name"]


class ExitReason(IntEnum):
    """Why KVM_RUN came back (``kvm_run.exit_reason``, api.rst 5)."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    S390_SIEIC = 13
    S390_RESET = 14
    DCR = 15
    NMI = 16
    INTERNAL_ERROR = 17
    OSI = 18
    PAPR_HCALL = 19
    S390_UCONTROL = 20
    WATCHDOG = 21
    S390_TSCH = 22
    EPR = 23
    SYSTEM_EVENT = 24
    S390_STSI = 25
    IOAPIC_EOI = 26
    HYPERV = 27
    ARM_NISV = 28
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    RISCV_SBI = 35
    RISCV_CSR = 36
    NOTIFY = 37
    LOONGARCH_IOCSR = 38
    MEMORY_FAULT = 39
    TDX = 40
    ARM_SEA = 41
    ARM_LDST64B = 42
    SNP_REQ_CERTS = 43


def reason_name(reason: int) -> str:
    """``"IO"`` for 2; a reason newer than this list keeps its number, as ``"EXIT_99"``."""
    try:
        return ExitReason(reason).name
    except ValueError:
        return f"EXIT_{reason}"
