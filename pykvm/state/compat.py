"""Whether this host's KVM can run a saved state: what the state demands, compared with what is here, each difference with a name.

What a guest was promised is the CPUID table it was given (``asked``) as far as KVM gave it; features that a KVM lets through unasked are no
promise. What is here is what KVM offers, and what it lets through. Compared are CPUID features, XSAVE's components (XCR0, and where each
lies in the area), MSRs, the TSC's frequency, paging (5 levels, the width of physical addresses), nested state, and the number of vCPUs.

A problem is *droppable* when the guest cannot miss what is dropped: a feature that nothing in its state has switched on (CR4, EFER,
XCR0, an MSR), or one that changes only speed. ``adapt`` drops those. The TSC's frequency is scaled where KVM can (KVM_CAP_TSC_CONTROL);
elsewhere the caller may accept that the guest's clock goes faster or slower.
Sources: SDM vol. 1 chapter 13 (XSAVE), vol. 3 section 2.5 (CR4); api.rst 4.46, 4.55, 8.3 (TSC scaling).
"""

from __future__ import annotations

from pykvm.abi import lib
from pykvm.cpuid import Cpuid
from pykvm.errors import IncompatibleStateError
from pykvm.platform import MMIO_HOLE_END
from pykvm.state.plain import Bool, Fields, Int, List, Text
from pykvm.state.vcpustate import xsave_layout
from pykvm.state.vcpustructs import capability_msrs, msr_indices
from pykvm.x86.cpu_features import NEEDS, features_of, place_of
from pykvm.x86.cpumodel import TOPOLOGY, offered, vendor_of
from pykvm.x86.msr import msr_name
from pykvm.x86.regs import CR4, EFER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.state.machinestate import MachineState
    from pykvm.system import System

__all__ = ["Host", "Problem", "Verdict", "adapted", "check", "demand"]

TSC_TOLERANCE = 250  # parts per million, which KVM itself takes as the same frequency (its tsc_tolerance_ppm)

# XSAVE's components by bit of XCR0 (SDM vol. 1 section 13.1): name, bits.
_COMPONENTS = (("AVX", 0x4), ("MPX", 0x18), ("AVX-512", 0xE0), ("PKRU", 0x200), ("AMX", 0x60000), ("APX", 0x80000), ("LWP", 1 << 62))

# feature: the bits of CR4, EFER or XCR0 without which no instruction of it works. What needs it (cpu_features.NEEDS) goes with it.
_SWITCHES = {
    "smep": ("cr4", CR4.SMEP), "smap": ("cr4", CR4.SMAP), "fsgsbase": ("cr4", CR4.FSGSBASE), "pcid": ("cr4", CR4.PCIDE),
    "umip": ("cr4", CR4.UMIP), "la57": ("cr4", CR4.LA57), "vmx": ("cr4", CR4.VMXE), "pku": ("cr4", CR4.PKE), "mce": ("cr4", CR4.MCE),
    "pge": ("cr4", CR4.PGE), "pse": ("cr4", CR4.PSE | CR4.PAE), "pae": ("cr4", CR4.PAE), "de": ("cr4", CR4.DE),
    "vme": ("cr4", CR4.VME | CR4.PVI), "xsave": ("cr4", CR4.OSXSAVE), "shstk": ("cr4", 1 << 23), "ibt": ("cr4", 1 << 23),
    "pks": ("cr4", 1 << 24), "lam": ("cr4", 1 << 28),
    "nx": ("efer", EFER.NXE), "svm": ("efer", EFER.SVME), "lm": ("efer", EFER.LME), "syscall": ("efer", EFER.SCE),
    "fxsr_opt": ("efer", 1 << 14), "avx": ("xcr0", 0x4), "mpx": ("xcr0", 0x18), "avx512f": ("xcr0", 0xE0), "amx_tile": ("xcr0", 0x60000),
    "lwp": ("xcr0", 1 << 62),
}  # fmt: skip
# feature: MSRs that are zero while it is not in use.
_BY_MSR = {
    "kvm_clock": (0x12, 0x11), "kvm_clock2": (0x4B564D01, 0x4B564D00), "kvm_asyncpf": (0x4B564D02,), "kvm_steal_time": (0x4B564D03,),
    "kvm_pv_eoi": (0x4B564D04,), "kvm_asyncpf_int": (0x4B564D02,), "kvm_migration_control": (0x4B564D08,), "tsc_adjust": (0x3B,),
    "xfd": (0x1C4,), "xsaves": (0xDA0,),
}  # fmt: skip
# Features that change speed, or tell of a speed, a fault or an identity, and give no instruction or register.
_HARMLESS = frozenset((
    "erms", "fsrm", "fzrm", "fsrs", "fsrc", "fdp_excptn_only", "zero_fcs_fds", "nonstop_tsc", "arat", "ht", "cmp_legacy", "misalignsse",
    "no_nested_data_bp", "null_sel_clr_base", "lfence_rdtsc", "xsaveerptr", "mcdt_no", "sbpb", "ibpb_brtype", "srso_no",
    "srso_user_kernel_no", "btc_no", "tsa_sq_no", "tsa_l1_no", "kvm_clock_stable", "kvm_asyncpf_vmexit", "kvm_hint_dedicated",
    "kvm_nopiodelay", "kvm_mmu", "kvm_poll_control", "kvm_pv_sched_yield", "kvm_pv_unhalt", "kvm_pv_tlb_flush", "kvm_pv_ipi",
    "kvm_hc_map_gpa_range", "kvm_msi_ext_dest_id", "aperfmperf", "hw_pstate", "cpb", "extapic", "topoext", "ss", "pbe", "dtherm", "osvw",
    "ibs", "perfctr_core", "perfctr_nb", "perfctr_llc", "pdcm", "dts", "dtes64", "est", "tm", "tm2", "acpi", "xtpr", "hwp", "epb", "ida",
    "pln", "pts",
))  # fmt: skip
# KVM sets these by the guest's state, not by what it was given.
_DYNAMIC = frozenset(("osxsave", "ospke", "apic", "monitor", "x2apic", "tsc_deadline_timer", "hypervisor"))
# Counters: without any that counts, a guest does not notice that they are gone.
_PMU = (range(0xC1, 0xC9), range(0x186, 0x18E), range(0x309, 0x30D), range(0x38D, 0x391), range(0x4C1, 0x4C9),
        range(0xC0010000, 0xC0010008), range(0xC0010200, 0xC001020C), range(0xC0000300, 0xC0000304))  # fmt: skip


