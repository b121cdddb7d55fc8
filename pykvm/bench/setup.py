"""Machines for the kinds of ``bench exits``: what each needs of the host, and how its machine is made ready."""

from __future__ import annotations

from errno import EPROTO, errorcode

from pykvm.abi import ffi, lib, new
from pykvm.assemble import asm
from pykvm.bench.kinds import (
    BATCH,
    COMMAND,
    COUNT,
    FILTERED_MSR,
    GPA,
    IDT_GPA,
    PORT,
    SAMPLE_GPA,
    SAMPLES,
    STOP_PORT,
    TOUCH_GPA,
    TOUCH_STRIDE,
    TOUCHES,
    VECTOR,
    Program,
    bank,
)
from pykvm.bus import Native
from pykvm.errors import KvmError, PykvmError
from pykvm.exit_reason import ExitReason, reason_name
from pykvm.machine import Machine
from pykvm.platform import IDT_GPA as USER_IDT
from pykvm.units import PAGE_SIZE
from pykvm.x86.modes import CODE64, LongMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.bench.kinds import Kind
    from pykvm.system import System

__all__ = ["Bank", "Device", "Prepared", "why_not"]

TRIAL_SECONDS = 5.0
_GSI = 20
_STAR, _LSTAR, _SFMASK = 0xC0000081, 0xC0000082, 0xC0000084
_SYSRET_BASE = 0x20  # + 16: the user's CS, + 8: its SS, both with RPL 3 (SDM vol. 2, SYSRET)


def _probe(name: str) -> Callable[[], bool]:
    def ask() -> bool:
        from pykvm import probe

        answers: dict[str, Callable[[], bool]] = {
            "single step": lambda: probe.single_step("long"),
            "software breakpoints": lambda: probe.breakpoints("software"),
            "hardware breakpoints": lambda: probe.breakpoints("hardware"),
            "SHUTDOWN keeps registers": probe.shutdown_keeps_registers,
        }
        return answers[name]()

    return ask


# name: (is it there?, what to say when it is not); beside those of needs.py
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "single step": (_probe("single step"), "KVM_GUESTDBG_SINGLESTEP does not stop after one instruction here"),
    "software breakpoints": (_probe("software breakpoints"), "KVM_GUESTDBG_USE_SW_BP gives no DEBUG exit here"),
    "hardware breakpoints": (_probe("hardware breakpoints"), "KVM_GUESTDBG_USE_HW_BP gives no DEBUG exit here"),
    "SHUTDOWN keeps registers": (_probe("SHUTDOWN keeps registers"), "KVM resets the vCPU at SHUTDOWN here, so that it comes only once"),
}


def why_not(kind: Kind, system: System) -> str | None:
    """What this host lacks for ``kind``, or None."""
    from pykvm.needs import unmet

    for name in kind.needs:
        if name == "sync regs":
            if not system.check_extension("KVM_CAP_SYNC_REGS") & lib.KVM_SYNC_X86_REGS:
                return "KVM_CAP_SYNC_REGS does not bring the registers here"
        elif name in NEEDS:
            if not NEEDS[name][0]():
                return NEEDS[name][1]
        else:
            reason = unmet({"needs": name}, system)
            if reason is not None:
                return reason.removeprefix("it needs ").removeprefix(f"{name}: ")
    return None


class Device:
    """A device of the usual shape: it keeps what is written and gives it back."""

    def __init__(self) -> None:
        self.value = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value

    def read(self, offset: int, size: int) -> int:
        return self.value


class Bank:
    """The guests of all kinds, assembled once for all machines."""

    def __init__(self) -> None:
        self.code, self.programs = bank(asm)


