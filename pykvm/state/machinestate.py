"""MachineState: all of a machine but its memory's bytes, as plain data.

A tree of dictionaries, lists, integers, text and None, the very one that goes into JSON; bytes are written in hex. Its sections:

- ``machine``: what it is made of (config.Config) and the image it was started from; ``host``: where it was saved
- ``slots``: memory slots; ``vcpus``: state/vcpustate.py; ``vm``: irqchips, PIT, routes and kvmclock (state/vmstate.py)
- ``devices``: what each device states of itself, by where it is; ``services``: the hypercalls of gallery guests
- ``runners``: interrupts that wait for a vCPU, and its exits by reason; ``console``: what the guest has printed,
  ``debug_port``: what firmware has

``RUNNING`` lists the clocks that go on while a state is saved and restored: two states of one moment may differ there, and nowhere else.
"""

from __future__ import annotations

from pykvm.errors import StateError
from pykvm.state import vcpustate, vmstate
from pykvm.state.plain import Bool, Fields, Hex, Int, List, Optional, Text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    from pykvm.state.plain import Shape

    T = TypeVar("T")

__all__ = ["RUNNING", "VERSION", "Difference", "MachineState"]

VERSION = 1  # of the layout; a state of a later one is refused
LARGEST = 64 << 20  # characters of JSON

# Fields, by path with the indices left out, that are clocks: the TSC and what is compared with it, the count of a LAPIC's timer (register
# 0x390), kvmclock, when a PIT channel was loaded, up to where the RTC has looked, and ACPI's timer.
RUNNING = (
    "vcpus[].msrs[IA32_TSC]", "vcpus[].msrs[IA32_TSC_DEADLINE]", "vcpus[].msrs[HV_X64_MSR_TIME_REF_COUNT]",
    "vcpus[].msrs[HV_X64_MSR_VP_RUNTIME]", "vcpus[].lapic+0x390", "vm.clock", "vm.pit.channels[].count_load_time",
    "devices[].state.seen", "devices[].state.elapsed", "devices[].state.carries",
)  # fmt: skip

_SLOT = Fields({"gpa": Int(52), "size": Int(52), "readonly": Bool()})
_MACHINE = Fields({
    "image": Text(4096), "sha256": Text(64), "format": Text(64), "mode": Text(16), "entry": Int(64), "start": Int(64),
    "cpus": Int(16), "irqchip": Text(16), "cpu": Optional(Text(1024)), "memory": Int(52), "strict": Bool(),
    "platform": Text(16), "protocol": Text(16), "assist": Bool(),
})  # fmt: skip
_HOST = Fields({"boot": Text(64), "kernel": Text(256), "vendor": Text(16), "xsave": List(List(Int(32), count=3), 64)})
_CONSOLE = Fields({"data": Hex(16 << 20), "dropped": Int(64)})
_SHAPES: dict[str, Shape] = {
    "slots": List(_SLOT, 4096), "vcpus": List(vcpustate.SHAPE, 1024), "vm": vmstate.SHAPE, "host": _HOST, "console": _CONSOLE,
    "debug_port": _CONSOLE,
    "runners": List(Fields({"vectors": List(Int(8), 4096), "exits": List(List(Int(64), count=2), 64)}), 1024),
}  # fmt: skip


class MachineState:
    """A machine's state; its sections are attributes. Made by Machine.save() and from_json(), and not to be changed."""

    SECTIONS = ("machine", "host", "slots", "vcpus", "vm", "devices", "services", "runners", "console", "debug_port")
    __slots__ = (*SECTIONS, "_made")

    machine: dict[str, Any]
    host: dict[str, Any]
    slots: list[dict[str, Any]]
    vcpus: list[dict[str, Any]]
    vm: dict[str, Any]
    devices: list[dict[str, Any]]
    services: dict[str, Any] | None
    runners: list[dict[str, Any]]
    console: dict[str, Any]
    debug_port: dict[str, Any]
    _made: dict[str, Any]

    def __init__(self, **sections: Any) -> None:
        for name in self.SECTIONS:
            object.__setattr__(self, name, sections[name])
        object.__setattr__(self, "_made", {})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a MachineState is not changed; make another one with replace()")

    def replace(self, **sections: Any) -> MachineState:
        """The same with other sections."""
        return MachineState(**{name: sections.get(name, getattr(self, name)) for name in self.SECTIONS})

    def once(self, what: str, make: Callable[[MachineState], T]) -> T:
        """What ``make`` makes of this state, kept under a name: good for whoever restores the same state again."""
        made: dict[str, Any] = self._made
        if what not in made:
            made[what] = make(self)
        return made[what]  # type: ignore[no-any-return]

    # --- JSON --------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """All of it as one line of JSON."""
        import json

        tree = {"version": VERSION, **{name: getattr(self, name) for name in self.SECTIONS}}
        return json.dumps(tree, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> MachineState:
        """From what to_json() made, or somebody else: everything is checked. Raises StateError that names the field."""
        import json

        if len(text) > LARGEST:
            raise StateError("state", f"it has {len(text)} bytes; {LARGEST} are the most")
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StateError("state", f"it is no JSON: {str(error)[:100]}") from None
        return cls.of_json_tree(tree)

    @classmethod
    def of_json_tree(cls, tree: Any) -> MachineState:
        """The same for JSON that is read already."""
        if type(tree) is not dict or type(tree.get("version")) is not int:
            raise StateError("state", "it is no state of pykvm's")
        if tree["version"] != VERSION:
            raise StateError(
                "state", f"it is of version {tree['version']}, this pykvm knows {VERSION}: use the pykvm that made it, or newer"
            )
        return cls.of_tree({name: value for name, value in tree.items() if name != "version"})

    @classmethod
    def of_tree(cls, tree: Any) -> MachineState:
        """From sections by name, which are checked."""
        if type(tree) is not dict or tree.keys() != set(cls.SECTIONS):
            raise StateError("state", f"its sections must be {', '.join(cls.SECTIONS)}")
        for name, shape in _SHAPES.items():
            shape.check(tree[name], name)
        _check_machine(tree["machine"])
        _check_devices(tree["devices"])
        if tree["services"] is not None and type(tree["services"]) is not dict:
            raise StateError("services", "it has no fields")
        if not len(tree["vcpus"]) == len(tree["runners"]) == tree["machine"]["cpus"]:
            raise StateError("vcpus", f"there are {len(tree['vcpus'])} of {tree['machine']['cpus']}")
        for i, vcpu in enumerate(tree["vcpus"]):
            if vcpu["id"] != i:
                raise StateError(f"vcpus[{i}].id", f"it is {vcpu['id']}")
            if (vcpu["lapic"] is None) != (tree["machine"]["irqchip"] == "none"):
                raise StateError(f"vcpus[{i}].lapic", f"it does not go with irqchip {tree['machine']['irqchip']}")
        return cls(**tree)

    # --- comparing ---------------------------------------------------------------------------------------------------

    def diff(self, other: MachineState, *, running: bool = False) -> list[Difference]:
        """The fields that differ, named; without the clocks of RUNNING, unless ``running``."""
        found = [d for name in self.SECTIONS for d in _diff(name, getattr(self, name), getattr(other, name))]
        return found if running else [d for d in found if d.kind not in RUNNING]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MachineState) and not self.diff(other, running=True)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """Every field on a line of its own, numbers in hex, zeros left out."""
        return "\n".join(line for name in self.SECTIONS for line in _lines(name, getattr(self, name)))

    def __repr__(self) -> str:
        size = sum(slot["size"] for slot in self.slots)
        name, chip = self.machine["image"].rpartition("/")[2], self.machine["irqchip"]
        return f"<MachineState {name}: {len(self.vcpus)} vCPUs, irqchip {chip}, {size >> 10} KiB in {len(self.slots)} slots>"


