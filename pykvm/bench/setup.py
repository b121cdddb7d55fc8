"""Machines for the kinds of ``bench exits``: what each needs of the host, and how its machine is made ready."""

from __future__ import annotations

from errno import errorcode
from typing import cast

from pykvm.abi import ffi, lib, new
from pykvm.assemble import asm
from pykvm.bench.kind import (
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
from pykvm.bench.kinds import KINDS
from pykvm.bench.special import PREPARE, Enabling
from pykvm.bus import Native
from pykvm.errors import KvmError, PykvmError
from pykvm.exit_reason import ExitReason, reason_name
from pykvm.exits import InternalError, Intr, IoOut
from pykvm.machine import Machine
from pykvm.platform import IDT_GPA as USER_IDT
from pykvm.units import PAGE_SIZE
from pykvm.x86.idt import GATE_SIZE, gate, use_idt
from pykvm.x86.modes import CODE64, LongMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from pykvm.bench.kind import Kind
    from pykvm.exits import Exit
    from pykvm.system import System

__all__ = ["NAIVE", "Bank", "Device", "Prepared", "why_not"]

TRIAL_SECONDS = 5.0
NAIVE = "naive cffi, no device"  # the name of Prepared.naive() among the loops
_ALONE = "no {} comes here: KVM handles it alone"
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


_VM_TYPES = {"SEV-ES guests": 3, "SEV-SNP guests": 4, "TDX guests": 5}  # KVM_X86_SEV_ES_VM ...: bits of KVM_CAP_VM_TYPES


def why_not(kind: Kind, system: System) -> str | None:
    """What this host lacks for ``kind``, or None."""
    from pykvm.needs import unmet

    for name in kind.needs:
        if name == "sync regs":
            if not system.check_extension("KVM_CAP_SYNC_REGS") & lib.KVM_SYNC_X86_REGS:
                return "KVM_CAP_SYNC_REGS does not bring the registers here"
        elif name in _VM_TYPES:
            types = system.check_extension("KVM_CAP_VM_TYPES")
            if not types >> _VM_TYPES[name] & 1:
                return f"only {name} make it: KVM_CAP_VM_TYPES is {types:#x} here, without bit {_VM_TYPES[name]}"
        elif name in NEEDS:
            if not NEEDS[name][0]():
                return NEEDS[name][1]
        else:
            reason = unmet({"needs": name}, system)
            if reason is not None:
                return reason.removeprefix("it needs ").removeprefix(f"{name}: ")
    return kind.absent or None


class Device:
    """A device of the usual shape: it keeps what is written and gives it back."""

    def __init__(self) -> None:
        self.value = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value

    def read(self, offset: int, size: int) -> int:
        return self.value


class Bank:
    """The guests of kinds, by default all, assembled once for all machines."""

    def __init__(self, kinds: list[Kind] = KINDS) -> None:
        self.code, self.programs = bank(kinds, asm)


class Prepared:
    """A machine that is ready to run one kind's guest."""

    def __init__(self, kind: Kind, guests: Bank, system: System) -> None:
        self.kind = kind
        self.program: Program = guests.programs[kind.name]
        self.ring: Any = ffi.NULL
        self.skip = 0
        self.slot: Any = None
        self._eventfds: list[Any] = []
        self._kept: Any = None  # host memory of a slot of its own
        self.machine = Machine(
            guests.code,
            entry=self.program.entry,
            mode=kind.mode,
            memory="2M",
            loop="python",
            irqchip=kind.irqchip,
            cpus=kind.cpus,
            pin=kind.cpus > 1,
            system=cast("System", Enabling(system, kind.device)),
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
        elif what in PREPARE:
            self._kept = PREPARE[what](machine)

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
        memory = self.machine.memory
        if self.kind.mode == "user":
            memory.write(IDT_GPA, memory.read(USER_IDT, 32 * GATE_SIZE))
        for vector, at in self.program.handlers.items():
            if vector < 256:
                memory.write(IDT_GPA + GATE_SIZE * vector, gate(at, CODE64, dpl=3))
        for vcpu in self.machine.vcpus:
            use_idt(vcpu, IDT_GPA)

    def _start_second(self) -> None:
        """The second vCPU starts in long mode with the others' IDT, and needs no INIT and SIPI."""
        second = self.machine.vcpus[1]
        LongMode().apply(second, self.machine.memory, self.program.ap, {"rsp": SAMPLE_GPA - 0x1000})
        use_idt(second, IDT_GPA)
        second.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)

    # --- whether it works ---------------------------------------------------------------------------------------------

    def trial(self) -> str | None:
        """Run it once, briefly: why it cannot be measured here, or None."""
        kind = self.kind
        if kind.limit or kind.reaches == "bare":
            return self._trial_bare()
        self.cool()
        self.command(BATCH, 3)
        try:
            result = self.machine.run(TRIAL_SECONDS, explain=False)
        except PykvmError as error:
            return f"its guest crashes: {' '.join(str(error).splitlines()[0].split())}"
        if result.reason == "timeout":
            return f"its guest does not get through here: it was stopped after {TRIAL_SECONDS:g} seconds"
        if result.reason != "exit" or result.exit_code:
            return f"its guest ends as {result.reason}"
        if kind.reason and not self.vcpu.native.counts[ExitReason[kind.reason]]:
            return _ALONE.format(kind.reason)
        return None

    def _trial_bare(self) -> str | None:
        """The same for a kind whose exits end a run."""
        kind, wanted = self.kind, ExitReason[self.kind.reason]
        self.run_area.request_interrupt_window = kind.device == "window"
        try:
            for command in (BATCH, SAMPLES) if kind.clocked else (BATCH,):
                self.command(command, 3)
                exits = list(self._exits(3 if kind.limit else 20))
                came = [exit.reason for exit in exits]
                if kind.limit and set(came) != {wanted}:
                    other = next(reason for reason in came if reason != wanted)
                    return f"KVM gives {reason_name(other)} here, not {kind.reason}, the first time or the next"
                if wanted not in came:
                    return _ALONE.format(kind.reason)
                if kind.suberror and isinstance(exits[-1], InternalError) and exits[-1].suberror != kind.suberror:
                    return f"KVM gives {kind.reason} with suberror {exits[-1].suberror} here, not {kind.suberror}"
        except TimeoutError:
            return f"its guest does not get through here: it was stopped after {TRIAL_SECONDS:g} seconds"
        except KvmError as error:
            return f"KVM_RUN gives {errorcode.get(error.errno or 0, error.errno)} here, and no {kind.reason}"
        finally:
            self.run_area.request_interrupt_window = 0
        return None

    def _exits(self, most: int) -> Iterator[Exit]:
        """Exits until the guest is through with its command, but no more than ``most``. Raises TimeoutError, KvmError."""
        for _ in range(most):
            if self.kind.device == "kick":
                self.vcpu.kick()
            exit = self.vcpu.run(TRIAL_SECONDS)
            if isinstance(exit, Intr) and exit.timed_out:
                raise TimeoutError
            if isinstance(exit, IoOut) and exit.port == STOP_PORT:
                break
            if not isinstance(exit, Intr) or self.kind.device == "kick":
                yield exit
            self.go_on()

    def go_on(self) -> None:
        """Past the instruction of a DEBUG exit, where KVM stays at it."""
        if self.skip:
            self.run_area.s.regs.regs.rip += self.skip
            self.run_area.kvm_dirty_regs |= lib.KVM_SYNC_X86_REGS

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
        if kind.device == "kick":
            return int(lib.pykvm_bench_boundary(native.fd, native.run, count))
        if kind.reaches == "loops" and not kind.device and not kind.reason:
            return int(lib.pykvm_bench_exits(native.fd, native.run, STOP_PORT))
        if kind.device == "window":
            native.run.request_interrupt_window = 1
        only = ExitReason[kind.reason] if kind.reason else 0
        taken = int(lib.pykvm_bench_traps(native.fd, native.run, STOP_PORT, count if kind.limit else 0, only, self.skip, self.ring))
        if kind.device == "window":
            native.run.request_interrupt_window = 0
        return taken

    def naive(self) -> None:
        """One command through the loop that one would first write with cffi: it looks at reason and port, and asks no device."""
        native = self.vcpu.native
        ioctl, fd, request, null = lib.pykvm_ioctl, native.fd, lib.KVM_RUN, ffi.NULL
        kvm_run = native.run
        while True:
            ioctl(fd, request, null)
            if kvm_run.exit_reason == 2 and kvm_run.io.port == STOP_PORT:
                return
