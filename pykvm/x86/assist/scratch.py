"""A CPU to ask: one instruction at CPL3 in a VM of its own, where the CPU executes it, whatever it does at CPL0.

For what computes on registers and one memory operand: x87, MMX, SSE, AVX. Its result is exact because it is the CPU's own. The
instruction cannot reach anything but the scratch VM's 2 MiB, so that whatever bytes a guest has made up do no harm.
"""

from __future__ import annotations

from pykvm.abi import ffi
from pykvm.exits import Intr, IoOut
from pykvm.memory import GuestMemory
from pykvm.platform import DEBUG_EXIT, EXCEPTION_REPORT
from pykvm.system import System
from pykvm.x86.assist.cpu import STATUS, Declined
from pykvm.x86.assist.fpu import Fpu
from pykvm.x86.modes import UserMode
from pykvm.x86.regs import RFLAGS
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.abi import Struct

__all__ = ["CODE", "DATA", "Scratch"]

CODE, DATA = 0x100000, 0x120000
_END = bytes((0xE6, DEBUG_EXIT))  # out DEBUG_EXIT, al: exits from CPL3 and touches no register
_PATIENCE = 5.0  # seconds; it takes microseconds


class Scratch:
    """The VM, made by the first run(); close() it."""

    def __init__(self) -> None:
        self._made = False

    def _make(self) -> None:
        self.system = System()
        self.memory = GuestMemory.of_size("2M")
        self.vm = self.system.create_vm()
        self.vm.add_memory(self.memory)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(self.system.get_supported_cpuid().as_guest())
        UserMode().apply(self.vcpu, self.memory, CODE)
        self._xcr0 = self._all = CpuView(self.vcpu, self.memory).xcr0
        self._sregs = self.vcpu.get_sregs()
        self._fresh = self._made = True

    def run(self, code: bytes, regs: Struct, fpu: Fpu, data: bytes, xcr0: int = 0) -> tuple[int | None, bytes]:
        """Execute ``code``, one instruction that lies at CODE, with general registers, flags and FPU state of another vCPU, and ``data`` at
        DATA. (the vector of the exception it raised, what the data are now); registers, flags and FPU state are changed to what came out,
        after an exception the FPU state alone. ``xcr0``: what it is to find in XCR0, 0 for everything. Raises Declined where this host's
        KVM does not execute it."""
        try:
            if not self._made:
                self._make()
            self._set_xcr0(xcr0 or self._all)
            return self._run(code, regs, fpu, data)
        except BaseException:  # Ctrl-C too: what the VM was in the middle of is not for the next one
            self.close()
            raise

    def _run(self, code: bytes, regs: Struct, fpu: Fpu, data: bytes) -> tuple[int | None, bytes]:
        memory, vcpu = self.memory, self.vcpu
        memory.write(CODE, code + _END)
        memory.write(DATA, data)
        mine = regs.copy()
        mine.rip, mine.rflags = CODE, RFLAGS.FIXED | RFLAGS.IOPL | RFLAGS.IF | int(regs.rflags) & STATUS
        if not self._fresh:
            vcpu.set_sregs(self._sregs)
        vcpu.set_regs(mine)
        fpu.store(vcpu, always=True)
        vector = self._vector()
        self._fresh = vector is None
        fpu.load(vcpu)
        if vector is None:
            mine = vcpu.get_regs()
            mine.rip, mine.rflags = regs.rip, int(regs.rflags) & ~STATUS | int(mine.rflags) & STATUS
            ffi.buffer(regs.cdata)[:] = ffi.buffer(mine.cdata)[:]
        return vector, memory.read(DATA, len(data))

    def _set_xcr0(self, value: int) -> None:
        if value != self._xcr0:
            xcrs = self.vcpu.get_xcrs()
            xcrs.xcrs[0].value = value
            self.vcpu.set_xcrs(xcrs)
            self._xcr0 = value

    def _vector(self) -> int | None:
        exit = self._exit()
        if not isinstance(exit, IoOut) or exit.port not in (DEBUG_EXIT, EXCEPTION_REPORT):
            raise Declined(f"executed at CPL3 in a VM of its own, it came to {exit!r}")
        self.vcpu.kick()
        self.vcpu.run(_PATIENCE)  # KVM finishes the OUT, and does not go on into the guest
        return None if exit.port == DEBUG_EXIT else exit.value

    def _exit(self) -> object:
        while True:
            exit = self.vcpu.run(_PATIENCE)
            if not isinstance(exit, Intr) or exit.timed_out:
                return exit

    def close(self) -> None:
        """Close its fds; the next run() makes another."""
        self._made = False
        for name in ("vm", "memory", "system"):
            if hasattr(self, name):
                getattr(self, name).close()
