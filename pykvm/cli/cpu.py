"""``pykvm cpu``: the CPU models, what of them this host can give, and what KVM makes of one."""

from __future__ import annotations

from pykvm.cli.options import Command, Option, whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.cpuid import Cpuid
    from pykvm.system import System
    from pykvm.x86.cpumodel import CpuModel

__all__ = ["COMMAND", "main"]

COMMAND = Command(
    "cpu",
    "[MODEL]",
    "The baselines, and whether this host can give each fully. With a MODEL: its features, what the host cannot give, and what KVM really\n"
    "set, read back from a vCPU. A model is a name, host, or a few words: 'haswell & zen2' is what both have, 'host -avx +smap' edits.",
    [
        Option("--cpus", "vCPUs of the guest, for the topology leaves", "N", 1, whole),
        Option("--json", "JSON instead of text, with the CPUID tables"),
    ],
    ["pykvm cpu", "pykvm cpu x86-64-v3", "pykvm cpu 'haswell & skylake-server' --cpus 4", "pykvm cpu host,-avx512f --json"],
)


def main(argv: list[str]) -> int:
    """List the baselines, or examine one model."""
    operands, o = COMMAND.parse(argv, 0, 1)
    from pykvm.system import System
    from pykvm.x86.cpumodel import BASELINES, CpuModel

    with System() as system:
        if operands:
            result: Any = _examine(CpuModel.parse(operands[0], system), system, o["cpus"])
        else:
            result = [_describe(model, system) for model in (CpuModel.host(system), *map(CpuModel.named, BASELINES))]
    if o["json"]:
        import json

        print(json.dumps(result, indent=2))
    elif operands:
        _print_one(result)
    else:
        _print_all(result)
    return 0


def _describe(model: CpuModel, system: System) -> dict[str, Any]:
    missing = sorted(model.missing(system))
    return {
        "name": model.name,
        "vendor": model.vendor,
        "family": model.family,
        "model": model.model,
        "stepping": model.stepping,
        "features": sorted(model.features),
        "complete": not missing,
        "missing": missing,
    }


def _examine(model: CpuModel, system: System, cpus: int) -> dict[str, Any]:
    """What KVM makes of the model: every vCPU gets its table, the first one's is compared."""
    from pykvm.x86.cpu_features import features_of

    result = _describe(model, system)
    with system.create_vm() as vm:
        vcpus = [vm.create_vcpu(i) for i in range(cpus)]
        for vcpu in vcpus:
            vcpu.set_cpuid2(model.cpuid(system, vcpu.id, cpus))
        set_to, got = model.cpuid(system, 0, cpus), vcpus[0].get_cpuid2()
        absent, leaked = model.compare(vcpus[0])
        ids = [leaf.edx for vcpu in vcpus if (leaf := vcpu.get_cpuid2().find(0xB)) is not None]
    missing = frozenset(result["missing"])
    return result | {
        "asked for": sorted(features_of(set_to)),
        "lost": sorted(absent - missing),
        "leaked": sorted(leaked),
        "there all the same": sorted(missing - absent),
        "cpus": cpus,
        "x2apic ids": ids,
        "set": _rows(set_to),
        "read back": _rows(got),
    }


def _rows(cpuid: Cpuid) -> list[dict[str, Any]]:
    return [
        {"leaf": f"{e.function:#x}", "index": e.index} | {name: f"{getattr(e, name):#010x}" for name in ("eax", "ebx", "ecx", "edx")}
        for e in sorted(cpuid, key=lambda e: (e.function, e.index))
    ]


def _identity(row: dict[str, Any]) -> str:
    if row["family"] is None:
        return f"{row['vendor']} as the host".strip()
    return f"{row['vendor']} {row['family']}/{row['model']}/{row['stepping']}"


def _print_all(rows: list[dict[str, Any]]) -> None:
    print(f"{'model':<16} {'vendor family/model/stepping':<28} this host can give it")
    for row in rows:
        missing = row["missing"]
        few = f"less {len(missing)}: {' '.join(missing[:6])}{' ...' * (len(missing) > 6)}"
        print(f"{row['name']:<16} {_identity(row):<28} {few if missing else 'fully'}")
    print("\npykvm cpu MODEL shows all of one, and what KVM makes of it")


def _print_one(row: dict[str, Any]) -> None:
    from textwrap import wrap

    print(f"{row['name']}: {_identity(row)}")
    for title, names in (
        (f"asked for, {len(row['asked for'])} features", row["asked for"]),
        ("missing: the host's KVM does not offer them, or not what they need", row["missing"]),
        ("lost: KVM took them and does not read them back", row["lost"]),
        ("leaked: KVM has set them unasked", row["leaked"]),
        ("of the missing, these are in the vCPU all the same", row["there all the same"]),
    ):
        print(f"\n{title}")
        print("\n".join(wrap(" ".join(names) or "none", 116, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)))
    print(f"\n{row['cpus']} vCPU{'s' * (row['cpus'] > 1)}, x2APIC ids {' '.join(map(str, row['x2apic ids']))}")
