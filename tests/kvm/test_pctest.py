"""The platform pc-test around real guests: interrupt lines, routes, tables, power-off, the debug port."""

import random

import pytest

from pykvm import ConfigError, GuestImageError, Machine, asm
from pykvm.kvmstats import Counters
from pykvm.memorymap import e820, memory_map
from pykvm.units import MIB
from tests.conftest import TIMEOUT
from tests.kvm.test_cli import run as pykvm

END = "mov al, 0\n out 0xf4, al\n"


def run(code, bits=16, **options):
    with Machine(asm(code, bits=bits, org=0x7C00), mode="real", memory="2M", platform="pc-test", **options) as machine:
        return machine, machine.run(TIMEOUT)


def interrupted_by(irq, cause):
    """Code that ends with 42 when the interrupt of the second 8259 comes after ``cause``, and with 1 when it does not."""
    return f"""
        mov word ptr [4 * {0x20 + irq}], offset handler
        mov word ptr [4 * {0x20 + irq} + 2], 0
        mov al, 0x11            # ICW1 to ICW4: vectors 0x20 to 0x2f
        out 0x20, al
        out 0xa0, al
        mov al, 0x20
        out 0x21, al
        mov al, 0x28
        out 0xa1, al
        mov al, 4
        out 0x21, al
        mov al, 2
        out 0xa1, al
        mov al, 1
        out 0x21, al
        out 0xa1, al
        mov al, 0xfb            # all masked but the cascade and this one
        out 0x21, al
        mov al, {0xFF & ~(1 << irq - 8)}
        out 0xa1, al
        sti
        {cause}
        mov cx, 0xffff
wait:   loop wait
        mov al, 1
        out 0xf4, al
handler:
        mov al, 42
        out 0xf4, al
    """


def test_the_debug_port_is_no_console():
    code = "mov dx, 0x402\n in al, dx\n cmp al, 0xe9\n jne 1f\n mov al, 'l'\n out dx, al\n mov al, 'c'\n out 0xe9, al\n" + END + "1: hlt"
    machine, result = run(code)
    assert (result.reason, result.console, result.debug_port) == ("exit", "c", "l")
    assert machine.debug_port.text == "l" and result.as_dict()["debug_port"] == "l"


def test_a_test_devices_line_interrupts(loop):
    raise_it = "mov dx, 0x200e\n mov al, 1\n out dx, al\n"
    assert run(interrupted_by(14, raise_it), loop=loop)[1].exit_code == 42


def test_the_power_button_interrupts():
    code = asm(interrupted_by(9, "mov dx, 0x602\n mov ax, 0x100\n out dx, ax\n"), bits=16, org=0x7C00)
    with Machine(code, mode="real", memory="2M", platform="pc-test") as machine:
        machine.pc.acpi.press_power_button()
        assert machine.run(TIMEOUT).exit_code == 42


def test_ports_and_memory_of_the_test_device():
    code = """
        mov eax, 0x11223344
        out 0xe0, eax
        in al, 0xe8
        cmp al, 0x44
        jne wrong
        mov eax, 0x7000
        out 0xe4, eax           # its page is flushed, and what is there stays
        cmp word ptr [0x7c00], 0xb866
        jne wrong
        mov dx, 0xcfc
        in eax, dx
        inc eax
        jnz wrong
        mov al, 42
        out 0xf4, al
wrong:  mov al, 1
        out 0xf4, al
    """
    _, result = run(code)
    assert result.exit_code == 42 and not result.unclaimed


def test_a_flushed_page_is_mapped_anew():
    """KVM's own count of page faults that it has fixed: one for each flush, as the guest comes back to the page each time."""
    code = """
        mov ecx, 50
        mov eax, 0x300000
    1:  mov ebx, [rax]
        out 0xe4, eax
        dec ecx
        jnz 1b
        out 0xf4, al
    """
    with Machine(asm(code, bits=64, org=0x100000), mode="user", memory="8M", platform="pc-test") as machine:
        counted = Counters(machine.vcpu, ("pf_fixed",))
        try:
            assert machine.run(TIMEOUT).reason == "exit"
            assert counted.read()["pf_fixed"] >= 50
        finally:
            counted.close()


