"""save(): a MachineState of a machine that stands still."""

from __future__ import annotations

import os
from functools import cache

from pykvm.errors import ConfigError, StateError
from pykvm.state import vcpustate, vmstate
from pykvm.state.machinestate import MachineState
from pykvm.x86.cpumodel import vendor_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.console import Console
    from pykvm.machine import Machine

__all__ = ["boot_id", "device_places", "other_sections", "save", "settle"]


def save(machine: Machine) -> MachineState:
    """The machine's state, without the bytes of its memory. It must stand still: between two runs, or after pause().

    An access that a vCPU has stopped at is completed first; the machine may go on running afterwards. A device without save() has the
    state None. Raises ConfigError for a machine that runs, StateError for what cannot be saved, and what a device raises.
    """
    settle(machine)
    supported = machine.system.get_supported_cpuid()
    layout = vcpustate.xsave_layout(supported)
    return MachineState(
        host={"boot": boot_id(), "kernel": os.uname().release, "vendor": vendor_of(supported), "xsave": layout},
        vcpus=[vcpustate.read(machine.vm, vcpu, layout) for vcpu in machine.vcpus],
        **other_sections(machine),
    )


def other_sections(machine: Machine) -> dict[str, Any]:
    """What a MachineState has beside ``host`` and ``vcpus``, of a machine that is settled."""
    config, services = machine.config, machine.services
    return {
        "machine": {
            "image": os.path.abspath(config.info.path) if os.path.exists(config.info.path) else config.info.path,
            "sha256": config.sha256,
            "format": config.info.format,
            "mode": config.info.mode,
            "entry": config.info.entry,
            "start": machine.boot.entry,
            "note": dict(config.info.note),
            "cpus": config.cpus,
            "irqchip": config.irqchip,
            "cpu": config.cpu,
            "platform": config.platform,
            "protocol": config.info.protocol,
            "assist": config.assist,
            "memory": config.memory,
            "strict": config.strict,
        },
        "slots": [{"gpa": s.gpa, "size": s.size, "readonly": s.readonly} for s in machine.memory.slots],
        "vm": vmstate.read(machine.vm, machine.clock),
        "devices": _devices(machine),
        "services": None if services is None else services.save(),
        "runners": [
            {"vectors": list(runner.vectors), "exits": [[r, n] for r, n in enumerate(runner.vcpu.native.counts) if n]}
            for runner in machine.runners
        ],
        "console": _text(machine.console),
        "debug_port": _text(machine.debug_port),
    }


def _text(console: Console) -> dict[str, Any]:
    return {"data": console.data.hex(), "dropped": console.dropped}


@cache
def boot_id() -> str:
    """What names this boot of this host: states of the same boot need no comparing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def settle(machine: Machine) -> None:
    """No vCPU is in the guest, none waits for an access to be completed, and what devices and other threads have asked for is done."""
    if any(runner.vcpu.native.tid for runner in machine.runners) and not machine.group.paused:
        raise ConfigError("the machine is running: pause() it first, or stop() the run")
    for runner in machine.runners:
        runner.settle()
    if machine.services is not None:
        machine.services.settle()


def device_places(machine: Machine) -> list[tuple[str, int, str, Any]]:
    """(space, base, name, device) of each device; one that is in several places only at its first."""
    seen: set[int] = set()
    places: list[tuple[str, int, str, Any]] = []
    for space in (machine.bus.pio, machine.bus.mmio):
        for claimed in space.ranges:
            if id(claimed.device) not in seen:
                seen.add(id(claimed.device))
                places.append((space.name, claimed.base, claimed.name, claimed.device))
    return places


def _devices(machine: Machine) -> list[dict[str, Any]]:
    """A row for each device, also for those that were there when the machine was saved before, and are not yet again."""
    rows = [
        {"space": space, "base": base, "name": name, "state": None if not hasattr(device, "save") else _state_of(device, name)}
        for space, base, name, device in device_places(machine)
    ]
    return sorted([*rows, *machine.waiting_devices.values()], key=lambda row: (row["space"] != "pio", row["base"]))


def _state_of(device: Any, name: str) -> dict[str, Any]:
    state = device.save()
    if type(state) is not dict:
        raise StateError(name, f"its save() gave {type(state).__name__}, not a dictionary")
    return state
