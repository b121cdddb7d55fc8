"""x87, MMX, SSE and AVX: moves and arithmetic on registers and one memory operand, executed by the CPU itself (scratch.py).

Here is what depends on the guest: whether it has these instructions switched on, its memory, and its exceptions (SDM vol. 3 sections
2.5, 13.1; vol. 1 sections 8.1.8, 11.5).
"""

from __future__ import annotations

from pykvm.x86.assist.cpu import GP, NM, UD, Cpu, Declined, Fault
from pykvm.x86.assist.relocate import Encoding
from pykvm.x86.assist.scratch import CODE, DATA
from pykvm.x86.regs import CR0, CR4

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.x86.assist.finish import Instruction
    from pykvm.x86.operation import Access, Operation

__all__ = ["INSTRUCTIONS", "compute", "is_computing", "memory_size", "raise_in"]

MF, XM = 16, 19
_MEM = 2 + 1  # capstone's X86_OP_MEM
_ENVIRONMENT = {"fnstenv": 28, "fldenv": 28, "fnsave": 108, "frstor": 108}  # in 32- and 64-bit code
_SIZES = {**_ENVIRONMENT, "fbld": 10, "fbstp": 10, "comisd": 8}  # where capstone says something else, or nothing
_X87_STORES = ("fst", "fist", "fbstp", "fnst", "fnsave", "fsave")
_LOADS_FIRST = ("ldmxcsr", "vldmxcsr")

# Opcodes that take registers and at most one memory operand of a fixed place, by map. Others of these maps: masked moves and gathers (which
# touch only some elements), loads of shared state, and what bits.py or system.py knows.
_LEGACY: dict[int, frozenset[int]] = {
    1: frozenset(
        (*range(0x10, 0x18), *range(0x28, 0x30), *range(0x50, 0x78), 0x7C, 0x7D, 0x7E, 0x7F, 0xC2, 0xC4, 0xC5, 0xC6, *range(0xD0, 0xFF))
    )
    - {0xF7},
    2: frozenset((*range(0x00, 0x0C), 0x10, 0x14, 0x15, 0x17, *range(0x1C, 0x1F), *range(0x20, 0x26), *range(0x28, 0x2C)))
    | frozenset((*range(0x30, 0x42), *range(0xC8, 0xD0), *range(0xDB, 0xE0))),
    3: frozenset((*range(0x08, 0x18), *range(0x20, 0x23), *range(0x40, 0x43), 0x44, *range(0x60, 0x64), 0xCC, 0xCE, 0xCF, 0xDF)),
}
_NOT_VEX: dict[int, frozenset[int]] = {
    1: frozenset((0x90, 0x91, 0x92, 0x93, 0x98, 0x99, 0xF7, *range(0x41, 0x4C))),  # mask registers
    2: frozenset((*range(0x2C, 0x30), 0x8C, 0x8E, *range(0x90, 0x94), *range(0xF0, 0x100), *range(0x48, 0x50))),
    3: frozenset((0xF0, *range(0x30, 0x34))),
}


def is_computing(encoding: Encoding) -> bool:
    """Whether it is one of those that are done here."""
    if encoding.vex:
        if encoding.map == 1 and encoding.opcode == 0xAE:
            return encoding.is_memory and encoding.modrm is not None and encoding.modrm >> 3 & 7 in (2, 3)  # VLDMXCSR, VSTMXCSR
        return encoding.map in _NOT_VEX and encoding.opcode not in _NOT_VEX[encoding.map]
    if encoding.map == 0:
        return 0xD8 <= encoding.opcode <= 0xDF
    if encoding.map == 1 and encoding.opcode == 0xAE:
        return not encoding.prefixes and encoding.is_memory and encoding.modrm is not None and encoding.modrm >> 3 & 7 in (2, 3)
    return encoding.opcode in _LEGACY[encoding.map]


