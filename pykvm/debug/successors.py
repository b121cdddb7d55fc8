"""Where a vCPU can be after its next instruction: what stepping by temporary breakpoints is made of.

The instruction is decoded with capstone, branches are followed by the flags and registers as they are, so that there is one next
address, and beside it the handlers of the exceptions that the instruction may raise instead. Sources: SDM vol. 2 (Jcc, LOOP, RET, IRET,
SYSCALL), vol. 3 sections 6.14 (64-bit gates), 20.1.4 (the real-mode interrupt vector table).
"""

from __future__ import annotations

from pykvm.disasm import decoder
from pykvm.errors import ConfigError, KvmError
from pykvm.probe import cpl0_emulated
from pykvm.x86.msr import msr_number
from pykvm.x86.regs import EFER, RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.vcpu import VCPU
    from pykvm.x86.view import CpuView

__all__ = ["Next", "handlers", "successor"]

_LONGEST = 15


class Next:
    """``address``: where the vCPU goes if the instruction raises nothing, a linear address; None when that cannot be told, since it will
    raise. ``user``: it will be at CPL3 there. ``size``: the instruction's bytes. ``reads``: linear ranges that its operands name.
    ``counts``: it is a branch to itself by LOOP, which does nothing but count RCX down."""

    __slots__ = ("address", "counts", "reads", "size", "user")

    def __init__(self, address: int | None, size: int, reads: list[tuple[int, int]], user: bool, counts: bool = False) -> None:
        self.address, self.size, self.reads, self.user, self.counts = address, size, reads, user, counts


def successor(view: CpuView, vcpu: VCPU) -> Next:
    """What follows the instruction at CS:RIP."""
    return _Decoder(view, vcpu).next()


def handlers(view: CpuView) -> set[int]:
    """The linear addresses of the handlers of vectors 0 to 31, where the guest has set up an IDT (or IVT)."""
    found = set()
    for vector in range(32):
        address = None if vector == 2 else gate(view, vector)
        if address is not None:
            found.add(address)
    return found


def gate(view: CpuView, vector: int) -> int | None:
    """Where a vector leads, a linear address; None without a present gate."""
    table = view.sregs.idt
    width = 4 if view.mode == "real" else 16 if view.sregs.efer & EFER.LMA else 8
    if width * vector + width - 1 > table.limit:
        return None
    raw = view.read(table.base + width * vector, width)
    if len(raw) < width:
        return None
    value = int.from_bytes(raw, "little")
    if view.mode == "real":
        return ((value >> 16) << 4) + (value & 0xFFFF)
    if not value >> 47 & 1 or value >> 44 & 1:
        return None
    offset = value & 0xFFFF | value >> 32 & 0xFFFF_0000 | (value >> 64 << 32 if width == 16 else 0)
    return code_base(view, value >> 16 & 0xFFFF) + offset & (1 << 64) - 1


def code_base(view: CpuView, selector: int) -> int:
    """The base that CS would have with this selector."""
    if view.mode == "real":
        return selector << 4
    raw = view.read(view.sregs.gdt.base + (selector & ~7), 8) if not selector & 4 else b""
    value = int.from_bytes(raw, "little")
    if view.sregs.efer & EFER.LMA and value >> 53 & 1:
        return 0
    return value >> 16 & 0xFFFFFF | (value >> 56 & 0xFF) << 24


def leaves_step(code: bytes) -> bool:
    """Whether a single step of ``code`` need not end where it leads: INT n and SYSCALL clear RFLAGS.TF, and KVM's emulator does not stop
    after IRET and SYSRET."""
    return code.startswith((b"\xcd", b"\x0f\x05")) or (
        cpl0_emulated() and code.startswith((b"\xcf", b"\x48\xcf", b"\x66\xcf", b"\x0f\x07", b"\x48\x0f\x07"))
    )


def to_user(view: CpuView, selector: int) -> bool:
    """Whether a far return to this selector is one to CPL3."""
    return view.mode != "real" and selector & 3 == 3


def count_down(view: CpuView) -> int:
    """RCX after LOOP: with the address size of the mode, its upper half stays in 16-bit and goes in 32-bit code."""
    rcx = int(view.regs.rcx)
    if view.bits == 16:
        return rcx & ~0xFFFF | rcx - 1 & 0xFFFF
    return rcx - 1 & (1 << view.bits) - 1


