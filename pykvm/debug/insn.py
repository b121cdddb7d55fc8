"""Which instruction made an exit: ``insn_rip()``, the same on every host.

Where KVM leaves RIP depends on who carried the instruction out. OUT handled by KVM's fast path leaves RIP at the instruction and
moves it on the next KVM_RUN; OUT, MMIO writes and HLT that went through KVM's emulator leave it past the instruction; reads always
leave it at the instruction, since they are not finished. So: reads are at, HLT and MMIO writes are past, and for OUT the host is
asked by experiment (pykvm/probe.py, ``out_leaves_rip_past``). Port 0x7E is past everywhere (KVM_X86_QUIRK_OUT_7E_INC_RIP), and so is
OUTS, which is always emulated. A REP OUTS, STOS or MOVS stays at the instruction, even for its last element:
KVM moves on when it comes back and finds RCX empty.
"""

from __future__ import annotations

from pykvm import exits
from pykvm.disasm import disassemble
from pykvm.probe import out_leaves_rip_past

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.disasm import Insn
    from pykvm.exits import Exit
    from pykvm.x86.view import CpuView

__all__ = ["insn_rip"]

_LONGEST = 15
_SEGMENTS = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
_LEGACY = {0x66, 0x67, 0xF0, 0xF2, 0xF3, *_SEGMENTS}  # all prefixes but REX
_REGISTERS = {1: "al", 2: "ax", 4: "eax"}
_OUTS, _STOS, _MOVS = (0x6E, 0x6F), (0xAA, 0xAB), (0xA4, 0xA5)
_DF = 1 << 10


def insn_rip(view: CpuView, exit: Exit) -> int | None:
    """The linear address of the instruction that made ``exit``, for a vCPU that has not run on; None when it cannot be told.

    Exits that no single instruction makes (a signal, a shutdown) give RIP as it is.
    """
    match exit:
        case exits.IoOut():
            return _out(view, exit)
        case exits.MmioWrite():
            string = _String(view)
            if string.is_rep(_STOS + _MOVS) and string.wrote(exit.gpa):
                return view.rip
            return _ending_at(view, _writes_memory)
        case exits.Hlt():
            return view.rip - 1 if view.read(view.rip - 1, 1) == b"\xf4" else None
        case _:
            return view.rip


def _out(view: CpuView, exit: exits.IoOut) -> int | None:
    port, dx = exit.port, view.regs.rdx & 0xFFFF

    def is_it(insn: Insn) -> bool:
        if insn.mnemonic == "out":
            to, _, register = insn.op_str.partition(", ")
            return register == _REGISTERS.get(exit.size) and (dx == port if to == "dx" else insn.bytes[-1] == port)
        return dx == port and insn.mnemonic.removeprefix("rep ") == {1: "outsb", 2: "outsw", 4: "outsd"}.get(exit.size)

    string = _String(view)
    if dx == port and string.is_rep(_OUTS) and string.size == exit.size and string.read_last() == exit.data[-exit.size :]:
        return view.rip
    if port != 0x7E and not out_leaves_rip_past(_probed_mode(view)):
        here = disassemble(view.read(view.rip, _LONGEST), view.rip, view.bits, 1)
        if here and here[0].mnemonic == "out" and is_it(here[0]):
            return view.rip
    return _ending_at(view, is_it)


def _probed_mode(view: CpuView) -> str:
    """The mode whose probe tells about this one: 32-bit code runs, or is emulated, as in protected mode."""
    if view.cpl == 3:
        return "user"
    return view.mode if view.mode in ("real", "long") else "protected"


class _String:
    """The instruction at RIP, seen as a string instruction with REP that has done at least one element."""

    def __init__(self, view: CpuView) -> None:
        self.view = view
        data = view.read(view.rip, _LONGEST)
        at = 0
        while at < len(data) and data[at] in _LEGACY:
            at += 1
        prefixes, rex = data[:at], 0
        if view.bits == 64 and data[at : at + 1] and data[at] & 0xF0 == 0x40:
            rex, at = data[at], at + 1
        self.opcode = data[at] if at < len(data) else -1
        self.rep = any(p in (0xF2, 0xF3) for p in prefixes)
        self.segment = next((_SEGMENTS[p] for p in reversed(prefixes) if p in _SEGMENTS), "ds")
        wide = (view.bits == 16) == (0x66 in prefixes)
        self.size = 1 if not self.opcode & 1 else 8 if rex & 8 else 4 if wide else 2
        bits = {16: 32, 32: 16, 64: 32}[view.bits] if 0x67 in prefixes else view.bits
        self.mask = (1 << bits) - 1

    def is_rep(self, opcodes: tuple[int, ...]) -> bool:
        """Whether it is one of these."""
        return self.rep and self.opcode in opcodes

    def _last(self, register: int, segment: str) -> int:
        """The linear address of the element that was done last."""
        step = -self.size if self.view.regs.rflags & _DF else self.size
        base = getattr(self.view.sregs, segment).base if self.view.bits != 64 or segment in ("fs", "gs") else 0
        return int(base + (register - step & self.mask)) & ((1 << 64 if self.view.bits == 64 else 1 << 32) - 1)

    def wrote(self, gpa: int) -> bool:
        """Whether the element that was done last went to ``gpa`` (one that crosses pages exits once for each)."""
        at = self._last(self.view.regs.rdi, "es")
        return any(self.view.walk(at + i).gpa == gpa for i in range(self.size))

    def read_last(self) -> bytes:
        """The element that was done last, of an instruction that reads memory."""
        return self.view.read(self._last(self.view.regs.rsi, self.segment), self.size)


def _writes_memory(insn: Insn) -> bool:
    return "[" in insn.op_str or insn.mnemonic.startswith(("push", "enter"))


def _ending_at(view: CpuView, accept: Callable[[Insn], bool]) -> int | None:
    """x86 code cannot be read backwards: decode from several starts; most fall into step with the true one within a few bytes."""
    rip = view.rip
    votes: dict[int, int] = {}
    for distance in range(min(rip, 3 * _LONGEST), 0, -1):
        data = view.read(rip - distance, distance)
        run = disassemble(data, rip - distance, view.bits) if len(data) == distance else []
        if run and run[-1].address + run[-1].size == rip and accept(run[-1]):
            votes[run[-1].address] = votes.get(run[-1].address, 0) + 1
    # Cutting off a prefix leaves an instruction too: it has fewer votes, and among equals the longer instruction is right.
    return max(votes, key=lambda address: (votes[address], -address)) if votes else None
