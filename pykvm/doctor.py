"""What this host is and what its KVM can do: one row for each fact, with where it was read.

Nothing here raises for what cannot be read: such a row says "unknown". Rows under "behaviour" are found by running tiny guests (probe.py).
"""

from __future__ import annotations

import glob
import os

from pykvm.errors import KvmError, PykvmError
from pykvm.system import System

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Row", "examine"]

UNKNOWN = "unknown"
_VULNERABILITIES = (  # those whose mitigations run on VM entry or exit, or change how guest memory is mapped
    "l1tf", "mds", "mmio_stale_data", "itlb_multihit", "retbleed", "spectre_v2", "spec_store_bypass", "spec_rstack_overflow",
)  # fmt: skip
# Capability: what pykvm does with it. A unit test has all that the sources name in here, and those that ioctls stand for.
CAPABILITIES = {
    "KVM_CAP_CHECK_EXTENSION_VM": "capabilities that depend on the VM",
    "KVM_CAP_ENABLE_CAP_VM": "switching capabilities on",
    "KVM_CAP_USER_MEMORY": "memory slots",
    "KVM_CAP_NR_MEMSLOTS": "how many of them",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": "dirty pages protected again in portions, as a migration sends them",
    "KVM_CAP_READONLY_MEM": "read-only slots (ROM)",
    "KVM_CAP_SET_TSS_ADDR": "real mode without unrestricted guest",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR": "real mode without unrestricted guest",
    "KVM_CAP_NR_VCPUS": "recommended number of vCPUs",
    "KVM_CAP_MAX_VCPUS": "most vCPUs",
    "KVM_CAP_EXT_CPUID": "CPUID of the guest",
    "KVM_CAP_TSC_DEADLINE_TIMER": "TSC deadline timer of the LAPIC",
    "KVM_CAP_IMMEDIATE_EXIT": "kicks and time limits without a race",
    "KVM_CAP_SYNC_REGS": "registers with each exit, without an ioctl",
    "KVM_CAP_BINARY_STATS_FD": "KVM's own counters, beside the exit ledger",
    "KVM_CAP_INTERNAL_ERROR_DATA": "what the emulator could not do",
    "KVM_CAP_MEMORY_FAULT_INFO": "which gpa could not be mapped",
    "KVM_CAP_MP_STATE": "whether a vCPU is halted",
    "KVM_CAP_VCPU_EVENTS": "exceptions and interrupts in flight",
    "KVM_CAP_XCRS": "AVX in user mode (XCR0)",
    "KVM_CAP_DEBUGREGS": "debug registers",
    "KVM_CAP_SET_GUEST_DEBUG": "single step and breakpoints",
    "KVM_CAP_XSAVE": "x87, SSE and AVX registers as one area",
    "KVM_CAP_XSAVE2": "the same for CPUs with more than 4096 bytes of them",
    "KVM_CAP_SREGS2": "PAE's page directory pointers in saved states",
    "KVM_CAP_NESTED_STATE": "states of guests that have guests",
    "KVM_CAP_PIT_STATE2": "the PIT in saved states",
    "KVM_CAP_TSC_CONTROL": "states from hosts whose TSC has another frequency",
    "KVM_CAP_EXCEPTION_PAYLOAD": "exceptions that wait, in saved states",
    "KVM_CAP_SET_GUEST_DEBUG2": "interrupts that wait while a step is under way",
    "KVM_CAP_GET_TSC_KHZ": "times in --stats",
    "KVM_CAP_ADJUST_CLOCK": "kvmclock stands still while a machine is paused",
    "KVM_CAP_IRQCHIP": "--irqchip kernel: PIC, IOAPIC and LAPICs",
    "KVM_CAP_PIT2": "--irqchip kernel: the PIT",
    "KVM_CAP_SPLIT_IRQCHIP": "--irqchip split: LAPICs alone",
    "KVM_CAP_IRQ_ROUTING": "where a GSI leads",
    "KVM_CAP_SIGNAL_MSI": "MSIs from user space",
    "KVM_CAP_IRQFD": "interrupts by eventfd",
    "KVM_CAP_IRQFD_RESAMPLE": "level-triggered ones",
    "KVM_CAP_USER_NMI": "NMIs from user space",
    "KVM_CAP_IOEVENTFD": "writes that signal an eventfd and do not exit",
    "KVM_CAP_COALESCED_MMIO": "MMIO writes that wait for the next exit",
    "KVM_CAP_COALESCED_PIO": "port writes that wait for the next exit",
    "KVM_CAP_X86_USER_SPACE_MSR": "MSRs answered in user space",
    "KVM_CAP_X86_MSR_FILTER": "which MSRs those are",
    "KVM_CAP_EXIT_HYPERCALL": "hypercalls that reach user space, one bit each",
    "KVM_CAP_X86_BUS_LOCK_EXIT": "exits of kind BusLock, for who switches them on",
    "KVM_CAP_X86_NOTIFY_VMEXIT": "exits of kind Notify, for who switches them on",
    "KVM_CAP_EXIT_ON_EMULATION_FAILURE": "the guest's instruction stays where KVM's emulator gave up (bench exits)",
    "KVM_CAP_DIRTY_LOG_RING": "exits of kind DirtyRingFull (bench exits)",
    "KVM_CAP_VAPIC": "exits of kind TprAccess (bench exits)",
    "KVM_CAP_HYPERV": "exits of kind SystemEvent and Hyperv (bench exits)",
    "KVM_CAP_HYPERV_SYNIC2": "Hyper-V messages (bench exits)",
    "KVM_CAP_XEN_HVM": "exits of kind Xen (bench exits)",
    "KVM_CAP_VM_TYPES": "kinds of VMs, one bit each",
}


