"""What doctor says of a host, from files made up here: real hosts are in tests/kvm and tests/hosts."""

import pytest

from pykvm.doctor import UNKNOWN, examine


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
