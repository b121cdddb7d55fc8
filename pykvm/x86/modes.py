"""CPU modes: what a vCPU's registers, and a few tables in guest memory, must hold for a guest to start in each.

| mode        | the guest starts in                       | what pykvm lays out in guest memory                             |
|-------------|-------------------------------------------|-----------------------------------------------------------------|
| real        | 16-bit real mode, CPL0                    | nothing                                                         |
| protected   | flat 32-bit protected mode, no paging     | a GDT                                                           |
| long        | 64-bit mode, CPL0, identity paging        | a GDT, page tables                                              |
| user        | 64-bit mode, CPL3, under a minimal kernel | the same, a TSS with an all-zero I/O bitmap, an IDT and its stubs |

All start with interrupts off, RSI pointing at the command line (platform.CMDLINE_GPA) and, but for real mode, RSP at the top of
low RAM. The GDT is the same everywhere; its user selectors are those of 64-bit Linux, the only ones that every host keeps.
Images with a boot protocol (loaders/) start as that says: see the last classes.
Sources: SDM vol. 3 chapters 3 (segments), 4.5 (4-level paging), 6.14 (64-bit IDT), 8.7 (64-bit TSS), 10.8.5 (entering long mode);
APM vol. 2 chapters 4, 5, 12, 14.
"""

from __future__ import annotations

from pykvm.errors import ConfigError
from pykvm.platform import (
    CMDLINE_GPA,
    EXCEPTION_REPORT,
    GDT_GPA,
    IDT_GPA,
    KERNEL_STACK_TOP,
    MMIO_HOLE_END,
    PAGE_TABLES_END,
    PAGE_TABLES_GPA,
    RESET_VECTOR_GPA,
    STUBS_GPA,
    TSS_GPA,
)
from pykvm.units import MIB, PAGE_SIZE
from pykvm.x86.paging import PageTableBuilder
from pykvm.x86.regs import CR0, CR4, EFER, RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.abi import Struct
    from pykvm.memory import GuestMemory
    from pykvm.vcpu import VCPU

__all__ = [
    "MODES",
    "FirmwareMode",
    "LinuxMode",
    "LongMode",
    "Mode",
    "MultibootMode",
    "ProtectedMode",
    "PvhMode",
    "RealMode",
    "UserMode",
    "mode_named",
]

# --- the GDT ---------------------------------------------------------------------------------------------------------
CODE32, CODE64, DATA = 0x08, 0x10, 0x18
LINUX_CODE = CODE64  # 32-bit code for Linux, which names this selector
USER_CODE32, USER_DATA, USER_CODE64, TSS = 0x23, 0x2B, 0x33, 0x38
GDT_LIMIT = TSS + 15
TSS_SIZE = 104
REAL_MODE_LIMIT = 0x3FF  # of IDTR: 256 vectors of 4 bytes
IO_BITMAP_SIZE = 0x10000 // 8 + 1  # one bit a port, and the byte of ones that must follow (SDM vol. 1 section 19.5.2)


def _descriptor(type: int, *, s: int = 1, dpl: int = 0, long: int = 0, db: int = 0, base: int = 0, limit: int = 0xFFFFF, g: int = 1) -> int:
    """A segment descriptor as its 64 bits (SDM vol. 3 figure 3-8); 1 << 7 of the access byte is P."""
    access = type | s << 4 | dpl << 5 | 1 << 7
    flags = long << 1 | db << 2 | g << 3
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16
    return low | access << 40 | (limit >> 16 & 0xF) << 48 | flags << 52 | (base >> 24 & 0xFF) << 56


def write_gdt(memory: GuestMemory) -> None:
    """The GDT at platform.GDT_GPA. Code and data are accessed already: a CPU need not write to the table."""
    entries = [
        0,
        _descriptor(0xB, db=1),
        _descriptor(0xB, long=1),
        _descriptor(0x3, db=1),
        _descriptor(0xB, db=1, dpl=3),
        _descriptor(0x3, db=1, dpl=3),
        _descriptor(0xB, long=1, dpl=3),
        _descriptor(0xB, s=0, base=TSS_GPA, limit=TSS_SIZE + IO_BITMAP_SIZE - 1, g=0),
        TSS_GPA >> 32,
    ]
    memory.write(GDT_GPA, b"".join(e.to_bytes(8, "little") for e in entries))