def compute(cpu: Cpu, op: Operation, encoding: Encoding, wide: Operation) -> None:
    """Carry one out that is_computing(). ``wide``: the same as the 64-bit code that it is executed as, and which alone tells its operands
    (in 16-bit code capstone takes the prefix 66 of SSE for one of operand size). Raises Fault and Declined."""
    x87 = not encoding.vex and encoding.map == 0
    _check_enabled(cpu, wide, encoding, x87)
    if cpu.bits != 64 and encoding.w and any(name[0] in "er" for name in wide.names):
        raise Declined("with VEX.W it would mean a wider register in 64-bit code, which it is to be executed as")
    data, access, stores = b"", None, False
    if encoding.is_memory:
        operand = next(o for o in op.operands if o.type == _MEM)
        access = _access(cpu, op, operand, wide)
        stores = _stores(wide, x87)
        align = wide.alignment(access.size)
        if stores:
            cpu.probe_write(access, align)
            data = bytes(access.size)
            if x87 and not cpu.fpu.all_masked:
                raise Declined("an x87 store with unmasked exceptions may store nothing")
        else:
            data = cpu.load(access, align)
            if wide.mnemonic in _LOADS_FIRST and int.from_bytes(data, "little") & ~cpu.fpu.mxcsr_mask:
                raise Fault(GP, cpu.code())
    vector, data = cpu.scratch.run(wide.bytes, cpu.regs, cpu.fpu, data)
    if vector is not None:
        raise_in(cpu, vector)
    if x87:
        cpu.fpu.move_pointers((CODE, int(cpu.regs.rip)), (DATA, 0 if access is None else access.offset))
    if stores and access is not None:
        cpu.store(access, data)


def _wait(cpu: Cpu, op: Operation) -> None:
    """FWAIT: a pending x87 exception is raised here (SDM vol. 2 at WAIT)."""
    both = CR0.MP | CR0.TS
    if cpu.sregs.cr0 & both == both:
        raise Fault(NM)
    if cpu.fpu.pending:
        raise_in(cpu, MF)


def _check_enabled(cpu: Cpu, op: Operation, encoding: Encoding, x87: bool) -> None:
    cr0, cr4 = cpu.sregs.cr0, cpu.sregs.cr4
    mmx = (
        not encoding.vex
        and not x87
        and (op.mnemonic == "emms" or (any(n.startswith("mm") for n in op.names) and "xmm" not in str(op.names)))
    )
    if x87:
        if cr0 & CR0.EM:
            raise Fault(NM)
    elif encoding.vex:
        if cpu.mode == "real" or not cr4 & CR4.OSXSAVE or cpu.view.xcr0 & 6 != 6:
            raise Fault(UD)
    elif cr0 & CR0.EM or (not mmx and not cr4 & CR4.OSFXSR):
        raise Fault(UD)
    if cr0 & CR0.TS:
        raise Fault(NM)


def _access(cpu: Cpu, op: Operation, operand: Any, wide: Operation) -> Access:
    if wide.mnemonic in _ENVIRONMENT and (cpu.bits == 16 or 0x66 in op.prefixes or cpu.mode == "real"):
        raise Declined("it has the x87 environment in the format of 16-bit code or real mode")
    access = op.address(operand)
    access.size = memory_size(wide)
    return access


def memory_size(op: Operation) -> int:
    """Bytes of the memory operand of 64-bit code."""
    return _SIZES.get(op.mnemonic) or next(int(operand.size) for operand in op.operands if operand.type == _MEM)


def _stores(op: Operation, x87: bool) -> bool:
    if x87:
        return op.mnemonic.startswith(_X87_STORES)
    return bool(op.operands[0].type == _MEM and op.mnemonic not in _LOADS_FIRST)


def raise_in(cpu: Cpu, vector: int) -> None:
    """The guest gets the exception that the scratch VM has got."""
    if vector == MF and not cpu.sregs.cr0 & CR0.NE:
        raise Declined("an x87 exception is to be reported through FERR#, as CR0.NE is clear")
    if vector == XM and not cpu.sregs.cr4 & CR4.OSXMMEXCPT:
        raise Fault(UD)
    if vector == XM:
        cpu.keep_fpu_on_fault()  # MXCSR says what happened
    if vector in (MF, XM):
        raise Fault(vector)
    raise Declined(f"executed at CPL3 in a VM of its own, it raises exception {vector}")


INSTRUCTIONS: dict[str, Instruction] = {"wait": _wait, "fwait": _wait}
