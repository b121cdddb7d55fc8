"""The names of model-specific registers: the architectural ones, those KVM adds, and a few that guests are seen to touch.

>>> msr_number("IA32_TSC"), msr_name(0xC0000082)
(16, 'IA32_LSTAR')

Names are the manuals'; KVM's own are the kernel's (MSR_KVM_...).
Sources: SDM vol. 4 chapter 2, table 2-2; APM vol. 2 appendix A; Documentation/virt/kvm/x86/msr.rst.
"""

from __future__ import annotations

from pykvm.errors import ConfigError

__all__ = ["MSRS", "msr_name", "msr_number"]

MSRS = {
    "IA32_P5_MC_ADDR": 0x0, "IA32_P5_MC_TYPE": 0x1, "IA32_MONITOR_FILTER_SIZE": 0x6, "IA32_TSC": 0x10, "IA32_PLATFORM_ID": 0x17,
    "IA32_APIC_BASE": 0x1B, "IA32_FEATURE_CONTROL": 0x3A, "IA32_TSC_ADJUST": 0x3B, "IA32_SPEC_CTRL": 0x48, "IA32_PRED_CMD": 0x49,
    "IA32_BIOS_UPDT_TRIG": 0x79, "IA32_BIOS_SIGN_ID": 0x8B, "IA32_SGXLEPUBKEYHASH0": 0x8C, "IA32_SGXLEPUBKEYHASH1": 0x8D,
    "IA32_SGXLEPUBKEYHASH2": 0x8E, "IA32_SGXLEPUBKEYHASH3": 0x8F, "IA32_SMM_MONITOR_CTL": 0x9B, "IA32_SMBASE": 0x9E,
    "IA32_CORE_CAPABILITIES": 0xCF, "MSR_PLATFORM_INFO": 0xCE, "IA32_UMWAIT_CONTROL": 0xE1, "IA32_MPERF": 0xE7, "IA32_APERF": 0xE8,
    "IA32_MTRRCAP": 0xFE, "IA32_ARCH_CAPABILITIES": 0x10A, "IA32_FLUSH_CMD": 0x10B, "IA32_TSX_CTRL": 0x122, "IA32_MCU_OPT_CTRL": 0x123,
    "MSR_MISC_FEATURES_ENABLES": 0x140, "IA32_SYSENTER_CS": 0x174, "IA32_SYSENTER_ESP": 0x175, "IA32_SYSENTER_EIP": 0x176,
    "IA32_MCG_CAP": 0x179, "IA32_MCG_STATUS": 0x17A, "IA32_MCG_CTL": 0x17B, "IA32_PERF_STATUS": 0x198, "IA32_PERF_CTL": 0x199,
    "IA32_CLOCK_MODULATION": 0x19A, "IA32_THERM_INTERRUPT": 0x19B, "IA32_THERM_STATUS": 0x19C, "IA32_MISC_ENABLE": 0x1A0,
    "IA32_ENERGY_PERF_BIAS": 0x1B0, "IA32_PACKAGE_THERM_STATUS": 0x1B1, "IA32_PACKAGE_THERM_INTERRUPT": 0x1B2, "IA32_XFD": 0x1C4,
    "IA32_XFD_ERR": 0x1C5, "IA32_DEBUGCTL": 0x1D9, "MSR_LASTBRANCHFROMIP": 0x1DB, "MSR_LASTBRANCHTOIP": 0x1DC, "MSR_LASTINTFROMIP": 0x1DD,
    "MSR_LASTINTTOIP": 0x1DE, "IA32_SMRR_PHYSBASE": 0x1F2, "IA32_SMRR_PHYSMASK": 0x1F3, "IA32_MTRR_FIX64K_00000": 0x250,
    "IA32_MTRR_FIX16K_80000": 0x258, "IA32_MTRR_FIX16K_A0000": 0x259, "IA32_PAT": 0x277, "IA32_MTRR_DEF_TYPE": 0x2FF,
    "IA32_PERF_CAPABILITIES": 0x345, "IA32_FIXED_CTR_CTRL": 0x38D, "IA32_PERF_GLOBAL_STATUS": 0x38E, "IA32_PERF_GLOBAL_CTRL": 0x38F,
    "IA32_PERF_GLOBAL_OVF_CTRL": 0x390, "IA32_PERF_GLOBAL_STATUS_SET": 0x391, "IA32_PEBS_ENABLE": 0x3F1, "MSR_PEBS_DATA_CFG": 0x3F2,
    "IA32_MCG_EXT_CTL": 0x4D0, "IA32_RTIT_OUTPUT_BASE": 0x560, "IA32_RTIT_OUTPUT_MASK_PTRS": 0x561, "IA32_RTIT_CTL": 0x570,
    "IA32_RTIT_STATUS": 0x571, "IA32_RTIT_CR3_MATCH": 0x572, "IA32_DS_AREA": 0x600, "IA32_U_CET": 0x6A0, "IA32_S_CET": 0x6A2,
    "IA32_PL0_SSP": 0x6A4, "IA32_PL1_SSP": 0x6A5, "IA32_PL2_SSP": 0x6A6, "IA32_PL3_SSP": 0x6A7, "IA32_INTERRUPT_SSP_TABLE_ADDR": 0x6A8,
    "IA32_TSC_DEADLINE": 0x6E0, "IA32_PKRS": 0x6E1, "IA32_XSS": 0xDA0, "MSR_RAPL_POWER_UNIT": 0x606, "MSR_PKG_ENERGY_STATUS": 0x611,
    # x2APIC (SDM vol. 3, table "Local APIC Register Address Map Supported by x2APIC")
    "IA32_X2APIC_APICID": 0x802, "IA32_X2APIC_VERSION": 0x803, "IA32_X2APIC_TPR": 0x808, "IA32_X2APIC_PPR": 0x80A,
    "IA32_X2APIC_EOI": 0x80B, "IA32_X2APIC_LDR": 0x80D, "IA32_X2APIC_SIVR": 0x80F, "IA32_X2APIC_ESR": 0x828,
    "IA32_X2APIC_LVT_CMCI": 0x82F, "IA32_X2APIC_ICR": 0x830, "IA32_X2APIC_LVT_TIMER": 0x832, "IA32_X2APIC_LVT_THERMAL": 0x833,
    "IA32_X2APIC_LVT_PMI": 0x834, "IA32_X2APIC_LVT_LINT0": 0x835, "IA32_X2APIC_LVT_LINT1": 0x836, "IA32_X2APIC_LVT_ERROR": 0x837,
    "IA32_X2APIC_INIT_COUNT": 0x838, "IA32_X2APIC_CUR_COUNT": 0x839, "IA32_X2APIC_DIV_CONF": 0x83E, "IA32_X2APIC_SELF_IPI": 0x83F,
    # KVM's, old and new numbers
    "MSR_KVM_WALL_CLOCK": 0x11, "MSR_KVM_SYSTEM_TIME": 0x12, "MSR_KVM_WALL_CLOCK_NEW": 0x4B564D00, "MSR_KVM_SYSTEM_TIME_NEW": 0x4B564D01,
    "MSR_KVM_ASYNC_PF_EN": 0x4B564D02, "MSR_KVM_STEAL_TIME": 0x4B564D03, "MSR_KVM_EOI_EN": 0x4B564D04, "MSR_KVM_POLL_CONTROL": 0x4B564D05,
    "MSR_KVM_ASYNC_PF_INT": 0x4B564D06, "MSR_KVM_ASYNC_PF_ACK": 0x4B564D07, "MSR_KVM_MIGRATION_CONTROL": 0x4B564D08,
    # Hyper-V's, which KVM can offer too
    "HV_X64_MSR_GUEST_OS_ID": 0x40000000, "HV_X64_MSR_HYPERCALL": 0x40000001, "HV_X64_MSR_VP_INDEX": 0x40000002,
    "HV_X64_MSR_RESET": 0x40000003, "HV_X64_MSR_VP_RUNTIME": 0x40000010, "HV_X64_MSR_TIME_REF_COUNT": 0x40000020,
    "HV_X64_MSR_REFERENCE_TSC": 0x40000021, "HV_X64_MSR_TSC_FREQUENCY": 0x40000022, "HV_X64_MSR_APIC_FREQUENCY": 0x40000023,
    "HV_X64_MSR_APIC_ASSIST_PAGE": 0x40000073, "HV_X64_MSR_SCONTROL": 0x40000080, "HV_X64_MSR_CRASH_CTL": 0x40000105,
    "HV_X64_MSR_REENLIGHTENMENT_CONTROL": 0x40000106, "HV_X64_MSR_TSC_EMULATION_CONTROL": 0x40000107,
    "HV_X64_MSR_TSC_EMULATION_STATUS": 0x40000108,
    # the 0xC000_00xx group, AMD's first
    "IA32_EFER": 0xC0000080, "IA32_STAR": 0xC0000081, "IA32_LSTAR": 0xC0000082, "IA32_CSTAR": 0xC0000083, "IA32_FMASK": 0xC0000084,
    "IA32_FS_BASE": 0xC0000100, "IA32_GS_BASE": 0xC0000101, "IA32_KERNEL_GS_BASE": 0xC0000102, "IA32_TSC_AUX": 0xC0000103,
    "TSC_RATIO": 0xC0000104, "PerfCntrGlobalStatus": 0xC0000300, "PerfCntrGlobalCtl": 0xC0000301,
    "PerfCntrGlobalStatusClr": 0xC0000302, "PerfCntrGlobalStatusSet": 0xC0000303,
    # AMD alone
    "SYSCFG": 0xC0010010, "HWCR": 0xC0010015, "IORRBase0": 0xC0010016, "IORRMask0": 0xC0010017, "IORRBase1": 0xC0010018,
    "IORRMask1": 0xC0010019, "TOP_MEM": 0xC001001A, "TOP_MEM2": 0xC001001D, "NB_CFG": 0xC001001F, "PATCH_LOADER": 0xC0010020,
    "INT_PENDING": 0xC0010055, "SMM_BASE": 0xC0010111, "SMMAddr": 0xC0010112, "SMMMask": 0xC0010113, "VM_CR": 0xC0010114,
    "IGNNE": 0xC0010115, "SMM_CTL": 0xC0010116, "VM_HSAVE_PA": 0xC0010117, "SVM_KEY": 0xC0010118, "VIRT_SPEC_CTRL": 0xC001011F,
    "SEV_ES_GHCB": 0xC0010130, "SEV_STATUS": 0xC0010131, "OSVW_ID_LENGTH": 0xC0010140, "OSVW_STATUS": 0xC0010141, "LS_CFG": 0xC0011020,
    "IC_CFG": 0xC0011021, "DC_CFG": 0xC0011022, "DE_CFG": 0xC0011029,
}  # fmt: skip

