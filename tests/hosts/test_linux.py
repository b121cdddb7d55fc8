"""Debian's kernel as a guest of pykvm on the emulated AMD-V host, from its PVH entry to a shell script: it suspends to RAM, is woken by the
RTC's alarm with both its vCPUs, and powers off. (Where KVM emulates CPL0, SYSCALL does not get that far: docs/guests-from-elsewhere.md.)
"""

import shutil
import sys
from pathlib import Path

import pytest

from pykvm.hosts import boot
from pykvm.hosts.debian import Missing, fetch
from pykvm.hosts.image import cpio
from pykvm.loaders.bzimage import vmlinux

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
echo "INIT can: $(/bin/busybox cat /sys/power/state)"
echo +2 > /sys/class/rtc/rtc0/wakealarm
echo mem > /sys/power/state
echo "INIT is awake: $?, $(/bin/busybox grep -c ^processor /proc/cpuinfo) CPUs"
/bin/busybox poweroff -f
"""
LIMIT = 500  # seconds


def test_linux_sleeps_wakes_and_powers_off(tmp_path):
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("there is no busybox: sudo apt-get install busybox-static")
    try:
        image = fetch().image
    except Missing as why:
        pytest.skip(str(why))
    (tmp_path / "vmlinux").write_bytes(vmlinux(image.read_bytes(), str(image), 256 << 20))
    files = {"init": (0o755, INIT.encode()), "bin/busybox": (0o755, Path(busybox).read_bytes())}
    (tmp_path / "initrd").write_bytes(cpio(files, ("bin", "dev", "proc", "sys")))
    with boot("amd", progress=lambda text: print(f"[amd] {text}", file=sys.__stderr__, flush=True)) as host:
        host.put(tmp_path / "vmlinux")
        host.put(tmp_path / "initrd")
        words = ["--cpus", "2", "--memory", "256M", "--initrd", "initrd", "--append", "console=ttyS0 panic=-1", "--timeout", str(LIMIT)]
        done = host.run(["pykvm", "run", "vmlinux", *words], timeout=LIMIT)
    lines = done.stdout.replace("\r", "").splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vmlinux is taken for PVH (ELF64)" in done.stderr
    for said in (
        "ACPI: PM: (supports S0 S3 S5)",
        "ACPI: PM: Preparing to enter system sleep state S3",
        "ACPI: PM: Waking up from system sleep state S3",
        "CPU1 is up",
        "reboot: Power down",
    ):
        assert any(line.endswith(said) for line in lines), done.stdout
    assert "INIT can: freeze mem disk" in lines and "INIT is awake: 0, 2 CPUs" in lines
