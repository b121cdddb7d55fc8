"""CPU models on hosts made up here: what they want, and that each table agrees with itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.cpuid import Cpuid, CpuidEntry
from pykvm.errors import ConfigError
from pykvm.x86.cpu_features import ALIASES, FEATURES, NEEDS, PLATFORM, WORDS, feature_named, implied_by, with_needs
from pykvm.x86.cpumodel import BASELINES, CpuModel, features_of, offered, signature_of, vendor_of

ONES = 0xFFFFFFFF
INTEL, AMD = "GenuineIntel", "AuthenticAMD"
# XSAVE's component sizes and offsets as on real CPUs: AVX, MPX's two, AVX-512's three, PKRU, CET's two (supervisor), AMX's two.
STATES = {2: (256, 576), 3: (64, 960), 4: (64, 1024), 5: (64, 1088), 6: (512, 1152), 7: (1024, 1664), 9: (8, 2688), 11: (16, 0),
          12: (24, 0), 17: (64, 2752), 18: (8192, 2816)}  # fmt: skip


class Host:
    """What CpuModel asks of a System."""

    def __init__(self, vendor, features, signature=0x50654, deadline=1, states=STATES, extra=(), leaf_1f=False):
        self.deadline = deadline
        words = {}
        for name in features:
            leaf, index, register, bit = FEATURES[name]
            words.setdefault((leaf, index), dict.fromkeys(("eax", "ebx", "ecx", "edx"), 0))[register] |= 1 << bit
        name = [int.from_bytes(vendor.encode()[i : i + 4], "little") for i in (0, 4, 8)]
        rows = {
            (0, 0): (0x20, name[0], name[2], name[1]),
            (1, 0): (signature, 0x07100800, 0, 0),  # the CPU that was asked: APIC id 7 of 16
            (0xB, 0): (1, 2, 0x100, 7),
            (0xB, 1): (5, 16, 0x201, 7),
            (0xA, 0): (0x07300404, 0, 0, 0x603),
            (0xD, 0): (sum(1 << n for n in states if n not in (11, 12)) | 3, 11008, 11008, 0),
            (0xD, 1): (0, 0, sum(1 << n for n in states if n in (11, 12)), 0),
            (0x40000000, 0): (0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
            (0x40000001, 0): (0, 0, 0, 0),
            (0x80000000, 0): (0x80000021, *((0, 0, 0) if vendor == INTEL else (name[0], name[2], name[1]))),
            (0x80000001, 0): (0, 0, 0, 0),
            (0x80000008, 0): (0x3028, 0, 0x600F, 0),
        }
        rows |= {(0xD, n): (size, offset, int(n in (11, 12)), 0) for n, (size, offset) in states.items()}
        if leaf_1f:
            rows[0x1F, 0] = (1, 2, 0x100, 7)
        for index, level in enumerate((0x121, 0x122, 0x143, 0x163)):
            # Shared by 2, and level 3 by 32; 16 cores.
            sharing = 31 if level == 0x163 else 1
            if vendor == INTEL:
                rows[4, index] = (15 << 26 | sharing << 14 | level, 0x1C0003F, 63, 0)
            else:
                rows[0x8000001D, index] = (sharing << 14 | level, 0x1C0003F, 63, 0)
        for key, registers in words.items():
            old = rows.get(key, (0, 0, 0, 0))
            rows[key] = tuple(a | registers[name] for a, name in zip(old, ("eax", "ebx", "ecx", "edx"), strict=True))
        rows |= dict(extra)
        self.table = Cpuid.of(CpuidEntry(leaf, i, int(leaf in (4, 7, 0xB, 0xD, 0x1F, 0x8000001D)), *row) for (leaf, i), row in rows.items())

    def get_supported_cpuid(self):
        return self.table

    def check_extension(self, cap):
        return self.deadline if cap == "KVM_CAP_TSC_DEADLINE_TIMER" else 0


def features_like(name):
    """All features of a baseline but those that KVM leaves to user space."""
    return CpuModel.named(name).features - {"hypervisor", "tsc_deadline_timer", "kvm_msi_ext_dest_id"}


SAPPHIRE = Host(INTEL, features_like("graniterapids"), leaf_1f=True)
HASWELL = Host(INTEL, features_like("haswell"), signature=0x306C3, states={2: STATES[2]})
MILAN = Host(AMD, features_like("zen3") | {"cmp_legacy", "topoext"}, signature=0xA00F11, states={n: STATES[n] for n in (2, 9)})
BARE = Host(AMD, features_like("x86-64-v1"), signature=0xA00F11)  # states, but no XSAVE: as kvm_pvm
HOSTS = {"sapphire": SAPPHIRE, "haswell": HASWELL, "milan": MILAN, "bare": BARE}


# --- the tables -------------------------------------------------------------------------------------------------------


def test_every_name_has_one_place():
    names = [name for text in WORDS.values() for name in text.split() if name != "-" and not name.isdecimal()]
    assert len(names) == len(set(names)) == len(FEATURES) == len(set(FEATURES.values()))
    assert all(0 <= bit < 32 for *_, bit in FEATURES.values())


@pytest.mark.parametrize(
    ("name", "place"),
    [  # from the manuals, one at least of each word, its last ones preferred
        ("sse2", (1, 0, "edx", 26)), ("pbe", (1, 0, "edx", 31)), ("pni", (1, 0, "ecx", 0)), ("hypervisor", (1, 0, "ecx", 31)),
        ("arat", (6, 0, "eax", 2)), ("epb", (6, 0, "ecx", 3)), ("avx2", (7, 0, "ebx", 5)), ("avx512vl", (7, 0, "ebx", 31)),
        ("la57", (7, 0, "ecx", 16)), ("rdpid", (7, 0, "ecx", 22)), ("pks", (7, 0, "ecx", 31)), ("amx_int8", (7, 0, "edx", 25)),
        ("ssbd", (7, 0, "edx", 31)), ("avx512_bf16", (7, 1, "eax", 5)), ("lam", (7, 1, "eax", 26)), ("prefetchiti", (7, 1, "edx", 14)),
        ("mcdt_no", (7, 2, "edx", 5)), ("xfd", (0xD, 1, "eax", 4)), ("syscall", (0x80000001, 0, "edx", 11)),
        ("lm", (0x80000001, 0, "edx", 29)), ("topoext", (0x80000001, 0, "ecx", 22)), ("mwaitx", (0x80000001, 0, "ecx", 29)),
        ("nonstop_tsc", (0x80000007, 0, "edx", 8)), ("amd_ssbd", (0x80000008, 0, "ebx", 24)), ("brs", (0x80000008, 0, "ebx", 31)),
        ("vgif", (0x8000000A, 0, "edx", 16)), ("vnmi", (0x8000000A, 0, "edx", 25)), ("autoibrs", (0x80000021, 0, "eax", 8)),
        ("srso_no", (0x80000021, 0, "eax", 29)), ("kvm_pv_ipi", (0x40000001, 0, "eax", 11)),
        ("kvm_clock_stable", (0x40000001, 0, "eax", 24)),
    ],
)  # fmt: skip
def test_places(name, place):
    assert FEATURES[name] == place


def test_needs_name_features_and_end():
    for name, needs in NEEDS.items():
        assert set(needs) <= set(FEATURES), name
        assert all(name not in with_needs([need]) for need in needs), f"{name} needs itself"
    assert set(ALIASES.values()) <= set(FEATURES)
    assert not set(ALIASES) & set(FEATURES)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_hold_together(name):
    model = CpuModel.named(name)
    assert implied_by(model.features) == model.features
    assert set(BASELINES[name][3].split()) <= model.features <= set(FEATURES)
    assert set(PLATFORM.split()) <= model.features
    base = BASELINES[name][0]
    assert not base or CpuModel.named(base).features < model.features


def test_levels_of_the_abi():
    v3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
    v2 = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
    v1 = "cmov cx8 fpu fxsr mmx syscall sse sse2"
    assert set(f"{v1} {v2} {v3}".split()) <= CpuModel.named("x86-64-v3").features
    assert CpuModel.named("x86-64-v4").features - CpuModel.named("x86-64-v3").features == {
        "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl",
    }  # fmt: skip
    for cpu, level in (("nehalem", 2), ("haswell", 3), ("zen1", 3), ("skylake-server", 4), ("zen4", 4)):
        assert CpuModel.named(f"x86-64-v{level}").features <= CpuModel.named(cpu).features


# --- models -----------------------------------------------------------------------------------------------------------


def test_removing_a_feature_removes_what_needs_it():
    model = CpuModel.named("icelake-server").without("avx")
    assert not {"avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512_vbmi2", "vaes", "vpclmulqdq"} & model.features
    assert {"xsave", "sse4_2", "aes", "pclmulqdq", "bmi2"} <= model.features
    assert "avx" not in CpuModel.named("haswell").without("xsave").features
    assert not {"pni", "ssse3", "sse4_1", "avx", "aes"} & CpuModel.named("haswell").without("sse2").features
    assert model.name == "icelake-server -avx"


def test_adding_a_feature_adds_what_it_needs():
    model = CpuModel.named("nehalem").with_features("avx512bw")
    assert {"xsave", "avx", "avx2", "avx512f", "avx512bw"} <= model.features


FEATURE = st.sampled_from(sorted(FEATURES))


@given(st.sampled_from(sorted(BASELINES)), st.lists(st.tuples(st.booleans(), FEATURE), max_size=8))
def test_edits_keep_a_model_whole(name, edits):
    model = CpuModel.named(name)
    for add, feature in edits:
        model = model.with_features(feature) if add else model.without(feature)
        assert (feature in model.features) == add
        assert implied_by(model.features) == model.features
    text = " ".join([name, *(f"{'-+'[add]}{feature}" for add, feature in edits)])
    assert CpuModel.parse(text) == model
    assert model.name == text


def test_both():
    both = CpuModel.parse("haswell & skylake-server")
    assert both.features == CpuModel.named("haswell").features
    assert (both.vendor, both.signature) == (INTEL, (6, 60, 3))
    assert both == CpuModel.named("skylake-server") & CpuModel.named("haswell")
    mixed = CpuModel.parse("haswell & zen2 -avx")
    assert (mixed.vendor, mixed.signature, mixed.family, mixed.model, mixed.stepping) == ("", None, None, None, None)
    assert "avx2" not in mixed.features and "bmi2" in mixed.features
    assert "clzero" not in mixed.features and "pcid" not in mixed.features


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Haswell,-avx2", "haswell -avx2"),
        ("haswell&zen1", "haswell & zen1"),
        ("haswell -lzcnt -SSE4.1", "haswell -abm -sse4_1"),
        ("haswell -7.0.ebx.5", "haswell -avx2"),
        ("haswell +tsc-deadline", "haswell"),
        ("skylake_server", "skylake-server"),
    ],
)
def test_spellings(text, same):
    assert CpuModel.parse(text) == CpuModel.parse(same)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hasswell", "unknown CPU model 'hasswell'; did you mean haswell?"),
        ("quux", "unknown CPU model 'quux'; use host or x86-64-v1, "),
        ("haswell -avx51f", "unknown CPU feature 'avx51f'; did you mean avx512f?"),
        ("haswell +0", "unknown CPU feature '0'; pykvm cpu host lists this host's"),
        ("haswell -7.0.ebx.32", "unknown CPU feature"),
        ("haswell -2.0.eax.1", "unknown CPU feature"),
        ("haswell zen1", "'zen1' is out of place"),
        ("haswell & & zen1", "'&' is out of place"),
        ("-avx haswell", "'-avx' is out of place"),
        ("haswell & -avx", "'-avx' is out of place"),
        ("haswell + avx", "'+' is out of place"),
        ("haswell &", "a name is missing"),
        ("", "a name is missing"),
        ("host", "needs an open System"),
    ],
)
def test_what_is_no_model(text, message):
    with pytest.raises(ConfigError) as caught:
        CpuModel.parse(text)
    assert message in str(caught.value)


@given(st.text(alphabet="haswelzn123 &+-,._x", max_size=20))
def test_any_text_is_a_model_or_a_config_error(text):
    try:
        CpuModel.parse(text, MILAN)
    except ConfigError:
        pass


def test_a_bit_without_a_name_is_kept():
    host = Host(INTEL, features_like("haswell"), extra={(7, 0): (1, 1 << 22 | 1 << 5, 0, 0), (7, 1): (1 << 9, 0, 0, 0)}.items())
    assert {"7.0.ebx.22", "7.1.eax.9", "avx2"} <= CpuModel.host(host).features
    assert {"7.0.ebx.22", "7.1.eax.9"} <= features_of(CpuModel.host(host).cpuid(host))
    table = CpuModel.parse("host -7.0.ebx.22", host).cpuid(host)
    assert "7.0.ebx.22" not in features_of(table) and "7.1.eax.9" in features_of(table)
    assert feature_named("07.0.EBX.22") == "7.0.ebx.22"


def test_repr():
    assert repr(CpuModel.named("x86-64-v2")) == "<CpuModel x86-64-v2: the host's identity, 54 features>"
    assert repr(CpuModel.named("zen3")).startswith("<CpuModel zen3: AuthenticAMD family 25, model 1, stepping 1, ")


# --- what a host can give ---------------------------------------------------------------------------------------------


def test_missing():
    assert CpuModel.named("haswell").missing(SAPPHIRE) == frozenset()
    newer = {"adx", "rdseed", "smap", "3dnowprefetch", "clflushopt", "xsavec", "xgetbv1", "xsaves"}
    assert CpuModel.named("skylake-client").missing(HASWELL) == newer
    assert "avx" in CpuModel.named("x86-64-v3").missing(BARE)
    # A feature that is offered without what it needs cannot be given.
    odd = Host(INTEL, features_like("haswell") - {"avx"})
    assert {"avx", "avx2", "fma"} <= CpuModel.named("haswell").missing(odd)
    assert "avx2" not in CpuModel.host(odd).features


def test_features_need_their_state():
    """AMX without the permission for its state: the bits are in leaf 7, the components are not in leaf 0xD."""
    host = Host(INTEL, features_like("sapphirerapids"), states={n: s for n, s in STATES.items() if n < 17})
    assert not {"amx_tile", "amx_int8"} & offered(host)
    assert {"amx_tile", "amx_int8", "amx_bf16"} == CpuModel.named("sapphirerapids").missing(host)


@pytest.mark.parametrize("deadline", [0, 1])
@pytest.mark.parametrize("lapic", [False, True])
def test_the_lapic_brings_its_features(deadline, lapic):
    host = Host(INTEL, features_like("haswell"), deadline=deadline)
    got = features_of(CpuModel.named("haswell").cpuid(host, lapic=lapic))
    assert ("x2apic" in got, "tsc_deadline_timer" in got, "kvm_pv_eoi" in got) == (lapic, lapic and bool(deadline), lapic)
    assert {"hypervisor", "kvm_clock", "apic"} <= got
    assert not {"x2apic", "tsc_deadline_timer"} & features_of(CpuModel.parse("haswell -x2apic -tsc_deadline").cpuid(host, lapic=True))


def test_the_hypervisor_can_be_hidden():
    assert "hypervisor" not in features_of(CpuModel.parse("haswell -hypervisor").cpuid(HASWELL))


# --- the table of a vCPU ----------------------------------------------------------------------------------------------


def check_table(table, model, host, apic_id, cpus, threads):
    """What the manuals say of one table, read as a guest would."""
    rows = {(e.function, e.index): e for e in table}
    assert len(rows) == len(table)
    got = features_of(table)
    vendor = model.vendor or vendor_of(host.table)
    assert vendor_of(table) == vendor
    assert signature_of(table) == (model.signature or signature_of(host.table))
    # Features: no more than both have, whole, and nothing lost but what the arguments decide.
    topology = {"ht", "cmp_legacy"}
    assert got - topology <= model.features & offered(host)
    assert implied_by(got) == got
    lapic = {"x2apic", "tsc_deadline_timer"} | {name for name in FEATURES if name.startswith("kvm_")}
    assert model.features - model.missing(host) - got <= topology | lapic | {name for name in PLATFORM.split() if name not in offered(host)}
    # Limits.
    assert rows[0, 0].eax >= max(leaf for leaf, _ in rows if leaf < 0x10000)
    assert rows[0x80000000, 0].eax >= max(leaf for leaf, _ in rows)
    assert (7, 0) not in rows or rows[7, 0].eax == max(index for leaf, index in rows if leaf == 7)
    assert rows[0x40000000, 0].ebx == 0x4B4D564B
    # Topology: leaf 1, then 0xB and 0x1F, each with the shifts that split the APIC id.
    assert ("ht" in got) == (cpus > 1)
    assert (rows[1, 0].ebx >> 24, rows[1, 0].ebx >> 16 & 0xFF, rows[1, 0].ebx >> 8 & 0xFF) == (apic_id & 0xFF, min(cpus, 255), 8)
    for leaf in (0xB, 0x1F):
        if leaf == 0x1F and (leaf, 0) not in rows:
            continue
        smt, core, end = (rows[leaf, i] for i in range(3))
        assert (smt.ecx, core.ecx, end.ecx, end.eax, end.ebx) == (0x100, 0x201, 2, 0, 0)
        assert 1 << smt.eax == smt.ebx == threads
        assert core.ebx == cpus and 1 << core.eax >= cpus > 1 << core.eax >> 1 and apic_id >> core.eax == 0
        assert {row.edx for row in (smt, core, end)} == {apic_id}
    if vendor == INTEL:
        assert not [leaf for leaf, _ in rows if leaf in (0x80000005, 0x8000001D, 0x8000001E)]
        assert rows[0x80000001, 0].edx & 0x0183F3FF == 0 and rows[0x80000008, 0].ecx == 0
        caches = [e for e in table if e.function == 4]
        assert all((e.eax >> 26) + 1 == min(1 << core.eax >> smt.eax, 64) for e in caches)
    else:
        assert not [leaf for leaf, _ in rows if leaf == 4]
        assert rows[0x80000001, 0].eax == rows[1, 0].eax
        assert rows[0x80000001, 0].edx & 0x0183F3FF == rows[1, 0].edx & 0x0183F3FF
        assert rows[0x80000008, 0].ecx & 0xFF == min(cpus, 256) - 1 and rows[0x80000008, 0].ecx >> 12 == core.eax
        assert ("cmp_legacy" in got) == (cpus > 1 and "cmp_legacy" in offered(host))
        caches = [e for e in table if e.function == 0x8000001D]
        assert bool(caches) == ("topoext" in got) == ((0x8000001E, 0) in rows)
        if (0x8000001E, 0) in rows:
            extended = rows[0x8000001E, 0]
            assert (extended.eax, extended.ebx & 0xFF, extended.ebx >> 8) == (apic_id, apic_id >> smt.eax & 0xFF, threads - 1)
    for e in caches:
        level, sharing = e.eax >> 5 & 7, (e.eax >> 14 & 0xFFF) + 1
        assert sharing == (1 << smt.eax if level < 3 else min(1 << core.eax, 4096))
    # XSAVE: a component for each feature and no other; the sizes are those of the components.
    if "xsave" not in got:
        assert not [leaf for leaf, _ in rows if leaf == 0xD]
        return
    xcr0, xss = rows[0xD, 0].eax | rows[0xD, 0].edx << 32, rows[0xD, 1].ecx if (0xD, 1) in rows else 0
    for bits, name in ((3, "xsave"), (4, "avx"), (0x18, "mpx"), (0xE0, "avx512f"), (0x200, "pku"), (0x60000, "amx_tile")):
        assert xcr0 & bits == (bits if name in got else 0), name
    assert xss == 0 or "xsaves" in got
    parts = [e for e in table if e.function == 0xD and e.index > 1]
    assert {e.index for e in parts} == {n for n in range(2, 63) if (xcr0 | xss) >> n & 1}
    assert rows[0xD, 0].ebx == 576
    assert rows[0xD, 0].ecx == max([576, *(e.eax + e.ebx for e in parts if xcr0 >> e.index & 1)])


@st.composite
def topologies(draw):
    """(cpus, threads, APIC id)"""
    threads = draw(st.sampled_from([1, 2, 4]))
    cpus = threads * draw(st.integers(1, 80))
    return cpus, threads, draw(st.integers(0, cpus - 1))


MODELS = st.sampled_from([*BASELINES, "host", "host & zen2", "haswell & zen1", "host -xsave", "host +svm", "zen4 -topoext", "host -avx2"])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(HOSTS)), MODELS, st.lists(FEATURE, max_size=3), topologies(), st.booleans())
def test_tables_agree_with_themselves(host, text, removed, topology, lapic):
    host = HOSTS[host]
    cpus, threads, apic_id = topology
    model = CpuModel.parse(" ".join([text, *(f"-{feature}" for feature in removed)]), host)
    check_table(model.cpuid(host, apic_id, cpus, threads, lapic), model, host, apic_id, cpus, threads)


@settings(deadline=None)
@given(st.sampled_from(sorted(HOSTS)), MODELS, topologies())
def test_the_tables_of_one_guest_differ_in_ids_alone(host, text, topology):
    host = HOSTS[host]
    cpus, threads, apic_id = topology
    model = CpuModel.parse(text, host)
    first, other = (model.cpuid(host, id, cpus, threads) for id in (0, apic_id))
    for a, b in zip(first, other, strict=True):
        if a.function == 1:
            b.ebx &= 0xFFFFFF
        elif a.function in (0xB, 0x1F):
            b.edx = 0
        elif a.function == 0x8000001E:
            b.eax, b.ebx = 0, b.ebx & ~0xFF
        assert repr(a) == repr(b)


def test_the_host_model_is_the_host():
    for host in HOSTS.values():
        model = CpuModel.host(host)
        assert model.missing(host) == frozenset()
        assert (model.vendor, model.signature) == (vendor_of(host.table), signature_of(host.table))
        assert features_of(model.cpuid(host, lapic=True)) == offered(host) - {"ht", "cmp_legacy"}
    assert CpuModel.host(SAPPHIRE).cpuid(SAPPHIRE).find(0xA).eax == 0x07300404
    # A baseline is the same CPU on every host that has it: no PMU of this one.
    assert CpuModel.named("haswell").cpuid(SAPPHIRE).find(0xA) is None


def test_a_baseline_is_the_same_on_hosts_that_have_it():
    ours = {(e.function, e.index): e for e in CpuModel.named("haswell").cpuid(HASWELL)}
    theirs = {(e.function, e.index): e for e in CpuModel.named("haswell").cpuid(SAPPHIRE) if e.function != 0x1F}
    assert ours.keys() == theirs.keys()
    # But for leaf 0, which must reach up to 0x1F where the host has that.
    assert all(repr(ours[key]) == repr(theirs[key]) for key in ours if key != (0, 0))


def test_brands():
    def brand(table):
        words = [getattr(table.find(0x80000002 + i), name, 0) for i in range(3) for name in ("eax", "ebx", "ecx", "edx")]
        return b"".join(word.to_bytes(4, "little") for word in words).rstrip(b"\0").decode()

    assert brand(CpuModel.named("haswell").cpuid(HASWELL)) == "pykvm haswell"
    long = CpuModel.parse("haswell & skylake-server & icelake-server -avx -bmi1 -bmi2")
    assert brand(long.cpuid(HASWELL)) == f"pykvm {long.name}"[:47]


@pytest.mark.parametrize(("apic_id", "cpus", "threads"), [(0, 0, 1), (0, 3, 2), (0, 6, 3), (0, 4, 0), (4, 4, 1), (-1, 4, 1), (0, -2, 2)])
def test_topologies_that_cannot_be(apic_id, cpus, threads):
    with pytest.raises(ConfigError):
        CpuModel.named("haswell").cpuid(HASWELL, apic_id, cpus, threads)


def test_find_heeds_the_index_where_it_counts():
    table = Cpuid.of([CpuidEntry(0xD, 0, 1, 7, 0, 0, 0), CpuidEntry(0xD, 1, 1, 15, 0, 0, 0), CpuidEntry(1, 0, 0, 3, 0, 0, 0)])
    assert [table.find(0xD, index) and table.find(0xD, index).eax for index in range(3)] == [7, 15, None]
    assert table.find(1, 5).eax == 3
    assert len(table) == 3 and len(Cpuid.of([])) == 0
