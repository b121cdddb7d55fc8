"""The part of Machine that is about its state: saved, restored, put back, cloned. pykvm/state/ does it, and is imported when asked."""

from __future__ import annotations

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any, Self

    from pykvm.machine import Machine
    from pykvm.memory import GuestMemory
    from pykvm.state.fork import Shared
    from pykvm.state.machinestate import MachineState
    from pykvm.state.reset import Checkpoint
    from pykvm.state.restore import StateOrigin

__all__ = ["Saveable"]


class Saveable:
    """What Machine inherits; ``self`` is a Machine."""

    shared: Shared | None = None  # what fork() shares
    restored: StateOrigin | None = None  # how restore() made it
    moved_to: str | None = None  # where the guest is after a migration
    handed_to: str | None = None  # where it may be: it was handed over, and no answer came. resume() decides that it is not
    _checkpoint: Checkpoint | None = None
    _clock: int | None = None  # where kvmclock stands while it does

    @property
    def _machine(self) -> Machine:
        return self  # type: ignore[return-value]

    @property
    def clock(self) -> int | None:
        """Where kvmclock stands, in nanoseconds, while it does: with an irqchip, whenever no run is in progress; else None."""
        return self._clock

    @clock.setter
    def clock(self, nanoseconds: int) -> None:
        if self._machine.vm.irqchip == "none":
            self._machine.vm.set_clock(nanoseconds)
        else:
            self._clock = nanoseconds

    def _turn_clock(self, *, running: bool | None = None, paused: bool | None = None) -> None:
        """kvmclock goes while a run is in progress that is not paused, and stands still else."""
        if self._machine.vm.irqchip == "none":
            return
        with self._machine._clock_lock:
            if running is not None:
                self._machine._running = running
            goes = self._machine._running and not (self._machine.group.paused if paused is None else paused)
            if goes and self._clock is not None:
                self._machine.vm.set_clock(self._clock)
                self._clock = None
            elif not goes and self._clock is None:
                self._clock = int(self._machine.vm.get_clock().clock)

    def _give_state(self, space: str, at: int, device: Any) -> None:
        """A device that is added to a restored machine gets the state of the one that was there when it was saved."""
        waiting = self._machine.waiting_devices
        row = waiting.pop((space, at), None) if waiting else None
        if row is not None and row["state"] is not None and hasattr(device, "load"):
            from copy import deepcopy

            device.load(deepcopy(row["state"]))  # the device may keep it and change it; others may be restored from the same state

    def leave(self, to: str) -> None:
        """The guest goes on somewhere else, at ``to``: the run ends as "migrated", and this copy never runs again."""
        self.moved_to, self.handed_to = to, None
        self._machine.stop("migrated")

    def _check_here(self) -> None:
        if self.moved_to is not None:
            raise ConfigError(f"the guest has moved to {self.moved_to}: this copy must not run")

    def _fall_asleep(self) -> None:
        from pykvm.state.sleep import fall_asleep

        fall_asleep(self._machine)

    def _wake_up(self) -> None:
        from pykvm.state.sleep import wake_up

        wake_up(self._machine)

    def save(self) -> MachineState:
        """All of the machine but its memory's bytes, as plain data (state/save.py). It must stand still, or be paused; it may go on."""
        from pykvm.state.save import save

        return save(self._machine)

    def snapshot(self, directory: str | os.PathLike[str]) -> MachineState:
        """Save the machine in a directory (state/snapshot.py), which is made, or replaced if it is a snapshot. Raises StateError."""
        from pykvm.state.snapshot import write_snapshot

        return write_snapshot(self._machine, directory)

    @classmethod
    def restore(
        cls,
        source: MachineState | str | os.PathLike[str],
        memory: GuestMemory | None = None,
        *,
        verify: bool = True,
        adapt: bool = False,
        accept_tsc: bool = False,
        **options: Any,
    ) -> Machine:
        """A machine that goes on where a saved one stood (state/restore.py).

        ``source``: a snapshot's directory, whose memory is compared with its checksums first (``verify``), or a state and its ``memory``:
        the slots with the guest's bytes, which belong to the machine from now on.
        ``options``: pin, loop, stats, ledger, on_output, poll_input and system, as for a new one. ``adapt`` drops what this host lacks and
        the guest has not in use; ``accept_tsc``: another TSC frequency is all right (state/compat.py). The attribute ``restored`` then has
        what was dropped, and notes. Raises StateError and IncompatibleStateError.
        """
        from pykvm.state.restore import restored_machine

        return restored_machine(cls, source, memory, verify, adapt, accept_tsc, options)  # type: ignore[arg-type]

    def fork(self, **options: Any) -> Self:
        """A clone of this machine, which must stand still: it goes on from here, and shares memory copy-on-write (state/fork.py).

        ``options`` as for restore(). What user space has added (devices, MSRs) is not cloned. Raises ConfigError and StateError.
        """
        from pykvm.state.fork import fork

        return fork(self._machine, options)  # type: ignore[return-value]

    def checkpoint(self) -> Checkpoint:
        """Remember where the machine stands, for reset(); one that was taken before is forgotten (state/reset.py). It must stand still."""
        from pykvm.state.reset import Checkpoint

        self._forget()
        self._checkpoint = Checkpoint(self._machine)
        return self._checkpoint

    def reset(self) -> None:
        """Back to the checkpoint: registers, devices and the pages that were written since. Raises ConfigError without one."""
        if self._checkpoint is None:
            from pykvm.errors import ConfigError

            raise ConfigError("there is nothing to go back to: call checkpoint() first")
        self._checkpoint.reset()

    def _forget(self) -> None:
        """Let go of the checkpoint and of what forks shared."""
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            checkpoint.close()
        shared, self.shared = self.shared, None
        if shared is not None:
            shared.close()