class Row:
    """One fact: ``group``, ``name``, ``value`` ("unknown" where it cannot be read), and ``source``, where it was read."""

    __slots__ = ("group", "name", "source", "value")

    def __init__(self, group: str, name: str, value: str, source: str) -> None:
        self.group, self.name, self.value, self.source = group, name, value, source

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"group": self.group, "name": self.name, "value": self.value, "source": self.source}

    def __repr__(self) -> str:
        return f"<Row {self.name}: {self.value} ({self.source})>"


def examine(kvm: str = "/dev/kvm", root: str = "/") -> Iterator[Row]:
    """All rows, each as it is found: the behaviour rows take the longest. ``root``: where /proc and /sys are."""
    host = _Host(root)
    yield from _cpu(host)
    yield from _module(host)
    yield from _mitigations(host)
    yield from _kvm(kvm)
    yield from _huge_pages(host)
    yield from _behaviour(kvm)


class _Host:
    """Files of /proc and /sys."""

    def __init__(self, root: str) -> None:
        self.root = root

    def read(self, path: str) -> str:
        try:
            with open(os.path.join(self.root, path.lstrip("/")), errors="replace") as file:
                return file.read().strip()
        except OSError:
            return UNKNOWN

    def switch(self, path: str) -> str:
        """A module parameter that is Y/N or a number, as on/off."""
        text = self.read(path)
        return {"Y": "on", "1": "on", "N": "off", "0": "off"}.get(text, text)

    def modules(self) -> list[str]:
        return sorted(os.path.basename(p) for p in glob.glob(os.path.join(self.root, "sys/module/kvm_*")))

    def cpu_flags(self) -> set[str]:
        line = next((line for line in self.read("/proc/cpuinfo").splitlines() if line.startswith("flags")), "")
        return set(line.partition(":")[2].split())


def _cpu(host: _Host) -> Iterator[Row]:
    source = "/proc/cpuinfo"
    text = host.read(source)
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    yield Row("CPU", "CPU model", names[0] if names else UNKNOWN, source)
    flags = host.cpu_flags()
    if "vmx" in flags:
        value = "VT-x (flag vmx)"
    elif "svm" in flags:
        value = "AMD-V (flag svm)"
    else:
        value = "none: neither flag vmx nor svm" if flags else UNKNOWN
    yield Row("CPU", "CPU virtualization", value, source)
    if flags:
        yield Row("CPU", "runs under a hypervisor", "yes" if "hypervisor" in flags else "no", source)


def _module(host: _Host) -> Iterator[Row]:
    modules = host.modules()
    yield Row("module", "vendor module", ", ".join(modules) or UNKNOWN, "/sys/module/kvm_*")
    intel, amd = "/sys/module/kvm_intel/parameters/", "/sys/module/kvm_amd/parameters/"
    if "kvm_intel" in modules:
        yield Row("module", "two-level paging", _paging("EPT", host.switch(intel + "ept")), intel + "ept")
        yield Row("module", "unrestricted guest", host.switch(intel + "unrestricted_guest"), intel + "unrestricted_guest")
        yield Row("module", "VPID", host.switch(intel + "vpid"), intel + "vpid")
        yield Row("module", "nested", host.switch(intel + "nested"), intel + "nested")
        yield Row("module", "vmentry_l1d_flush", host.read(intel + "vmentry_l1d_flush"), intel + "vmentry_l1d_flush")
    elif "kvm_amd" in modules:
        yield Row("module", "two-level paging", _paging("NPT", host.switch(amd + "npt")), amd + "npt")
        yield Row("module", "unrestricted guest", "on (AMD-V runs real mode as it is)", "APM vol. 2, section 15.19")
        yield Row("module", "ASID", "on (part of AMD-V)", "APM vol. 2, section 15.16")
        yield Row("module", "nested", host.switch(amd + "nested"), amd + "nested")
    else:
        tdp = "/sys/module/kvm/parameters/tdp_mmu"
        value = "none: shadow paging" if host.switch(tdp) == "off" else UNKNOWN
        yield Row("module", "two-level paging", value, tdp)
        for name in ("unrestricted guest", "VPID", "nested"):
            yield Row("module", name, UNKNOWN, "no parameter for it: neither kvm_intel nor kvm_amd is loaded")


