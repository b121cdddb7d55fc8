"""Finding the place of a triple fault on hosts that lose it: the image once more, from its start, one instruction at a time.

AMD-V leaves a guest's state undefined at SHUTDOWN, and KVM resets the vCPU. A second machine, made as the first was made, is stepped with
KVM_GUESTDBG_SINGLESTEP; the registers before its last instruction are those of the fault. It counts only when it ends in
SHUTDOWN after the same exits and the same output: what a host changed in the first one, or told it, is not there in the second.
Handlers run in one go (an exception clears RFLAGS.TF), so that a fault inside one shows as the exception that led there.
"""

from __future__ import annotations

from time import monotonic

from pykvm import exits
from pykvm.abi import lib
from pykvm.errors import PykvmError
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.abi import Struct
    from pykvm.machine import Machine

__all__ = ["Replay"]

MAX_STEPS = 10_000
MAX_SECONDS = 2.0


class Replay:
    """``view`` is the CPU before its last instruction, or None, and ``why`` says why; ``steps``: how many instructions it took.

    A context manager: the view reads the second machine's memory.
    """

    def __init__(self, machine: Machine) -> None:
        self.view: CpuView | None = None
        self.why = ""
        self.steps = 0
        self._machine: Machine | None = None
        if machine.cpus > 1 or machine.vm.irqchip != "none":
            self.why = "a machine with an irqchip or several vCPUs does not run the same way twice"
            return
        try:
            self._machine = _again(machine)
            self._run(machine, self._machine)
        except PykvmError as error:
            self.why = str(error)

    def _run(self, first: Machine, again: Machine) -> None:
        end = monotonic() + MAX_SECONDS
        state: tuple[Struct, Struct] | None = None
        counts: dict[int, int] = {}
        while True:
            if self.steps >= MAX_STEPS or monotonic() > end:
                self.why = f"it took more than {self.steps} instructions"
                return
            # Each time anew: it arms RFLAGS.TF, which POPF and IRET of the guest's take away.
            again.vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
            state = again.vcpu.get_regs(), again.vcpu.get_sregs()
            exit = again.vcpu.run(MAX_SECONDS)
            if isinstance(exit, exits.Debug):
                self.steps += 1
                continue
            counts[exit.reason] = counts.get(exit.reason, 0) + 1
            if isinstance(exit, exits.Shutdown):
                break
            if not _answer(again, exit):
                self.why = f"run again, it ended otherwise ({exit!r})"
                return
        if counts != first.exit_counts() or again.console.text != first.console.text:
            self.why = "run again, it did not make the same exits and the same output"
            return
        self.view = CpuView(again.vcpu, again.memory)
        self.view.reset_to(*state)

    def close(self) -> None:
        """Close the second machine."""
        if self._machine is not None:
            self._machine.close()

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _again(machine: Machine) -> Machine:
    """A machine made as this one was."""
    from pykvm.machine import Machine

    again = Machine.of_config(machine.config, loop="python", system=machine.system)
    if [(s.gpa, s.size) for s in again.memory.slots] != [(s.gpa, s.size) for s in machine.memory.slots]:
        again.close()
        raise PykvmError("its memory was changed after it was made")
    return again


def _answer(machine: Machine, exit: exits.Exit) -> bool:
    """Do what the platform's devices do at an access; False for all other exits."""
    bus = machine.bus
    match exit:
        case exits.IoOut():
            bus.out(exit.port, exit.size, exit.data, exit.count)
        case exits.IoIn():
            exit.reply(bus.in_(exit.port, exit.size, exit.count))
        case exits.MmioWrite():
            bus.write("mmio", exit.gpa, exit.size, exit.value)
        case exits.MmioRead():
            exit.reply(bus.read("mmio", exit.gpa, exit.size))
        case _:
            return False
    return True
