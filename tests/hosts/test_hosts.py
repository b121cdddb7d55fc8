"""tests/kvm on emulated AMD-V with NPT and VT-x with EPT, with paging off too, and what `pykvm host` promises of a booted host."""

import json

EXPECTED = {"amd": ("AMD-V", "kvm_amd", "NPT"), "intel": ("VT-x", "kvm_intel", "EPT")}


def test_hello(host):
    done = host.result("hello")
    assert (done.returncode, done.stdout) == (0, "Hello from long mode.\n")


def test_status_and_both_outputs_come_through(host):
    done = host.result("status")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert host.result("killed").returncode == 128 + 9
    assert host.result("missing").returncode == 127


def test_files_travel_both_ways(host):
    sent, received = host.result("files")
    assert received == sent


def doctor(completed):
    assert completed.returncode == 0, completed.stderr
    return {row["name"]: row["value"] for row in json.loads(completed.stdout)["rows"]}


def test_doctor_names_the_hardware(host):
    flag, module, paging = EXPECTED[host.cpu]
    rows = doctor(host.result("doctor"))
    assert rows["CPU virtualization"].startswith(flag)
    assert rows["vendor module"] == module
    assert rows["two-level paging"] == f"{paging}: on"
    assert rows["CPL0 code is emulated"] == "no"


def test_the_kvm_tests_pass(host):
    check(host.result("tests"), least=150)


def test_doctor_sees_paging_off(host):
    assert doctor(host.result("doctor off"))["two-level paging"] == f"{EXPECTED[host.cpu][2]}: off (shadow paging)"


def test_the_marked_kvm_tests_pass_with_paging_off(host):
    check(host.result("shadow"), least=60)


def check(report, least):
    """Status 0, and so many passed that a run that found no tests cannot be taken for one where all went well."""
    assert report.status == 0, report.output
    assert report.count("failure") == report.count("error") == 0
    assert report.count("passed") >= least, report.output