class Problem:
    """One thing that the state demands and this host has not: ``what`` in words, ``kind`` ("feature", "xsave", "msr", "tsc", "paging",
    "nested", "cpus"), ``droppable``, ``key`` (a feature's or an MSR's name, or XCR0 bits)."""

    __slots__ = ("droppable", "key", "kind", "what")

    def __init__(self, kind: str, key: Any, what: str, droppable: bool = False) -> None:
        self.kind, self.key, self.what, self.droppable = kind, key, what, droppable

    def __str__(self) -> str:
        return self.what

    def __repr__(self) -> str:
        return f"<Problem {self.kind}: {self.what}{', droppable' if self.droppable else ''}>"


_HOST = Fields({
    "features": List(Text(64), 1024), "xcr0": Int(64), "layout": List(List(Int(32), count=3), 64), "msrs": List(Int(32), 1024),
    "tsc_khz": Int(32), "tsc_scales": Bool(), "nested": Text(16), "max_vcpus": Int(32), "width": Int(8), "vendor": Text(16),
})  # fmt: skip


class Host:
    """What one host offers, asked of its KVM once: plain values, so that the receiver of a migration can send its own as JSON."""

    __slots__ = ("features", "layout", "max_vcpus", "msrs", "nested", "tsc_khz", "tsc_scales", "vendor", "width", "xcr0")

    def __init__(
        self,
        features: list[str],
        xcr0: int,
        layout: list[list[int]],
        msrs: list[int],
        tsc_khz: int,
        tsc_scales: bool,
        nested: str,
        max_vcpus: int,
        width: int,
        vendor: str,
    ) -> None:
        self.features, self.xcr0, self.layout, self.msrs = features, xcr0, layout, msrs
        self.tsc_khz, self.tsc_scales, self.nested, self.max_vcpus = tsc_khz, tsc_scales, nested, max_vcpus
        self.width, self.vendor = width, vendor  # bits of a physical address; "GenuineIntel"

    @classmethod
    def of(cls, system: System) -> Host:
        """This host. Makes a VM for a moment: some of it can only be seen in a vCPU."""
        supported = system.get_supported_cpuid()
        with system.create_vm() as vm:
            vcpu = vm.create_vcpu()
            vcpu.set_cpuid2(supported.as_guest())
            given = features_of(vcpu.get_cpuid2())  # with what KVM lets through unasked
            khz = vcpu.get_tsc_khz() if system.check_extension("KVM_CAP_GET_TSC_KHZ") else 0
            xcr0 = 1
            leaf = supported.find(0xD, 0)
            if leaf is not None and system.check_extension("KVM_CAP_XCRS"):
                xcr0 = leaf.eax | leaf.edx << 32 | 3
        nested = vendor_of(supported) if system.check_extension("KVM_CAP_NESTED_STATE") else ""
        width = supported.find(0x80000008)
        return cls(
            features=sorted(offered(system) | given),
            xcr0=xcr0,
            layout=xsave_layout(supported),
            msrs=sorted(msr_indices(system)),
            tsc_khz=khz,
            tsc_scales=bool(system.check_extension("KVM_CAP_TSC_CONTROL")),
            nested=nested,
            max_vcpus=system.check_extension("KVM_CAP_MAX_VCPUS"),
            width=width.eax & 0xFF if width is not None else 36,
            vendor=vendor_of(supported),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, data: Any) -> Host:
        """From as_dict(), or somebody else: everything is checked. Raises StateError."""
        _HOST.check(data, "host")
        return cls(**data)


