"""An instruction with its operands, and what they are worth in the state that it was met in."""

from __future__ import annotations

from pykvm.disasm import decoder
from pykvm.x86.regs import CR0

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.x86.view import CpuView

__all__ = ["Access", "Operation", "engine_for"]

_REG, _IMM, _MEM = 1, 2, 3  # capstone's X86_OP_
_READ, _WRITE = 1, 2  # capstone's CS_AC_
_LONGEST = 15
_BYTES = {"al": 0, "bl": 0, "cl": 0, "dl": 0, "ah": 8, "bh": 8, "ch": 8, "dh": 8}
# They compute an address, or touch nothing that could fault.
_NO_ACCESS = ("lea", "nop", "invlpg", "prefetch", "bndmk", "clflush", "clwb", "cldemote")
_ONLY_READ = ("cmp", "test", "push", "call", "jmp", "lcall", "ljmp", "div", "idiv", "mul", "imul", "lgdt", "lidt", "bt", "comis", "ucomis")

# Legacy SSE: all but these want a 16-byte operand aligned (SDM vol. 1 section 10.8.3, vol. 2 at PCMPESTRI and its like).
_UNALIGNED = ("movups", "movupd", "movdqu", "lddqu", "pcmpestr", "pcmpistr")
# With VEX or EVEX only these do (SDM vol. 1 section 14.9).
_VEX_ALIGNED = ("vmovaps", "vmovapd", "vmovdqa", "vmovntps", "vmovntpd", "vmovntdq")


def engine_for(bits: int) -> Any:
    """This thread's capstone engine for 16-, 32- or 64-bit code, with operands. One must not be used by two threads at once."""
    return decoder(bits, detail=True)


class Access:
    """Memory that an instruction touches: ``offset`` in ``segment``, ``linear``, ``size`` bytes, a ``write``, a ``read``, or both."""

    __slots__ = ("linear", "offset", "read", "segment", "size", "stack", "write")

    def __init__(self, segment: str, offset: int, linear: int, size: int, write: bool, stack: bool = False) -> None:
        self.segment, self.offset, self.linear, self.size, self.write, self.stack = segment, offset, linear, size, write, stack
        self.read = not write


