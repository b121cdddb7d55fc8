"""What this host's KVM does, found by doing it: tiny guests whose behaviour tells hosts apart. Each answer is asked for once.

Probed rather than assumed: the same kernel module behaves differently by CPU, by parameter and by mode.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

from pykvm import exits
from pykvm.abi import lib, new
from pykvm.errors import KvmError
from pykvm.memory import HUGE_PAGE, GuestMemory
from pykvm.platform import TSS_GPA
from pykvm.system import System
from pykvm.x86.modes import IO_BITMAP_SIZE, TSS_SIZE, LongMode, ProtectedMode, RealMode, UserMode
from pykvm.x86.paging import walk
from pykvm.x86.regs import AVAILABLE_TSS, BUSY_TSS, CR4, RFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pykvm.abi import Struct
    from pykvm.exits import Exit
    from pykvm.vcpu import VCPU
    from pykvm.x86.modes import Mode

__all__ = [
    "assist_works",
    "breakpoints",
    "cpl0_emulated",
    "cpl3_ports",
    "hypercall_returns",
    "interruptible_with_if_clear",
    "out_leaves_rip_past",
    "shadow_paging",
    "shutdown_keeps_registers",
    "single_step",
    "tr_reads_busy",
    "watchpoints",
]

_TIMEOUT = 0.2  # seconds; a probe that says nothing until then has its answer
_CODE = 0x100000
DR7_G0 = 2  # DR0 breaks on execution (SDM vol. 3 section 17.2.4)
_MODES: dict[str, type[Mode]] = {"real": RealMode, "protected": ProtectedMode, "long": LongMode, "user": UserMode}


@contextmanager
def _guest(code: bytes, mode: str, memory: str = "2M") -> Iterator[tuple[VCPU, GuestMemory, int]]:
    """A vCPU at the start of ``code``, the guest's memory, and where that start is."""
    at = 0x1000 if mode == "real" else _CODE
    with System() as system, GuestMemory.of_size(memory) as ram, system.create_vm() as vm:
        vm.add_memory(ram)
        ram.write(at, code)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid2(system.get_supported_cpuid().as_guest())
        _MODES[mode]().apply(vcpu, ram, at)
        yield vcpu, ram, at


def _exit_of(
    code: bytes,
    mode: str,
    debug: int | Struct = 0,
    timeout: float = _TIMEOUT,
    change: Callable[[VCPU, GuestMemory], None] | None = None,
) -> tuple[Exit, int]:
    """(first exit, RIP relative to the start) of a guest made of ``code``; ``change`` is made to it before it starts."""
    with _guest(code, mode) as (vcpu, ram, at):
        if debug:
            vcpu.set_guest_debug(debug)
        if change is not None:
            change(vcpu, ram)
        exit = vcpu.run(timeout)
        return exit, vcpu.get_regs().rip - at


@cache
def out_leaves_rip_past(mode: str) -> bool:
    """Whether an OUT exit leaves RIP behind the instruction in this mode ("real", "protected", "long" or "user")."""
    for timeout in (_TIMEOUT, 10 * _TIMEOUT, 100 * _TIMEOUT):  # it always exits, but a busy machine may be late
        exit, rip = _exit_of(b"\xe6\xf4\xf4", mode, timeout=timeout)  # out 0xf4, al; hlt
        if isinstance(exit, exits.IoOut):
            break
    return isinstance(exit, exits.IoOut) and rip == 2


@cache
def cpl0_emulated(mode: str = "long") -> bool:
    """Whether KVM's instruction emulator runs CPL0 code: it does not know POPCNT, which every CPU with VT-x or AMD-V has.

    ``mode``: "long", "protected" or "real", which KVM emulates in part on VT-x without unrestricted guest.
    """
    exit, _ = _exit_of(b"\xf3\x0f\xb8\xc0\xf4", mode)  # popcnt eax, eax; hlt
    return isinstance(exit, exits.InternalError)


@cache
def assist_works() -> bool:
    """Whether what KVM's emulator does not know is finished in user space: POPCNT and CVTSI2SD of MMIO (x86/assist/)."""
    from pykvm.errors import GuestCrash
    from pykvm.machine import Machine

    class Device:
        def read(self, offset: int, size: int) -> int:
            return 7

    code = bytes.fromhex("bb000010d0 f30fb803 f20f2a03 f20f2cd0 01d0 e6f4")  # popcnt eax, [rbx]; cvtsi2sd xmm0, [rbx]; cvttsd2si edx, xmm0
    with Machine(code, mode="long", memory="2M") as machine:  # add eax, edx; out 0xf4, al
        machine.add_device(Device(), gpa=0xD010_0000, length=4)
        try:
            return machine.run(100 * _TIMEOUT).exit_code == 10
        except GuestCrash:
            return False


@cache
def cpl3_ports(by: str) -> bool:
    """Whether CPL3 may use a port that only the I/O bitmap (``by`` "bitmap") or only IOPL ("iopl") grants."""
    exit, _ = _exit_of(b"\xe6\xf4\xeb\xfe", "user", change=only_iopl if by == "iopl" else only_bitmap)  # out 0xf4, al; jmp .
    return isinstance(exit, exits.IoOut) and exit.port == 0xF4


def only_iopl(vcpu: VCPU, ram: GuestMemory) -> None:
    """User mode without the ports that its I/O bitmap grants: IOPL is left."""
    ram.write(TSS_GPA + TSS_SIZE, b"\xff" * IO_BITMAP_SIZE)


def only_bitmap(vcpu: VCPU, ram: GuestMemory) -> None:
    """User mode without IOPL: the I/O bitmap is left."""
    regs = vcpu.get_regs()
    regs.rflags &= ~RFLAGS.IOPL
    vcpu.set_regs(regs)


