"""fork(): a second machine in this process that goes on from where the first one stands, its memory shared copy-on-write.

The bytes go to memfds once (zero pages take no room), and both machines map them privately from then on: pages are shared until one of
them writes. As long as the first machine does not run and nobody writes to its memory, further forks share the same memfds.
"""

from __future__ import annotations

import os

from pykvm.abi import ffi, lib
from pykvm.errors import ConfigError
from pykvm.memory import GuestMemory
from pykvm.state.machinestate import MachineState
from pykvm.state.restore import StateOrigin, made
from pykvm.state.save import other_sections, settle
from pykvm.state.vcpustructs import capture

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.hostwrites import HostWrites
    from pykvm.machine import Machine
    from pykvm.memory import MemSlot

__all__ = ["Shared", "fork"]


def fork(machine: Machine, options: dict[str, Any]) -> Machine:
    """A clone of a machine that stands still; ``options`` as for Machine.restore(). Raises ConfigError and StateError."""
    before = _sessions(machine)
    settle(machine)
    structs = [capture(machine.vm, vcpu) for vcpu in machine.vcpus]
    state = MachineState(host={}, vcpus=[], **other_sections(machine))
    shared = machine.shared
    if shared is None or not shared.still_there(machine, before):
        if shared is not None:
            shared.close()
        shared = machine.shared = Shared(machine)
    shared.sessions = _sessions(machine)
    system = options.pop("system", None) or machine.system.another()
    own = system is not machine.system
    memory = None
    try:
        memory = shared.memory()
        clone = made(type(machine), machine.config, StateOrigin(state, memory, structs=structs), {**options, "system": system})
    except BaseException:
        if memory is not None:
            memory.close()
        if own:
            system.close()
        raise
    clone._own_system = own
    return clone


def _sessions(machine: Machine) -> list[int]:
    return [vcpu.native.sessions for vcpu in machine.vcpus]


class Shared:
    """The memory that a machine shares with its forks, a memfd for each slot. ``sessions``: how often its vCPUs had run then."""

    def __init__(self, machine: Machine) -> None:
        self.sessions: list[int] = []
        self._slots: tuple[MemSlot, ...] = machine.memory.slots
        self._fds: list[int] = []
        try:
            for slot in self._slots:
                fd = os.memfd_create("pykvm-fork", os.MFD_CLOEXEC)
                self._fds.append(fd)
                os.truncate(fd, slot.size)
                _fill(fd, slot)
            for slot, fd in zip(self._slots, self._fds, strict=True):
                if slot.backing in ("anonymous", "private") and not slot.readonly:
                    machine.memory.make_private(slot, fd)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise ConfigError(f"the memory cannot be shared: {error.strerror}") from error
            raise
        self._log: HostWrites | None = None
        try:
            self._log = machine.memory.log_writes(yields=True)
        except ConfigError:
            pass  # somebody else keeps a log: each fork copies, then

    def still_there(self, machine: Machine, sessions: list[int]) -> bool:
        """Whether the machine's memory is still what is shared."""
        memory = machine.memory
        return sessions == self.sessions and memory.slots == self._slots and self._log is not None and memory.unwritten(self._log)

    def memory(self) -> GuestMemory:
        """Memory of a fork."""
        made = GuestMemory()
        try:
            for slot, fd in zip(self._slots, self._fds, strict=True):
                made.add_private(slot.gpa, slot.size, fd, readonly=slot.readonly)
        except BaseException:
            made.close()
            raise
        return made

    def close(self) -> None:
        """Let go of the memfds; what is mapped stays."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _fill(fd: int, slot: MemSlot) -> None:
    import mmap

    with mmap.mmap(fd, slot.size) as mapping:
        to, memory = ffi.from_buffer("uint8_t[]", mapping), ffi.cast("uint8_t *", slot.hva)
        lib.pykvm_copy_pages(to, memory, slot.size, slot.file)
        del to  # which holds the mapping
