"""The state that an instruction works on: registers and memory of a vCPU that stands at it, changed all at once or not at all.

An instruction reads and stages writes; a ``Fault`` on the way leaves everything as it was; ``commit()`` makes the changes. Memory goes
through segments and the guest's page tables with the checks of the manual: SDM vol. 3 sections 4.6, 4.7 (pages), 5.3 (limits), 6.15
(what faults push), vol. 1 section 3.3.7.1 (canonical addresses). Only CPL0, the one level at which KVM reports that it gave up.
"""

from __future__ import annotations

from pykvm.abi import ffi, lib
from pykvm.x86.assist.fpu import Fpu
from pykvm.x86.paging import A, D
from pykvm.x86.regs import CR0, CR4, RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.bus import Bus
    from pykvm.memory import MemSlot
    from pykvm.x86.assist.scratch import Scratch
    from pykvm.x86.operation import Access, Operation
    from pykvm.x86.paging import Walk
    from pykvm.x86.view import CpuView

__all__ = ["GP", "NM", "PF", "SS", "STATUS", "UD", "Cpu", "Declined", "Fault"]

UD, NM, NP, SS, GP, PF = 6, 7, 11, 12, 13, 14
STATUS = RFLAGS.CF | RFLAGS.PF | RFLAGS.AF | RFLAGS.ZF | RFLAGS.SF | RFLAGS.OF
_REG, _IMM, _MEM = 1, 2, 3  # capstone's X86_OP_
_HIGH_BYTES = ("ah", "bh", "ch", "dh")


class Fault(Exception):
    """The instruction raises this exception instead: ``vector``, ``error_code`` where it has one, ``cr2`` for #PF."""

    def __init__(self, vector: int, error_code: int | None = None, cr2: int | None = None) -> None:
        self.vector, self.error_code, self.cr2 = vector, error_code, cr2


class Declined(Exception):
    """It cannot be done exactly, for the reason in the message."""


