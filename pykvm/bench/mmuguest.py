"""Guests that run a given piece of code over a given piece of host memory, and the process beside them: what `bench mmu` is made of.

A guest does a batch of operations, writes to the stop port, and begins anew. Its program at CPL3 calls the very bytes that the process
calls; its kernel, where the workload is one of CPL0, has page tables of its own.
"""

from __future__ import annotations

import os
import random
from contextlib import ExitStack, suppress
from errno import EINTR
from mmap import MADV_NOHUGEPAGE
from struct import pack_into

from pykvm.abi import ffi, lib
from pykvm.assemble import asm
from pykvm.errors import ConfigError, KvmError
from pykvm.kvmstats import Counters
from pykvm.memory import GuestMemory
from pykvm.platform import LOAD_GPA
from pykvm.units import GIB, MIB, PAGE_SIZE, format_size
from pykvm.x86.modes import LongMode, UserMode
from pykvm.x86.paging import PageTableBuilder, walk
from pykvm.x86.regs import CR0, CR4, EFER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

    from pykvm.system import System
    from pykvm.x86.modes import Mode

__all__ = ["Function", "Guest", "Kernel", "Ram", "fill_chain", "kernel_tables", "smaps_field", "user_guest"]

STOP_PORT = 0xF4
HUGE = 2 * MIB
FUNCTION_GPA, RESULT_GPA, STACK_GPA = LOAD_GPA + 0x200, 0x180000, 0x1FF000
TABLES_GPA = 2 * MIB  # page tables, and what else only the guest's kernel sees
DATA_GPA = GIB
WINDOW = 0x5000000000  # PML4[0], PDPT[320]: a page table of its own
COUNTERS = ("exits", "pf_taken", "pf_fixed", "pf_emulate", "tlb_flush", "invlpg", "insn_emulation")
# System V functions of (RDI, RSI, RDX) that give RAX: the guest's program and the process run these very bytes.
FUNCTIONS = {
    "chase": "xor eax, eax; 1: mov rax, [rdi + rax]; dec rsi; jnz 1b; ret",
    "random": """
            mov eax, 1
            xor r8d, r8d
            movabs r9, 6364136223846793005
            movabs r10, 1442695040888963407
        1:  imul rax, r9
            add rax, r10
            mov rcx, rax
            shr rcx, 20
            and rcx, rdx
            add r8, [rdi + rcx]
            dec rsi
            jnz 1b
            mov rax, r8
            ret
    """,
    "first_touch": "xor eax, eax; 1: mov byte ptr [rdi], 1; add rdi, 4096; dec rsi; jnz 1b; ret",
}


class Ram:
    """Host memory at a multiple of 2 MiB, used by guests and by the process. ``huge``: 2 MiB pages, from hugetlb or else transparent."""

    def __init__(self, size: int, huge: bool) -> None:
        self.size, self.kind = size, 2 if huge else 0
        self.hva = lib.pykvm_bench_map(size, self.kind)
        if huge and self.hva < 0:
            self.kind = 1
            self.hva = lib.pykvm_bench_map(size, self.kind)
        if self.hva < 0:
            raise ConfigError(f"the host gives no {format_size(size)} ({os.strerror(-self.hva)}): use a smaller --size")
        self.bytes = ffi.buffer(ffi.cast("char *", self.hva), size)

    def discard(self) -> None:
        """Give the pages back; guests that have them mapped lose them too."""
        error = lib.pykvm_bench_discard(self.hva, self.size)
        if error:
            raise ConfigError(f"madvise: {os.strerror(-error)}")

    def populate(self) -> None:
        """Have the host find every page."""
        for offset in range(0, self.size, PAGE_SIZE):
            self.bytes[offset] = b"\1"

    def huge_share(self) -> float:
        """The part that 2 MiB pages really back, of what has been touched."""
        if self.kind == 2:
            return 1.0
        return smaps_field(self.hva, "AnonHugePages") / max(1, smaps_field(self.hva, "Anonymous"))

    def describe(self) -> str:
        """What backs it."""
        if self.kind == 0:
            return "4K"
        return "2M, hugetlb" if self.kind == 2 else f"2M, transparent ({self.huge_share():.0%})"

    def close(self) -> None:
        """Unmap it: no guest may have it any more."""
        if self.hva > 0:
            del self.bytes
            lib.pykvm_bench_unmap(self.hva, self.size)
            self.hva = 0

    def __enter__(self) -> Ram:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def smaps_field(hva: int, field: str) -> int:
    """Bytes that /proc/self/smaps names for the mapping that starts at ``hva``; 0 where it says nothing."""
    try:
        with open("/proc/self/smaps") as file:
            inside = False
            for line in file:
                head = line.split(None, 1)[0]
                if not head.endswith(":"):
                    inside = int(head.partition("-")[0], 16) == hva
                elif inside and head == f"{field}:":
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class _User(UserMode):
    """User mode that also maps ``size`` bytes at DATA_GPA with pages of ``page`` bytes, and no devices."""

    def __init__(self, page: int, size: int) -> None:
        super().__init__()
        self.page, self.size = page, size

    def _map(self, memory: GuestMemory) -> int:
        builder = PageTableBuilder(memory, TABLES_GPA, TABLES_GPA + _table_room(self.size))
        self._map_ram(builder, 0, TABLES_GPA)
        builder.map(DATA_GPA, DATA_GPA, self.size, page_size=self.page, user=True)
        return builder.cr3


