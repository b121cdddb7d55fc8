"""The platform "pc-test": what kernels, test images and firmware made for QEMU's PC expect, without a bus, a disk or a screen.

| where              |                                                              |
|--------------------|--------------------------------------------------------------|
| ports 0x402        | firmware's log: ``debug_port``                               |
| 0x510              | fw_cfg: ``fw_cfg``, to which files can be added              |
| 0x600              | ACPI PM events, power-off and timer, SCI at GSI 9: ``acpi``  |
| 0xcf8              | PCI configuration: nothing there                             |
| 0xe0, 0x2000, ...  | QEMU's pc-testdev (devices/pctestdev.py)                     |
| 0xe0000-0xfffff    | ACPI tables and an MP table, which say how many vCPUs        |
| 0-0x3ff            | real-mode vectors: each BIOS service says that it is missing |
| the rest           | as in pc.py; COM1, RTC with memory size, debug exit, ...     |

The irqchip is KVM's, with the PIT's interrupt at the IOAPIC's pin 2, as on PCs.
"""

from __future__ import annotations

from pykvm.abi import lib
from pykvm.bus import Native
from pykvm.devices.acpipm import LENGTH as ACPI_LENGTH
from pykvm.devices.acpipm import AcpiPm
from pykvm.devices.debugconsole import DebugConsole
from pykvm.devices.fwcfg import LENGTH as FW_CFG_LENGTH
from pykvm.devices.fwcfg import FwCfg
from pykvm.devices.pciconfig import LENGTH as PCI_LENGTH
from pykvm.devices.pciconfig import PciConfig
from pykvm.devices.pctestdev import LINES, MMIO_LENGTH, BytePorts, EchoPorts, FlushPort, IrqLines
from pykvm.devices.reset import PortA, ResetControl
from pykvm.devices.scratch import Scratch
from pykvm.irq import Route, default_routes
from pykvm.memorymap import e820, memory_map
from pykvm.pc import Pc
from pykvm.platform import (
    ACPI_PM,
    DEBUG_PORT,
    FW_CFG,
    PCI_CONFIG,
    PORT_A,
    SCI_GSI,
    TEST_BYTES,
    TEST_FLUSH,
    TEST_IRQ_LINES,
    TEST_MMIO_GPA,
    TEST_PORTS,
    TIMER_PIN,
)
from pykvm.tables.acpi import acpi_tables
from pykvm.tables.linker import FSEG, HIGH, SCRIPT, linker_script
from pykvm.tables.mptable import mp_table
from pykvm.tables.place import place_tables
from pykvm.tables.vectors import place_vectors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.memory import GuestMemory
    from pykvm.pc import Board
    from pykvm.vm import VM

__all__ = ["PcTest", "gsi_routes"]

MISC_ENABLE, FAST_STRINGS = 0x1A0, 1 << 0  # SDM vol. 4 table 2-2; KVM has the bit clear on Intel


def gsi_routes() -> list[Route]:
    """KVM's own routes, but that GSI 0, the PIT, is at the IOAPIC's pin 2, and GSI 2, where a PC cascades its 8259s, nowhere there."""
    routes = [route for route in default_routes() if not (route.chip == lib.KVM_IRQCHIP_IOAPIC and route.gsi in (0, TIMER_PIN))]
    return [*routes, Route.to_chip(0, "ioapic", TIMER_PIN)]


class PcTest(Pc):
    """``debug_port`` is a Console; ``fw_cfg`` and ``acpi`` are the devices of these names."""

    def _add_own(self, board: Board, console: DebugConsole, reset: ResetControl) -> None:
        bus, memory, stop, irq, cpus = board.bus, board.memory, board.stop, board.irq, board.cpus
        assert irq is not None  # config.py has seen to it
        self.cpus = cpus
        lines = [irq(gsi) for gsi in range(LINES)]
        echo = EchoPorts()
        self.fw_cfg = FwCfg(memory, cpus)
        self.acpi = AcpiPm(stop, lines[SCI_GSI].set, wake=lambda: self.wake and self.wake())
        self.rtc.on_alarm = self.acpi.alarm
        for port, length, device in (
            (PORT_A, 1, PortA(stop)),
            (TEST_PORTS, 4, echo),
            (TEST_FLUSH, 4, FlushPort(memory.flush_page)),
            (TEST_BYTES, 4, BytePorts(echo, console)),
            (FW_CFG, FW_CFG_LENGTH, self.fw_cfg),
            (ACPI_PM, ACPI_LENGTH, self.acpi),
            (PCI_CONFIG, PCI_LENGTH, PciConfig(reset)),
            (TEST_IRQ_LINES, LINES, IrqLines(lambda line, level: lines[line].set(level))),
        ):
            bus.pio.add(port, length, device)
        log = DebugConsole(self.debug_port)
        bus.pio.add(DEBUG_PORT, 1, log, name="debug port", native=Native.append(self.debug_port))
        if memory.find(TEST_MMIO_GPA) is None:  # firmware of 16 MiB begins there
            bus.mmio.add(TEST_MMIO_GPA, MMIO_LENGTH, Scratch(MMIO_LENGTH), name="test memory")

    def prepare(self, memory: GuestMemory, vm: VM, *, firmware: bool) -> int:
        """What the guest finds at its start: fw_cfg's files, and the tables in memory, unless ``firmware`` puts them there itself.

        And REP MOVS and STOS that are said to be fast, as on QEMU's CPUs: Linux on Intel does without them else.
        """
        for vcpu in vm.vcpus:
            for value in vcpu.get_msrs((MISC_ENABLE,)).values():
                vcpu.set_msrs(((MISC_ENABLE, value | FAST_STRINGS),))
        pic = vm.irqchip == "kernel"
        tables, rsdp = acpi = acpi_tables(self.cpus, pic=pic)
        self.fw_cfg.add_file("etc/e820", e820(memory_map(memory)))
        self.fw_cfg.add_file(SCRIPT, linker_script((tables, HIGH), (rsdp, FSEG)))
        for blob in acpi:
            self.fw_cfg.add_file(blob.name, blob.data)
        if firmware:
            return 0
        leaf = vm.vcpus[0].get_cpuid2().find(1)
        signature, features = (0, 0) if leaf is None else (leaf.eax, leaf.edx)
        self.tables = place_tables(memory, acpi, mp_table(self.cpus, signature, features, pic=pic))
        self.tables.append(place_vectors(memory))
        assert rsdp.gpa is not None
        return rsdp.gpa

    @property
    def power_button(self) -> Callable[[], object]:
        """Asks the guest to power off by an ACPI event, or wakes it from S3."""
        return self.acpi.press_power_button

    def fall_asleep(self) -> None:
        """Into S3."""
        self.acpi.fall_asleep()

    @property
    def asleep(self) -> bool:
        """Whether the machine is in S3."""
        return self.acpi.asleep

    def tick(self) -> None:
        """Time passes."""
        super().tick()
        self.acpi.tick()