# Rows of like registers: first number, how many, step, and the name with its number.
_RUNS = [
    (0xC1, 8, 1, "IA32_PMC{}"), (0x186, 8, 1, "IA32_PERFEVTSEL{}"), (0x200, 16, 2, "IA32_MTRR_PHYSBASE{}"),
    (0x201, 16, 2, "IA32_MTRR_PHYSMASK{}"), (0x280, 32, 1, "IA32_MC{}_CTL2"), (0x309, 4, 1, "IA32_FIXED_CTR{}"),
    (0x400, 32, 4, "IA32_MC{}_CTL"), (0x401, 32, 4, "IA32_MC{}_STATUS"), (0x402, 32, 4, "IA32_MC{}_ADDR"),
    (0x403, 32, 4, "IA32_MC{}_MISC"), (0x4C1, 8, 1, "IA32_A_PMC{}"), (0x810, 8, 1, "IA32_X2APIC_ISR{}"),
    (0x818, 8, 1, "IA32_X2APIC_TMR{}"), (0x820, 8, 1, "IA32_X2APIC_IRR{}"), (0xC0010000, 4, 1, "PerfEvtSel{}"),
    (0xC0010004, 4, 1, "PerfCtr{}"), (0xC0010200, 6, 2, "PERF_CTL{}"), (0xC0010201, 6, 2, "PERF_CTR{}"),
    (0x580, 4, 2, "IA32_RTIT_ADDR{}_A"), (0x581, 4, 2, "IA32_RTIT_ADDR{}_B"),
]  # fmt: skip
MSRS.update((name.format(i), first + i * step) for first, count, step, name in _RUNS for i in range(count))
MSRS.update((f"IA32_MTRR_FIX4K_{0xC0000 + i * 0x8000:05X}", 0x268 + i) for i in range(8))
# VMX capabilities (SDM vol. 3 appendix A), from 0x480 on.
_VMX = (
    "BASIC PINBASED_CTLS PROCBASED_CTLS EXIT_CTLS ENTRY_CTLS MISC CR0_FIXED0 CR0_FIXED1 CR4_FIXED0 CR4_FIXED1 VMCS_ENUM PROCBASED_CTLS2"
    " EPT_VPID_CAP TRUE_PINBASED_CTLS TRUE_PROCBASED_CTLS TRUE_EXIT_CTLS TRUE_ENTRY_CTLS VMFUNC PROCBASED_CTLS3"
)
MSRS.update((f"IA32_VMX_{name}", 0x480 + i) for i, name in enumerate(_VMX.split()))
_NAMES = {number: name for name, number in MSRS.items()}
# Other manuals' names for the same registers.
_ALSO = {
    "TSC": 0x10, "APIC_BASE": 0x1B, "EFER": 0xC0000080, "STAR": 0xC0000081, "LSTAR": 0xC0000082, "CSTAR": 0xC0000083,
    "SFMASK": 0xC0000084, "SYSCALL_MASK": 0xC0000084, "FS_BASE": 0xC0000100, "GS_BASE": 0xC0000101, "KERNEL_GS_BASE": 0xC0000102,
    "KERNELGSBASE": 0xC0000102, "TSC_AUX": 0xC0000103, "PAT": 0x277, "XSS": 0xDA0,
    "IA32_CR_PAT": 0x277, "FEAT_CTL": 0x3A, "IA32_UCODE_REV": 0x8B, "MSR_KVM_PV_EOI_EN": 0x4B564D04,
}  # fmt: skip


def msr_name(number: int) -> str:
    """The name of an MSR, or its number in hex if it has none here."""
    return _NAMES.get(number) or f"{number:#x}"


def msr_number(name: str) -> int:
    """The number of an MSR by its name (any case, with or without MSR_ before it) or by a number as text. Raises ConfigError."""
    key = name.strip()
    for known in (MSRS, _ALSO):
        if key in known:
            return known[key]
    if key[:1].isdecimal():
        try:
            number = int(key, 0)
        except ValueError:
            raise ConfigError(f"MSR {name!r} is neither a name nor a number") from None
        if number >= 1 << 32:
            raise ConfigError(f"MSR {name}: numbers have 32 bits")
        return number
    folded = {known.upper(): number for known, number in (_ALSO | MSRS).items()}
    key = key.upper()
    if key in folded or key.removeprefix("MSR_") in folded:
        return folded.get(key, folded.get(key.removeprefix("MSR_"), 0))
    from difflib import get_close_matches

    near = get_close_matches(key, folded, 1)
    hint = f"did you mean {msr_name(folded[near[0]])}?" if near else "give its number"
    raise ConfigError(f"unknown MSR {name!r}; {hint}")
