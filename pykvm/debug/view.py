"""A stopped vCPU as something to read: registers, code bytes through the guest's own page tables, walks, descriptors."""

from __future__ import annotations

from pykvm.errors import GuestMemoryError
from pykvm.x86.paging import Walk, walk
from pykvm.x86.regs import CR0, EFER, cpl_of, insn_bits, linear_rip, mode_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.abi import Struct
    from pykvm.memory import GuestMemory
    from pykvm.vcpu import VCPU

__all__ = ["CpuView"]

_SYSTEM_TYPES = {
    1: "16-bit TSS", 2: "LDT", 3: "busy 16-bit TSS", 4: "call gate", 5: "task gate", 6: "16-bit interrupt gate",
    7: "16-bit trap gate", 9: "TSS", 11: "busy TSS", 12: "call gate", 14: "interrupt gate", 15: "trap gate",
}  # fmt: skip


class CpuView:
    """A snapshot of registers, and guest memory read as the guest sees it. Nothing here raises for what a guest set up wrong."""

    def __init__(self, vcpu: VCPU, memory: GuestMemory) -> None:
        self.memory = memory
        self.regs: Struct = vcpu.get_regs()
        self.sregs: Struct = vcpu.get_sregs()
        self.bits = insn_bits(self.sregs)
        self.mode = mode_of(self.sregs)
        self.cpl = cpl_of(self.sregs)
        self.rip = linear_rip(self.regs, self.sregs)

    def walk(self, gva: int) -> Walk:
        """The page walk of a linear address."""
        s = self.sregs
        return walk(self.memory, gva, cr0=s.cr0, cr3=s.cr3, cr4=s.cr4, efer=s.efer)

    def read(self, gva: int, size: int) -> bytes:
        """Up to ``size`` bytes at a linear address; fewer where a page or memory ends."""
        data = b""
        while len(data) < size:
            at = gva + len(data)
            gpa = self.walk(at).gpa
            if gpa is None:
                break
            n = min(size - len(data), 4096 - (at & 4095))
            try:
                data += self.memory.read(gpa, n)
            except GuestMemoryError:
                slot = self.memory.find(gpa)
                if slot is not None:
                    data += self.memory.read(gpa, slot.gpa + slot.size - gpa)
                break
        return data

    @property
    def paging(self) -> bool:
        """Whether linear addresses are translated."""
        return bool(self.sregs.cr0 & CR0.PG)

    def gate(self, vector: int) -> str:
        """The IDT entry of a vector as a line (SDM vol. 3 sections 6.11, 6.14.1)."""
        table = self.sregs.idt
        if self.mode == "real":
            raw = self.read(table.base + 4 * vector, 4)
            if 4 * vector + 3 > table.limit or len(raw) < 4:
                return f"IVT entry {vector}: beyond the table's limit {table.limit:#x}"
            return f"IVT entry {vector}: {int.from_bytes(raw[2:], 'little'):04x}:{int.from_bytes(raw[:2], 'little'):04x}"
        width = 16 if self.sregs.efer & EFER.LMA else 8
        if width * vector + width - 1 > table.limit:
            return f"IDT entry {vector}: beyond the IDT's limit {table.limit:#x}"
        raw = self.read(table.base + width * vector, width)
        if len(raw) < width:
            return f"IDT entry {vector}: at {table.base + width * vector:#x}, where there is no memory"
        value = int.from_bytes(raw, "little")
        offset = value & 0xFFFF | value >> 32 & 0xFFFF_0000 | (value >> 64 << 32 if width == 16 else 0)
        kind = _SYSTEM_TYPES.get(value >> 40 & 0x1F, f"type {value >> 40 & 0x1F:#x}, no gate")
        present = "present" if value >> 47 & 1 else "NOT PRESENT"
        return f"IDT entry {vector}: {kind}, {present}, dpl {value >> 45 & 3}, handler {value >> 16 & 0xFFFF:#x}:{offset:#x}"

    def descriptor(self, selector: int) -> str:
        """The GDT entry of a selector as a line (SDM vol. 3 figure 3-8)."""
        table = self.sregs.gdt
        at = selector & ~7
        if selector & ~3 == 0:
            return f"selector {selector:#x}: null"
        if at + 7 > table.limit:
            return f"selector {selector:#x}: beyond the GDT's limit {table.limit:#x}"
        raw = self.read(table.base + at, 8)
        if len(raw) < 8:
            return f"selector {selector:#x}: the GDT is at {table.base:#x}, where there is no memory"
        value = int.from_bytes(raw, "little")
        present = "present" if value >> 47 & 1 else "NOT PRESENT"
        dpl = value >> 45 & 3
        if not value >> 44 & 1:
            kind = _SYSTEM_TYPES.get(value >> 40 & 15, "system")
        else:
            code = value >> 43 & 1
            size = "64-bit" if value >> 53 & 1 else "32-bit" if value >> 54 & 1 else "16-bit"
            kind = f"{size} {'code' if code else 'data'}"
        return f"selector {selector:#x}: {kind}, {present}, dpl {dpl} (GDT entry {value:016x})"
