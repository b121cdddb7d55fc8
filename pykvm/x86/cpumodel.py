"""A guest's CPU as a model, a named set of features with an identity, instead of a dump of what KVM_GET_SUPPORTED_CPUID says.

>>> model = CpuModel.parse("haswell -avx2", system)
>>> sorted(model.missing(system))  # what this host cannot give
>>> vcpu.set_cpuid2(model.cpuid(system, apic_id=0, cpus=2))
>>> missing, leaked = model.compare(vcpu)

**The rule.** What a host can give is what KVM says it supports (KVM_GET_SUPPORTED_CPUID), even where its CPU does more; ``cpuid()`` never
asks for more, nor for a feature without those it needs. What a vCPU really has is what KVM_GET_CPUID2 reads back after KVM_SET_CPUID2: a
feature of the model that is not there is *missing* (the host does not offer it, or KVM lost it), one that is there unasked has *leaked*.
VT-x and AMD-V hosts lose and leak nothing. A KVM without them (``kvm_pvm``) lets the CPU's own bits through, in the table and in user
mode, where CPUID does not exit: masking is no fence there. What CPL3 can really use is a matter of trying (pykvm/probe.py does so).

A table made here is sparse: leaves that are all zero are left out, for KVM answers zeros there.
Sources: SDM vol. 2A, CPUID, and vol. 1 section 13.2 (XSAVE's leaf); vol. 3 section 10.9 (topology); APM vol. 3 appendix E;
api.rst 4.20, 4.46; Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from pykvm.cpuid import SIGNIFICANT_INDEX, Cpuid, CpuidEntry
from pykvm.errors import ConfigError
from pykvm.x86.cpu_features import (
    BASELINES,
    FEATURES,
    MIRRORED,
    PLATFORM,
    WORDS,
    feature_named,
    features_of,
    implied_by,
    place_of,
    with_needs,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.system import System
    from pykvm.vcpu import VCPU

__all__ = ["BASELINES", "TOPOLOGY", "CpuModel", "features_of", "offered"]

INTEL, AMD, HYGON = "GenuineIntel", "AuthenticAMD", "HygonGenuine"

# KVM sets these by the guest's control registers and MSRs, whatever the table says (kvm_update_cpuid_runtime).
_DYNAMIC = frozenset(("osxsave", "ospke", "apic", "monitor"))
# These follow from the arguments of cpuid(), not from the model alone.
_LAPIC = frozenset((
    "x2apic", "tsc_deadline_timer", "kvm_asyncpf", "kvm_asyncpf_vmexit", "kvm_asyncpf_int", "kvm_pv_eoi", "kvm_pv_unhalt", "kvm_pv_ipi",
    "kvm_msi_ext_dest_id",
))  # fmt: skip
TOPOLOGY = frozenset(("ht", "cmp_legacy"))
_PLATFORM = frozenset(PLATFORM.split())

# XSAVE's components by bit of XCR0 or IA32_XSS (SDM vol. 1 section 13.1), and the feature they hold the state of.
_COMPONENTS = {
    2: "avx", 3: "mpx", 4: "mpx", 5: "avx512f", 6: "avx512f", 7: "avx512f", 8: "intel_pt", 9: "pku", 11: "shstk", 12: "shstk",
    15: "arch_lbr", 17: "amx_tile", 18: "amx_tile", 19: "apx_f", 62: "lwp",
}  # fmt: skip
_SUPERVISOR = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 16
_LEGACY_SIZE = 576  # bytes: FXSAVE's area and XSAVE's header

# Leaves that describe one feature, and mean nothing without it.
_LEAF_NEEDS = {
    0x5: "monitor", 0xD: "xsave", 0x12: "sgx", 0x14: "intel_pt", 0x19: "kl", 0x1C: "arch_lbr", 0x1D: "amx_tile", 0x1E: "amx_tile",
    0x24: "avx10", 0x8000000A: "svm", 0x8000001B: "ibs", 0x8000001C: "lwp", 0x8000001D: "topoext", 0x8000001E: "topoext",
    0x8000001F: "sev",
}  # fmt: skip
# A named model takes these from the host, as far as it has their feature, and nothing that only the host's CPU explains (its PMU).
_COMMON = frozenset((0, 1, 6, 7, 0xD, 0x1D, 0x1E, 0x80000000, 0x80000001, 0x80000007, 0x80000008, 0x8000000A, 0x80000021,
                     0x40000000, 0x40000001))  # fmt: skip
_CACHES = {INTEL: (0x2, 0x4, 0x80000006), AMD: (0x80000005, 0x80000006, 0x8000001D), HYGON: (0x80000005, 0x80000006, 0x8000001D)}
# For hosts that say nothing of their caches: level 1 data and code of 32 KiB, level 2 of 1 MiB, level 3 of 16 MiB, in leaf 4's format.
_DEFAULT_CACHES = [(0x121, 0x1C0003F, 63, 0), (0x122, 0x1C0003F, 63, 0), (0x143, 0x3C0003F, 1023, 0), (0x163, 0x3C0003F, 16383, 0)]


def offered(system: System) -> frozenset[str]:
    """The features that KVM can give a guest here: KVM_GET_SUPPORTED_CPUID, and what it leaves to user space (leaf 1 ECX bits 24 and 31).

    A feature whose state leaf 0xD does not have (AMX without permission, arch_prctl) or whose needs are not offered is not offered.
    """
    cpuid = system.get_supported_cpuid()
    found = features_of(cpuid) - {"osxsave", "ospke"} | {"hypervisor"}
    if system.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"):
        found |= {"tsc_deadline_timer"}
    states = _states(cpuid)
    return implied_by(found - {name for bit, name in _COMPONENTS.items() if not states >> bit & 1})


class CpuModel:
    """``name``, ``vendor`` ("" for the host's), ``features``, and ``signature``: (family, model, stepping), or None for the host's."""

    __slots__ = ("_everything", "brand", "features", "name", "signature", "vendor")

    def __init__(
        self,
        name: str,
        vendor: str,
        signature: tuple[int, int, int] | None,
        features: frozenset[str],
        brand: str = "",
        everything: bool = False,
    ) -> None:
        self.name, self.vendor, self.signature, self.features = name, vendor, signature, features
        self.brand = brand  # leaves 0x8000_0002 to 4, 47 characters of ASCII; empty for one made of the name
        self._everything = everything  # also those leaves of the host that only its own CPU explains

    # --- where models come from --------------------------------------------------------------------------------------

    @classmethod
    def host(cls, system: System) -> CpuModel:
        """Everything that KVM offers here, with the host's identity. Raises KvmError if KVM_GET_SUPPORTED_CPUID fails."""
        cpuid = system.get_supported_cpuid()
        return cls("host", vendor_of(cpuid), signature_of(cpuid), offered(system), _host_brand(), True)

    @classmethod
    def named(cls, name: str) -> CpuModel:
        """A baseline of BASELINES. Raises ConfigError with the nearest name."""
        key = name.lower().replace("_", "-")
        if key not in BASELINES:
            from difflib import get_close_matches

            near = get_close_matches(key, ["host", *BASELINES], 1)
            raise ConfigError(
                f"unknown CPU model {name!r}; " + (f"did you mean {near[0]}?" if near else f"use host or {', '.join(BASELINES)}")
            )
        _, vendor, signature, _ = BASELINES[key]
        features: list[str] = []
        base = key
        while base:
            base, _, _, added = BASELINES[base]
            features += added.split()
        return cls(key, vendor, signature, with_needs(features))

    @classmethod
    def parse(cls, text: str, system: System | None = None) -> CpuModel:
        """A model by words, from left to right: a name, ``& name`` for what both have, ``-feature`` and ``+feature``; commas are blanks.

        "host" needs ``system``. Raises ConfigError for unknown names, with the nearest, and for what is no such sentence.
        """
        model: CpuModel | None = None
        both = False
        for word in text.replace("&", " & ").replace(",", " ").split():
            if word == "&" and model is not None and not both:
                both = True
            elif word[0] in "+-" and len(word) > 1 and model is not None and not both:
                model = model.without(word[1:]) if word[0] == "-" else model.with_features(word[1:])
            elif word[0] not in "+-&" and (model is None or both):
                if word.lower() == "host" and system is None:
                    raise ConfigError("the CPU model 'host' needs an open System")
                one = cls.host(system) if word.lower() == "host" and system is not None else cls.named(word)
                model = one if model is None else model & one
                both = False
            else:
                raise ConfigError(f"CPU model {text!r}: {word!r} is out of place; write NAME, NAME & NAME, NAME -feature +feature")
        if model is None or both:
            raise ConfigError(f"CPU model {text!r}: a name is missing; use host or {', '.join(BASELINES)}")
        return model

    def __and__(self, other: CpuModel) -> CpuModel:
        """The common baseline: the features of both, and the older one's signature if one vendor made both (else the host's identity)."""
        features = implied_by(self.features & other.features)
        name = f"{self.name} & {other.name}"
        if self.vendor != other.vendor or self.signature is None or other.signature is None:
            return CpuModel(name, self.vendor if self.vendor == other.vendor else "", None, features)
        return CpuModel(name, self.vendor, min(self.signature, other.signature), features)

    def without(self, *names: str) -> CpuModel:
        """The model less these features and all that need them. Raises ConfigError for an unknown name."""
        gone = frozenset(feature_named(name) for name in names)
        return self._edited("-", gone, implied_by(self.features - gone))

    def with_features(self, *names: str) -> CpuModel:
        """The model plus these features and all they need. Raises ConfigError for an unknown name."""
        more = frozenset(feature_named(name) for name in names)
        return self._edited("+", more, self.features | with_needs(more))

    def _edited(self, sign: str, names: frozenset[str], features: frozenset[str]) -> CpuModel:
        name = " ".join([self.name, *(f"{sign}{feature}" for feature in sorted(names))])
        return CpuModel(name, self.vendor, self.signature, features, self.brand, self._everything)

    # --- what they say -----------------------------------------------------------------------------------------------

    @property
    def family(self) -> int | None:
        """The family as software computes it (base plus extended), None for the host's."""
        return self.signature[0] if self.signature else None

    @property
    def model(self) -> int | None:
        """The model number, None for the host's."""
        return self.signature[1] if self.signature else None

    @property
    def stepping(self) -> int | None:
        """The stepping, None for the host's."""
        return self.signature[2] if self.signature else None

    def missing(self, system: System) -> frozenset[str]:
        """The features of the model that this host cannot give: KVM does not offer them, or not what they need.

        KVM's paravirtual features and the few others that no CPU has to have (cpu_features.PLATFORM) are not counted.
        """
        return self.features - self._given(system) - _PLATFORM - _DYNAMIC

    def _given(self, system: System) -> frozenset[str]:
        return implied_by(self.features & offered(system))

    def compare(self, vcpu: VCPU) -> tuple[frozenset[str], frozenset[str]]:
        """(missing, leaked): the model's features that the vCPU has not, and those it has beside the model; from KVM_GET_CPUID2.

        Left out: what the arguments of ``cpuid()`` decide, KVM's own leaves, and what KVM changes with the guest's state.
        """
        got = features_of(vcpu.get_cpuid2())
        aside = _PLATFORM | _DYNAMIC | TOPOLOGY
        return self.features - got - aside, got - self.features - aside

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuModel) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return self.vendor, self.signature, self.features, self._everything

    def __repr__(self) -> str:
        identity = "the host's identity" if self.signature is None else "family {}, model {}, stepping {}".format(*self.signature)
        return f"<CpuModel {self.name}: {' '.join(filter(None, (self.vendor, identity)))}, {len(self.features)} features>"

    # --- the table ---------------------------------------------------------------------------------------------------

    def cpuid(self, system: System, apic_id: int = 0, cpus: int = 1, threads: int = 1, lapic: bool = False) -> Cpuid:
        """The table for KVM_SET_CPUID2 of one vCPU: what the model wants and KVM offers, no more.

        The guest has ``cpus`` vCPUs in one package, ``threads`` (a power of two) to a core; they have the APIC ids 0 to cpus - 1.
        ``lapic``: the VM has an in-kernel LAPIC, so x2APIC, the TSC deadline (KVM_CAP_TSC_DEADLINE_TIMER) and KVM's paravirtual
        interrupts may be shown. Raises ConfigError for a topology that cannot be.
        """
        if not (0 < threads <= 256 and threads & threads - 1 == 0 and cpus > 0 and cpus % threads == 0):
            raise ConfigError(f"{cpus} CPUs of {threads} threads a core: threads must be a power of two that divides the CPUs")
        if not 0 <= apic_id < cpus:
            raise ConfigError(f"APIC id {apic_id} of {cpus} CPUs: ids are 0 to {cpus - 1}")
        host = system.get_supported_cpuid()
        vendor = self.vendor or vendor_of(host)
        given = self._given(system) - TOPOLOGY
        if not lapic:
            given -= _LAPIC
        if cpus > 1:
            given |= TOPOLOGY if vendor != INTEL and "cmp_legacy" in offered(system) else {"ht"}
        table = _Table(host, self._leaves(host, vendor, given))
        table.features(given)
        table.identity(vendor, self.signature or signature_of(host), self.brand or f"pykvm {self.name}")
        table.topology(vendor, apic_id, cpus, threads)
        table.caches(host, vendor, given, cpus, threads)
        table.xsave(host, given)
        return table.finish(host if self._everything else None)

    def _leaves(self, host: Cpuid, vendor: str, given: frozenset[str]) -> set[int]:
        """The leaves to start from, of those that the host has."""
        leaves = {entry.function for entry in host}
        if not self._everything or vendor != vendor_of(host):
            leaves &= _COMMON | (set(_CACHES.get(vendor, ())) if vendor == vendor_of(host) else set())
        return {leaf for leaf in leaves if leaf not in _LEAF_NEEDS or _LEAF_NEEDS[leaf] in given}