def _paging(name: str, switch: str) -> str:
    return f"{name}: off (shadow paging)" if switch == "off" else f"{name}: {switch}"


def _mitigations(host: _Host) -> Iterator[Row]:
    for name in _VULNERABILITIES:
        path = f"/sys/devices/system/cpu/vulnerabilities/{name}"
        yield Row("mitigations", name, host.read(path), path)
    path = "/sys/module/kvm/parameters/nx_huge_pages"
    yield Row("mitigations", "nx_huge_pages", host.read(path), path)


def _kvm(path: str) -> Iterator[Row]:
    try:
        system = System(path)
    except PykvmError as error:
        yield Row("KVM", "access", str(error), path)
        for name in ("API version", *CAPABILITIES):
            yield Row("KVM", name, UNKNOWN, path)
        return
    with system:
        yield Row("KVM", "access", "yes", f"open({path})")
        yield Row("KVM", "API version", str(system.api_version), "KVM_GET_API_VERSION")
        for cap, purpose in CAPABILITIES.items():
            value = system.check_extension(cap)
            yield Row("KVM", cap, str(value) if value else "no", f"KVM_CHECK_EXTENSION; {purpose}")
        try:
            with system.create_vm() as vm:
                khz = f"{vm.create_vcpu().get_tsc_khz() / 1e3:g} MHz"
        except KvmError:
            khz = UNKNOWN
        yield Row("KVM", "guest TSC", khz, "KVM_GET_TSC_KHZ")


def _huge_pages(host: _Host) -> Iterator[Row]:
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    chosen = [word.strip("[]") for word in host.read(path).split() if word.startswith("[")]
    yield Row("memory", "transparent huge pages", chosen[0] if chosen else UNKNOWN, path)
    folder = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
    total, free = host.read(folder + "nr_hugepages"), host.read(folder + "free_hugepages")
    value = UNKNOWN if UNKNOWN in (total, free) else f"{total} reserved, {free} free"
    yield Row("memory", "2 MiB huge pages", value, folder)


def _behaviour(path: str) -> Iterator[Row]:
    from pykvm import probe

    probes: dict[str, tuple[Callable[[], bool], str]] = {
        "CPL0 code is emulated": (probe.cpl0_emulated, "a guest: popcnt at CPL0"),
        "real mode is emulated": (lambda: probe.cpl0_emulated("real"), "a guest: popcnt in real mode"),
        "emulation assist works": (probe.assist_works, "a guest: popcnt and cvtsi2sd of MMIO, which KVM's emulator does not know"),
        "CPL3 ports by I/O bitmap": (lambda: probe.cpl3_ports("bitmap"), "a guest: out at CPL3, IOPL 0, a bitmap of zeros"),
        "CPL3 ports by IOPL": (lambda: probe.cpl3_ports("iopl"), "a guest: out at CPL3, IOPL 3, a bitmap of ones"),
        "CPL3 single-steps": (lambda: probe.single_step("user"), "a guest: KVM_GUESTDBG_SINGLESTEP at CPL3"),
        "CPL0 single-steps": (lambda: probe.single_step("long"), "a guest: KVM_GUESTDBG_SINGLESTEP at CPL0"),
        "software breakpoints": (lambda: probe.breakpoints("software"), "a guest: KVM_GUESTDBG_USE_SW_BP, int3 at CPL0"),
        "hardware breakpoints": (lambda: probe.breakpoints("hardware"), "a guest: KVM_GUESTDBG_USE_HW_BP, DR0 at CPL0"),
        "OUT exits leave RIP past it": (lambda: probe.out_leaves_rip_past("long"), "a guest: out at CPL0"),
        "hypercalls come back": (probe.hypercall_returns, "a guest: vmcall at CPL0"),
        "SHUTDOWN keeps the registers": (probe.shutdown_keeps_registers, "a guest: ud2 without an IDT"),
        "RFLAGS.IF=0 can be interrupted": (probe.interruptible_with_if_clear, "a guest: 10 ms of spinning, a signal after 1 ms"),
    }
    for name, (ask, source) in probes.items():
        try:
            value = UNKNOWN if not os.path.exists(path) else "yes" if ask() else "no"
        except PykvmError:
            value = UNKNOWN
        yield Row("behaviour", name, value, source)