def _segment(segment: Struct, selector: int, type: int, *, dpl: int = 0, long: int = 0, db: int = 1) -> None:
    segment.selector, segment.type, segment.dpl = selector, type, dpl
    segment.base, segment.limit = 0, 0xFFFFFFFF
    segment.present, segment.s, segment.l, segment.db, segment.g = 1, 1, long, db, 1
    segment.unusable, segment.avl = 0, 0


def low_ram_top(memory: GuestMemory) -> int:
    """One past the last byte of the RAM that starts at gpa 0."""
    slot = memory.find(0)
    if slot is None:
        raise ConfigError("a guest needs RAM at gpa 0: add a slot there")
    return slot.size


class Mode:
    """A way to start: ``apply()`` writes the tables to guest memory and the registers to the vCPU."""

    name = ""
    bits = 16

    def apply(self, vcpu: VCPU, memory: GuestMemory, entry: int, registers: dict[str, int] | None = None) -> None:
        """Start at ``entry`` (gpa; identity mapped where there is paging). ``registers``: further general registers by name."""
        sregs = vcpu.get_sregs()
        regs = vcpu.get_regs()
        regs.rflags, regs.rip, regs.rsi = RFLAGS.FIXED, entry, CMDLINE_GPA
        self._fill(memory, sregs, regs, entry)
        for name, value in (registers or {}).items():
            setattr(regs, name, value)
        vcpu.set_sregs(sregs)
        vcpu.set_regs(regs)

    def _fill(self, memory: GuestMemory, sregs: Struct, regs: Struct, entry: int) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class RealMode(Mode):
    """16-bit real mode. All segments are 0 when the entry is below 64 KiB; else CS holds the entry's paragraph.

    SP is 0x7C00, below where boot sectors go. The IVT at 0 is the guest's to fill (SDM vol. 3 section 21.1).
    """

    name = "real"
    bits = 16

    def _fill(self, memory: GuestMemory, sregs: Struct, regs: Struct, entry: int) -> None:
        if entry > 0xFFFFF:
            raise ConfigError(f"real mode reaches 1 MiB, and the entry is {entry:#x}: load the image lower, or use another --mode")
        for name in ("cs", "ss", "ds", "es", "fs", "gs"):
            segment = getattr(sregs, name)
            segment.base = segment.selector = 0
        if entry > 0xFFFF:
            sregs.cs.selector, sregs.cs.base, regs.rip = entry >> 4, entry & ~0xF, entry & 0xF
        regs.rsp = 0x7C00


class ProtectedMode(Mode):
    """Flat 32-bit protected mode: base 0, limit 4 GiB, CPL0, no paging, no IDT (SDM vol. 3 sections 3.2.1, 10.9.1)."""

    name = "protected"
    bits = 32

    def _fill(self, memory: GuestMemory, sregs: Struct, regs: Struct, entry: int) -> None:
        if entry >> 32:
            raise ConfigError(f"protected mode reaches 4 GiB, and the entry is {entry:#x}")
        write_gdt(memory)
        sregs.gdt.base, sregs.gdt.limit = GDT_GPA, GDT_LIMIT
        sregs.idt.base, sregs.idt.limit = 0, 0
        sregs.cr0 = CR0.PE | CR0.ET | CR0.NE
        _segment(sregs.cs, CODE32, 0xB)
        for name in ("ss", "ds", "es", "fs", "gs"):
            _segment(getattr(sregs, name), DATA, 0x3)
        regs.rsp = low_ram_top(memory)


