"""A machine made from a MachineState and memory that has the guest's bytes already."""

from __future__ import annotations

import os

from pykvm.abi import lib
from pykvm.config import IRQCHIPS, MAX_CPUS, Config
from pykvm.errors import ConfigError, GuestImageError, KvmError, PykvmError, StateError
from pykvm.loaders import peek
from pykvm.loaders.image import BootState, ImageInfo
from pykvm.loaders.source import read_image
from pykvm.state import vcpustate, vmstate
from pykvm.state.machinestate import MachineState
from pykvm.state.save import boot_id, device_places
from pykvm.state.vcpustructs import put

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.machine import Machine
    from pykvm.memory import GuestMemory
    from pykvm.state.compat import Host
    from pykvm.state.vcpustructs import VcpuStructs

__all__ = ["StateOrigin", "config_of", "made", "restored_machine"]


def config_of(state: MachineState) -> Config:
    """What the machine was made of. Its image's bytes, which symbols come from, are there if the file still is. Raises StateError."""
    m = state.machine
    if m["irqchip"] not in IRQCHIPS or not 1 <= m["cpus"] <= MAX_CPUS:
        raise StateError("machine", f"{m['cpus']} vCPUs with irqchip {m['irqchip']!r} cannot be")
    try:
        data, info = _image(m)
        config = Config(
            data,
            info,
            memory=m["memory"],
            cpus=m["cpus"],
            irqchip=m["irqchip"],
            cpu=m["cpu"],
            platform=m["platform"],
            strict=m["strict"],
            assist=m["assist"],
        )
    except ConfigError as error:
        raise StateError("machine", str(error)) from None
    config.sha256 = m["sha256"]
    return config


def _image(m: dict[str, Any]) -> tuple[bytes, ImageInfo]:
    try:
        if m["sha256"] and os.path.isfile(m["image"]):
            data, path = read_image(m["image"])
            if Config.hash(data) == m["sha256"]:
                protocol = m["protocol"]
                info = peek(data, path, "auto" if protocol else m["mode"], protocol or "auto")
                info.note = m["note"]
                return data, info
    except (GuestImageError, ConfigError):
        pass
    why = "as the saved state says"
    return b"", ImageInfo(m["image"], "state", m["mode"], m["entry"], [], m["note"], why=why, protocol=m["protocol"])


def restored_machine(
    kind: type[Machine],
    source: MachineState | str | os.PathLike[str],
    memory: GuestMemory | None,
    verify: bool,
    adapt: bool,
    accept_tsc: bool,
    options: dict[str, Any],
) -> Machine:
    """What Machine.restore() does."""
    if not isinstance(source, MachineState):
        from pykvm.state.snapshot import open_snapshot

        source, memory = open_snapshot(source, verify=verify)
    if memory is None:
        raise ConfigError("a state without memory: give memory=, its slots with the guest's bytes, or a snapshot's directory")
    try:
        return made(kind, source.once("config", config_of), StateOrigin(source, memory, adapt, accept_tsc), options)
    except BaseException:
        memory.close()
        raise


def made(kind: type[Machine], config: Config, origin: StateOrigin, options: dict[str, Any]) -> Machine:
    """The machine."""
    machine = kind.__new__(kind)
    machine._make(config, origin, **options)
    machine.restored = origin
    return machine


