"""The state that belongs to a VM rather than to a vCPU: PICs, IOAPIC, PIT, GSI routes and kvmclock.

It is written after the vCPUs: an interrupt that an IOAPIC still holds goes into a LAPIC at once. A line that is high when a PIC or IOAPIC
is saved is high when it is restored; its device says nothing. KVM does not tell its GSI routes, so VM remembers those it was given.
Sources: api.rst 4.26, 4.27 (irqchips), 4.73, 4.74 (PIT), 4.29, 4.30 (clock), 4.52 (routes).
"""

from __future__ import annotations

from pykvm.abi import Struct, ffi, lib
from pykvm.errors import KvmError, StateError
from pykvm.irq import Route
from pykvm.state.plain import Fields, Int, Kernel, List, Optional, plain, struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.vm import VM

__all__ = ["SHAPE", "read", "write"]

_PINS_AT = 24  # struct kvm_ioapic_state: where its 64-bit redirection entries begin
_IOAPIC = Fields({"base_address": Int(64), "ioregsel": Int(32), "id": Int(32), "irr": Int(32), "redirtbl": List(Int(64), count=24)})
SHAPE = Fields({
    "pics": Optional(List(Kernel("struct kvm_pic_state"), count=2)),
    "ioapic": Optional(_IOAPIC),
    "pit": Optional(Kernel("struct kvm_pit_state2")),
    "routes": Optional(List(Fields({"gsi": Int(32), "chip": Optional(Int(2)), "pin": Int(32), "address": Int(64), "data": Int(32)}), 4096)),
    "clock": Int(64),
})  # fmt: skip


def read(vm: VM, clock: int | None) -> dict[str, Any]:
    """All of it; ``clock`` is where kvmclock stands, if somebody has stopped it."""
    pics = ioapic = pit = None
    if vm.irqchip == "kernel":
        pics = [plain(vm.get_irqchip(chip).chip.pic) for chip in (lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE)]
        chip = vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC)
        ioapic = plain(chip.chip.ioapic) | {"redirtbl": list(_entries(chip))}
        pit = plain(vm.get_pit2())
    routes = None
    if vm.routes is not None:
        routes = [{"gsi": r.gsi, "chip": r.chip, "pin": r.pin, "address": r.address, "data": r.data} for r in vm.routes]
    return {"pics": pics, "ioapic": ioapic, "pit": pit, "routes": routes, "clock": int(vm.get_clock().clock) if clock is None else clock}


def _entries(chip: Struct) -> Any:
    """The IOAPIC's redirection entries, a view."""
    start = ffi.cast("char *", ffi.addressof(chip.cdata.chip)) + _PINS_AT
    return ffi.cast("uint64_t *", start)[0 : lib.KVM_IOAPIC_NUM_PINS]


def write(vm: VM, state: dict[str, Any]) -> None:
    """Into a VM whose vCPUs have their state. Raises StateError for what KVM refuses."""
    try:
        if state["pics"] is not None:
            for number, data in zip((lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE), state["pics"], strict=True):
                vm.set_irqchip(struct("struct kvm_irqchip", {"chip_id": number, "chip": {"pic": data}}))
        if state["ioapic"] is not None:
            registers = {name: value for name, value in state["ioapic"].items() if name != "redirtbl"}
            chip = struct("struct kvm_irqchip", {"chip_id": lib.KVM_IRQCHIP_IOAPIC, "chip": {"ioapic": registers}})
            entries = _entries(chip)
            for pin, entry in enumerate(state["ioapic"]["redirtbl"]):
                entries[pin] = entry
            vm.set_irqchip(chip)
        if state["pit"] is not None:
            vm.set_pit2(struct("struct kvm_pit_state2", state["pit"]))
        if state["routes"] is not None:
            vm.set_gsi_routing(Route(r["gsi"], r["chip"], r["pin"], r["address"], r["data"]) for r in state["routes"])
    except KvmError as error:
        raise StateError("vm", f"this host's KVM does not take it: {error}") from error
