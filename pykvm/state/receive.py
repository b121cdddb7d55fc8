"""The destination of a live migration (state/migrate.py has the protocol): checks, takes the memory, and starts on COMMIT alone.

Everything that can be known beforehand is checked when the first STATE has come: layout, devices, what the CPU must have. The machine
is made then, so that the last STATE has only to be filled in. Whatever goes wrong before COMMIT, nothing of the guest is left here.
"""

from __future__ import annotations

from pykvm.errors import MigrationError, PykvmError
from pykvm.machine import Machine
from pykvm.memory import GuestMemory, host_memory
from pykvm.state import stream as wire
from pykvm.state.machinestate import MachineState
from pykvm.state.pages import PageReceiver
from pykvm.state.restore import StateOrigin, config_of
from pykvm.state.stream import Stream
from pykvm.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["PATIENCE", "Incoming"]

PATIENCE = 30.0  # seconds that the source may take for a frame


class Arrival(StateOrigin):
    """Fills a machine twice: with the first state, so that what KVM does not take is known before memory moves, and with the last."""

    def fill(self, machine: Machine) -> None:
        """All but what can be done once only: the hypercalls' devices."""
        whole, self.state = self.state, self.state.replace(services=None)
        try:
            super().fill(machine)
        finally:
            self.state = whole

    def finish(self, machine: Machine, state: MachineState) -> None:
        """Now: ``state`` is of the same guest, some time later."""
        self.state, self.notes, self.dropped = state, [], []
        self._structs = self._make_structs(machine)
        super().fill(machine)

    @property
    def remarks(self) -> list[str]:
        """What is not as it was, in words."""
        return [*(f"dropped: {what}" for what in self.dropped), *self.notes]


class Incoming:
    """One guest on its way here, over the connected socket ``sock``.

    ``adapt``, ``accept_tsc``: as for Machine.restore(). ``prepare(machine)`` is called when there is a machine, for devices of the caller's
    own. ``resumable``: somebody here can resume() a guest that comes paused; without, it is refused. ``options`` are Machine.restore()'s.
    """

    def __init__(
        self,
        sock: Any,
        *,
        patience: float = PATIENCE,
        adapt: bool = False,
        accept_tsc: bool = False,
        prepare: Callable[[Machine], object] = lambda machine: None,
        resumable: bool = True,
        **options: Any,
    ) -> None:
        self.stream = Stream(sock, patience=patience)
        self.machine: Machine | None = None
        self.notes: list[str] = []  # what is not quite as it was, in words
        self._adapt, self._accept_tsc, self._prepare, self._options = adapt, accept_tsc, prepare, options
        self._resumable = resumable

    def take(self) -> Machine:
        """The machine, when the source has committed: whoever gets it runs it at once; one that came paused waits in its run for resume().

        Raises MigrationError, and the guest is not here.
        """
        refusal = wire.REFUSE
        try:
            arrival, first = self._greet()
            refusal = wire.ABORT
            machine = self.machine
            assert machine is not None
            state = self._take_memory(machine)
            _check_same_guest(first, state)
            arrival.finish(machine, state)
            _check_devices(machine)
            self.notes = arrival.remarks
            self.stream.send_fields(wire.READY, notes=self.notes)
            self.stream.receive(wire.COMMIT)
        except BaseException as error:
            self._give_up(refusal, str(error) if isinstance(error, PykvmError) else repr(error))
            if isinstance(error, PykvmError) and not isinstance(error, MigrationError):
                raise MigrationError(str(error)) from error
            raise
        try:
            self.stream.send(wire.RUNNING)
        except MigrationError:
            pass  # the source has gone; the guest is here, and here alone
        self.stream.close()
        return machine

    def _greet(self) -> tuple[Arrival, MachineState]:
        """Check the guest and make a machine for it."""
        stream = self.stream
        paused = bool(stream.receive(wire.HELLO).fields().get("paused"))
        if paused and not self._resumable:
            raise MigrationError("the guest is paused, and nobody could resume it here: start `pykvm receive` with --control unix:PATH")
        first = MachineState.from_json(stream.receive(wire.STATE).head)
        memory = _memory_for(first)
        try:
            config, arrival = config_of(first), Arrival(first, memory, self._adapt, self._accept_tsc)
            machine = Machine.__new__(Machine)
            machine._make(config, arrival, **self._options)
        except BaseException:
            memory.close()
            raise
        self.machine = machine
        machine.restored = arrival
        if paused:
            machine.pause()
        self._prepare(machine)
        if first.services is None:  # what a guest has had made by hypercall comes with the last state
            _check_devices(machine)
        stream.send_fields(wire.WELCOME, software="pykvm", notes=arrival.remarks)
        return arrival, first

    def _take_memory(self, machine: Machine) -> MachineState:
        """Rounds of pages; returns the last state."""
        with PageReceiver(self.stream, machine.memory) as pages:
            while True:
                frame = self.stream.receive(wire.PAGES, wire.ROUND, wire.STATE)
                if frame.kind == wire.PAGES:
                    pages.take(frame)
                elif frame.kind == wire.ROUND:
                    self.stream.send(wire.ROUND_DONE)
                else:
                    return MachineState.from_json(frame.head)

    def _give_up(self, kind: int, why: str) -> None:
        self.stream.patience = 0.5
        try:
            self.stream.send_fields(kind, why=why[:2000])
        except MigrationError:
            pass  # it has gone
        self.stream.close()
        if self.machine is not None:
            self.machine.close()


def _memory_for(state: MachineState) -> GuestMemory:
    size = sum(slot["size"] for slot in state.slots)
    if size > host_memory():
        raise MigrationError(f"the guest has {format_size(size)} of memory, more than this host ({host_memory() >> 20}M)")
    memory = GuestMemory()
    try:
        for slot in state.slots:
            memory.add(slot["gpa"], slot["size"], readonly=slot["readonly"])
    except BaseException:
        memory.close()
        raise
    return memory


def _check_devices(machine: Machine) -> None:
    """A guest must not wake up without a device that it was using."""
    if machine.waiting_devices:
        places = ", ".join(f"{'port' if space == 'pio' else 'gpa'} {base:#x}" for space, base in machine.waiting_devices)
        raise MigrationError(f"the guest has devices that there are none of here: {places}")


def _check_same_guest(first: MachineState, last: MachineState) -> None:
    """What the machine was made from must not have changed on the way."""
    for what in ("machine", "slots"):
        if getattr(first, what) != getattr(last, what):
            raise MigrationError(f"the guest's {what} changed while it moved")
    if any(a["asked"] != b["asked"] for a, b in zip(first.vcpus, last.vcpus, strict=True)):
        raise MigrationError("the guest's CPUID changed while it moved")