class LongMode(Mode):
    """64-bit mode at CPL0, every gpa up to 4 GiB and all of RAM mapped to itself; no IDT (SDM vol. 3 sections 4.5, 10.8.5).

    ``page_size``: 2 MiB, or 4096 to map RAM with 4 KiB pages (which costs a page of tables for each 2 MiB).
    """

    name = "long"
    bits = 64
    user = False

    def __init__(self, page_size: int = 2 * MIB) -> None:
        if page_size not in (PAGE_SIZE, 2 * MIB):
            raise ConfigError(f"long mode maps RAM with pages of 4096 or {2 * MIB} bytes, not {page_size}")
        self.page_size = page_size

    def _fill(self, memory: GuestMemory, sregs: Struct, regs: Struct, entry: int) -> None:
        write_gdt(memory)
        sregs.gdt.base, sregs.gdt.limit = GDT_GPA, GDT_LIMIT
        sregs.idt.base, sregs.idt.limit = 0, 0
        sregs.cr3 = self._map(memory)
        sregs.cr4 = CR4.PAE | CR4.OSFXSR | CR4.OSXMMEXCPT
        sregs.cr0 = CR0.PE | CR0.MP | CR0.ET | CR0.NE | CR0.WP | CR0.PG
        sregs.efer = EFER.LME | EFER.LMA | EFER.SCE | EFER.NXE
        _segment(sregs.cs, CODE64, 0xB, long=1, db=0)
        for name in ("ss", "ds", "es", "fs", "gs"):
            _segment(getattr(sregs, name), DATA, 0x3)
        regs.rsp = low_ram_top(memory)

    def _map(self, memory: GuestMemory) -> int:
        """Build the identity mapping; returns CR3."""
        builder = PageTableBuilder(memory, PAGE_TABLES_GPA, min(PAGE_TABLES_END, low_ram_top(memory)))
        for slot in memory.slots:
            self._map_ram(builder, slot.gpa, slot.gpa + slot.size)
        low = -(-low_ram_top(memory) // (2 * MIB)) * 2 * MIB
        # The rest of the first 4 GiB, where devices are.
        builder.map(low, low, MMIO_HOLE_END - low, page_size=2 * MIB, user=self.user)
        return builder.cr3

    def _map_ram(self, builder: PageTableBuilder, start: int, end: int) -> None:
        if start != 0 and start < MMIO_HOLE_END:
            return  # inside the 4 GiB that are mapped anyway
        self._map_pages(builder, start, end)

    def _map_pages(self, builder: PageTableBuilder, start: int, end: int) -> None:
        size = -(-(end - start) // self.page_size) * self.page_size
        builder.map(start, start, size, page_size=self.page_size, user=self.user)


class UserMode(LongMode):
    """64-bit mode at CPL3 under a minimal kernel that only reports exceptions to the host.

    Page 0 is unmapped, the kernel's pages (platform.GDT_GPA up to PAGE_TABLES_END) are supervisor-only but for the command line,
    and the rest of the first 4 GiB is the program's. The program may use every port, through the TSS's I/O bitmap and through
    IOPL: either is enough by the manual, but not every host implements both. An exception runs a stub at CPL0 that writes its
    vector to platform.EXCEPTION_REPORT with this on the stack: RAX, vector, error code, RIP, CS, RFLAGS, RSP, SS (8 bytes each).
    x87 and SSE are on; AVX too where KVM offers XSAVE. (SDM vol. 3 sections 6.14, 8.7; vol. 1 sections 13.3, 19.5.2.)
    """

    name = "user"
    user = True

    def _fill(self, memory: GuestMemory, sregs: Struct, regs: Struct, entry: int) -> None:
        super()._fill(memory, sregs, regs, entry)
        _write_tss(memory)
        _write_idt(memory)
        sregs.idt.base, sregs.idt.limit = IDT_GPA, 32 * 16 - 1
        tr = sregs.tr
        tr.selector, tr.base, tr.limit, tr.type = TSS, TSS_GPA, TSS_SIZE + IO_BITMAP_SIZE - 1, 0xB
        tr.present, tr.s, tr.dpl, tr.l, tr.db, tr.g, tr.unusable = 1, 0, 0, 0, 0, 0, 0
        _segment(sregs.cs, USER_CODE64, 0xB, long=1, db=0, dpl=3)
        for name in ("ss", "ds", "es", "fs", "gs"):
            _segment(getattr(sregs, name), USER_DATA, 0x3, dpl=3)
        regs.rflags |= RFLAGS.IOPL | RFLAGS.IF
        regs.rsp -= 8  # as after a call: what the ABI expects at a function's first instruction (16-byte alignment)

    def _map_ram(self, builder: PageTableBuilder, start: int, end: int) -> None:
        if start:
            super()._map_ram(builder, start, end)
            return
        # 4 KiB pages below 2 MiB, where the kernel's and the program's differ. Page 0 stays unmapped.
        first = min(2 * MIB, end)
        for begin, until, user in (
            (PAGE_SIZE, CMDLINE_GPA, False),
            (CMDLINE_GPA, PAGE_TABLES_GPA, True),
            (PAGE_TABLES_GPA, PAGE_TABLES_END, False),
            (PAGE_TABLES_END, first, True),
        ):
            if begin < min(until, first):
                builder.map(begin, begin, min(until, first) - begin, page_size=PAGE_SIZE, user=user)
        if end > first:
            self._map_pages(builder, first, end)

    def apply(self, vcpu: VCPU, memory: GuestMemory, entry: int, registers: dict[str, int] | None = None) -> None:
        super().apply(vcpu, memory, entry, registers)
        _enable_avx(vcpu)


def _write_tss(memory: GuestMemory) -> None:
    """A 64-bit TSS: RSP0 for the way to CPL0, and the I/O bitmap behind it, all zero: every port is the program's."""
    tss = bytearray(TSS_SIZE)
    tss[4:12] = KERNEL_STACK_TOP.to_bytes(8, "little")
    tss[102:104] = TSS_SIZE.to_bytes(2, "little")
    memory.write(TSS_GPA, bytes(tss) + bytes(IO_BITMAP_SIZE - 1) + b"\xff")


HAS_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))  # SDM vol. 3 table 6-1, APM vol. 2 table 8-1


