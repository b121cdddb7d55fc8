"""The target's description (target.xml) and the order of registers that follows from it.

Features and names are gdb's own (GDB manual, section G.5.7 "i386 Features"), with one more for control registers. 64-bit for guests that
end up in long mode, else 32-bit: gdb wants the architecture of the image.
"""

from __future__ import annotations

from pykvm.debug.registers import XState, write_register
from pykvm.errors import ConfigError, KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.machine import Machine
    from pykvm.vcpu import VCPU

__all__ = ["Register", "Target"]

_FLAGS = (
    ("CF", 0), ("PF", 2), ("AF", 4), ("ZF", 6), ("SF", 7), ("TF", 8), ("IF", 9), ("DF", 10), ("OF", 11), ("NT", 14), ("RF", 16), ("VM", 17),
    ("AC", 18), ("VIF", 19), ("VIP", 20), ("ID", 21),
)  # fmt: skip
_CONTROL_BITS = {
    "cr0": (("PE", 0), ("MP", 1), ("EM", 2), ("TS", 3), ("ET", 4), ("NE", 5), ("WP", 16), ("AM", 18), ("NW", 29), ("CD", 30), ("PG", 31)),
    "cr4": (
        ("VME", 0), ("PVI", 1), ("TSD", 2), ("DE", 3), ("PSE", 4), ("PAE", 5), ("MCE", 6), ("PGE", 7), ("PCE", 8), ("OSFXSR", 9),
        ("OSXMMEXCPT", 10), ("UMIP", 11), ("LA57", 12), ("VMXE", 13), ("SMXE", 14), ("FSGSBASE", 16), ("PCIDE", 17), ("OSXSAVE", 18),
        ("SMEP", 20), ("SMAP", 21), ("PKE", 22),
    ),
    "efer": (("SCE", 0), ("LME", 8), ("LMA", 10), ("NXE", 11), ("SVME", 12)),
}  # fmt: skip
_FPU = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")


class Register:
    """One register of the description: gdb's ``name``, its ``bits`` there, and what it is ``of`` (registers.py)."""

    __slots__ = ("bits", "group", "name", "of", "type")

    def __init__(self, name: str, bits: int, type: str = "int", group: str = "", of: str = "") -> None:
        self.name, self.bits, self.type, self.group, self.of = name, bits, type, group, of or name

    def xml(self) -> str:
        """Its element."""
        group = f' group="{self.group}"' if self.group else ""
        return f'<reg name="{self.name}" bitsize="{self.bits}" type="{self.type}"{group}/>'


