"""The names of CPUID's feature bits, which feature needs which, and the features of well-known CPUs: tables.

A feature is spelled as in Linux's /proc/cpuinfo; ALIASES has QEMU's and the manuals' spelling where they differ. A bit without a name
is spelled by its place, ``leaf.index.register.bit`` with the leaf in hex ("7.1.eax.9"), so that none is ever lost.
Sources: SDM vol. 2A, CPUID; APM vol. 3 appendix E; Documentation/virt/kvm/x86/cpuid.rst for leaf 0x4000_0001.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.cpuid import Cpuid

__all__ = ["ALIASES", "BASELINES", "FEATURES", "NEEDS", "WORDS", "feature_named", "features_of", "implied_by", "place_of", "with_needs"]

# (leaf, index, register): the names of bits 0, 1, 2 ...; "-" has none. A number N stands for N bits without a name.
WORDS = {
    (0x1, 0, "edx"): "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss"
    " ht tm ia64 pbe",
    (0x1, 0, "ecx"): "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic"
    " movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    (0x6, 0, "eax"): "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req",
    (0x6, 0, "ecx"): "aperfmperf 2 epb",
    (0x7, 0, "ebx"): "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f"
    " avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    (0x7, 0, "ecx"): "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme"
    " avx512_vpopcntdq - la57 5 rdpid kl bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    (0x7, 0, "edx"): "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr 2 avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort -"
    " tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp"
    " flush_l1d arch_capabilities core_capabilities ssbd",
    (0x7, 1, "eax"): "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd 2 fzrm fsrs fsrc 4 fred lkgs wrmsrns nmi_src amx_fp16"
    " hreset avx_ifma 2 lam msrlist 3 movrs",
    (0x7, 1, "edx"): "4 avx_vnni_int8 avx_ne_convert 2 amx_complex - avx_vnni_int16 3 prefetchiti 3 cet_sss avx10 - apx_f",
    (0x7, 2, "edx"): "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x80000001, 0, "edx"): "11 syscall 7 mp nx - mmxext 2 fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    (0x80000001, 0, "ecx"): "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp"
    " fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx addr_mask_ext",
    (0x80000007, 0, "ebx"): "overflow_recov succor - smca",
    (0x80000007, 0, "edx"): "7 hw_pstate nonstop_tsc cpb",
    (0x80000008, 0, "ebx"): "clzero irperf xsaveerptr - rdpru 4 wbnoinvd 2 amd_ibpb - amd_ibrs amd_stibp ibrs_always_on stibp_always_on"
    " ibrs_preferred ibrs_same_mode efer_lmsle_mbz 2 amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret brs",
    (0x8000000A, 0, "edx"): "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists 2 pausefilter - pfthreshold avic -"
    " v_vmsave_vmload vgif - x2avic - v_spec_ctrl 4 vnmi 2 svme_addr_chk",
    (0x8000001F, 0, "eax"): "sme sev - sev_es sev_snp",
    (0x80000021, 0, "eax"): "no_nested_data_bp fs_gs_base_ns lfence_rdtsc smm_page_cfg_lock 2 null_sel_clr_base upper_addr_ignore autoibrs"
    " no_smm_ctl_msr amd_fsrs amd_fsrc - prefetch_ctl_msr 3 cpuid_user_dis epsf 8 sbpb ibpb_brtype srso_no srso_user_kernel_no",
    (0x80000021, 0, "ecx"): "- tsa_sq_no tsa_l1_no",
    (0x40000001, 0, "eax"): "kvm_clock kvm_nopiodelay kvm_mmu kvm_clock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt -"
    " kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id"
    " kvm_hc_map_gpa_range kvm_migration_control 6 kvm_clock_stable",
    (0x40000001, 0, "edx"): "kvm_hint_dedicated",
}


def _places() -> dict[str, tuple[int, int, str, int]]:
    places = {}
    for (leaf, index, register), names in WORDS.items():
        bit = 0
        for name in names.split():
            if name.isdecimal():
                bit += int(name)
                continue
            if name != "-":
                places[name] = (leaf, index, register, bit)
            bit += 1
    return places


FEATURES = _places()  # name: (leaf, index, register, bit)
_NAMES = {place: name for name, place in FEATURES.items()}

# Bits of 0x8000_0001 EDX that repeat those of leaf 1 EDX on AMD and are reserved on Intel (APM vol. 3, Fn8000_0001_EDX).
MIRRORED = (*range(10), *range(12, 18), 23, 24)
_REPEATED = {(0x80000001, 0, "edx", bit) for bit in MIRRORED}

ALIASES = {
    "sse3": "pni", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "lzcnt": "abm", "clmul": "pclmulqdq", "xd": "nx", "clfsh": "clflush",
    "htt": "ht", "tsc_deadline": "tsc_deadline_timer", "invtsc": "nonstop_tsc", "sha": "sha_ni", "ibpb": "amd_ibpb", "cmpxchg16b": "cx16",
    "cmpxchg8b": "cx8", "rdrnd": "rdrand", "1gb": "pdpe1gb",
    "auto_ibrs": "autoibrs", "psfd": "amd_psfd", "avx512_ifma": "avx512ifma", "avx512_vbmi": "avx512vbmi", "ds": "dts",
}  # fmt: skip

# feature: what software must have seen before it may use it (SDM vol. 1 chapters 13 to 18, "Detection"; APM vol. 3 appendix D).
_NEEDS = {
    "mmx": "fpu", "fxsr": "fpu",
    "sse": "fxsr", "sse2": "sse", "pni": "sse2", "ssse3": "pni", "sse4_1": "ssse3", "sse4_2": "sse4_1", "sse4a": "pni",
    "misalignsse": "sse", "aes": "sse2", "pclmulqdq": "sse2", "sha_ni": "sse2", "gfni": "sse2", "fxsr_opt": "fxsr",
    "mmxext": "mmx", "3dnow": "mmx", "3dnowext": "3dnow", "xsaveopt": "xsave", "xsavec": "xsave", "xgetbv1": "xsave", "xsaves": "xsavec",
    "xfd": "xsavec", "osxsave": "xsave", "xsaveerptr": "xsave", "avx": "xsave sse4_2", "avx2": "avx", "fma": "avx", "f16c": "avx",
    "vaes": "avx aes", "vpclmulqdq": "avx pclmulqdq", "xop": "avx", "fma4": "avx", "avx_vnni": "avx2", "avx_ifma": "avx2",
    "avx_vnni_int8": "avx2", "avx_ne_convert": "avx2", "avx_vnni_int16": "avx2", "sha512": "avx2", "sm3": "avx", "sm4": "avx2",
    "avx512f": "avx2", "avx512dq": "avx512f", "avx512ifma": "avx512f", "avx512pf": "avx512f", "avx512er": "avx512f",
    "avx512cd": "avx512f", "avx512bw": "avx512f", "avx512vl": "avx512f", "avx512vbmi": "avx512bw", "avx512_vbmi2": "avx512bw",
    "avx512_vnni": "avx512f", "avx512_bitalg": "avx512bw", "avx512_vpopcntdq": "avx512f", "avx512_4vnniw": "avx512f",
    "avx512_4fmaps": "avx512f", "avx512_vp2intersect": "avx512f", "avx512_bf16": "avx512bw", "avx512_fp16": "avx512bw avx512vl",
    "avx10": "avx512vl", "amx_tile": "xsave", "amx_bf16": "amx_tile", "amx_int8": "amx_tile", "amx_fp16": "amx_tile",
    "amx_complex": "amx_tile", "apx_f": "xsave", "mpx": "xsave", "pku": "xsave", "ospke": "pku", "shstk": "xsaves", "ibt": "xsaves",
    "cet_sss": "shstk", "lwp": "xsave", "nx": "pae", "lm": "pae", "pdpe1gb": "lm", "la57": "lm", "lahf_lm": "lm",
    "cx16": "cx8 lm", "pcid": "lm", "invpcid": "pcid", "lam": "lm", "lass": "lm", "pse36": "pse", "rdtscp": "tsc",
    "tsc_adjust": "tsc", "nonstop_tsc": "tsc", "x2apic": "apic", "tsc_deadline_timer": "apic tsc", "arat": "apic", "extapic": "apic",
    "msrlist": "msr", "wrmsrns": "msr", "spec_ctrl": "msr", "arch_capabilities": "msr", "tsxldtrk": "rtm",
    "sgx_lc": "sgx", "sgx_keys": "sgx", "kvm_asyncpf_vmexit": "kvm_asyncpf", "kvm_asyncpf_int": "kvm_asyncpf",
    "kvm_pv_tlb_flush": "kvm_steal_time", "sev_es": "sev", "sev_snp": "sev_es", "succor": "mca", "overflow_recov": "mca",
} | dict.fromkeys(WORDS[0x8000000A, 0, "edx"].split(), "svm")  # fmt: skip

NEEDS = {name: tuple(needs.split()) for name, needs in _NEEDS.items() if name in FEATURES}

# What KVM or user space provides whatever the CPU is: every baseline wants it, and none counts it as missing (CpuModel.missing).
# x2apic and tsc_deadline_timer reach the guest only with an in-kernel LAPIC.
PLATFORM = "hypervisor x2apic tsc_deadline_timer tsc_adjust arat " + " ".join(
    name for name, (leaf, *_) in FEATURES.items() if leaf == 0x40000001 and name != "kvm_hint_dedicated"
)

# name: (the baseline it extends, vendor, (family, model, stepping), what it adds). x86-64-v1 to v4 are the levels of the System V ABI,
# AMD64 supplement, section 3.1.1, v1 with what 64-bit kernels take for granted. The CPUs leave out what no guest is given (monitor, SMM,
# thermal bits), what was withdrawn by microcode or by KVM (hle, rtm, mpx), nested virtualization, and what only some of a generation's
# chips have. Families and models: SDM vol. 4 chapter 2, table 2-1; AMD's revision guides.
BASELINES: dict[str, tuple[str, str, tuple[int, int, int] | None, str]] = {
    "x86-64-v1": ("", "", None, PLATFORM + " fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2"
                  " syscall nx lm"),
    "x86-64-v2": ("x86-64-v1", "", None, "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2"),
    "x86-64-v3": ("x86-64-v2", "", None, "xsave avx avx2 bmi1 bmi2 f16c fma abm movbe"),
    "x86-64-v4": ("x86-64-v3", "", None, "avx512f avx512bw avx512cd avx512dq avx512vl"),
    "nehalem": ("x86-64-v2", "GenuineIntel", (6, 26, 5), "vme rdtscp"),
    "westmere": ("nehalem", "GenuineIntel", (6, 44, 2), "aes pclmulqdq pcid"),
    "sandybridge": ("westmere", "GenuineIntel", (6, 42, 7), "xsave xsaveopt avx"),
    "ivybridge": ("sandybridge", "GenuineIntel", (6, 58, 9), "f16c rdrand fsgsbase smep erms"),
    "haswell": ("ivybridge", "GenuineIntel", (6, 60, 3), "avx2 bmi1 bmi2 fma abm movbe invpcid pdpe1gb"),
    "broadwell": ("haswell", "GenuineIntel", (6, 61, 4), "adx rdseed smap 3dnowprefetch"),
    "skylake-client": ("broadwell", "GenuineIntel", (6, 94, 3), "clflushopt xsavec xgetbv1 xsaves"),
    "skylake-server": ("skylake-client", "GenuineIntel", (6, 85, 4), "avx512f avx512dq avx512cd avx512bw avx512vl clwb pku"),
    "cascadelake": ("skylake-server", "GenuineIntel", (6, 85, 7), "avx512_vnni spec_ctrl ssbd arch_capabilities"),
    "cooperlake": ("cascadelake", "GenuineIntel", (6, 85, 11), "avx512_bf16 stibp"),
    "icelake-server": ("cascadelake", "GenuineIntel", (6, 106, 6), "avx512ifma avx512vbmi avx512_vbmi2 avx512_bitalg avx512_vpopcntdq gfni"
                       " vaes vpclmulqdq sha_ni umip rdpid fsrm la57 wbnoinvd stibp"),
    "sapphirerapids": ("icelake-server", "GenuineIntel", (6, 143, 8), "avx512_bf16 avx512_fp16 avx_vnni amx_tile amx_bf16 amx_int8 xfd"
                       " serialize cldemote movdiri movdir64b fzrm fsrs fsrc"),
    "graniterapids": ("sapphirerapids", "GenuineIntel", (6, 173, 1), "amx_fp16 prefetchiti"),
    "zen1": ("x86-64-v3", "AuthenticAMD", (23, 1, 2), "vme mmxext fxsr_opt pdpe1gb rdtscp cr8_legacy sse4a misalignsse 3dnowprefetch osvw"
             " topoext fsgsbase smep smap rdrand rdseed adx clflushopt sha_ni aes pclmulqdq xsaveopt xsavec xgetbv1 xsaves clzero"
             " xsaveerptr"),
    "zen2": ("zen1", "AuthenticAMD", (23, 49, 0), "clwb rdpid umip wbnoinvd amd_ibpb amd_stibp amd_ssbd"),
    "zen3": ("zen2", "AuthenticAMD", (25, 1, 1), "pcid invpcid pku vaes vpclmulqdq erms fsrm amd_ibrs"),
    "zen4": ("zen3", "AuthenticAMD", (25, 17, 1), "avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512_bf16 avx512vbmi"
             " avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq gfni la57 null_sel_clr_base lfence_rdtsc autoibrs amd_psfd"),
    "zen5": ("zen4", "AuthenticAMD", (26, 2, 1), "avx_vnni movdiri movdir64b avx512_vp2intersect prefetchiti"),
}  # fmt: skip


def feature_named(name: str) -> str:
    """The feature's own name, of any spelling. Raises ConfigError with the nearest name."""
    key = name.strip().lower().replace("-", "_")
    key = ALIASES.get(key, key)
    place = place_of(key)
    if place is not None:
        return _spell(place)
    from difflib import get_close_matches

    from pykvm.errors import ConfigError

    near = get_close_matches(key, [*FEATURES, *ALIASES], 1)
    raise ConfigError(f"unknown CPU feature {name!r}; " + (f"did you mean {near[0]}?" if near else "pykvm cpu host lists this host's"))