class StateOrigin:
    """Brings a saved state and ``memory`` into a machine (start.py).

    ``notes``: what could not be put back and does not matter, in words; ``dropped``: what ``adapt`` has dropped.

    ``waiting``: the states of devices that are not there yet, by space and base: add_device() gives them theirs.
    ``structs``: the vCPUs, where they come from this host and need not be made of the state's ``vcpus``.
    """

    def __init__(
        self,
        state: MachineState,
        memory: GuestMemory,
        adapt: bool = False,
        accept_tsc: bool = False,
        structs: list[VcpuStructs] | None = None,
    ) -> None:
        self.state, self.memory, self._adapt, self._accept_tsc = state, memory, adapt, accept_tsc
        self._host: Host | None = None
        self.notes: list[str] = []
        self.dropped: list[str] = []
        self._structs = structs
        have = [(slot.gpa, slot.size, slot.readonly) for slot in memory.slots]
        want = [(slot["gpa"], slot["size"], slot["readonly"]) for slot in state.slots]
        if have != want:
            raise StateError("slots", "they are not those of the memory that comes with the state")

    def make_memory(self) -> GuestMemory:
        """The memory that came with the state."""
        return self.memory

    def _make_structs(self, machine: Machine) -> list[VcpuStructs]:
        """The vCPUs as this host takes them. Raises IncompatibleStateError and StateError."""
        layout, boot, system = self.state.host["xsave"], self.state.host["boot"], machine.system
        sregs2 = bool(system.check_extension("KVM_CAP_SREGS2"))
        if boot and boot == boot_id():  # the very host that saved it: there is nothing to compare
            return self.state.once("vcpus", lambda state: [vcpustate.structs_of(vcpu, layout, layout, sregs2) for vcpu in state.vcpus])
        self._compare(machine)
        here = vcpustate.xsave_layout(system.get_supported_cpuid())
        return [vcpustate.structs_of(vcpu, layout, here, sregs2) for vcpu in self.state.vcpus]

    def _compare(self, machine: Machine) -> None:
        """With this host; raises IncompatibleStateError."""
        from pykvm.state.compat import Host, demand

        if self._host is None:
            self._host = Host.of(machine.system)
        verdict = demand(self.state, self._host, adapt=self._adapt, accept_tsc=self._accept_tsc)
        self.state, self.dropped = verdict.state, verdict.dropped
        self.notes += verdict.notes

    def set_cpuid(self, machine: Machine) -> None:
        """What each vCPU was given, as far as this host can. Raises IncompatibleStateError."""
        if self._structs is None:
            self._structs = self._make_structs(machine)
        for vcpu, structs in zip(machine.vcpus, self._structs, strict=True):
            try:
                vcpu.set_cpuid2(structs.asked)
            except KvmError as error:
                raise StateError(f"vcpus[{vcpu.id}].asked", f"this host's KVM does not take it: {error}") from error

    def fill(self, machine: Machine) -> None:
        """Registers, interrupt controllers, clocks, devices."""
        state, vm = self.state, machine.vm
        machine.boot = BootState(state.machine["start"], state.machine["mode"])
        if state.services is not None and machine.services is not None:
            _load(machine.services, state.services, "services")
        if machine.cpu_model is None and machine.config.cpu is not None:
            from pykvm.x86.cpumodel import CpuModel

            try:
                machine.cpu_model = CpuModel.parse(machine.config.cpu, machine.system)
            except ConfigError as error:
                raise StateError("machine.cpu", str(error)) from None
        assert self._structs is not None
        for vcpu, structs in zip(machine.vcpus, self._structs, strict=True):
            self.notes += put(vm, vcpu, structs)
        vmstate.write(vm, state.vm)
        machine.clock = state.vm["clock"]
        waiting = dict(state.once("devices", lambda state: {(row["space"], row["base"]): row for row in state.devices}))
        for space, base, name, device in device_places(machine):
            row = waiting.pop((space, base), None)
            if row is not None and row["state"] is not None and hasattr(device, "load"):
                _load(device, row["state"], name)
        machine.waiting_devices = waiting
        for runner, data in zip(machine.runners, state.runners, strict=True):
            runner.vectors = list(data["vectors"])
            for reason, count in data["exits"]:
                if reason >= lib.PYKVM_REASONS:
                    raise StateError("runners.exits", f"{reason} is no exit reason")
                runner.vcpu.native.counts[reason] = count
        for console, data in ((machine.console, state.console), (machine.debug_port, state.debug_port)):
            console.data[:] = bytes.fromhex(data["data"])
            console.dropped = data["dropped"]


def _load(device: Any, data: dict[str, Any], name: str) -> None:
    try:
        device.load(data)
    except StateError:
        raise
    except (PykvmError, OSError, ValueError, TypeError, KeyError) as error:
        raise StateError(name, f"its state cannot be taken back: {error!r}") from error