class Cpu:
    """A vCPU at the instruction ``op``; ``scratch``: who may be asked to execute it; ``bus``: where MMIO goes that it touches."""

    def __init__(self, view: CpuView, op: Operation, scratch: Scratch, bus: Bus | None = None) -> None:
        self.view, self.op, self.scratch, self.bus = view, op, scratch, bus
        self.regs, self.sregs, self.bits, self.mode = view.regs, view.sregs, view.bits, view.mode
        self.next_rip = self._masked_rip(int(self.regs.rip) + len(op.bytes))
        self.sregs_changed = False
        self.jumped = False  # to an interrupt handler or back from one: no single-step trap follows
        self.unmasks_nmi = False
        self.clears_rf = True  # but for what loads RFLAGS as a whole
        self._fpu: Fpu | None = None
        self._walks: list[tuple[Walk, bool]] = []
        self._writes: list[tuple[int, bytes]] = []
        self._mmio_writes: list[tuple[int, bytes]] = []

    def _masked_rip(self, rip: int) -> int:
        return rip & (1 << 64) - 1 if self.bits == 64 else rip & 0xFFFFFFFF if self.bits == 32 else rip & 0xFFFF

    @property
    def fpu(self) -> Fpu:
        """x87, SSE and what else XSAVE has, read when first asked for."""
        if self._fpu is None:
            self._fpu = Fpu(self.view.vcpu)
        return self._fpu

    # --- registers ---------------------------------------------------------------------------------------------------

    def set_register(self, name: str, value: int) -> None:
        """A general register by any of its names; 32-bit ones clear what is above them (SDM vol. 1 section 3.4.1.1)."""
        regs = self.regs
        if name in _HIGH_BYTES:
            full = f"r{name[0]}x"
            setattr(regs, full, int(getattr(regs, full)) & ~0xFF00 | (value & 0xFF) << 8)
            return
        full, bits = _place(name)
        mask = (1 << bits) - 1
        kept = int(getattr(regs, full)) & ~mask if bits < 32 else 0
        setattr(regs, full, kept | value & mask)

    def set_flags(self, mask: int, value: int) -> None:
        """The flags in ``mask`` become those of ``value``."""
        self.regs.rflags = int(self.regs.rflags) & ~mask | value & mask

    # --- operands ----------------------------------------------------------------------------------------------------

    def get(self, operand: Any) -> int:
        """What an integer operand holds, unsigned."""
        if operand.type == _MEM:
            return int.from_bytes(self.load(self.op.address(operand)), "little")
        if operand.type == _IMM:
            return int(operand.imm) & (1 << 8 * int(operand.size)) - 1
        return self.op.register(self.op.insn.reg_name(operand.reg))

    def put(self, operand: Any, value: int) -> None:
        """Give an integer operand a value, cut to its size."""
        if operand.type == _MEM:
            self.store(self.op.address(operand, True), (value & (1 << 8 * operand.size) - 1).to_bytes(operand.size, "little"))
        else:
            self.set_register(self.op.insn.reg_name(operand.reg), value)

    # --- memory ------------------------------------------------------------------------------------------------------

    def load(self, access: Access, align: int = 1) -> bytes:
        """What the access reads. ``align``: the instruction wants this alignment, whatever AC says."""
        self._check_segment(access, False)
        self._check_aligned(access, align)
        return self.load_linear(access.linear, access.size)

    def store(self, access: Access, data: bytes, align: int = 1) -> None:
        """Stage a write."""
        self._check_segment(access, True)
        self._check_aligned(access, align)
        self.store_linear(access.linear, data)

    def probe_write(self, access: Access, align: int = 1) -> None:
        """Faults as a write would; stages none."""
        self._check_segment(access, True)
        self._check_aligned(access, align)
        for linear, size in self._pages(access.linear, access.size):
            self.translate(linear, size, write=True)

    def load_linear(self, linear: int, size: int, system: bool = False) -> bytes:
        """Bytes at a linear address. ``system``: the CPU's own access to a table, which SMAP does not see as an explicit one."""
        data = b""
        for at, n in self._pages(linear, size):
            gpa = self.translate(at, n, system=system)
            slot = self._slot(gpa, n)
            if slot is not None:
                data += bytes(slot.map[gpa - slot.gpa : gpa - slot.gpa + n])
            else:
                data += self._mmio(gpa, n, size).read("mmio", gpa, n).to_bytes(n, "little")
        return data

    def store_linear(self, linear: int, data: bytes, system: bool = False) -> None:
        """Stage a write at a linear address; both pages of one that crosses are checked first."""
        pieces = [(self.translate(at, n, write=True, system=system), n) for at, n in self._pages(linear, len(data))]
        for gpa, n in pieces:
            slot = self._slot(gpa, n)
            piece, data = data[:n], data[n:]
            if slot is not None and not slot.readonly:
                self._writes.append((gpa, piece))
            else:
                self._mmio(gpa, n, n + len(data))
                self._mmio_writes.append((gpa, piece))

    @staticmethod
    def _pages(linear: int, size: int) -> list[tuple[int, int]]:
        first = min(size, 4096 - (linear & 4095))
        return [(linear, first)] if first == size else [(linear, first), (linear + first, size - first)]

    def _slot(self, gpa: int, size: int) -> MemSlot | None:
        slot = self.view.memory.find(gpa)
        if slot is not None and gpa + size > slot.gpa + slot.size:
            raise Declined(f"it accesses {size} bytes at gpa {gpa:#x}, where a memslot ends in the middle of them")
        return slot

    def _mmio(self, gpa: int, size: int, whole: int) -> Bus:
        """The bus, where one of its devices answers a whole access at ``gpa``."""
        if self.bus is None or size != whole or size not in (1, 2, 4, 8) or self.bus.mmio.find(gpa, size) is None:
            raise Declined(f"it accesses {whole} bytes of MMIO at gpa {gpa:#x}, where no device of this machine takes so many at once")
        return self.bus

    def atomic_place(self, access: Access) -> tuple[int, int]:
        """(gpa, hva) of an access that was checked by probe_write(), for what must be one atomic access there; mark_written() follows."""
        gpa = self.translate(access.linear, access.size, write=True)
        slot = self._slot(gpa, access.size)
        if slot is None or slot.readonly or access.linear % access.size:
            raise Declined(f"it is to be atomic at gpa {gpa:#x}, which is not memory, or not aligned")
        return gpa, slot.hva + gpa - slot.gpa

    # --- checks ------------------------------------------------------------------------------------------------------

    def code(self, value: int = 0) -> int | None:
        """An error code, where exceptions push one: not in real mode."""
        return None if self.mode == "real" else value

    def canonical(self, address: int) -> bool:
        """Whether an address of 64-bit mode is canonical."""
        top = 56 if self.sregs.cr4 & CR4.LA57 else 47
        return address >> top in (0, (1 << 64 - top) - 1)

    def _check_segment(self, access: Access, write: bool) -> None:
        vector = SS if access.segment == "ss" else GP
        if self.bits == 64:
            if not (self.canonical(access.linear) and self.canonical(access.linear + access.size - 1 & (1 << 64) - 1)):
                raise Fault(vector, self.code())
            return
        segment = getattr(self.sregs, access.segment)
        if self.mode != "real":
            if segment.unusable or not segment.present:
                raise Fault(vector, self.code())
            if (write and (segment.type & 8 or not segment.type & 2)) or (not write and segment.type & 0xA == 8):
                raise Fault(GP, self.code())
        last = access.offset + access.size - 1
        if self.mode != "real" and segment.type & 0xC == 4:
            outside = access.offset <= segment.limit or last > (0xFFFFFFFF if segment.db else 0xFFFF)
        else:
            outside = last > segment.limit
        if outside:
            raise Fault(vector, self.code())

    def _check_aligned(self, access: Access, align: int) -> None:
        if access.linear % align:
            raise Fault(GP, self.code())

    def translate(self, linear: int, size: int, write: bool = False, system: bool = False) -> int:
        """The gpa of an access that stays in one page; raises the #PF that it makes."""
        walk = self.view.walk(linear)
        why = walk.denies(write=write, wp=bool(self.sregs.cr0 & CR0.WP))
        if not why and walk.page_size and walk.user and self.sregs.cr4 & (CR4.SMAP | CR4.PKE):
            if self.sregs.cr4 & CR4.PKE:
                raise Declined("it accesses a user page while protection keys (CR4.PKE) are on")
            if system or not self.regs.rflags & RFLAGS.AC:
                why = "SMAP"
        if why:
            if walk.fault and "where the guest has no memory" in walk.fault:
                raise Declined(f"the page tables for {linear:#x} are not in memory")
            present = not walk.fault or "reserved" in walk.fault
            raise Fault(PF, present | write << 1 | (8 if "reserved" in walk.fault else 0), linear)
        self._walks.append((walk, write))
        assert walk.gpa is not None
        return walk.gpa

    # --- the end -----------------------------------------------------------------------------------------------------

    def keep_fpu_on_fault(self) -> None:
        """The one thing that an exception may change: what it did to the FPU's status (SDM vol. 1 section 11.5.3)."""
        if self._fpu is not None:
            self._fpu.store(self.view.vcpu)

    def commit(self) -> None:
        """Make the changes; RIP goes to ``next_rip``; RF is cleared (SDM vol. 3 section 17.3.1.1)."""
        memory, vcpu = self.view.memory, self.view.vcpu
        for walk, write in self._walks:
            self._mark(walk, write)
        for gpa, data in self._writes:
            memory.write(gpa, data)
        for gpa, data in self._mmio_writes:
            assert self.bus is not None
            self.bus.write("mmio", gpa, len(data), int.from_bytes(data, "little"))
        if self._fpu is not None:
            self._fpu.store(vcpu)
        if self.sregs_changed:
            vcpu.set_sregs(self.sregs)
        self.regs.rip = self.next_rip
        if self.clears_rf:
            self.regs.rflags = int(self.regs.rflags) & ~RFLAGS.RF
        vcpu.set_regs(self.regs)

    def _mark(self, walk: Walk, write: bool) -> None:
        """Accessed and dirty bits (SDM vol. 3 section 4.8)."""
        for entry in walk.entries:
            if entry.level == "PDPT" and len(walk.entries) < 4 and walk.entries[0] is entry:
                continue  # PAE's own PDPT entries have none
            bits = A | (D if write and entry is walk.entries[-1] else 0)
            if bits & ~entry.value:
                slot = self.view.memory.find(entry.gpa)
                if slot is not None and not slot.readonly:
                    lib.pykvm_or8(ffi.cast("uint8_t *", slot.hva + entry.gpa - slot.gpa), bits)
                    self.view.memory.mark_written(entry.gpa, 1)


def _place(name: str) -> tuple[str, int]:
    """The 64-bit register that ``name`` is a part of, and the part's bits."""
    if name[0] == "r" and name[1:2].isdigit():
        return name.rstrip("dwb"), {"d": 32, "w": 16, "b": 8}.get(name[-1], 64)
    if name[0] == "r":
        return name, 64
    if name[0] == "e":
        return "r" + name[1:], 32
    if name in ("sil", "dil", "bpl", "spl"):
        return "r" + name[:2], 8
    if name in ("al", "bl", "cl", "dl"):
        return f"r{name[0]}x", 8
    return "r" + name, 16
