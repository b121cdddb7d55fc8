"""A stopped vCPU as something to read: registers, code bytes through the guest's own page tables, walks, descriptors."""

from __future__ import annotations

from pykvm.errors import GuestMemoryError, KvmError
from pykvm.x86.paging import Walk, walk
from pykvm.x86.regs import CR0, EFER, cpl_of, insn_bits, linear_rip, mode_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.abi import Struct
    from pykvm.memory import GuestMemory
    from pykvm.vcpu import VCPU

__all__ = ["CpuView", "Descriptor", "Gate"]

_SYSTEM_TYPES = {
    1: "16-bit TSS", 2: "LDT", 3: "busy 16-bit TSS", 4: "call gate", 5: "task gate", 6: "16-bit interrupt gate",
    7: "16-bit trap gate", 9: "TSS", 11: "busy TSS", 12: "call gate", 14: "interrupt gate", 15: "trap gate",
}  # fmt: skip


class Descriptor:
    """A segment or system descriptor by its fields (SDM vol. 3 figure 3-8)."""

    __slots__ = ("base", "db", "dpl", "l", "limit", "p", "s", "type", "value")

    def __init__(self, value: int) -> None:
        self.value = value
        self.type, self.s, self.dpl, self.p = value >> 40 & 15, value >> 44 & 1, value >> 45 & 3, value >> 47 & 1
        self.l, self.db = value >> 53 & 1, value >> 54 & 1
        self.base = value >> 16 & 0xFFFFFF | value >> 32 & 0xFF000000
        limit = value & 0xFFFF | value >> 32 & 0xF0000
        self.limit = limit << 12 | 0xFFF if value >> 55 & 1 else limit

    @property
    def is_code(self) -> bool:
        """A code segment."""
        return bool(self.s and self.type & 8)

    @property
    def is_conforming(self) -> bool:
        """Code that may be entered from less privilege as it is."""
        return self.is_code and bool(self.type & 4)

    @property
    def is_writable(self) -> bool:
        """A data segment that may be written."""
        return bool(self.s and not self.type & 8 and self.type & 2)

    @property
    def is_readable(self) -> bool:
        """Data, or code that may be read."""
        return bool(self.s and (not self.type & 8 or self.type & 2))

    @property
    def kind(self) -> str:
        """What it describes, in words."""
        if not self.s:
            return _SYSTEM_TYPES.get(self.type, f"system type {self.type:#x}")
        if self.is_code:
            size = "64-bit" if self.l else "32-bit" if self.db else "16-bit"
            return f"{size} code"
        return ("data" if self.is_writable else "read-only data") + (" (expand-down)" if self.type & 4 else "")


class Gate:
    """An IDT entry of protected or long mode by its fields (SDM vol. 3 figures 6-2, 6-8)."""

    __slots__ = ("dpl", "ist", "offset", "p", "selector", "type", "value")

    def __init__(self, value: int, width: int) -> None:
        self.value = value
        self.selector, self.type, self.dpl, self.p = value >> 16 & 0xFFFF, value >> 40 & 0x1F, value >> 45 & 3, value >> 47 & 1
        self.offset = value & 0xFFFF | value >> 32 & 0xFFFF_0000 | (value >> 64 & 0xFFFFFFFF) << 32
        self.ist = value >> 32 & 7 if width == 16 else 0

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if self.type & 0x10:
            return "a segment descriptor, no gate" if self.value else "empty, no gate"
        return _SYSTEM_TYPES.get(self.type, "empty, no gate" if not self.value else f"type {self.type:#x}, no gate")