class Operation:
    """The instruction at RIP of a view. ``vex``: encoded with VEX or EVEX. ``str()`` is its text."""

    def __init__(self, view: CpuView, insn: Any) -> None:
        self.view, self.insn = view, insn
        self.mnemonic: str = insn.mnemonic.split()[-1]  # without rep, lock and their like
        self.operands: list[Any] = list(insn.operands)
        self.bytes = bytes(insn.bytes)
        self.opcode = bytes(insn.opcode).rstrip(b"\0") or b"\0"
        self.groups = {insn.group_name(g) for g in insn.groups}
        self.vex = self.bytes[0] in (0xC4, 0xC5, 0x62) and (view.bits == 64 or self.bytes[1] & 0xC0 == 0xC0)
        self.names = [insn.reg_name(o.reg) for o in self.operands if o.type == _REG]

    @classmethod
    def here(cls, view: CpuView, engine: Any = None, code: bytes = b"") -> Operation | None:
        """Decode at RIP; None where the bytes are no instruction. ``engine``: one of ``engine_for()`` that is kept; ``code``: the bytes,
        by default those in memory."""
        for insn in (engine or engine_for(view.bits)).disasm(code or view.read(view.rip, _LONGEST), view.rip, 1):
            return cls(view, insn)
        return None

    def on(self, view: CpuView) -> Operation:
        """The same instruction, met again in another state."""
        other: Operation = object.__new__(Operation)
        other.__dict__.update(self.__dict__)
        other.view = view
        return other

    def __str__(self) -> str:
        return f"{self.insn.mnemonic} {self.insn.op_str}".strip()

    @property
    def end(self) -> int:
        """Its length is added to RIP: the linear address behind it."""
        return self.view.rip + len(self.bytes)

    @property
    def operand_size(self) -> int:
        """2, 4 or 8 bytes, by mode and prefixes (of far transfers and IRET; SDM vol. 1 section 3.6)."""
        rex = self.insn.rex & 8 if self.view.bits == 64 else 0
        flip = self._has_prefix(0x66)
        return 8 if rex else (4 if flip else 2) if self.view.bits == 16 else 2 if flip else 4

    @property
    def prefixes(self) -> bytes:
        """capstone's four legacy prefixes, 0 where there is none."""
        return bytes(self.insn.prefix)

    def _has_prefix(self, byte: int) -> bool:
        return byte in bytes(self.insn.prefix)

    @property
    def target(self) -> str:
        """The register that is its first operand, or an empty string."""
        first = self.operands[0] if self.operands else None
        return str(self.insn.reg_name(first.reg)) if first is not None and first.type == _REG else ""

    @property
    def locked(self) -> bool:
        """With a LOCK prefix."""
        return self._has_prefix(0xF0)

    @property
    def writes_memory(self) -> bool:
        """Its first operand is memory."""
        return bool(self.operands) and self.operands[0].type == _MEM

    # --- operands ----------------------------------------------------------------------------------------------------

    def register(self, name: str) -> int:
        """A general register by any of its names; RIP is the next instruction's."""
        regs = self.view.regs
        if name in ("rip", "eip"):
            return self.end
        if name in _BYTES:
            return int(getattr(regs, f"r{name[0]}x")) >> _BYTES[name] & 0xFF
        if name[0] == "r" and name[1:2].isdigit():
            bits = {"d": 32, "w": 16, "b": 8}.get(name[-1], 64)
            return int(getattr(regs, name.rstrip("dwb"))) & (1 << bits) - 1
        if name[0] == "r":
            return int(getattr(regs, name))
        if name[0] == "e":
            return int(getattr(regs, "r" + name[1:])) & 0xFFFFFFFF
        if name in ("sil", "dil", "bpl", "spl"):
            return int(getattr(regs, "r" + name[:2])) & 0xFF
        return int(getattr(regs, "r" + name, 0)) & 0xFFFF

    def value(self, operand: Any) -> int | None:
        """What a source operand holds; None when its memory cannot be read."""
        if operand.type == _IMM:
            return int(operand.imm)
        if operand.type == _REG:
            return self.register(self.insn.reg_name(operand.reg))
        data = self.view.read(self.address(operand).linear, operand.size)
        return int.from_bytes(data, "little") if len(data) == operand.size else None

    def address(self, operand: Any, write: bool = False) -> Access:
        """Where a memory operand is."""
        mem = operand.mem
        base, index = (self.insn.reg_name(r) if r else "" for r in (mem.base, mem.index))
        total = int(mem.disp)
        if base:
            total += self.register(base)
        if index and index not in ("riz", "eiz"):
            total += self.register(index) * mem.scale
        segment = self.insn.reg_name(mem.segment) if mem.segment else ""
        if not segment:
            segment = "ss" if base in ("rsp", "esp", "sp", "rbp", "ebp", "bp") else "ds"
            if base in ("rdi", "edi", "di") and self.mnemonic[:4] in ("stos", "movs", "scas", "insb", "insw", "insd", "cmps"):
                segment = "es"
        return self.place(segment, total & (1 << 8 * self.insn.addr_size) - 1, operand.size, write)

    def place(self, segment: str, offset: int, size: int, write: bool, stack: bool = False) -> Access:
        """A place in a segment."""
        base = 0
        if self.view.bits != 64 or segment in ("fs", "gs"):
            base = int(getattr(self.view.sregs, segment).base)
        mask = (1 << 64) - 1 if self.view.bits == 64 else (1 << 32) - 1
        return Access(segment, offset, offset + base & mask, size, write, stack)

    def alignment(self, size: int) -> int:
        """What the address of its memory operand of ``size`` bytes must be a multiple of, or #GP."""
        name = self.mnemonic
        if name.startswith(("fxsave", "fxrstor", "cmpxchg16b")):
            return 16
        if name.startswith(("xsave", "xrstor")):
            return 64
        if self.vex:
            return size if name.startswith(_VEX_ALIGNED) else 1
        legacy = size == 16 and any(r.startswith("xmm") for r in self.names)
        return 16 if legacy and not name.startswith(_UNALIGNED) else 1

    # --- accesses ----------------------------------------------------------------------------------------------------

    def accesses(self) -> list[Access]:
        """The memory it touches: its operands, and the stack; what is read comes first."""
        found = []
        if not self.mnemonic.startswith(_NO_ACCESS):
            for i, operand in enumerate(self.operands):
                if operand.type == _MEM:
                    write = bool(operand.access & _WRITE)
                    if i == 0 and self.mnemonic.startswith(("vmov", "ins", "sgdt", "sidt", "fxsave", "xsave")):
                        write = True
                    elif self.mnemonic.startswith(_ONLY_READ):
                        write = False
                    found.append(self.address(operand, write))
                    found[-1].read = not write or bool(operand.access & _READ)
        if self.mnemonic.startswith("xlat"):
            at = int(self.view.regs.rbx) + (int(self.view.regs.rax) & 0xFF)
            found.append(self.place("ds", at & (1 << 8 * self.insn.addr_size) - 1, 1, False))
        if self.mnemonic == "enter":
            return self._stack_accesses()
        return sorted(found + self._stack_accesses(), key=lambda access: access.write)

    def slots(self, first: int, count: int, size: int) -> list[int | None]:
        """``count`` values of ``size`` bytes from the stack, the first at ``first`` bytes above the stack pointer."""
        out: list[int | None] = []
        for i in range(count):
            data = self.view.read(self.stack(first + i * size, size, False).linear, size)
            out.append(int.from_bytes(data, "little") if len(data) == size else None)
        return out

    def stack(self, above: int, size: int, write: bool) -> Access:
        """A place at ``above`` bytes from the stack pointer (SDM vol. 1 section 6.2.3)."""
        view = self.view
        width = 64 if view.bits == 64 else 32 if view.sregs.ss.db and view.sregs.cr0 & CR0.PE else 16
        mask = (1 << width) - 1
        return self.place("ss", int(view.regs.rsp) + above & mask, size, write, True)

    def _stack_accesses(self) -> list[Access]:
        name = self.mnemonic
        near = 8 if self.view.bits == 64 and not self._has_prefix(0x66) else self.operand_size
        if name.startswith(("push", "call")):
            count = 8 if name.startswith("pusha") else 1
            return [self.stack(-near * (i + 1), near, True) for i in range(count)]
        if name.startswith("pop") and not name.startswith("popcnt"):
            return [self.stack(0, near, False)]
        if name == "ret":
            return [self.stack(0, near, False)]
        if name in ("retf", "retfq"):
            return [self.stack(i * self.operand_size, self.operand_size, False) for i in range(2)]
        if name.startswith("iret"):
            return [self.stack(i * self.operand_size, self.operand_size, False) for i in range(5 if self.view.bits == 64 else 3)]
        if name == "leave":
            at = self.view.regs.rbp - self.view.regs.rsp
            return [self.stack(at, near, False)]
        if name == "enter":
            nested = self.operands[1].imm & 31 > 1
            frames = [self.stack(self.view.regs.rbp - self.view.regs.rsp - near, near, False)] if nested else []
            return [self.stack(-near, near, True), *frames]
        return []