def place_of(name: str) -> tuple[int, int, str, int] | None:
    """(leaf, index, register, bit) of a feature's name or of a place ("7.1.eax.9", in a word that has features); else None."""
    if name in FEATURES:
        return FEATURES[name]
    try:
        leaf, index, register, bit = name.split(".")
        place = (int(leaf, 16), int(index), register, int(bit))
    except ValueError:
        return None
    return place if place[:3] in WORDS and 0 <= place[3] < 32 else None


def _spell(place: tuple[int, int, str, int]) -> str:
    return _NAMES.get(place) or "{:x}.{}.{}.{}".format(*place)


def features_of(cpuid: Cpuid) -> frozenset[str]:
    """The features that a table says, for example ``vcpu.get_cpuid2()``; bits without a name come by their place."""
    found: set[tuple[int, int, str, int]] = set()
    for entry in cpuid:
        for register in ("eax", "ebx", "ecx", "edx"):
            if (entry.function, entry.index, register) not in WORDS:
                continue
            value, bit = getattr(entry, register), 0
            while value >> bit:
                if value >> bit & 1:
                    found.add((entry.function, entry.index, register, bit))
                bit += 1
    return frozenset(map(_spell, found - _REPEATED))


def with_needs(features: Iterable[str]) -> frozenset[str]:
    """These features and all they need."""
    todo, found = list(features), set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += NEEDS.get(name, ())
    return frozenset(found)


def implied_by(features: frozenset[str]) -> frozenset[str]:
    """Those of these features whose needs are among them too: a set that software may rely on."""
    while True:
        kept = frozenset(name for name in features if features.issuperset(NEEDS.get(name, ())))
        if kept == features:
            return kept
        features = kept