def _write_idt(memory: GuestMemory) -> None:
    """32 interrupt gates to 16-byte stubs, which push what the CPU did not and meet in one place that reports."""
    from pykvm.x86.idt import gate

    stubs, idt = bytearray(), bytearray()
    common = STUBS_GPA + 32 * 16
    for vector in range(32):
        at = STUBS_GPA + len(stubs)
        stub = b"" if vector in HAS_ERROR_CODE else b"\x6a\x00"  # push 0
        stub += bytes((0x6A, vector))  # push vector
        stub += b"\xe9" + (common - (at + len(stub) + 5)).to_bytes(4, "little", signed=True)  # jmp common
        stubs += stub.ljust(16, b"\xcc")
        dpl = 3 if vector in (3, 4) else 0  # int3 and into may be the program's own
        idt += gate(at, CODE64, dpl)
    # push rax; mov eax, [rsp + 8]; out EXCEPTION_REPORT, eax; here: hlt; jmp here
    stubs += b"\x50\x8b\x44\x24\x08" + bytes((0xE7, EXCEPTION_REPORT)) + b"\xf4\xeb\xfd"
    memory.write(STUBS_GPA, stubs)
    memory.write(IDT_GPA, idt)


def _enable_avx(vcpu: VCPU) -> None:
    """Let the program use AVX: CR4.OSXSAVE and XCR0, where the vCPU's CPUID has XSAVE (SDM vol. 1 section 13.3)."""
    leaf1 = vcpu.get_cpuid2().find(1)
    if leaf1 is None or not leaf1.ecx >> 26 & 1:
        return
    leafd = vcpu.get_cpuid2().find(0xD)
    offered = 0x3 if leafd is None else leafd.eax
    sregs = vcpu.get_sregs()
    sregs.cr4 |= CR4.OSXSAVE
    vcpu.set_sregs(sregs)
    xcrs = vcpu.get_xcrs()
    xcrs.nr_xcrs = 1
    xcrs.xcrs[0].xcr = 0
    xcrs.xcrs[0].value = offered & 0xE7  # x87, SSE, AVX and the three of AVX-512
    vcpu.set_xcrs(xcrs)


