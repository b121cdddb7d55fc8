"""What a measurement has to say of its host: which CPU, kernel and mitigations, what the TSC counts, and how quiet it was."""

from __future__ import annotations

import os
from functools import cache

from pykvm.abi import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Noise", "describe", "tsc_counts_instructions"]

_PARAMETERS = {
    "kvm": ("halt_poll_ns", "nx_huge_pages", "tdp_mmu"),
    "kvm_intel": ("ept", "vpid", "unrestricted_guest", "vmentry_l1d_flush", "ple_gap", "enable_apicv", "nested"),
    "kvm_amd": ("npt", "avic", "vgif", "nested"),
}
_OPTIONS = ("mitigations=", "nosmt", "l1tf=", "mds=", "spectre", "retbleed=", "kvm", "clearcpuid=", "isolcpus=", "nohz_full=", "idle=")
_SPIN = 20_000  # multiplications
_SPREAD, _STEAL = 0.1, 0.005  # more than this is said


def _read(path: str) -> str | None:
    try:
        with open(path, errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def describe(root: str = "/") -> dict[str, Any]:
    """The host as a JSON object. What cannot be read is missing."""
    cpuinfo = _read(f"{root}proc/cpuinfo") or ""
    halves = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in halves}
    modules = f"{root}sys/module/"
    vendor = [name for name in sorted(_names(modules)) if name.startswith("kvm_")]
    parameters = {
        f"{module}.{name}": value
        for module in ("kvm", *vendor)
        for name in _PARAMETERS.get(module, ())
        if (value := _read(f"{modules}{module}/parameters/{name}")) is not None
    }
    folder = f"{root}sys/devices/system/cpu/"
    mitigations = {name: _read(f"{folder}vulnerabilities/{name}") or "" for name in sorted(_names(f"{folder}vulnerabilities"))}
    governor = _read(f"{folder}cpu0/cpufreq/scaling_governor")
    os_name = os.uname()
    return {
        "cpu": fields.get("model name", ""),
        "cpus": len(os.sched_getaffinity(0)),
        "microcode": fields.get("microcode", ""),
        "hypervisor": "hypervisor" in fields.get("flags", "").split(),
        "kernel": f"{os_name.sysname} {os_name.release}",
        "kernel_options": [word for word in (_read(f"{root}proc/cmdline") or "").split() if word.startswith(_OPTIONS)],
        "vendor_modules": vendor,
        "parameters": parameters,
        "vmentry_l1d_flush": parameters.get("kvm_intel.vmentry_l1d_flush"),
        "nx_huge_pages": parameters.get("kvm.nx_huge_pages"),
        "halt_poll_ns": parameters.get("kvm.halt_poll_ns"),
        "mitigations": mitigations,
        "smt": _read(f"{folder}smt/active"),
        "governor": governor,
        "load": list(os.getloadavg()),
    }


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


@cache
def tsc_counts_instructions() -> bool:
    """Whether the guest's TSC advances by exactly one for each instruction, as in Bochs: then a difference of two readings is exact.

    A guest reads it around n NOPs, for several n, many times.
    """
    from pykvm import exits
    from pykvm.memory import GuestMemory
    from pykvm.system import System
    from pykvm.x86.modes import ProtectedMode

    lengths, at, out = (0, 7, 60, 333), 0x100000, 0x80000
    code = bytearray(b"\xbf" + out.to_bytes(4, "little"))  # mov edi, out
    for nops in lengths:
        code += b"\x0f\x31\x89\xc6" + b"\x90" * nops + b"\x0f\x31\x29\xf0\xab"  # rdtsc; mov esi, eax; nops; rdtsc; sub eax, esi; stosd
    code += b"\xf4"
    seen = set()
    with System() as system, GuestMemory.of_size("2M") as ram, system.create_vm() as vm:
        vm.add_memory(ram)
        ram.write(at, bytes(code))
        vcpu = vm.create_vcpu()
        for _ in range(8):
            ProtectedMode().apply(vcpu, ram, at)
            if not isinstance(vcpu.run(1.0), exits.Hlt):
                return False
            seen.add(tuple(ram.read_u32(out + 4 * i) for i in range(len(lengths))))
    # An interrupt of the host's may come between two readings once.
    return any(all(taken[i] - taken[0] == nops for i, nops in enumerate(lengths)) for taken in seen) and len(seen) <= 2


class Noise:
    """How quiet the machine was: time stolen by a hypervisor, switches to other processes, and how fast a fixed piece of work went.

    ``look()`` now and then between measurements; ``as_dict()`` and ``sentence()`` at the end.
    """

    def __init__(self) -> None:
        self.spins: list[float] = []
        self._since = self._counters()
        self.look()

    def look(self) -> None:
        """Time the fixed piece of work, a few times; the best counts."""
        for _ in range(5):
            self.spins.append(min(lib.pykvm_bench_spin(_SPIN) for _ in range(3)) / _SPIN)

    @staticmethod
    def _counters() -> tuple[int, int, int]:
        import resource

        line = (_read("/proc/stat") or "cpu 0").splitlines()[0].split()[1:]
        ticks = [int(word) for word in line]
        return sum(ticks[:8]), ticks[7] if len(ticks) > 7 else 0, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        total, stolen, switches = (now - then for now, then in zip(self._counters(), self._since, strict=True))
        low, high = min(self.spins), max(self.spins)
        return {
            "steal": stolen / total if total else 0.0,
            "involuntary_switches": switches,
            "load": os.getloadavg()[0],
            "spin_tsc": [low, high],
            "quiet": high <= low * (1 + _SPREAD) and stolen <= total * _STEAL and os.getloadavg()[0] < len(os.sched_getaffinity(0)),
        }


def sentence(noise: dict[str, Any]) -> str:
    """The same for people."""
    low, high = noise["spin_tsc"]
    quiet = "the machine was quiet" if noise["quiet"] else "the machine was NOT quiet"
    return (
        f"{quiet}: load {noise['load']:.1f}, {100 * noise['steal']:.1f} % stolen, {noise['involuntary_switches']} times another process "
        f"ran instead, a multiplication took {low:.2f} to {high:.2f} TSC units"
    )