class Target:
    """The description of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        info = machine.info
        self.long = info.format.startswith("ELF64") or (not info.format.startswith("ELF") and info.mode in ("long", "user"))
        self.features: list[tuple[str, str, list[Register]]] = [
            ("org.gnu.gdb.i386.core", _flags("i386_eflags", 4, _FLAGS), self._core()),
            ("org.gnu.gdb.i386.sse", _SSE_TYPES, self._sse()),
        ]
        if self.long:
            bases = [Register(f"{name}_base", 64, "int64") for name in ("fs", "gs")]
            self.features.append(("org.gnu.gdb.i386.segments", "", bases))
        if self._has_avx():
            self.features.append(
                (
                    "org.gnu.gdb.i386.avx",
                    '<vector id="v16i8_h" type="uint8" count="16"/>',
                    [Register(f"ymm{n}h", 128, "uint128") for n in range(16 if self.long else 8)],
                )
            )
        width = 64 if self.long else 32
        control = [
            Register(name, width, f"i386_{name}" if name in _CONTROL_BITS else f"int{width}", "system")
            for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
        ]
        types = "".join(_flags(f"i386_{name}", width // 8, bits) for name, bits in _CONTROL_BITS.items())
        self.features.append(("org.pykvm.control", types, control))
        self.registers = [register for _, _, registers in self.features for register in registers]

    def _core(self) -> list[Register]:
        if self.long:
            names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
            found = [Register(name, 64, "data_ptr" if name in ("rbp", "rsp") else "int64") for name in names]
            found.append(Register("rip", 64, "code_ptr"))
        else:
            names = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
            found = [Register(name, 32, "data_ptr" if name in ("ebp", "esp") else "int32", of="r" + name[1:]) for name in names]
            found.append(Register("eip", 32, "code_ptr", of="rip"))
        found.append(Register("eflags", 32, "i386_eflags"))
        found += [Register(name, 32, "int32") for name in ("cs", "ss", "ds", "es", "fs", "gs")]
        found += [Register(f"st{n}", 80, "i387_ext") for n in range(8)]
        return found + [Register(name, 32, "int", "float") for name in _FPU]

    def _sse(self) -> list[Register]:
        found = [Register(f"xmm{n}", 128, "vec128") for n in range(16 if self.long else 8)]
        return [*found, Register("mxcsr", 32, "i386_mxcsr", "vector")]

    def _has_avx(self) -> bool:
        if not self.machine.system.check_extension("KVM_CAP_XSAVE"):
            return False
        leaf = self.machine.system.get_supported_cpuid().find(0xD)
        return leaf is not None and bool(leaf.eax & 4)

    def xml(self) -> bytes:
        """target.xml."""
        architecture = "i386:x86-64" if self.long else "i386"
        lines = ['<?xml version="1.0"?>', '<!DOCTYPE target SYSTEM "gdb-target.dtd">', '<target version="1.0">']
        lines.append(f"<architecture>{architecture}</architecture>")
        for name, types, registers in self.features:
            lines.append(f'<feature name="{name}">{types}')
            lines += [register.xml() for register in registers]
            lines.append("</feature>")
        return "\n".join([*lines, "</target>"]).encode()

    def read(self, vcpu: VCPU) -> list[bytes]:
        """All registers, each as gdb has it: little endian, of its size. What this host's KVM does not give is zeros."""
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        try:
            xstate: XState | None = XState(vcpu)
        except KvmError:
            xstate = None
        values = []
        for register in self.registers:
            of = register.of
            if of in ("cs", "ss", "ds", "es", "fs", "gs"):
                value = int(getattr(sregs, of).selector)
            elif of in ("fs_base", "gs_base"):
                value = int(getattr(sregs, of[:2]).base)
            elif of == "eflags":
                value = int(regs.rflags)
            elif register.group == "system":
                value = int(getattr(sregs, of))
            elif of.startswith(("st", "xmm", "ymm", "mxcsr")) or of in _FPU:
                value = 0 if xstate is None else xstate.read(of)
            else:
                value = int(getattr(regs, of))
            values.append((value & (1 << register.bits) - 1).to_bytes(register.bits // 8, "little"))
        return values

    def write(self, vcpu: VCPU, number: int, data: bytes) -> None:
        """Set one. Raises ConfigError (no such register, a wrong length, a value that cannot be) and KvmError."""
        if not 0 <= number < len(self.registers):
            raise ConfigError(f"there is no register {number}")
        register = self.registers[number]
        if 8 * len(data) != register.bits:
            raise ConfigError(f"{register.name} has {register.bits} bits")
        write_register(vcpu, register.of, int.from_bytes(data, "little"))

    def write_all(self, vcpu: VCPU, data: bytes) -> None:
        """The G packet: those that differ are set."""
        at = 0
        for number, before in enumerate(self.read(vcpu)):
            new = data[at : at + len(before)]
            at += len(before)
            if len(new) == len(before) and new != before:
                self.write(vcpu, number, new)


_SSE_TYPES = """
<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/>
<vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/>
<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/><field name="v16_int8" type="v16i8"/>
<field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/>
<field name="uint128" type="uint128"/></union>
<flags id="i386_mxcsr" size="4"><field name="IE" start="0" end="0"/><field name="DE" start="1" end="1"/><field name="ZE" start="2" end="2"/>
<field name="OE" start="3" end="3"/><field name="UE" start="4" end="4"/><field name="PE" start="5" end="5"/>
<field name="DAZ" start="6" end="6"/><field name="IM" start="7" end="7"/><field name="DM" start="8" end="8"/>
<field name="ZM" start="9" end="9"/><field name="OM" start="10" end="10"/><field name="UM" start="11" end="11"/>
<field name="PM" start="12" end="12"/><field name="FZ" start="15" end="15"/></flags>"""


def _flags(id: str, size: int, bits: tuple[tuple[str, int], ...]) -> str:
    fields = "".join(f'<field name="{name}" start="{bit}" end="{bit}"/>' for name, bit in bits)
    return f'<flags id="{id}" size="{size}">{fields}</flags>'