class Verdict:
    """``problems`` that nobody has accepted, ``dropped`` and ``notes`` in words, and the ``state`` as this host can run it."""

    __slots__ = ("dropped", "notes", "problems", "state")

    def __init__(self, state: MachineState, problems: list[Problem], dropped: list[str], notes: list[str]) -> None:
        self.state, self.problems, self.dropped, self.notes = state, problems, dropped, notes


def check(state: MachineState, host: Host) -> tuple[list[Problem], list[str]]:
    """(problems, notes): everything in which ``state`` demands more than ``host`` has, and what differs without mattering."""
    problems: list[Problem] = []
    notes: list[str] = []
    switched = _Switched(state)
    have = frozenset(host.features)
    for name in sorted(promised(state) - have - _DYNAMIC - TOPOLOGY):
        problems.append(Problem("feature", name, f"CPUID feature {name}", switched.droppable(name)))
    _check_xsave(state, host, switched, problems)
    _check_msrs(state, host, problems, notes)
    khz = state.vcpus[0]["tsc_khz"]
    if khz and host.tsc_khz and abs(khz - host.tsc_khz) * 1_000_000 > khz * TSC_TOLERANCE:
        if host.tsc_scales:
            notes.append(f"the TSC is scaled from {host.tsc_khz} to {khz} kHz")
        else:
            problems.append(Problem("tsc", khz, f"a TSC of {khz} kHz (here {host.tsc_khz} kHz, and KVM cannot scale it)"))
    _check_paging(state, host, problems, notes)
    if any(vcpu["nested"] is not None for vcpu in state.vcpus) and host.nested != state.host["vendor"]:
        problems.append(Problem("nested", None, f"nested virtualization in use, of {state.host['vendor']}"))
    if len(state.vcpus) > host.max_vcpus:
        problems.append(Problem("cpus", None, f"{len(state.vcpus)} vCPUs (here {host.max_vcpus} are the most)"))
    if state.host["vendor"] != host.vendor:
        notes.append(f"the state is from {state.host['vendor']}, this host is {host.vendor}")
    return problems, notes


def demand(state: MachineState, host: Host, *, adapt: bool = False, accept_tsc: bool = False) -> Verdict:
    """check(), and with ``adapt`` the droppable problems dropped. Raises IncompatibleStateError when some are left."""
    problems, notes = check(state, host)
    if accept_tsc:
        notes += [f"accepted: {p}" for p in problems if p.kind == "tsc"]
        problems = [p for p in problems if p.kind != "tsc"]
    drop = [p for p in problems if p.droppable and adapt]
    left = [p for p in problems if p not in drop]
    if left:
        advice = "" if not all(p.droppable for p in left) else "; none of it is in use: --adapt drops it"
        if [p.kind for p in left] == ["tsc"]:
            advice = "; --accept-tsc lets the guest's clock run at this host's"
        raise IncompatibleStateError(left, advice)
    return Verdict(adapted(state, drop), left, [str(p) for p in drop], notes)


def promised(state: MachineState) -> frozenset[str]:
    """The features that the guest was given because it was to have them."""
    found: frozenset[str] = frozenset()
    for vcpu in state.vcpus:
        found |= features_of(Cpuid.of_rows(vcpu["asked"])) & features_of(Cpuid.of_rows(vcpu["cpuid"]))
    return found


class _Switched:
    """What the vCPUs of a state have switched on."""

    def __init__(self, state: MachineState) -> None:
        self.bits = {"cr4": 0, "efer": 0, "xcr0": 0}
        self.in_use = 0  # XSAVE components that are not in their initial state
        self.msrs: set[int] = set()
        for vcpu in state.vcpus:
            self.bits["cr4"] |= vcpu["sregs"]["cr4"]
            self.bits["efer"] |= vcpu["sregs"]["efer"]
            self.bits["xcr0"] |= next((value for xcr, value in vcpu["xcrs"] if xcr == 0), 1)
            self.in_use |= int.from_bytes(bytes.fromhex(vcpu["xsave"])[512:520], "little")
            self.msrs |= {index for index, value in vcpu["msrs"] if value}

    def droppable(self, feature: str) -> bool:
        """Whether nothing in the state can have come from it or lead to it."""
        if feature in _HARMLESS:
            return True
        todo, seen = [feature], set()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            register, bits = _SWITCHES.get(name, ("", 0))
            if register and not self.bits[register] & bits:
                return True
            if name in _BY_MSR and not self.msrs.intersection(_BY_MSR[name]):
                return True
            todo += NEEDS.get(name, ())
        return False


