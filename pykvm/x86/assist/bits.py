"""Counting and moving bits: POPCNT, BMI1, BMI2, ADX, CRC32 (SDM vol. 2). Flags that the manual leaves undefined keep their value.

KVM's emulator never gives up on their relatives: it runs LZCNT and TZCNT as BSR and BSF, and raises #UD for MOVBE if CPUID lacks it.
"""

from __future__ import annotations

from pykvm.x86.assist.cpu import STATUS, Cpu
from pykvm.x86.regs import RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.x86.assist.finish import Instruction
    from pykvm.x86.operation import Operation

__all__ = ["INSTRUCTIONS"]

CF, ZF, SF, OF = RFLAGS.CF, RFLAGS.ZF, RFLAGS.SF, RFLAGS.OF


def _mask(operand: Any) -> int:
    return (1 << 8 * int(operand.size)) - 1


def _flags_if(carry: bool, zero: bool, sign: bool = False) -> int:
    return CF * carry | ZF * zero | SF * sign


def _popcnt(cpu: Cpu, op: Operation) -> None:
    to, source = op.operands
    value = cpu.get(source)
    cpu.put(to, value.bit_count())
    cpu.set_flags(STATUS, ZF * (not value))


def _set_with_flags(cpu: Cpu, to: Any, result: int, carry: bool) -> None:
    """What ANDN, BEXTR and the three BLS have in common: OF clear, AF and PF undefined."""
    result &= _mask(to)
    cpu.put(to, result)
    cpu.set_flags(CF | ZF | SF | OF, _flags_if(carry, not result, bool(result >> 8 * to.size - 1)))


def _andn(cpu: Cpu, op: Operation) -> None:
    to, first, second = op.operands
    _set_with_flags(cpu, to, ~cpu.get(first) & cpu.get(second), False)


def _bextr(cpu: Cpu, op: Operation) -> None:
    to, source, control = op.operands
    start, length = cpu.get(control) & 0xFF, cpu.get(control) >> 8 & 0xFF
    result = cpu.get(source) >> start & (1 << length) - 1
    cpu.put(to, result)
    cpu.set_flags(CF | OF | ZF, ZF * (not result & _mask(to)))


def _blsi(cpu: Cpu, op: Operation) -> None:
    to, source = op.operands
    value = cpu.get(source)
    _set_with_flags(cpu, to, value & -value, value != 0)


def _blsmsk(cpu: Cpu, op: Operation) -> None:
    to, source = op.operands
    value = cpu.get(source)
    _set_with_flags(cpu, to, value ^ value - 1, value == 0)


def _blsr(cpu: Cpu, op: Operation) -> None:
    to, source = op.operands
    value = cpu.get(source)
    _set_with_flags(cpu, to, value & value - 1, value == 0)


def _bzhi(cpu: Cpu, op: Operation) -> None:
    to, source, index = op.operands
    n, width = cpu.get(index) & 0xFF, 8 * to.size
    value = cpu.get(source)
    _set_with_flags(cpu, to, value & (1 << n) - 1 if n < width else value, n > width - 1)


def _pdep(cpu: Cpu, op: Operation) -> None:
    to, source, mask = op.operands
    bits, left, result = cpu.get(source), cpu.get(mask), 0
    while left:
        lowest = left & -left
        if bits & 1:
            result |= lowest
        bits >>= 1
        left ^= lowest
    cpu.put(to, result)


def _pext(cpu: Cpu, op: Operation) -> None:
    to, source, mask = op.operands
    value, left, result, at = cpu.get(source), cpu.get(mask), 0, 0
    while left:
        lowest = left & -left
        result |= bool(value & lowest) << at
        at += 1
        left ^= lowest
    cpu.put(to, result)


def _mulx(cpu: Cpu, op: Operation) -> None:
    high, low, source = op.operands
    product = cpu.get(source) * op.register("rdx" if low.size == 8 else "edx")
    cpu.put(low, product)
    cpu.put(high, product >> 8 * low.size)  # the same register twice: the high half stays


def _rorx(cpu: Cpu, op: Operation) -> None:
    to, source, count = op.operands
    width = 8 * to.size
    n, value = int(count.imm) & width - 1, cpu.get(source)
    cpu.put(to, value >> n | value << width - n)


def _shift(cpu: Cpu, op: Operation) -> None:
    """SARX, SHLX, SHRX."""
    to, source, count = op.operands
    width = 8 * to.size
    n, value = cpu.get(count) & width - 1, cpu.get(source)
    if op.mnemonic == "sarx" and value >> width - 1:
        value -= 1 << width
    cpu.put(to, value << n if op.mnemonic == "shlx" else value >> n)


def _add_with(flag: int) -> Instruction:
    """ADCX and ADOX: an addition with a carry of its own."""

    def add(cpu: Cpu, op: Operation) -> None:
        to, source = op.operands
        total = cpu.get(to) + cpu.get(source) + bool(cpu.regs.rflags & flag)
        cpu.put(to, total)
        cpu.set_flags(flag, flag * (total >> 8 * to.size))

    return add


_CRC32C = 0x82F63B78  # the polynomial 11EDC6F41, bits reversed


def _crc32(cpu: Cpu, op: Operation) -> None:
    to, source = op.operands
    crc = cpu.get(to) & 0xFFFFFFFF
    for byte in cpu.get(source).to_bytes(source.size, "little"):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_CRC32C if crc & 1 else 0)
    cpu.put(to, crc)


INSTRUCTIONS: dict[str, Instruction] = {
    "popcnt": _popcnt,
    "andn": _andn, "bextr": _bextr, "blsi": _blsi, "blsmsk": _blsmsk, "blsr": _blsr, "bzhi": _bzhi,
    "pdep": _pdep, "pext": _pext, "mulx": _mulx, "rorx": _rorx, "sarx": _shift, "shlx": _shift, "shrx": _shift,
    "adcx": _add_with(CF), "adox": _add_with(OF), "crc32": _crc32,
}  # fmt: skip