def _small_pages(memory: GuestMemory) -> None:
    """Keep transparent 2 MiB pages away: the code and the tables would get them or not by where the mapping happens to lie."""
    for slot in memory.slots:
        with suppress(OSError):  # a kernel without transparent huge pages
            slot.map.madvise(MADV_NOHUGEPAGE)


def _table_room(size: int) -> int:
    """Room for the tables of ``size`` bytes in 4 KiB pages, and some more, in whole 2 MiB."""
    return -(-(size // HUGE + 16) * PAGE_SIZE // HUGE) * HUGE


class Kernel(LongMode):
    """Long mode with tables that are there already."""

    def __init__(self, cr3: int) -> None:
        super().__init__()
        self.cr3 = cr3

    def _map(self, memory: GuestMemory) -> int:
        return self.cr3


def kernel_tables(memory: GuestMemory, base: int, gpa: int, pages: int) -> tuple[int, int]:
    """(CR3, gpa of the window's page table): low RAM mapped to itself, and ``pages`` at WINDOW to ``gpa``."""
    builder = PageTableBuilder(memory, base, base + 16 * PAGE_SIZE)
    builder.map(0, 0, memory.slots[0].size, page_size=HUGE)
    builder.map(WINDOW, gpa, pages * PAGE_SIZE, page_size=PAGE_SIZE)
    found = walk(memory, WINDOW, cr0=CR0.PG | CR0.PE, cr3=builder.cr3, cr4=CR4.PAE, efer=EFER.LMA | EFER.LME)
    return builder.cr3, found.entries[-1].gpa


class Guest:
    """A vCPU whose guest does ``operations`` operations and writes to the stop port, over and over. ``code`` lies at LOAD_GPA."""

    def __init__(self, system: System, memory: GuestMemory, ram: Ram, mode: Mode, code: bytes, operations: int) -> None:
        self.operations, self.memory, self.ram = operations, memory, ram
        self._used: dict[str, int] = {}
        self._calls = -1  # the first warms up, and is not counted
        with ExitStack() as stack:
            stack.callback(memory.close)
            _small_pages(memory)
            self.vm = stack.enter_context(system.create_vm())
            self.vm.add_memory(memory)
            self._slot(ram.size)
            memory.write(LOAD_GPA, code)
            self.vcpu = self.vm.create_vcpu()
            self.vcpu.set_cpuid2(system.get_supported_cpuid().as_guest())
            mode.apply(self.vcpu, memory, LOAD_GPA, {"rsp": STACK_GPA})
            self._counters = Counters(self.vcpu, COUNTERS)
            stack.callback(self._counters.close)
            self._pages = Counters(self.vm, ("pages_4k", "pages_2m", "pages_1g"))
            stack.callback(self._pages.close)
            self._stack = stack.pop_all()

    def _slot(self, size: int) -> None:
        self.vm.set_user_memory_region(1, 0, DATA_GPA, size, self.ram.hva)

    def forget(self) -> None:
        """Have KVM forget every mapping of the data, and keep the host's."""
        self._slot(0)
        self._slot(self.ram.size)

    def run(self) -> float:
        """One batch: TSC units an operation."""
        native, before = self.vcpu.native, self._counters.read()
        start = lib.pykvm_rdtsc()
        taken = lib.pykvm_bench_exits(native.fd, native.run, STOP_PORT)
        while taken == -EINTR:  # a signal: its handler, here, may raise; else the guest goes on from where it was
            taken = lib.pykvm_bench_exits(native.fd, native.run, STOP_PORT)
            if taken >= 0:
                taken = lib.pykvm_rdtsc() - start
        if taken < 0:
            raise KvmError("KVM_RUN", -taken, f"exit reason {native.run.exit_reason} in the guest of bench mmu")
        self._calls += 1
        if self._calls:
            for name, value in self._counters.read().items():
                self._used[name] = self._used.get(name, 0) + value - before[name]
        return float(taken) / self.operations

    def per_op(self) -> dict[str, float]:
        """KVM's counters an operation, without the exit that ends a batch; empty where KVM has none."""
        done = max(1, self._calls) * self.operations
        return {name: max(0, n - (self._calls if name == "exits" else 0)) / done for name, n in self._used.items()}

    def mapped(self) -> dict[str, int]:
        """Entries in KVM's tables by page size, now."""
        return self._pages.read()

    def close(self) -> None:
        """Everything but the data."""
        self._stack.close()


class Function:
    """Machine code in a page of this process that may be executed and not written."""

    def __init__(self, code: bytes) -> None:
        self.at = lib.pykvm_bench_code(code, len(code))
        if self.at < 0:
            raise ConfigError(f"this process may not make memory executable ({os.strerror(-self.at)}): is there a security policy?")
        self._result = ffi.new("uint64_t *")

    def __call__(self, a: int, b: int, c: int = 0) -> int:
        """TSC units that one call took; its result is in ``result``."""
        return int(lib.pykvm_bench_call(self.at, a, b, c, self._result))

    @property
    def result(self) -> int:
        """RAX of the last call."""
        return int(self._result[0])

    def close(self) -> None:
        """Unmap it."""
        lib.pykvm_bench_forget_code(self.at)

    def __enter__(self) -> Function:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _program(name: str, count: int, mask: int = 0) -> bytes:
    """A CPL3 program that calls the function over and over."""
    around = asm(
        f"again: mov edi, {DATA_GPA}; mov esi, {count}; mov edx, {mask}; mov eax, {FUNCTION_GPA}; call rax; "
        f"mov [{RESULT_GPA}], rax; out {STOP_PORT}, al; jmp again",
        org=LOAD_GPA,
    )
    return around.ljust(FUNCTION_GPA - LOAD_GPA, b"\xcc") + asm(FUNCTIONS[name], org=FUNCTION_GPA)


def user_guest(system: System, name: str, ram: Ram, page: int, operations: int, mask: int = 0) -> Guest:
    memory = GuestMemory.of_size(TABLES_GPA + _table_room(ram.size))
    return Guest(system, memory, ram, _User(page, ram.size), _program(name, operations, mask), operations)


def fill_chain(ram: Any, size: int) -> None:
    """A random cycle through all 4 KiB pages of a buffer: each node, on some cache line of its page, holds the next one's offset."""
    chance = random.Random(size)
    pages = list(range(size // PAGE_SIZE))
    chance.shuffle(pages)
    pages.remove(0)  # where it begins
    nodes = [0, *(PAGE_SIZE * page + 64 * chance.randrange(64) for page in pages)]
    for node, after in zip(nodes, [*nodes[1:], 0], strict=True):
        pack_into("<Q", ram, node, after)
