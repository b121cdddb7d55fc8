"""What a guest needs of the host: the note's ``needs=``, a comma list of names, each answered by a capability, a CPUID bit or a probe.

>>> with System() as system:
...     unmet({"needs": "vmx"}, system)
'it needs vmx: KVM offers VMX to guests only with kvm_intel and its parameter nested=1'

A name is a row of NEEDS, or ``cap:KVM_CAP_X``: the host answers that KVM_CHECK_EXTENSION with something else than 0.
"""

from __future__ import annotations

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pykvm.system import System

__all__ = ["NEEDS", "unmet"]


def _cpuid_bit(function: int, register: str, bit: int) -> Callable[[System], bool]:
    """Whether KVM can give a guest this CPUID bit."""

    def offered(system: System) -> bool:
        entry = system.get_supported_cpuid().find(function)
        return entry is not None and bool(getattr(entry, register) >> bit & 1)

    return offered


def _runs_in_user_mode(code: bytes) -> Callable[[System], bool]:
    """Whether user mode executes ``code``. CPUID does not tell on a host whose CPL3 has more than KVM offers (docs/hosts.md)."""

    def runs(system: System) -> bool:
        from pykvm.errors import GuestCrash
        from pykvm.machine import Machine
        from pykvm.platform import DEBUG_EXIT

        with Machine(code + bytes((0xE6, DEBUG_EXIT)), mode="user", memory="2M", system=system) as machine:
            try:
                return machine.run(1).reason == "exit"
            except GuestCrash:
                return False

    return runs


def _cpl0_direct(system: System) -> bool:
    from pykvm.probe import cpl0_emulated

    return not cpl0_emulated()


def _hypercalls(system: System) -> bool:
    from pykvm.probe import hypercall_returns

    return hypercall_returns()


def _tsc_deadline(system: System) -> bool:
    """Whether the CPUID of a machine with a LAPIC has the timer's TSC-deadline mode; without the bit KVM ignores the MSR."""
    from pykvm.machine import Machine

    with Machine("halt", irqchip="kernel", system=system) as machine:
        leaf = machine.vcpu.get_cpuid2().find(1)
        return leaf is not None and bool(leaf.ecx >> 24 & 1)


# name: (is it there?, what to say when it is not)
NEEDS: dict[str, tuple[Callable[[System], bool], str]] = {
    "vmx": (_cpuid_bit(1, "ecx", 5), "KVM offers VMX to guests only with kvm_intel and its parameter nested=1"),
    "svm": (_cpuid_bit(0x80000001, "ecx", 2), "KVM offers SVM to guests only with kvm_amd and its parameter nested=1"),
    "avx": (_runs_in_user_mode(b"\xc5\xf8\x77"), "a CPL3 program cannot execute VZEROUPPER here"),
    "avx2": (_runs_in_user_mode(b"\xc5\xfd\xfe\xc0"), "a CPL3 program cannot execute VPADDD on YMM registers here"),
    "cpl0": (_cpl0_direct, "KVM's instruction emulator runs CPL0 code here, and knows integer instructions only"),
    "tsc_deadline": (_tsc_deadline, "the vCPU has no TSC-deadline mode in its CPUID (leaf 1 ECX bit 24)"),
    "hypercalls": (_hypercalls, "VMCALL at CPL0 does not come back here"),
}


def unmet(note: Mapping[str, str], system: System) -> str | None:
    """Why a guest with this note cannot run on this host, or None when all that it needs is there. The first unmet need counts."""
    for name in filter(None, (word.strip() for word in note.get("needs", "").split(","))):
        if name.startswith("cap:"):
            try:
                if not system.check_extension(name[4:]):
                    return f"it needs {name[4:]}: KVM_CHECK_EXTENSION says 0 here"
            except ConfigError as unknown:
                return f"it needs {name[4:]}: {unknown}"
        elif name not in NEEDS:
            return f"it needs {name!r}, which this pykvm does not know: pykvm/needs.py has {', '.join(NEEDS)} and cap:KVM_CAP_..."
        elif not NEEDS[name][0](system):
            return f"it needs {name}: {NEEDS[name][1]}"
    return None