class _Table:
    """A CPUID table in the making: registers by (leaf, index)."""

    def __init__(self, host: Cpuid, leaves: set[int]) -> None:
        self.rows = {(e.function, e.index): {"eax": e.eax, "ebx": e.ebx, "ecx": e.ecx, "edx": e.edx} for e in host if e.function in leaves}
        self.indexed = {e.function for e in host if e.flags & SIGNIFICANT_INDEX} | {0x4, 0x7, 0xB, 0xD, 0x1F, 0x8000001D}

    def set(self, leaf: int, index: int = 0, **registers: int) -> None:
        """Change some registers of a row; a new row has zeros in the others."""
        self.rows.setdefault((leaf, index), dict.fromkeys(("eax", "ebx", "ecx", "edx"), 0)).update(registers)

    def drop(self, leaf: int) -> None:
        """Take all rows of a leaf out."""
        for key in [key for key in self.rows if key[0] == leaf]:
            del self.rows[key]

    def features(self, given: frozenset[str]) -> None:
        """Each feature word, as given and nothing else."""
        words = dict.fromkeys(WORDS, 0)
        for leaf, index, register, bit in filter(None, map(place_of, given)):
            words[leaf, index, register] |= 1 << bit
        for (leaf, index, register), value in words.items():
            if value or (leaf, index) in self.rows:
                self.set(leaf, index, **{register: value})

    def identity(self, vendor: str, signature: tuple[int, int, int], brand: str) -> None:
        """Leaves 0, 1 EAX, 0x8000_0000 and 1, and the brand string."""
        name = [int.from_bytes(vendor.encode()[i : i + 4], "little") for i in (0, 4, 8)]
        for leaf in (0, 0x80000000):
            # Intel leaves the vendor out of the extended leaf (SDM), AMD repeats it (APM).
            ebx, edx, ecx = name if leaf == 0 or vendor != INTEL else (0, 0, 0)
            self.set(leaf, eax=0, ebx=ebx, edx=edx, ecx=ecx)
        family, model, stepping = signature
        eax = stepping | (model & 0xF) << 4 | min(family, 15) << 8 | model >> 4 << 16 | max(0, family - 15) << 20
        self.set(1, eax=eax)
        shared = sum(1 << bit for bit in MIRRORED)
        edx = self.rows[0x80000001, 0]["edx"] & ~shared
        if vendor == INTEL:
            self.set(0x80000001, eax=0, ebx=0, edx=edx)
        else:
            self.set(0x80000001, eax=eax, edx=edx | self.rows[1, 0]["edx"] & shared)
        text = brand.encode("ascii", "replace")[:47].ljust(48, b"\0")
        for i in range(3):
            words = (int.from_bytes(text[at : at + 4], "little") for at in range(16 * i, 16 * i + 16, 4))
            self.set(0x80000002 + i, **dict(zip(("eax", "ebx", "ecx", "edx"), words, strict=True)))

    def topology(self, vendor: str, apic_id: int, cpus: int, threads: int) -> None:
        """Who this vCPU is among how many: leaves 1 EBX, 0xB, 0x1F, and on AMD 0x8000_0008 ECX and 0x8000_001E."""
        thread_bits, bits = (threads - 1).bit_length(), (cpus - 1).bit_length()
        line = self.rows[1, 0]["ebx"] & 0xFF00  # CLFLUSH's
        self.set(1, ebx=(apic_id & 0xFF) << 24 | min(cpus, 255) << 16 | line)
        # Level types: 1 is threads in a core, 2 cores in a package, 0 ends the list.
        levels = [(thread_bits, threads, 1 << 8), (bits, cpus, 1 | 2 << 8), (0, 0, 2)]
        for leaf in (0xB, 0x1F):
            if leaf == 0xB or any(key[0] == leaf for key in self.rows):
                self.drop(leaf)
                for index, (shift, count, level) in enumerate(levels):
                    self.set(leaf, index, eax=shift, ebx=count, ecx=level, edx=apic_id)
        if vendor == INTEL:
            self.set(0x80000008, ecx=0)
            return
        self.set(0x80000008, ecx=min(cpus, 256) - 1 | bits << 12)
        self.drop(0x8000001E)
        if self.has("topoext"):
            self.set(0x8000001E, eax=apic_id, ebx=(threads - 1) << 8 | apic_id >> thread_bits & 0xFF)

    def caches(self, host: Cpuid, vendor: str, given: frozenset[str], cpus: int, threads: int) -> None:
        """Leaf 4 (Intel) or 0x8000_001D (AMD), which have one format: the host's caches, shared as the guest's topology says."""
        rows = [(e.eax, e.ebx, e.ecx, e.edx) for e in host if e.function == 4 and e.eax & 0x1F]
        rows = rows or [(e.eax, e.ebx, e.ecx, e.edx) for e in host if e.function == 0x8000001D and e.eax & 0x1F] or _DEFAULT_CACHES
        leaf = 4 if vendor == INTEL else 0x8000001D
        self.drop(4)
        self.drop(0x8000001D)
        if vendor != INTEL and not self.has("topoext"):
            return
        if vendor == INTEL and vendor_of(host) != INTEL:
            self.set(2, eax=0xFF01)  # descriptor 0xFF: "ask leaf 4"
        package, core = 1 << (cpus - 1).bit_length(), threads
        for index, (eax, ebx, ecx, edx) in enumerate(rows):
            sharing = core if eax >> 5 & 7 < 3 else package  # by level
            eax = eax & 0x3FFF | min(sharing - 1, 0xFFF) << 14
            if leaf == 4:
                eax |= min(package // core - 1, 0x3F) << 26
            self.set(leaf, index, eax=eax, ebx=ebx, ecx=ecx, edx=edx)

    def xsave(self, host: Cpuid, given: frozenset[str]) -> None:
        """Leaf 0xD: the components whose features are given, and the sizes that follow."""
        if "xsave" not in given:
            return
        states = _states(host) & (3 | sum(1 << bit for bit, name in _COMPONENTS.items() if name in given))
        if "xsaves" not in given:
            states &= ~_SUPERVISOR
        size = _LEGACY_SIZE
        for leaf, index in list(self.rows):
            if leaf == 0xD and index > 1:
                if not states >> index & 1:
                    del self.rows[leaf, index]
                elif not _SUPERVISOR >> index & 1:
                    size = max(size, self.rows[leaf, index]["eax"] + self.rows[leaf, index]["ebx"])
        user, supervisor = states & ~_SUPERVISOR, states & _SUPERVISOR
        # EBX is the size for the current XCR0, that of a CPU after reset here; KVM keeps it up to date.
        self.set(0xD, 0, eax=user & 0xFFFFFFFF, ebx=_LEGACY_SIZE, ecx=size, edx=user >> 32)
        compact = _LEGACY_SIZE if given & {"xsavec", "xsaves"} else 0
        self.set(0xD, 1, ebx=compact, ecx=supervisor & 0xFFFFFFFF, edx=supervisor >> 32)

    def has(self, name: str) -> bool:
        """Whether the feature's bit is set by now."""
        leaf, index, register, bit = FEATURES[name]
        row = self.rows.get((leaf, index))
        return row is not None and bool(row[register] >> bit & 1)

    def finish(self, host: Cpuid | None) -> Cpuid:
        """Without rows of zeros; leaves 0, 7.0 and 0x8000_0000 say in EAX how far theirs go, leaves 0 and 0x8000_0000 at least as far as
        ``host``'s. A named model's go to 0xD in any case: a KVM that lets XSAVE through adds that leaf by itself."""
        # Leaf 0x8000_001E is zero for APIC id 0 alone, and the vCPUs of a guest must not differ in how far their leaves go.
        kept = {key for key, row in self.rows.items() if any(row.values()) or key[0] in (0, 0x80000000, 0x8000001E)}
        for leaf, least in ((0, 0xD), (0x80000000, 0x80000008)):
            first = None if host is None else host.find(leaf)
            used = (key[0] for key in kept if key[0] - leaf in range(0x10000))
            self.set(leaf, eax=max(least if first is None else first.eax, *used))
        if (7, 0) in self.rows:
            self.set(7, eax=max((key[1] for key in kept if key[0] == 7), default=0))
            kept |= {(7, 0)} if self.rows[7, 0]["eax"] else set()
        return Cpuid.of(
            CpuidEntry(leaf, index, SIGNIFICANT_INDEX if leaf in self.indexed else 0, **self.rows[leaf, index])
            for leaf, index in sorted(kept)
        )


def vendor_of(cpuid: Cpuid) -> str:
    """Leaf 0's vendor string, such as "GenuineIntel"."""
    leaf = cpuid.find(0)
    if leaf is None:
        return ""
    return b"".join(register.to_bytes(4, "little") for register in (leaf.ebx, leaf.edx, leaf.ecx)).decode("latin-1")


def signature_of(cpuid: Cpuid) -> tuple[int, int, int]:
    """(family, model, stepping) of leaf 1 EAX, each as software computes it (SDM vol. 2A, CPUID, figure 3-6)."""
    leaf = cpuid.find(1)
    eax = 0 if leaf is None else leaf.eax
    family, model = eax >> 8 & 0xF, eax >> 4 & 0xF
    if family in (6, 15):
        model |= eax >> 12 & 0xF0
    return family + (eax >> 20 & 0xFF if family == 15 else 0), model, eax & 0xF


def _states(cpuid: Cpuid) -> int:
    """XSAVE's components in leaf 0xD: XCR0's from index 0, IA32_XSS's from index 1."""
    user, supervisor = cpuid.find(0xD, 0), cpuid.find(0xD, 1)
    states = 0 if user is None else user.eax | user.edx << 32
    return states | (0 if supervisor is None else supervisor.ecx | supervisor.edx << 32)


def _host_brand() -> str:
    # KVM gives no brand string, and CPUID is no instruction of Python's.
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""