def _check_xsave(state: MachineState, host: Host, switched: _Switched, problems: list[Problem]) -> None:
    """XCR0's components must be here, and at the same places: a guest's own XSAVE areas have them where its CPU had them."""
    xcr0 = switched.bits["xcr0"]
    model = promised(state)
    there, here = ({row[0]: row[1:] for row in layout} for layout in (state.host["xsave"], host.layout))
    for name, bits in _COMPONENTS:
        missing, common = xcr0 & bits & ~host.xcr0, xcr0 & bits & host.xcr0
        which = f"XCR0 bit{'s' if bits & bits - 1 else ''} {_bits(bits)}"
        if missing:
            unused = not switched.in_use & missing and not _features_with(name) & model
            problems.append(Problem("xsave", missing, f"{name} ({which})", unused))
        elif any(bits >> n & 1 and common >> n & 1 and n in there and there[n] != here.get(n) for n in there):
            unused = not switched.in_use & common and not _features_with(name) & model
            problems.append(Problem("xsave", common, f"{name} ({which}) where this host's XSAVE area does not have it", unused))


def _features_with(component: str) -> set[str]:
    return {"AVX": {"avx"}, "MPX": {"mpx"}, "AVX-512": {"avx512f"}, "PKRU": {"pku"}, "AMX": {"amx_tile"}}.get(component, set())


def _bits(mask: int) -> str:
    bits = [n for n in range(64) if mask >> n & 1]
    return f"{bits[0]}-{bits[-1]}" if len(bits) > 1 else str(bits[0])


def _check_msrs(state: MachineState, host: Host, problems: list[Problem], notes: list[str]) -> None:
    known, capabilities = frozenset(host.msrs), capability_msrs()
    wanted = {index: value for vcpu in state.vcpus for index, value in vcpu["msrs"] if value and index not in known}
    for index, value in sorted(wanted.items()):
        if index in capabilities:
            notes.append(f"MSR {msr_name(index)} ({value:#x}) is not here")
        else:
            counts = any(i in (*range(0x186, 0x18E), *range(0xC0010000, 0xC0010004)) and v >> 22 & 1 for i, v in wanted.items())
            droppable = any(index in row for row in _PMU) and not counts
            problems.append(Problem("msr", index, f"MSR {msr_name(index)} = {value:#x}", droppable))


def _check_paging(state: MachineState, host: Host, problems: list[Problem], notes: list[str]) -> None:
    if any(vcpu["sregs"]["cr4"] & CR4.LA57 for vcpu in state.vcpus) and "la57" not in host.features:
        problems.append(Problem("paging", None, "5-level paging in use (CR4.LA57)"))
    width = next((row[3] & 0xFF for row in state.vcpus[0]["asked"] if row[0] == 0x80000008), 0)
    top = max([MMIO_HOLE_END, *(slot["gpa"] + slot["size"] for slot in state.slots)])
    if top > 1 << host.width:
        problems.append(Problem("paging", None, f"guest physical addresses up to {top:#x} (this host's have {host.width} bits)"))
    elif width and width != host.width:
        notes.append(f"the guest was told of {width}-bit physical addresses, this host's have {host.width} bits")


def adapted(state: MachineState, drop: list[Problem]) -> MachineState:
    """The state without what ``drop`` names."""
    if not drop:
        return state
    features = {p.key for p in drop if p.kind == "feature"}
    places = [place for place in map(place_of, features) if place is not None]
    bits = sum(p.key for p in drop if p.kind == "xsave")
    msrs = {p.key for p in drop if p.kind == "msr"}
    column = {"eax": 3, "ebx": 4, "ecx": 5, "edx": 6}
    vcpus = []
    for vcpu in state.vcpus:
        rows = [list(row) for row in vcpu["asked"]]
        for row in rows:
            for leaf, index, register, bit in places:
                if row[0] == leaf and (row[1] == index or not row[2] & lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX):
                    row[column[register]] &= ~(1 << bit)
            if row[:2] == [0xD, 0]:
                row[3] &= ~bits & 0xFFFFFFFF
        area = bytearray.fromhex(vcpu["xsave"])
        if len(area) >= 520:
            area[512:520] = (int.from_bytes(area[512:520], "little") & ~bits).to_bytes(8, "little")
        vcpus.append({
            **vcpu,
            "asked": rows,
            "xcrs": [[xcr, value & ~bits if xcr == 0 else value] for xcr, value in vcpu["xcrs"]],
            "xsave": bytes(area).hex(),
            "msrs": [[index, value] for index, value in vcpu["msrs"] if index not in msrs],
        })  # fmt: skip
    return state.replace(vcpus=vcpus)
