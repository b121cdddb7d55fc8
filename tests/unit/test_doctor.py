"""What doctor says of a host, from files made up here: real hosts are in tests/kvm and tests/hosts."""

import re
from pathlib import Path

import pytest

import pykvm
from pykvm import gallery
from pykvm.abi import lib
from pykvm.doctor import CAPABILITIES, UNKNOWN, examine

# What has to be there for an ioctl, or for what an exit says, where the sources do not name it.
STANDS_FOR = {
    "KVM_CHECK_EXTENSION": "KVM_CAP_CHECK_EXTENSION_VM",
    "KVM_ENABLE_CAP": "KVM_CAP_ENABLE_CAP_VM",
    "KVM_SET_USER_MEMORY_REGION": "KVM_CAP_USER_MEMORY",
    "KVM_SET_TSS_ADDR": "KVM_CAP_SET_TSS_ADDR",
    "KVM_SET_IDENTITY_MAP_ADDR": "KVM_CAP_SET_IDENTITY_MAP_ADDR",
    "KVM_GET_SUPPORTED_CPUID": "KVM_CAP_EXT_CPUID",
    "KVM_GET_MP_STATE": "KVM_CAP_MP_STATE",
    "KVM_GET_VCPU_EVENTS": "KVM_CAP_VCPU_EVENTS",
    "KVM_GET_XCRS": "KVM_CAP_XCRS",
    "KVM_GET_DEBUGREGS": "KVM_CAP_DEBUGREGS",
    "KVM_SET_GUEST_DEBUG": "KVM_CAP_SET_GUEST_DEBUG",
    "KVM_GET_CLOCK": "KVM_CAP_ADJUST_CLOCK",
    "KVM_NMI": "KVM_CAP_USER_NMI",
    "KVM_GET_NESTED_STATE": "KVM_CAP_NESTED_STATE",
    "KVM_GET_XSAVE": "KVM_CAP_XSAVE",
    "KVM_GET_XSAVE2": "KVM_CAP_XSAVE2",
    "KVM_GET_SREGS2": "KVM_CAP_SREGS2",
    "KVM_GET_PIT2": "KVM_CAP_PIT_STATE2",
    "KVM_CLEAR_DIRTY_LOG": "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    "KVM_GET_STATS_FD": "KVM_CAP_BINARY_STATS_FD",
    "KVM_CREATE_GUEST_MEMFD": "KVM_CAP_GUEST_MEMFD",
    "KVM_EXIT_MEMORY_FAULT": "KVM_CAP_MEMORY_FAULT_INFO",
    "KVM_EXIT_INTERNAL_ERROR": "KVM_CAP_INTERNAL_ERROR_DATA",
    "immediate_exit": "KVM_CAP_IMMEDIATE_EXIT",
}


def rows(root, kvm="/no/such/kvm"):
    return {row.name: row.value for row in examine(kvm, str(root))}


def make(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def test_what_cannot_be_read_is_unknown(tmp_path):
    found = rows(tmp_path)
    access = found.pop("access")
    assert "no such device" in access
    assert set(found.values()) == {UNKNOWN}


@pytest.mark.parametrize(
    ("flag", "module", "parameter", "setting", "expected"),
    [
        ("vmx", "kvm_intel", "ept", "Y\n", "EPT: on"),
        ("vmx", "kvm_intel", "ept", "N\n", "EPT: off (shadow paging)"),
        ("svm", "kvm_amd", "npt", "1\n", "NPT: on"),
        ("svm", "kvm_amd", "npt", "0\n", "NPT: off (shadow paging)"),
    ],
)
def test_modules_and_paging(tmp_path, flag, module, parameter, setting, expected):
    files = {
        "proc/cpuinfo": f"model name\t: A CPU\nflags\t\t: fpu {flag} sse\n",
        f"sys/module/{module}/parameters/{parameter}": setting,
        f"sys/module/{module}/parameters/nested": "Y\n",
    }
    make(tmp_path, files)
    found = rows(tmp_path)
    assert found["CPU model"] == "A CPU"
    assert found["CPU virtualization"].startswith({"vmx": "VT-x", "svm": "AMD-V"}[flag])
    assert found["vendor module"] == module
    assert found["two-level paging"] == expected
    assert found["nested"] == "on"
    assert found["runs under a hypervisor"] == "no"


def test_mitigations_and_huge_pages(tmp_path):
    pages = "sys/kernel/mm/hugepages/hugepages-2048kB"
    files = {
        "sys/module/kvm_intel/parameters/vmentry_l1d_flush": "cond\n",
        "sys/devices/system/cpu/vulnerabilities/l1tf": "Mitigation: PTE Inversion\n",
        f"{pages}/nr_hugepages": "8\n",
        f"{pages}/free_hugepages": "3\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    }
    make(tmp_path, files)
    found = rows(tmp_path)
    assert found["vmentry_l1d_flush"] == "cond"
    assert found["l1tf"] == "Mitigation: PTE Inversion"
    assert found["2 MiB huge pages"] == "8 reserved, 3 free"
    assert found["transparent huge pages"] == "madvise"


def sources():
    """The text of the package without doctor itself, with the native half's where it is at hand; and that of the gallery."""
    package = Path(pykvm.__file__).parent
    native = package.parent / "native"
    files = [path for path in package.rglob("*.py") if path != package / "doctor.py"]
    files += [native / name for name in ("runloop.c", "bench.c") if (native / name).exists()]
    return "\n".join(path.read_text() for path in files), "\n".join(map(gallery.source, gallery.names()))


def test_every_capability_in_use_has_a_row():
    text, guests = sources()
    named = {name for name in re.findall(r"\bKVM_CAP_\w+\b", text + guests) if hasattr(lib, name)}
    meant = {cap for word, cap in STANDS_FOR.items() if re.search(rf"\b{word}\b", text)}
    assert len(named) > 20 and len(meant) > 10
    assert sorted((named | meant) - set(CAPABILITIES)) == []


def test_every_row_is_a_capability():
    assert [name for name in CAPABILITIES if not hasattr(lib, name)] == []


def test_a_row_for_each_capability(tmp_path):
    assert set(CAPABILITIES) <= set(rows(tmp_path))
