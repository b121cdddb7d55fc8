"""The test device's ports, PCI configuration ports and system control port A, without KVM."""

from pykvm.console import Console
from pykvm.devices.debugconsole import DebugConsole
from pykvm.devices.pciconfig import PciConfig
from pykvm.devices.pctestdev import BytePorts, EchoPorts, FlushPort, IrqLines
from pykvm.devices.reset import PortA, ResetControl


def test_ports_keep_32_bits_in_any_width():
    ports = EchoPorts()
    ports.write(0, 4, 0x11223344)
    ports.write(1, 1, 0xAA)
    assert ports.read(0, 4) == 0x1122AA44
    assert ports.read(2, 2) == 0x1122
    ports.write(2, 4, 0xDEAD5566)  # what would lie beyond is not written
    assert ports.read(0, 4) == 0x5566AA44
    assert ports.read(2, 4) == 0xFFFF5566


def test_byte_ports_are_the_same_bytes_beside_the_debug_console():
    console = Console()
    ports = EchoPorts()
    bytewise = BytePorts(ports, DebugConsole(console))
    bytewise.write(0, 4, 0x44332211)
    assert ports.read(0, 4) == 0x44332211
    bytewise.write(1, 1, ord("x"))
    assert console.text == "x" and bytewise.read(1, 1) == 0xE9
    assert bytewise.read(0, 4) == 0x44332211 and bytewise.read(1, 2) == 0x3322


def test_flush_takes_the_page_of_a_32_bit_gpa():
    flushed = []
    port = FlushPort(flushed.append)
    port.write(0, 4, 0xFFFF1234)
    port.write(0, 2, 0x1000)
    port.write(1, 4, 0x1000)
    assert flushed == [0xFFFF1000]


def test_interrupt_lines():
    driven = []
    lines = IrqLines(lambda *change: driven.append(change))
    lines.write(14, 1, 0x80)
    lines.write(14, 1, 0)
    lines.write(3, 2, 1)  # bytes only
    assert driven == [(14, 1), (14, 0)]


def test_pci_has_nothing_and_the_reset_register_in_the_middle():
    stopped = []
    pci = PciConfig(ResetControl(lambda *why: stopped.append(why)))
    pci.write(0, 4, 0x80000600)  # the address register's bits are no reset
    assert pci.read(0, 4) == 0xFFFFFFFF and pci.read(4, 4) == 0xFFFFFFFF and pci.read(6, 2) == 0xFFFF
    pci.write(1, 1, 2)
    assert pci.read(1, 1) == 2 and not stopped
    pci.write(1, 1, 6)
    assert stopped == [("reset", None)]


def test_port_a():
    stopped = []
    port = PortA(lambda *why: stopped.append(why))
    assert port.read(0, 1) == 2
    port.write(0, 1, 0)
    assert port.read(0, 1) == 0 and not stopped
    port.write(0, 1, 3)
    assert port.read(0, 1) == 2 and stopped == [("reset", None)]
    port.write(0, 1, 0)
    other = PortA(stopped.append)
    other.load(port.save())
    assert other.read(0, 1) == 0