@cache
def shadow_paging() -> bool:
    """Whether KVM keeps shadows of the guest's page tables (no EPT, no NPT): what the host writes there is not heard of, even when the TLB
    is flushed. A program reads through an entry of 2 MiB before and after the host has moved it."""
    at, code = 0x400000, b"\x8a\x04\x25\x00\x00\x40\x00\xe6\xf4\xeb\xf5"  # 1: mov al, [0x400000]; out 0xf4, al; jmp 1b
    with _guest(code, "user", "8M") as (vcpu, ram, _):
        ram.write_u8(at + HUGE_PAGE, 1)
        vcpu.run(100 * _TIMEOUT)
        sregs = vcpu.get_sregs()
        entry = walk(ram, at, cr0=sregs.cr0, cr3=sregs.cr3, cr4=sregs.cr4, efer=sregs.efer).entries[-1]
        ram.write_u64(entry.gpa, entry.value + HUGE_PAGE)
        for _ in range(2):  # a change of CR4.PGE flushes
            sregs.cr4 ^= CR4.PGE
            vcpu.set_sregs(sregs)
        vcpu.run(100 * _TIMEOUT)
        return bool(vcpu.get_regs().rax & 0xFF == 0)


@cache
def single_step(mode: str) -> bool:
    """Whether KVM_GUESTDBG_SINGLESTEP stops after one instruction in this mode."""
    try:
        exit, rip = _exit_of(b"\x90\x90\x90\xe6\xf4\xeb\xfe", mode, lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
    except KvmError:
        return False
    return isinstance(exit, exits.Debug) and rip == 1


@cache
def breakpoints(kind: str) -> bool:
    """Whether KVM_GUESTDBG_USE_SW_BP (``kind`` "software": INT3) or _USE_HW_BP ("hardware": DR0) stops a guest at CPL0."""
    debug = new("struct kvm_guest_debug")
    debug.control = lib.KVM_GUESTDBG_ENABLE | (lib.KVM_GUESTDBG_USE_SW_BP if kind == "software" else lib.KVM_GUESTDBG_USE_HW_BP)
    debug.cdata.arch.debugreg[0], debug.cdata.arch.debugreg[7] = _CODE + 1, DR7_G0 if kind == "hardware" else 0
    exit, rip = _exit_of(b"\x90\xcc" if kind == "software" else b"\x90\x90\xe6\xf4", "long", debug)  # nop; int3 or nop; out 0xf4, al
    return isinstance(exit, exits.Debug) and rip == 1


@cache
def watchpoints() -> bool:
    """Whether DR0 stops a guest at CPL0 that writes where it points."""
    debug = new("struct kvm_guest_debug")
    debug.control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
    debug.cdata.arch.debugreg[0], debug.cdata.arch.debugreg[7] = _CODE + 0x100, 0xD0000 | DR7_G0  # a write of 4 bytes
    exit, rip = _exit_of(b"\x89\x05\xfa\x00\x00\x00\xe6\xf4", "long", debug)  # mov [rip + 0xfa], eax; out 0xf4, al
    return isinstance(exit, exits.Debug) and rip == 6


@cache
def hypercall_returns() -> bool:
    """Whether an unknown hypercall (VMCALL on Intel, VMMCALL on AMD) comes back to the guest at CPL0, as on hardware."""
    exit, _ = _exit_of(b"\xb8\xff\x00\x00\x00\x0f\x01\xc1\xe6\xf4\xf4", "long")  # mov eax, 255; vmcall; out 0xf4, al; hlt
    return isinstance(exit, exits.IoOut)


@cache
def shutdown_keeps_registers() -> bool:
    """Whether the registers at a SHUTDOWN exit are those of the triple fault. AMD-V leaves them undefined, so KVM resets the vCPU there."""
    exit, rip = _exit_of(b"\x0f\x0b", "long")  # ud2
    return isinstance(exit, exits.Shutdown) and rip == 0


@cache
def interruptible_with_if_clear() -> bool:
    """Whether an interrupt of the host's ends a guest's run while the guest's RFLAGS.IF is clear, as the manuals say (SDM vol. 3,
    "External-interrupt exiting"). Where it does not (Bochs), such a guest that never exits hangs the whole host."""
    with System() as system, system.create_vm() as vm:
        ticks = vm.create_vcpu().get_tsc_khz() * 10  # 10 ms in the guest, against a time limit of 1 ms
    # mov rcx, ticks; rdtsc; shl rdx, 32; or rax, rdx; add rcx, rax; 1: rdtsc; shl rdx, 32; or rax, rdx; cmp rax, rcx; jb 1b; out 0xf4, al
    code = b"\x48\xb9" + ticks.to_bytes(8, "little") + bytes.fromhex("0f31 48c1e220 4809d0 4801c1 0f31 48c1e220 4809d0 4839c8 72f2 e6f4")
    # A busy machine may be late with the signal once, but not three times.
    return any(isinstance(_exit_of(code, "long", timeout=0.001)[0], exits.Intr) for _ in range(3))


@cache
def tr_reads_busy() -> bool:
    """Whether KVM calls the TSS in TR busy when it is not. AMD-V keeps TR as LTR has loaded it, from a descriptor that was available, and
    VMRUN only looks at its size (APM vol. 2 section 15.5.1). VT-x wants it busy, so KVM says that it is."""
    with System() as system, system.create_vm() as vm:
        vcpu = vm.create_vcpu()
        sregs = vcpu.get_sregs()
        sregs.tr.type = AVAILABLE_TSS
        vcpu.set_sregs(sregs)
        return bool(vcpu.get_sregs().tr.type == BUSY_TSS)