class MultibootMode(Mode):
    """What multiboot promises: flat 32-bit segments, CR0.PE without PG, interrupts off; no tables in memory (specification 0.6.96, 3.2).

    GDTR, IDTR and ESP are undefined by it; here GDTR is empty and ESP 0. IDTR is what a PC's BIOS leaves, the real-mode vectors: an image
    that goes back to real mode may take that for granted, as kvm-unit-tests' realmode does.
    """

    name = "multiboot"
    bits = 32

    def _fill(self, memory: GuestMemory, sregs: Struct, regs: Struct, entry: int) -> None:
        if entry >> 32:
            raise ConfigError(f"protected mode reaches 4 GiB, and the entry is {entry:#x}")
        sregs.gdt.base = sregs.gdt.limit = sregs.idt.base = 0
        sregs.idt.limit = REAL_MODE_LIMIT
        sregs.cr0, sregs.cr4 = CR0.PE | CR0.ET, 0
        _segment(sregs.cs, CODE32, 0xB)
        for name in ("ss", "ds", "es", "fs", "gs"):
            _segment(getattr(sregs, name), DATA, 0x3)
        regs.rsi = regs.rsp = 0


class PvhMode(MultibootMode):
    """What PVH promises: the same, all other writable bits of CR0 and CR4 clear, and a busy 32-bit TSS at 0 (Xen: docs/misc/pvh.pandoc)."""

    name = "pvh"

    def _fill(self, memory: GuestMemory, sregs: Struct, regs: Struct, entry: int) -> None:
        super()._fill(memory, sregs, regs, entry)
        sregs.idt.limit = 0
        tr = sregs.tr
        tr.selector, tr.base, tr.limit, tr.type = 0, 0, 0x67, 0xB
        tr.present, tr.s, tr.dpl, tr.l, tr.db, tr.g, tr.unusable = 1, 0, 0, 0, 0, 0, 0


class LinuxMode(ProtectedMode):
    """What Linux' 32-bit boot protocol promises: a GDT with CS 0x10 and the data segments 0x18, flat (Documentation/arch/x86/boot.rst)."""

    name = "linux"

    def _fill(self, memory: GuestMemory, sregs: Struct, regs: Struct, entry: int) -> None:
        super()._fill(memory, sregs, regs, entry)
        memory.write_u64(GDT_GPA + LINUX_CODE, _descriptor(0xB, db=1))
        sregs.cs.selector = LINUX_CODE


class FirmwareMode(Mode):
    """As a CPU comes out of reset: real mode at F000:FFF0 with CS's base at 0xFFFF0000 (SDM vol. 3 table 10-1).

    The vCPU has been made by KVM in just that state; here it is only put where the reset vector is.
    """

    name = "firmware"
    bits = 16

    def _fill(self, memory: GuestMemory, sregs: Struct, regs: Struct, entry: int) -> None:
        if entry != RESET_VECTOR_GPA:
            raise ConfigError(f"firmware starts at the reset vector, gpa {RESET_VECTOR_GPA:#x}, not at {entry:#x}: run it without --entry")
        sregs.cs.selector, sregs.cs.base = 0xF000, 0xFFFF0000
        regs.rip, regs.rsi = 0xFFF0, 0


# By name. The last four are not modes to choose: they are how the boot protocols of those names start (loaders/).
MODES: dict[str, type[Mode]] = {
    mode.name: mode for mode in (RealMode, ProtectedMode, LongMode, UserMode, MultibootMode, PvhMode, LinuxMode, FirmwareMode)
}


def mode_named(name: str, **options: Any) -> Mode:
    """The mode called "real", "protected", "long" or "user", or a boot protocol's start. Raises ConfigError for another name."""
    try:
        return MODES[name](**options)
    except KeyError:
        raise ConfigError(f"unknown mode {name!r}: use one of real, protected, long, user") from None
