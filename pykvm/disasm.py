"""Disassembly with capstone, imported when first used."""

from __future__ import annotations

from _thread import _local

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.symbols import Symbols

__all__ = ["Insn", "decoder", "disassemble", "window"]

_LONGEST = 15
_made = _local()
_NEAR = 4096  # a symbol farther back than this is not decoded from


class Insn:
    """One instruction: ``address``, its ``bytes``, and its text."""

    __slots__ = ("address", "bytes", "mnemonic", "op_str")

    def __init__(self, address: int, bytes: bytes, mnemonic: str, op_str: str) -> None:
        self.address, self.bytes, self.mnemonic, self.op_str = address, bytes, mnemonic, op_str

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.bytes)

    def __str__(self) -> str:
        return f"{self.mnemonic} {self.op_str}".strip()

    def __repr__(self) -> str:
        return f"<Insn {self.address:#x}: {self}>"


def disassemble(data: bytes, address: int, bits: int, count: int = 0) -> list[Insn]:
    """Up to ``count`` instructions (0: all) of ``data``, which lies at ``address``, decoded as 16-, 32- or 64-bit code.

    Ends early at bytes that are no instruction.
    """
    return [Insn(i.address, bytes(i.bytes), i.mnemonic, i.op_str) for i in decoder(bits).disasm(data, address, count)]


def decoder(bits: int, *, detail: bool = False) -> Any:
    """A ``capstone.Cs`` for 16-, 32- or 64-bit code, with operands when ``detail``. To make one takes as long as to decode some
    instructions; each thread keeps its own, since they must not be shared."""
    made: dict[str, Any] = _made.__dict__
    engine = made.get(name := f"{bits} {detail}")
    if engine is None:
        import capstone

        mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
        engine = made[name] = capstone.Cs(capstone.CS_ARCH_X86, mode)
        engine.detail = detail
    return engine


def window(
    read: Callable[[int, int], bytes],
    rip: int,
    bits: int,
    before: int = 4,
    after: int = 6,
    symbols: Symbols | None = None,
) -> str:
    """The instructions around ``rip`` as lines, with ``=>`` at it.

    ``read(address, size)`` gives code bytes, fewer where memory ends. x86 code cannot be read backwards: what comes before ``rip`` is
    decoded from the symbol at or before it, else by trying starts until one run of instructions ends exactly there.
    """
    found = symbols.lookup(rip) if symbols else None
    known = [] if found is None or found[1] > _NEAR else _run_to(read, rip - found[1], rip, bits)
    rows = known[-before:] or _before(read, rip, bits, before)
    here = disassemble(read(rip, _LONGEST * after), rip, bits, after)
    names = {insn.address: symbols.name(insn.address) if symbols else "" for insn in [*rows, *here]}
    width = max((len(name) + 3 for name in names.values() if name), default=0) + 1
    lines = []
    for insn in [*rows, *here]:
        name = names[insn.address]
        where = (f" <{name}>:" if name else ":").ljust(width)
        lines.append(f"{'=>' if insn.address == rip else '  '} {insn.address:#010x}{where} {insn.bytes.hex():<20} {insn}")
    if not here:
        data = read(rip, 8)
        what = f"bytes {data.hex(' ')}: not an instruction" if data else "no memory here"
        lines.append(f"=> {rip:#010x}: {what}")
    return "\n".join(lines)


def _run_to(read: Callable[[int, int], bytes], start: int, rip: int, bits: int) -> list[Insn]:
    """The instructions from ``start`` up to ``rip``, or none when they do not end exactly there."""
    data = read(start, rip - start)
    run = disassemble(data, start, bits) if data and len(data) == rip - start else []
    return run if run and run[-1].address + run[-1].size == rip else []


def _before(read: Callable[[int, int], bytes], rip: int, bits: int, count: int) -> list[Insn]:
    best: list[Insn] = []
    for distance in range(min(rip, 6 * count), 0, -1):
        run = _run_to(read, rip - distance, rip, bits)
        if len(run) >= count:
            return run[-count:]
        best = max(best, run, key=len)
    return best