def test_power_off_ends_the_run():
    _, result = run("mov dx, 0x604\n mov ax, 0x2000\n out dx, ax\n hlt")
    assert (result.reason, result.exit_code) == ("power-off", 0)


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_any_access_anywhere(irqchip):
    """Reads and writes at, across and beside every device's registers: nothing raises, and no answer is out of range."""
    chance = random.Random(1)
    with Machine("hello", platform="pc-test", irqchip=irqchip) as machine:
        bus = machine.bus
        for _ in range(2000):
            space, widths = (bus.mmio, range(1, 9)) if chance.random() < 0.2 else (bus.pio, (1, 2, 4))
            claimed, size = chance.choice(space.ranges), chance.choice(widths)
            at = min(max(0, claimed.base + chance.randrange(-3, claimed.length + 2)), space.limit - size)
            if chance.random() < 0.5:
                assert 0 <= bus.read(space.name, at, size) < 1 << 8 * size
            else:
                bus.write(space.name, at, size, chance.choice((0, 1, 0x20, chance.getrandbits(8 * size))) & (1 << 8 * size) - 1)
            machine.pc.tick()


def test_cpus_agree_everywhere():
    """The MADT, CMOS and fw_cfg's count: what three kinds of guests go by."""
    with Machine("acpi_madt", cpus=5, memory="64M") as machine:
        assert "5 LAPICs" in machine.run(TIMEOUT).console
        assert machine.rtc.ram[0x5F] == 4
        assert machine.pc.fw_cfg.items[5] == machine.pc.fw_cfg.items[15] == b"\5\0"
        assert machine.pc.fw_cfg.items[machine.pc.fw_cfg.files["etc/e820"]] == e820(memory_map(machine.memory))


def test_strings_are_said_to_be_fast(system):
    """IA32_MISC_ENABLE bit 0 on every vCPU."""
    with Machine("pm_timer", cpus=2, system=system) as machine:
        assert [vcpu.get_msr(0x1A0) & 1 for vcpu in machine.vcpus] == [1, 1]


def test_a_file_of_ones_own_in_fw_cfg():
    with Machine("fw_cfg") as machine:
        machine.pc.fw_cfg.add_file("opt/org.example/text", b"hello")
        assert machine.run(TIMEOUT).exit_code == 0


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="irqchip kernel or split"):
        Machine("hello", platform="pc-test", irqchip="none")
    with pytest.raises(ConfigError, match="1 MiB"):
        Machine("hello_real", platform="pc-test", memory="64K")
    with pytest.raises(ConfigError, match="pykvm, pc-test"):
        Machine("hello", platform="vax")


def test_bios_services_say_that_they_are_missing(system):
    """INT 15h, AX=E820h, and one that nobody has: the carry flag comes back set, and all else as it was."""
    code = "clc\n mov ax, 0xe820\n int 0x15\n jnc 1f\n cmp ax, 0xe820\n jne 1f\n clc\n int 0x7f\n jnc 1f\n mov al, 9\n out 0xf4, al\n"
    image = asm(code + "1: mov al, 1\n out 0xf4, al\n", bits=16, org=0x7C00)
    with Machine(image, mode="real", memory="2M", platform="pc-test", system=system) as machine:
        assert machine.run(TIMEOUT).exit_code == 9


def test_an_image_where_the_tables_are(tmp_path):
    image = bytes(0x100000 - 0x7C00)  # a flat one, to 1 MiB
    with pytest.raises(GuestImageError, match="platform has its tables"):
        Machine(image, mode="real", memory="2M", platform="pc-test")
    Machine(image, mode="real", memory="2M").close()


def test_firmware_of_16_mib_takes_the_place_of_the_test_memory():
    code = asm("mov al, 42\n out 0xf4, al\n hlt", bits=16, org=0xFFF0)
    with Machine(bytes(16 * MIB - 16) + code.ljust(16, b"\0"), format="firmware", memory="2M") as machine:
        assert machine.run(TIMEOUT).exit_code == 42


@pytest.mark.slow  # four processes
def test_command_line(tmp_path):
    done = pykvm("run", "pm_timer")
    assert done.returncode == 0 and b"good night" in done.stdout and done.stderr == ""
    code = "mov dx, 0x402\n mov al, 'l'\n out dx, al\n mov al, 10\n out dx, al\n mov al, 'c'\n out 0xe9, al\n" + END
    image = tmp_path / "image"
    image.write_bytes(asm(code, bits=16, org=0x7C00))
    options = ("run", str(image), "--format", "flat", "--mode", "real", "--platform", "pc-test", "--memory", "2M")
    done = pykvm(*options)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"c\n", "")
    done = pykvm(*options, "--debug-port")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"c\n", "l\n")
