"""Debian's SeaBIOS from the reset vector: it finds fw_cfg, our tables and every vCPU, and no disk to boot from."""

import re

import pytest

from pykvm import Machine, asm
from pykvm.hosts.debian import Missing, package
from pykvm.platform import WAKING_VECTOR
from tests.conftest import TIMEOUT

END = "No bootable device"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images():
    try:
        return package("seabios") / "usr/share/seabios"
    except Missing as why:
        pytest.skip(str(why))


@pytest.mark.parametrize(("name", "cpus"), [("bios.bin", 1), ("bios-256k.bin", 3)])
def test_to_its_end(images, name, cpus):
    with Machine(str(images / name), format="firmware", memory="64M", cpus=cpus) as machine:
        assert machine.config.platform == "pc-test"

        def stop_at_the_end(_):
            if "Retrying" in machine.debug_port.text[-40:]:
                machine.stop()

        machine.debug_port.on_output = stop_at_the_end
        result = machine.run(4 * TIMEOUT)
        log = result.debug_port
        assert result.reason == "stopped", log + result.explanation
        assert log.startswith("SeaBIOS (version ")
        assert "QEMU fw_cfg DMA interface supported" in log
        assert f"Found {cpus} cpu(s) max supported {cpus} cpu(s)" in log
        assert re.search(r"e820: addr 0x0*100000 len 0x0*3f00000 \[RAM\]", log)
        assert END in log and END in result.console  # by its serial console, fw_cfg having said that there is no screen
        # It has linked the tables that fw_cfg gave it: the RSDP, where guests look for it, leads to a DSDT of ours.
        rsdp = next(gpa for gpa in range(0xF0000, 0x100000, 16) if machine.memory.read(gpa, 8) == b"RSD PTR ")
        assert sum(machine.memory.read(rsdp, 36)) & 0xFF == 0
        rsdt = machine.memory.read_u32(rsdp + 16)
        fadt = machine.memory.read_u32(rsdt + 36)
        dsdt = machine.memory.read_u32(fadt + 40)
        assert machine.memory.read(fadt, 4) == b"FACP" and machine.memory.read(dsdt, 4) == b"DSDT"
        assert sum(machine.memory.read(dsdt, machine.memory.read_u32(dsdt + 4))) & 0xFF == 0
        # And it resumes an operating system from S3, at the vector that one has left in the FACS.
        facs = machine.memory.read_u32(fadt + 36)
        assert machine.memory.read(facs, 4) == b"FACS"
        machine.memory.write_u32(facs + WAKING_VECTOR, 0x2000)
        machine.memory.write(0x2000, asm("mov al, 77\n out 0xf4, al\n hlt", bits=16, org=0x2000))
        machine.debug_port.on_output = None
        machine.group.on_sleep()
        machine.pc.acpi.press_power_button()
        result = machine.run(TIMEOUT)
        assert (result.reason, result.exit_code) == ("exit", 77), result.debug_port
        assert "Jump to resume vector (2000)" in result.debug_port