class Prepared:
    """A machine that is ready to run one kind's guest."""

    def __init__(self, kind: Kind, guests: Bank, system: System) -> None:
        self.kind = kind
        self.program: Program = guests.programs[kind.name]
        self.ring: Any = ffi.NULL
        self.skip = 0
        self.slot: Any = None
        self._eventfds: list[Any] = []
        self.machine = Machine(
            guests.code,
            entry=self.program.entry,
            mode=kind.mode,
            memory="2M",
            loop="python",
            irqchip="kernel" if kind.irqchip == "kernel" else "none",
            cpus=kind.cpus,
            pin=kind.cpus > 1,
            system=system,
        )
        try:
            self.vcpu = self.machine.vcpu
            self.run_area = self.vcpu.native.run
            self._add_devices()
            if kind.handlers:
                self._write_idt()
            if kind.cpus > 1:
                self._start_second()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the machine, then what it signalled."""
        self.machine.close()
        for eventfd in self._eventfds:
            eventfd.close()

    # --- what is special about each -----------------------------------------------------------------------------------

    def _add_devices(self) -> None:
        machine, kind = self.machine, self.kind
        what, _, space = kind.device.partition(" ")
        options: dict[str, Any] = {"native": Native.constant(0)}
        at: dict[str, dict[str, Any]] = {"pio": {"port": PORT, "length": 4}, "mmio": {"gpa": GPA, "length": PAGE_SIZE}}
        if what in ("eventfd", "irqfd"):
            eventfd = self._eventfd()
            options["eventfd"] = eventfd
            at["pio"]["length"] = 1
            at["mmio"]["length"] = 4
        elif what == "coalesced":
            options["coalesced"] = True
            options["native"] = None  # the ring's writes reach the device through the bus
        device = Device()
        for name in ("pio", "mmio"):
            if not space or space == name:
                machine.add_device(device, **at[name], **({} if what == "irqfd" and name == "mmio" else options))
        if what == "coalesced":
            self.ring = self.vcpu.native.coalesced
        elif what == "irqfd":
            from pykvm.irq import Route, msi_message

            machine.vm.set_gsi_routing([Route.to_msi(_GSI, *msi_message(VECTOR))])
            machine.vm.irqfd(_GSI, eventfd.fd)
        elif what == "msr":
            machine.on_msr(FILTERED_MSR, lambda: device.value, lambda value: setattr(device, "value", value))
        elif what == "hypercall":
            machine.on_hypercall(lambda number, arguments: 0)
        elif what == "touch":
            self.slot = machine.add_memory(TOUCH_GPA, TOUCHES * TOUCH_STRIDE)
        elif what == "syscall":
            self.vcpu.set_msr(_STAR, CODE64 << 32 | _SYSRET_BASE << 48)
            self.vcpu.set_msr(_LSTAR, self.program.handlers[0x100])
            self.vcpu.set_msr(_SFMASK, 0)
        elif what in ("step", "int3", "dr0"):
            self._debug(what)

    def _eventfd(self) -> Any:
        from pykvm.irq import EventFd

        self._eventfds.append(EventFd())
        return self._eventfds[-1]

    def _debug(self, what: str) -> None:
        debug = new("struct kvm_guest_debug")
        flag = {"step": lib.KVM_GUESTDBG_SINGLESTEP, "int3": lib.KVM_GUESTDBG_USE_SW_BP, "dr0": lib.KVM_GUESTDBG_USE_HW_BP}[what]
        debug.control = lib.KVM_GUESTDBG_ENABLE | flag
        if what == "dr0":
            debug.cdata.arch.debugreg[0], debug.cdata.arch.debugreg[7] = self.program.body, 2
        self.vcpu.set_guest_debug(debug)
        if what != "step":
            self.skip = 1
            self.vcpu.want_sync_regs()

    def _write_idt(self) -> None:
        """Gates to the kind's handlers at IDT_GPA; in user mode, those of its minimal kernel for the rest."""
        memory, kind = self.machine.memory, self.kind
        idt = bytearray(256 * 16)
        if kind.mode == "user":
            idt[: 32 * 16] = memory.read(USER_IDT, 32 * 16)
        for vector, at in self.program.handlers.items():
            if vector < 256:
                gate = at & 0xFFFF | CODE64 << 16 | (0xE | 3 << 5 | 1 << 7) << 40 | (at >> 16 & 0xFFFF) << 48
                idt[16 * vector : 16 * vector + 16] = gate.to_bytes(8, "little") + (at >> 32).to_bytes(8, "little")
        memory.write(IDT_GPA, bytes(idt))
        for vcpu in self.machine.vcpus:
            sregs = vcpu.get_sregs()
            sregs.idt.base, sregs.idt.limit = IDT_GPA, len(idt) - 1
            vcpu.set_sregs(sregs)

    def _start_second(self) -> None:
        """The second vCPU starts in long mode with the others' IDT, and needs no INIT and SIPI."""
        second = self.machine.vcpus[1]
        LongMode().apply(second, self.machine.memory, self.program.ap, {"rsp": SAMPLE_GPA - 0x1000})
        sregs = second.get_sregs()
        sregs.idt.base, sregs.idt.limit = IDT_GPA, 256 * 16 - 1
        second.set_sregs(sregs)
        second.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)

    # --- whether it works ---------------------------------------------------------------------------------------------

    def trial(self) -> str | None:
        """Run it once, briefly: why it cannot be measured here, or None."""
        kind = self.kind
        if kind.limit or kind.reaches == "bare":
            return self._trial_in_c()
        self.cool()
        self.command(BATCH, 3)
        try:
            result = self.machine.run(TRIAL_SECONDS, explain=False)
        except PykvmError as error:
            return f"its guest crashes: {' '.join(str(error).splitlines()[0].split())}"
        if result.reason == "timeout":
            return f"its guest does not get through here: it was stopped after {TRIAL_SECONDS:g} seconds"
        return None if result.reason == "exit" and not result.exit_code else f"its guest ends as {result.reason}"

    def _trial_in_c(self) -> str | None:
        for command in (BATCH, SAMPLES) if self.kind.clocked else (BATCH,):
            self.command(command, 3)
            taken = self.c(3)
            if taken == -EPROTO:
                came = reason_name(self.run_area.exit_reason)
                return f"KVM gives {came} here, not {self.kind.reason}, the first time or the next"
            if taken < 0:
                return f"KVM_RUN gives {errorcode.get(-taken, -taken)}"
        return None

    def command(self, what: int, count: int) -> None:
        """What the guest does next; a kind with a limit goes on as long as it is let."""
        memory = self.machine.memory
        memory.write_u32(COMMAND, what)
        memory.write_u32(COUNT, 0xFFFFFFFF if self.kind.limit else count)

    def cool(self) -> None:
        """For the first-touch kinds: take away what the last round has touched."""
        if self.slot is not None:
            error = lib.pykvm_bench_cool(self.slot.hva, self.slot.size, TOUCH_STRIDE if self.kind.device == "touch backed" else 0)
            if error:
                raise KvmError("madvise", -error, "to take memory away from a slot")

    def c(self, count: int) -> int:
        """One command through plain C. TSC units, or -errno."""
        native, kind = self.vcpu.native, self.kind
        if kind.reaches == "loops" and not kind.device:
            return int(lib.pykvm_bench_exits(native.fd, native.run, STOP_PORT))
        if kind.device == "window":
            native.run.request_interrupt_window = 1
        only = ExitReason[kind.reason] if kind.limit else 0
        taken = int(lib.pykvm_bench_traps(native.fd, native.run, STOP_PORT, count if kind.limit else 0, only, self.skip, self.ring))
        if kind.device == "window":
            native.run.request_interrupt_window = 0
        return taken
