"""Emulated hosts without booting one: what is missing is named, with the way to get it; the cache; model lists."""

import os
import stat

import pytest

from pykvm.errors import ConfigError, HostError
from pykvm.hosts import boot, debian, emulators
from pykvm.hosts.cache import cached


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A PATH with nothing but the commands that are put there, and an empty cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "cache"))

    def add(name, script="exit 0"):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return add


@pytest.mark.parametrize(("cpu", "package"), [("amd", "qemu-system-x86"), ("intel", "bochs bochs-term bochsbios vgabios")])
def test_a_missing_emulator_is_named_with_its_packages(fake, cpu, package):
    with pytest.raises(HostError, match="sudo apt-get install") as caught, boot(cpu):
        pass
    assert package in str(caught.value)


def test_no_kernel_package(fake):
    for name in ("apt-get", "dpkg", "apt-cache"):
        fake(name)
    with pytest.raises(HostError, match="apt knows no linux-image-cloud-amd64: run sudo apt-get update"):
        debian.fetch()


def test_a_download_that_fails_says_why_and_leaves_nothing(fake, tmp_path):
    fake("dpkg")
    fake("apt-cache", "echo '  Depends: linux-image-6.1.0-1-cloud-amd64'")
    fake("apt-get", "echo 'E: Temporary failure resolving' >&2; exit 100")
    with pytest.raises(HostError, match=r"apt-get download .* failed \(E: Temporary failure resolving\): check the network"):
        debian.fetch()
    assert os.listdir(tmp_path / "cache") == []


def test_a_package_without_a_kernel(fake):
    fake("dpkg", "exit 0")
    fake("apt-cache", "echo '  Depends: linux-image-6.1.0-1-cloud-amd64'")
    fake("apt-get", ": > a.deb")
    with pytest.raises(HostError, match="holds no kernel: remove it and run pykvm host fetch"):
        debian.fetch()


def test_models_are_asked_for(fake):
    fake("qemu-system-x86_64", "printf 'x86 max  Enables all\\nx86 EPYC AMD EPYC\\nx86 Haswell Intel\\nx86 host  KVM\\n'")
    found = {m.name: m.virtualization for m in emulators.models()}
    assert found == {"max": "AMD-V, NPT", "EPYC": "AMD-V, NPT", "Haswell": "none in TCG"}
    assert emulators.model_named("EPYC")[1] == "EPYC"
    with pytest.raises(HostError, match="no hardware virtualization"):
        emulators.model_named("Haswell")
    with pytest.raises(HostError, match=r"no emulator offers the CPU model 'nosuch' \(Bochs not installed\)"):
        emulators.model_named("nosuch")


def test_paging_is_on_or_off():
    with pytest.raises(ConfigError, match="use on or off"), boot("amd", paging="maybe"):
        pass


def test_the_cache_shows_whole_entries_only(fake, tmp_path):
    def fails(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("entry", fails)
    assert os.listdir(tmp_path / "cache") == []
    made = cached("entry", lambda folder: (folder / "whole").write_text("x"))
    assert stat.S_ISREG((made / "whole").stat().st_mode)
    assert cached("entry", fails) == made
