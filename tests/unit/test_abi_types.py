"""cffi checks a type when it is first used: touch every one, so that a wrong declaration fails here and nowhere else."""

import re
from pathlib import Path

import pytest

from pykvm.abi import Struct, ffi, lib, new

NATIVE = Path(__file__).parents[2] / "native"
CONSTANTS = [name for line in (NATIVE / "kvm_constants.txt").read_text().splitlines() if not line.startswith("#") for name in line.split()]
typedefs, structs, unions = ffi.list_types()


@pytest.mark.parametrize("name", [*(f"struct {s}" for s in structs), *typedefs])
def test_layout(name):
    kind = ffi.typeof(name)
    if kind.kind in ("struct", "union"):
        assert kind.fields is not None
        assert ffi.sizeof(name) > 0 or kind.fields


def test_constants():
    assert len(CONSTANTS) == len(set(CONSTANTS))
    values = {name: getattr(lib, name) for name in CONSTANTS}
    assert all(isinstance(value, int) for value in values.values())
    capabilities = {name: value for name, value in values.items() if name.startswith("KVM_CAP_")}
    assert len(set(capabilities.values())) == len(capabilities)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("kvm_regs", 144), ("kvm_sregs", 312), ("kvm_sregs2", 320), ("kvm_segment", 24), ("kvm_fpu", 416), ("kvm_xsave", 4096),
        ("kvm_cpuid_entry2", 40), ("kvm_msr_entry", 16), ("kvm_userspace_memory_region", 32), ("kvm_userspace_memory_region2", 160),
        ("kvm_lapic_state", 1024), ("kvm_irqfd", 32), ("kvm_ioeventfd", 64), ("kvm_vcpu_events", 64), ("kvm_pit_state2", 112),
        ("kvm_irqchip", 520), ("kvm_irq_routing_entry", 48), ("kvm_guest_debug", 72), ("kvm_debugregs", 128), ("kvm_enable_cap", 104),
        ("kvm_create_guest_memfd", 64), ("kvm_pre_fault_memory", 64), ("kvm_clock_data", 48), ("kvm_msi", 32), ("kvm_dirty_gfn", 16),
    ],
)  # fmt: skip
def test_sizes(name, size):
    assert ffi.sizeof(f"struct {name}") == size


def test_kvm_run_offsets():
    offset = lambda field: ffi.offsetof("struct kvm_run", field)  # noqa: E731
    assert (offset("immediate_exit"), offset("exit_reason"), offset("cr8"), offset("apic_base")) == (1, 8, 16, 24)
    members = "hw fail_entry ex io debug mmio hypercall tpr_access internal emulation_failure system_event eoi hyperv msr xen notify"
    assert {offset(member) for member in members.split()} == {32}
    assert offset("kvm_valid_regs") == 288
    run = ffi.new("struct kvm_run *")
    assert int(ffi.cast("uintptr_t", lib.pykvm_memory_fault(run))) - int(ffi.cast("uintptr_t", run)) == 32


def test_ioctl_numbers():
    """_IOC(direction, 0xAE, number, size), Linux asm-generic/ioctl.h."""
    ioc = lambda direction, number, size: direction << 30 | size << 16 | 0xAE << 8 | number  # noqa: E731
    assert ioc(0, 0x80, 0) == lib.KVM_RUN
    assert ioc(2, 0x81, 144) == lib.KVM_GET_REGS
    assert ioc(1, 0x46, 32) == lib.KVM_SET_USER_MEMORY_REGION
    assert ioc(1, 0x49, 160) == lib.KVM_SET_USER_MEMORY_REGION2
    assert ioc(3, 0xD4, 64) == lib.KVM_CREATE_GUEST_MEMFD
    assert ioc(3, 0xD5, 64) == lib.KVM_PRE_FAULT_MEMORY


def test_exit_reasons_agree_with_the_header():
    from pykvm import ExitReason

    header = {n.removeprefix("KVM_EXIT_"): getattr(lib, n) for n in CONSTANTS if re.fullmatch(r"KVM_EXIT_(?!IO_|HYPERV_|XEN_H)\w+", n)}
    assert len(header) > 20
    for name, value in header.items():
        assert ExitReason[name] == value


def test_every_x86_exit_reason_has_a_class():
    from pykvm import exits

    header = {getattr(lib, n) for n in CONSTANTS if re.fullmatch(r"KVM_EXIT_(?!IO_|HYPERV_|XEN_H)\w+", n)}
    assert header <= set(exits._DECODERS)


def test_struct_wrapper():
    sregs = new("struct kvm_sregs")
    sregs.cs.selector = 0x10
    cs = sregs.cs
    copy = sregs.copy()
    sregs.cs.base = 0x1234
    assert cs.base == 0x1234
    assert copy.cs.base == 0
    assert copy != sregs
    assert "selector=0x10" in repr(cs)
    sregs.ds = cs
    assert sregs.ds.selector == 0x10
    assert isinstance(cs, Struct)
    assert len(sregs.to_bytes()) == 312
    del sregs, copy
    assert cs.selector == 0x10  # the nested structure keeps its owner alive
    with pytest.raises(AttributeError):
        cs.no_such_field  # noqa: B018


def test_exits_newer_than_the_headers():
    from pykvm import exits

    vcpu = ffi.new("struct pykvm_vcpu *")
    run = vcpu.run = ffi.new("struct kvm_run *")
    run.exit_reason = lib.KVM_EXIT_TDX
    call = lib.pykvm_tdx(run)
    call.nr, call.data[0] = 0x10002, 0x1000
    assert exits.decode(vcpu) == exits.Tdx(0x10002, (0x1000, 0, 0, 0, 0), 0)
    run.exit_reason = lib.KVM_EXIT_SNP_REQ_CERTS
    wanted = lib.pykvm_snp_certs(run)
    wanted.gpa, wanted.npages = 0x2000, 4
    assert exits.decode(vcpu) == exits.SnpReqCerts(0x2000, 4)
    run.exit_reason = 99
    assert exits.decode(vcpu) == exits.UnknownExit(99)


def test_hypercall_is_answered():
    from pykvm import exits

    vcpu = ffi.new("struct pykvm_vcpu *")
    run = vcpu.run = ffi.new("struct kvm_run *")
    run.exit_reason = lib.KVM_EXIT_HYPERCALL
    run.hypercall.nr = 12
    exit = exits.decode(vcpu)
    assert exit == exits.Hypercall(vcpu, 12, (0,) * 6)
    exit.reply(-1)
    assert run.hypercall.ret == 2**64 - 1