class CpuView:
    """A snapshot of registers, and guest memory read as the guest sees it. Nothing here raises for what a guest set up wrong."""

    def __init__(self, vcpu: VCPU, memory: GuestMemory) -> None:
        self.vcpu = vcpu
        self.memory = memory
        self.regs: Struct = vcpu.get_regs()
        self.sregs: Struct = vcpu.get_sregs()
        self._look()

    def _look(self) -> None:
        self.bits = insn_bits(self.sregs)
        self.mode = mode_of(self.sregs)
        self.cpl = cpl_of(self.sregs)
        self.rip = linear_rip(self.regs, self.sregs)

    def reset_to(self, regs: Struct, sregs: Struct) -> None:
        """Take these registers in place of the vCPU's."""
        self.regs, self.sregs = regs, sregs
        self._look()

    def at(self, **changes: int) -> CpuView:
        """The same CPU with other registers: ``rip``, ``rsp``, ``rflags`` ..., and ``cs``, a selector of the GDT (real mode: any)."""
        other: CpuView = object.__new__(CpuView)
        other.vcpu, other.memory = self.vcpu, self.memory
        other.regs, other.sregs = self.regs.copy(), self.sregs.copy()
        selector = changes.pop("cs", None)
        for name, value in changes.items():
            setattr(other.regs, name, value)
        if selector is not None:
            cs = other.sregs.cs
            cs.selector = selector
            found = self.entry(selector)
            if self.mode == "real":
                cs.base = selector << 4
            elif isinstance(found, Descriptor):
                cs.base, cs.limit, cs.type, cs.dpl, cs.l, cs.db = found.base, found.limit, found.type, found.dpl, found.l, found.db
                other.sregs.ss.dpl = selector & 3
        other._look()
        return other

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
        gate = self.gate_entry(vector)
        if isinstance(gate, str):
            return f"IDT entry {vector}: {gate}"
        present = "present" if gate.p else "NOT PRESENT"
        return f"IDT entry {vector}: {gate.kind}, {present}, dpl {gate.dpl}, handler {gate.selector:#x}:{gate.offset:#x}"

    def gate_entry(self, vector: int) -> Gate | str:
        """The IDT entry of a vector outside real mode, or why there is none."""
        table = self.sregs.idt
        width = 16 if self.sregs.efer & EFER.LMA else 8
        if width * vector + width - 1 > table.limit:
            return f"beyond the IDT's limit {table.limit:#x}"
        at = table.base + width * vector
        found = self.walk(at)
        if found.gpa is None:
            return f"at {at:#x}, which is not mapped: {found.fault}"
        raw = self.read(at, width)
        if len(raw) < width:
            return f"at {at:#x}, where there is no memory"
        return Gate(int.from_bytes(raw, "little"), width)

    def entry(self, selector: int) -> Descriptor | str:
        """The descriptor of a selector, from the GDT or the LDT, or why there is none."""
        if selector & ~3 == 0:
            return "null"
        at = selector & ~7
        name, base, limit = ("GDT", self.sregs.gdt.base, self.sregs.gdt.limit)
        if selector & 4:
            ldt = self.sregs.ldt
            if ldt.unusable or not ldt.present:
                return "in the LDT, and there is none"
            name, base, limit = "LDT", ldt.base, ldt.limit
        if at + 7 > limit:
            return f"beyond the {name}'s limit {limit:#x}"
        found = self.walk(base + at)
        if found.gpa is None:
            return f"in the {name} at {base:#x}, which is not mapped: {found.fault}"
        raw = self.read(base + at, 8)
        if len(raw) < 8:
            return f"in the {name} at {base:#x}, where there is no memory"
        return Descriptor(int.from_bytes(raw, "little"))

    def cpuid(self, leaf: int, register: str, index: int = 0) -> int:
        """A register of a CPUID leaf as this vCPU was given it; 0 when it has no such leaf."""
        found = self.vcpu.get_cpuid2().find(leaf, index)
        return 0 if found is None else int(getattr(found, register))

    @property
    def xcr0(self) -> int:
        """XCR0; 1 where this host's KVM has none."""
        try:
            xcrs = self.vcpu.get_xcrs()
        except KvmError:
            return 1
        return next((int(x.value) for x in xcrs.cdata.xcrs[0 : xcrs.nr_xcrs] if x.xcr == 0), 1)

    def backed(self, gpa: int) -> bool:
        """Whether a slot backs the byte at ``gpa``."""
        return self.memory.contains(gpa, 1)

    def descriptor(self, selector: int) -> str:
        """The GDT entry of a selector as a line (SDM vol. 3 figure 3-8)."""
        found = self.entry(selector)
        if isinstance(found, str):
            return f"selector {selector:#x}: {found}"
        present = "present" if found.p else "NOT PRESENT"
        return f"selector {selector:#x}: {found.kind}, {present}, dpl {found.dpl} (GDT entry {found.value:016x})"
