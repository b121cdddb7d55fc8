"""The CPUID tables that go through KVM: what the host can give, what a vCPU was given (api.rst 4.20, 4.46)."""

from __future__ import annotations

from pykvm.abi import ffi, flexible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

__all__ = ["SIGNIFICANT_INDEX", "Cpuid", "CpuidEntry"]

_WORDS = ffi.sizeof("struct kvm_cpuid_entry2") // 4  # 32-bit numbers of an entry: seven, and padding
_PADDING = (0,) * (_WORDS - 7)
SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the leaf depends on ECX


class CpuidEntry:
    """One leaf: ``function`` (EAX in), ``index`` (ECX in), and the four registers out."""

    __slots__ = ("eax", "ebx", "ecx", "edx", "flags", "function", "index")

    def __init__(self, function: int, index: int, flags: int, eax: int, ebx: int, ecx: int, edx: int) -> None:
        self.function, self.index, self.flags = function, index, flags
        self.eax, self.ebx, self.ecx, self.edx = eax, ebx, ecx, edx

    def __repr__(self) -> str:
        return (
            f"<CPUID {self.function:#x}.{self.index}: eax={self.eax:#010x} ebx={self.ebx:#010x} ecx={self.ecx:#010x} edx={self.edx:#010x}>"
        )


class Cpuid:
    """A table as the kernel made it; it goes back into KVM_SET_CPUID2 as it is, and is decoded only when somebody looks."""

    __slots__ = ("cdata",)

    def __init__(self, cdata: Any) -> None:
        self.cdata = cdata

    @classmethod
    def of(cls, entries: Iterable[CpuidEntry]) -> Cpuid:
        """A table of these entries, for KVM_SET_CPUID2."""
        return cls.of_rows([[e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx] for e in entries])

    @classmethod
    def of_rows(cls, rows: list[list[int]]) -> Cpuid:
        """A table of what rows() gives. Raises OverflowError for what is no 32-bit number."""
        table = flexible("struct kvm_cpuid2", "entries", len(rows))
        table.nent = len(rows)
        words = ffi.new("uint32_t[]", [word for row in rows for word in (*row, *_PADDING)])
        ffi.memmove(table.entries, words, ffi.sizeof(words))
        return cls(table)

    def rows(self) -> list[list[int]]:
        """Function, index, flags, EAX, EBX, ECX and EDX of each entry; many times as fast as one object for each."""
        words = ffi.unpack(ffi.cast("uint32_t *", self.cdata.entries), self.cdata.nent * _WORDS)
        return [words[at : at + 7] for at in range(0, len(words), _WORDS)]

    def as_guest(self) -> Cpuid:
        """A copy for a guest: with leaf 1 ECX bit 31, "a hypervisor is present", which KVM leaves to user space to set."""
        table = ffi.new("struct kvm_cpuid2 *", {"entries": self.cdata.nent})
        ffi.memmove(table, self.cdata, ffi.sizeof("struct kvm_cpuid2") + self.cdata.nent * ffi.sizeof("struct kvm_cpuid_entry2"))
        for i in range(table.nent):
            if table.entries[i].function == 1:
                table.entries[i].ecx |= 1 << 31
                break
        return Cpuid(table)

    def __iter__(self) -> Iterator[CpuidEntry]:
        for row in self.rows():
            yield CpuidEntry(*row)

    def __len__(self) -> int:
        return int(self.cdata.nent)

    def find(self, function: int, index: int = 0) -> CpuidEntry | None:
        """The entry of a leaf, or None. ``index`` counts only for leaves that depend on ECX."""
        return next((e for e in self if e.function == function and (e.index == index or not e.flags & SIGNIFICANT_INDEX)), None)

    def __repr__(self) -> str:
        return f"<Cpuid {len(self)} entries>"
