"""The guest platform, as named constants: the guest physical map, I/O ports and GSIs.

Ports are the PC's own (and QEMU's for the debug devices), so that images written for those run here too.
"""

from __future__ import annotations

# --- I/O ports -------------------------------------------------------------------------------------------------------
COM1 = 0x3F8  # 16550A UART, 8 ports, IRQ 4
POST = 0x80  # power-on self test codes
RTC_INDEX = 0x70  # MC146818: index at 0x70, data at 0x71
KBD_DATA = 0x60
KBD_COMMAND = 0x64  # i8042 command/status: writing 0xFE pulses the reset line
RESET_CONTROL = 0xCF9  # PIIX/ICH reset control register
DEBUG_CONSOLE = 0xE9  # every byte written is console output (Bochs' port 0xE9 hack)
DEBUG_EXIT = 0xF4  # isa-debug-exit: the value written ends the run with that code
SCRATCH_PORT = 0xE0  # eight ports that keep what is written
HYPERCALL_PORT = 0x5E0  # pykvm: hypercalls through ports (devices/hypercall.py), 24 ports
EXCEPTION_REPORT = 0xF8  # pykvm: the minimal kernel of user mode reports an exception frame here
# of the PC test platform
PORT_A = 0x92  # system control port A: A20, reset
TEST_PORTS = 0xE0  # QEMU's pc-testdev: four ports that keep what is written
TEST_FLUSH = 0xE4
TEST_BYTES = 0xE8
DEBUG_PORT = 0x402  # firmware's log (SeaBIOS)
FW_CFG = 0x510  # QEMU's firmware configuration device, 12 ports
ACPI_PM = 0x600  # ACPI's PM1 event block; control at + 4, timer at + 8
PCI_CONFIG = 0xCF8  # address; data at + 4
TEST_IRQ_LINES = 0x2000  # QEMU's pc-testdev: one port for each interrupt line

# --- GSIs ------------------------------------------------------------------------------------------------------------
COM1_GSI = 4
RTC_GSI = 8
SCI_GSI = 9  # ACPI events, on the PC test platform
TIMER_PIN = 2  # where the PC test platform has the PIT's GSI 0 at the IOAPIC

# --- Guest physical map ----------------------------------------------------------------------------------------------
# 0x00000000  page 0 stays free: real-mode vectors, and in user mode it is unmapped so that a null pointer faults
# 0x00001000  the tables of protected, long and user mode (see x86/modes.py): GDT, IDT, TSS, handler stubs, page tables
# 0x00007c00  where flat real-mode images go
# 0x00100000  where protected and long mode images go (guests/guest.ld, 1 MiB)
# RAM_HIGH    RAM beyond the MMIO hole continues at 4 GiB
GDT_GPA = 0x1000
IDT_GPA = 0x2000
TSS_GPA = 0x3000  # 104 bytes and the I/O permission bitmap of 8193 bytes: three pages
STUBS_GPA = 0x6000  # exception handlers of user mode
KERNEL_STACK_TOP = 0x8000  # grows down to STUBS_GPA + 0x1000
CMDLINE_GPA = 0x8000  # the command line, NUL-terminated, one page; RSI points here at the start
PAGE_TABLES_GPA = 0x9000
PAGE_TABLES_END = 0x9F000
BOOT_INFO_GPA, BOOT_INFO_END = 0x9000, 0x9F000  # what a boot protocol hands over (loaders/handover.py); those lay out no page tables
REAL_LOAD_GPA = 0x7C00
BDA_GPA = 0x400  # the BIOS data area
LOW_RAM_END = 0x9FC00  # what a PC calls conventional memory ends here
EBDA_GPA, EBDA_END = 0x9FC00, 0xA0000  # the extended BIOS data area
BIOS_GPA, BIOS_END = 0xE0000, 0x100000  # where guests look for the RSDP and the MP table, in steps of 16 bytes
NO_SERVICE_GPA = 0xF8000  # the handler of real-mode interrupts where there is no BIOS
FACS_GPA, WAKING_VECTOR = BIOS_GPA, 12  # ACPI's table where a guest leaves the address to wake it at, and how far in
RSDP_GPA, MP_GPA, MP_TABLE_GPA = 0xF0000, 0xF0030, 0xF0040  # the other ACPI tables begin at BIOS_GPA
LOAD_GPA = 0x100000

MMIO_HOLE = 0xC000_0000  # RAM below this; devices between here and 4 GiB
MMIO_HOLE_END = 0x1_0000_0000
SCRATCH_GPA = 0xD000_0000  # one page that keeps what is written, where every access exits
HYPERCALL_GPA = 0xD001_0000  # the registers of HYPERCALL_PORT once more, as MMIO
IOAPIC_GPA = 0xFEC0_0000
TEST_MMIO_GPA = 0xFF00_0000  # QEMU's pc-testdev: 64 KiB that keep what is written
LAPIC_GPA = 0xFEE0_0000
# For hosts without unrestricted guest. Below 16 MiB of firmware, the most that a PC has.
IDENTITY_MAP_GPA = 0xFEFF_C000  # KVM_SET_IDENTITY_MAP_ADDR: one page
TSS_ADDR_GPA = 0xFEFF_D000  # KVM_SET_TSS_ADDR: three pages, directly above
FIRMWARE_END = 0x1_0000_0000  # firmware ends here
RESET_VECTOR_GPA = 0xFFFF_FFF0  # the first instruction after reset
