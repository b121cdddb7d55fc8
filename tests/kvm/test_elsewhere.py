"""Others' images, from Debian's packages: Xen by multiboot, Linux by its PVH entry, memtest86+ by Linux' boot protocol, U-Boot as firmware.

docs/guests-from-elsewhere.md shows these runs. (SeaBIOS is in test_seabios.py.)
"""

import pytest

from pykvm import Machine, gallery
from pykvm.hosts.debian import Missing, dependency, fetch, package
from tests.conftest import TIMEOUT

pytestmark = pytest.mark.slow


def console_until(machine, text):
    """What the guest prints until ``text`` comes."""
    console = machine.console

    def look(data):
        if text in console.text[-len(text) - len(data) :]:
            machine.stop()

    console.on_output = look
    result = machine.run(12 * TIMEOUT)
    assert result.reason == "stopped" and text in result.console, result.console + result.explanation
    return result.console


def the(name):
    try:
        return package(name)
    except Missing as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def xen():
    name = dependency("xen-system-amd64", "xen-hypervisor-")
    if name is None:
        pytest.skip("apt knows no xen-system-amd64: run sudo apt-get update, on a machine that has Debian's package lists")
    return str(next(the(name).glob("boot/xen-*-amd64.gz")))


@pytest.fixture(scope="module")
def kernel():
    try:
        return str(fetch().image)
    except Missing as why:
        pytest.skip(str(why))


def test_xen_to_its_banner(xen):
    with Machine(xen, append="console=com1") as machine:
        assert machine.info.kind == "multiboot (ELF32)"
        console = console_until(machine, "dom0 kernel not specified")
        assert console.splitlines()[0].startswith("(XEN) Xen version ")
        assert "(XEN) Bootloader: pykvm\n" in console.replace("\r", "")
        assert "Command line: console=com1" in console


def test_xen_with_a_module_and_two_cpus(xen):
    """To where it finds that the module is no kernel of the kind that it starts."""
    module = gallery.find("hello") + " its words"
    with Machine(xen, append="console=com1 loglvl=all", initrd=[module], cpus=2, memory="256M") as machine:
        lines = console_until(machine, "Could not construct domain 0").replace("\r", "").splitlines()
    assert "(XEN) Multiboot-e820 RAM map:" in lines
    assert "(XEN)  [0000000000100000, 000000000fffffff] (usable)" in lines
    assert any(line.startswith("(XEN) ACPI: RSDP 000F0000") for line in lines)
    assert "(XEN) Using ACPI (MADT) for SMP configuration information" in lines
    assert "(XEN) Platform timer is 3.580MHz ACPI PM Timer" in lines
    assert "(XEN) Brought up 2 CPUs" in lines


def test_linux_by_its_pvh_entry(kernel):
    with Machine(kernel, format="pvh", append="console=ttyS0 earlyprintk=serial", memory="256M") as machine:
        assert machine.info.kind == "PVH (ELF64)"
        console = console_until(machine, "ACPI: Reserving APIC table memory")
    assert "Linux version " in console
    assert "Command line: console=ttyS0 earlyprintk=serial" in console
    assert "BIOS-e820: [mem 0x0000000000100000-0x000000000fffffff] usable" in console
    assert "Hypervisor detected: KVM" in console
    assert "ACPI: RSDP 0x00000000000F0000" in console


def test_memtest86():
    image = the("memtest86+") / "boot/memtest86+x64.bin"
    with Machine(str(image), append="console=ttyS0,115200", memory="64M") as machine:
        assert machine.info.kind == "Linux (bzImage)"
        console = console_until(machine, "[Address test, walking ones")
    assert "Memtest86+ v" in console
    assert "Memory  :   64MB" in console


def test_u_boot_from_the_reset_vector():
    image = the("u-boot-qemu") / "usr/lib/u-boot/qemu-x86/u-boot.rom"
    with Machine(str(image), format="firmware", memory="64M") as machine:
        assert machine.info.rom == (0xFFF00000, 1 << 20)
        assert "U-Boot " in console_until(machine, "DRAM:  64 MiB")