class Difference:
    """One field that differs: ``path`` ("vcpus[0].regs.rip"), ``kind`` (the same without indices), and both values, None: not there."""

    __slots__ = ("a", "b", "path")

    def __init__(self, path: str, a: Any, b: Any) -> None:
        self.path, self.a, self.b = path, a, b

    @property
    def kind(self) -> str:
        """The path without indices."""
        return _kind(self.path)

    def __repr__(self) -> str:
        return f"{self.path}: {_shown(self.a)} -> {_shown(self.b)}"


def _kind(path: str) -> str:
    """``vcpus[0].msrs[IA32_TSC]`` becomes ``vcpus[].msrs[IA32_TSC]``."""
    result, at = "", 0
    while (start := path.find("[", at)) >= 0:
        end = path.find("]", start)
        inside = path[start + 1 : end]
        result += path[at : start + 1] + ("" if inside.isdecimal() else inside) + "]"
        at = end + 1
    return result + path[at:]


def _diff(path: str, a: Any, b: Any) -> Iterator[Difference]:
    if a == b:
        return
    if path.endswith(".msrs") and isinstance(a, list) and isinstance(b, list):
        from pykvm.x86.msr import msr_name

        x, y = dict(a), dict(b)
        for index in dict.fromkeys([*x, *y]):
            if x.get(index) != y.get(index):
                yield Difference(f"{path}[{msr_name(index)}]", x.get(index), y.get(index))
    elif isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            yield from _diff(f"{path}.{name}", a.get(name), b.get(name))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _diff(f"{path}[{i}]", x, y)
    elif path.endswith((".lapic", ".xsave", ".nested")) and isinstance(a, str) and isinstance(b, str):
        size = max(len(a), len(b))
        before, after = a.ljust(size, "0"), b.ljust(size, "0")
        for i in range(0, size, 8):
            if before[i : i + 8] != after[i : i + 8]:
                yield Difference(f"{path}+{i // 2:#x}", before[i : i + 8], after[i : i + 8])
    else:
        yield Difference(path, a, b)


def _lines(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _lines(f"{path}.{name}", inner)
    elif path.endswith(".msrs"):
        from pykvm.x86.msr import msr_name

        for index, inner in value:
            if inner:
                yield f"{path}[{msr_name(index)}] = {inner:#x}"
    elif isinstance(value, list):
        if value and all(isinstance(inner, int) for inner in value):
            yield f"{path} = {' '.join(f'{inner:#x}' for inner in value)}"
        else:
            for i, inner in enumerate(value):
                yield from _lines(f"{path}[{i}]", inner)
    elif value:
        yield f"{path} = {_shown(value)}"


def _shown(value: Any) -> str:
    if type(value) is int:
        return f"{value:#x}"
    text = str(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def _check_machine(machine: Any) -> None:
    if type(machine) is not dict or type(machine.get("note")) is not dict:
        raise StateError("machine", "it has no fields, or no note")
    for key, value in machine["note"].items():
        if type(value) is not str or len(value) > 4096 or len(machine["note"]) > 256:
            raise StateError("machine.note", f"{key[:40]}: it is no text")
    _MACHINE.check({name: value for name, value in machine.items() if name != "note"}, "machine")


def _check_devices(devices: Any) -> None:
    """Where each is; the state of each is checked by the device itself."""
    List(Fields({"space": Text(4), "base": Int(52), "name": Text(256), "state": Optional(_Anything())}), 4096).check(devices, "devices")


class _Anything:
    """Fields of whatever shape."""

    def check(self, value: Any, path: str) -> None:
        """At least it has fields."""
        if type(value) is not dict:
            raise StateError(path, "it has no fields")