class _Decoder:
    """One instruction of one vCPU."""

    def __init__(self, view: CpuView, vcpu: VCPU) -> None:
        import capstone

        self.view, self.vcpu, self.x86 = view, vcpu, capstone.x86
        self.bits = view.bits
        self.flags = view.regs.rflags
        self.user = view.cpl == 3
        self.base = 0 if self.bits == 64 else view.sregs.cs.base
        self.mask = (1 << self.bits) - 1
        engine = decoder(self.bits, detail=True)
        # Decoded at its offset in CS: that is what relative branches wrap around in.
        self.insn: Any = next(engine.disasm(view.read(view.rip, _LONGEST), view.regs.rip & self.mask, 1), None)
        self.branches = (
            capstone.CS_GRP_JUMP, capstone.CS_GRP_CALL, capstone.CS_GRP_RET, capstone.CS_GRP_INT, capstone.CS_GRP_IRET,
            capstone.CS_GRP_BRANCH_RELATIVE,
        )  # fmt: skip

    def next(self) -> Next:
        """See successor()."""
        insn = self.insn
        if insn is None:
            return Next(None, 1, [], self.user)  # no instruction, or no memory: #UD or #PF
        reads = [
            (at, op.size)
            for op in insn.operands
            if op.type == self.x86.X86_OP_MEM and insn.mnemonic not in ("lea", "nop") and (at := self._address(op)) is not None
        ]
        is_branch = insn.mnemonic.startswith("sys") or any(insn.group(group) for group in self.branches)
        offset = self._branch() if is_branch else self._behind()
        loops = insn.mnemonic.startswith("loop")
        return Next(offset, insn.size, reads, self.user, loops and offset == self.view.rip)

    def _linear(self, offset: int) -> int:
        return self.base + (offset & self.mask) & ((1 << 64) - 1 if self.bits == 64 else 0xFFFFFFFF)

    def _behind(self) -> int:
        return self._linear(self.insn.address + self.insn.size)

    def _branch(self) -> int | None:
        insn, regs = self.insn, self.view.regs
        op, second = insn.opcode[0], insn.opcode[1]
        taken: bool | None = None
        if 0x70 <= op <= 0x7F:
            taken = self._condition(op & 15)
        elif op == 0x0F and 0x80 <= second <= 0x8F:
            taken = self._condition(second & 15)
        elif 0xE0 <= op <= 0xE3:
            taken = self._counted(op)
        elif op in (0xEB, 0xE9, 0xE8):
            taken = True
        if taken is not None:
            target = insn.operands[0].imm
            if self.bits != 64 and self._operand_size() == 2:
                target &= 0xFFFF
            return self._linear(target) if taken else self._behind()
        match op:
            case 0xFF:
                return self._indirect(insn.modrm >> 3 & 7)
            case 0xEA | 0x9A:
                return self._far(insn.operands[0].imm, insn.operands[1].imm)
            case 0xC2 | 0xC3:
                size = 8 if self.bits == 64 else self._operand_size()
                return self._read_linear(self._stack(), size)
            case 0xCA | 0xCB | 0xCF:
                size = self._far_size()
                offset, selector = self._read(self._stack(), size), self._read(self._stack() + size, 2)
                if offset is None or selector is None:
                    return None
                self.user = to_user(self.view, selector)
                return self._far(selector, offset)
            case 0xCC:
                return gate(self.view, 3)
            case 0xF1:
                return gate(self.view, 1)
            case 0xCD:
                self.user = False
                return gate(self.view, insn.operands[0].imm & 0xFF)
            case 0xCE:
                return gate(self.view, 4) if self.flags & RFLAGS.OF else self._behind()
        if op == 0x0F and second == 0x05:
            self.user = self.user and cpl0_emulated()  # where it stays at CPL3
            return self._msr("IA32_LSTAR" if self.bits == 64 else "IA32_CSTAR")
        if op == 0x0F and second == 0x07:
            self.user = True
            return int(regs.rcx if insn.rex & 8 else regs.rcx & 0xFFFFFFFF)
        if op == 0x0F and second == 0x34:
            return self._msr("IA32_SYSENTER_EIP")
        if op == 0x0F and second == 0x35:
            return int(regs.rdx if insn.rex & 8 else regs.rdx & 0xFFFFFFFF)
        return self._behind()

    def _msr(self, name: str) -> int | None:
        try:
            return self.vcpu.get_msr(msr_number(name))
        except KvmError:
            return None

    def _condition(self, code: int) -> bool:
        """SDM vol. 2 appendix B, table B-1: pairs of a condition and its opposite."""
        f = self.flags
        cf, zf, sf, of, pf = (bool(f & bit) for bit in (RFLAGS.CF, RFLAGS.ZF, RFLAGS.SF, RFLAGS.OF, RFLAGS.PF))
        holds = (of, cf, zf, cf or zf, sf, pf, sf != of, zf or sf != of)[code >> 1]
        return holds != bool(code & 1)

    def _counted(self, op: int) -> bool:
        """LOOPNE, LOOPE, LOOP, JCXZ: they count in CX, ECX or RCX by their address size."""
        mask = (1 << 8 * self.insn.addr_size) - 1
        count = self.view.regs.rcx & mask
        if op == 0xE3:
            return bool(count == 0)
        zero = bool(self.flags & RFLAGS.ZF)
        return bool((count - 1) & mask) and (op == 0xE2 or zero == (op == 0xE1))

    def _operand_size(self) -> int:
        wide = (self.bits == 16) == (self.insn.prefix[2] == 0x66)
        return 4 if wide else 2

    def _far_size(self) -> int:
        if self.bits == 64 and self.insn.rex & 8:
            return 8
        return self._operand_size()

    def _far(self, selector: int, offset: int) -> int:
        return code_base(self.view, selector) + offset & (1 << 64) - 1

    def _indirect(self, kind: int) -> int | None:
        op = self.insn.operands[0]
        if kind in (2, 4):
            if op.type == self.x86.X86_OP_REG:
                return self._linear(self._register(op.reg))
            at = self._address(op)
            return None if at is None else self._read_linear(at, 8 if self.bits == 64 else self._operand_size())
        if kind in (3, 5):
            size, at = self._far_size(), self._address(op)
            offset = None if at is None else self._read(at, size)
            selector = None if at is None else self._read(at + size, 2)
            return None if offset is None or selector is None else self._far(selector, offset)
        return self._behind()  # INC, DEC, PUSH

    def _read(self, at: int, size: int) -> int | None:
        raw = self.view.read(at, size)
        return int.from_bytes(raw, "little") if len(raw) == size else None

    def _read_linear(self, at: int, size: int) -> int | None:
        offset = self._read(at, size)
        return None if offset is None else self._linear(offset)

    def _stack(self) -> int:
        ss, rsp = self.view.sregs.ss, self.view.regs.rsp
        if self.bits == 64:
            return int(rsp)
        return int(ss.base + (rsp & (0xFFFFFFFF if ss.db else 0xFFFF))) & 0xFFFFFFFF

    def _register(self, number: int) -> int:
        if not number or number in (self.x86.X86_REG_RIZ, self.x86.X86_REG_EIZ):
            return 0
        name = self.insn.reg_name(number)
        regs = self.view.regs
        if name in ("rip", "eip", "ip"):
            return int(self.insn.address + self.insn.size)
        if name[0] == "r" and name[-1] in "dw" and name[1:-1].isdigit():
            return int(getattr(regs, name[:-1])) & (0xFFFFFFFF if name[-1] == "d" else 0xFFFF)
        if name[0] == "r":
            return int(getattr(regs, name))
        wide = int(getattr(regs, "r" + name.removeprefix("e")))
        return wide & (0xFFFFFFFF if name[0] == "e" else 0xFFFF)

    def _address(self, op: Any) -> int | None:
        """The linear address of a memory operand; None when its registers are none of the general ones."""
        memory = op.mem
        try:
            total = self._register(memory.base) + self._register(memory.index) * memory.scale + memory.disp
        except AttributeError:
            return None
        total &= (1 << 8 * self.insn.addr_size) - 1
        segment = self.insn.reg_name(memory.segment) if memory.segment else ""
        if not segment:
            base = self.insn.reg_name(memory.base) if memory.base else ""
            segment = "ss" if base in ("bp", "ebp", "sp", "esp") else "ds"
        if self.bits != 64 or segment in ("fs", "gs"):
            total += getattr(self.view.sregs, segment).base
        return int(total) & ((1 << 64) - 1 if self.bits == 64 else 0xFFFFFFFF)


def check_apart(following: Next, rip: int, target: int) -> None:
    """A temporary breakpoint must not lie in the instruction that is to be stepped, or in what it reads. Raises ConfigError."""
    if rip <= target < rip + following.size:
        raise ConfigError(f"the instruction at {rip:#x} jumps into itself, to {target:#x}: it cannot be stepped on this host")
    if any(at <= target < at + size for at, size in following.reads):
        raise ConfigError(f"the instruction at {rip:#x} reads code at {target:#x}: it cannot be stepped on this host")
