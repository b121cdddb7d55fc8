"""``pykvm guests``: the gallery."""

from __future__ import annotations

from pykvm import gallery
from pykvm.cli.options import Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# A note's group= and what the guests of it are about, in the order of the list.
GROUPS = {
    "start": "starting and stopping, one guest for each CPU mode",
    "boot": "boot protocols: how images made for other loaders start",
    "io": "ports, and devices behind them",
    "memory": "RAM, read-only memory, MMIO and page tables",
    "exceptions": "faults, handled by the guest or by nobody",
    "interrupts": "interrupt controllers, routes, injection",
    "time": "clocks and timers",
    "smp": "more than one vCPU",
    "cpu": "CPUID, registers, extensions",
    "msr": "model-specific registers and hypercalls",
    "nested": "a hypervisor as the guest",
    "platform": "the PC test platform: firmware's tables, fw_cfg, ACPI",
}

COMMAND = Command(
    "guests",
    "[NAME]",
    "The guests that come with pykvm. With a NAME: what it shows, which exits it makes, its expectations and its source.",
    [Option("--json", "JSON instead of text")],
    ["pykvm guests", "pykvm guests page_fault"],
)


def main(argv: list[str]) -> int:
    """List them, or show one."""
    operands, o = COMMAND.parse(argv, 0, 1)
    chosen = [_describe(name) for name in (operands or gallery.names())]
    if o["json"]:
        import json

        print(json.dumps(chosen if not operands else chosen[0], indent=2))
    elif operands:
        print(gallery.source(operands[0]), end="")
        print(f"\n# image: {chosen[0]['image']}")
        for key, value in chosen[0]["note"].items():
            print(f"# {key}={value}")
    else:
        width = max((len(guest["name"]) for guest in chosen), default=0)
        by_group: dict[str, list[dict[str, Any]]] = {}
        for guest in chosen:
            by_group.setdefault(guest["note"].get("group", ""), []).append(guest)
        for group in sorted(by_group, key=lambda g: list(GROUPS).index(g) if g in GROUPS else len(GROUPS)):
            print(f"{group or 'other'}: {GROUPS.get(group, 'guests of no group')}")
            for guest in by_group[group]:
                needs = guest["note"].get("needs")
                print(f"  {guest['name']:<{width}}  {guest['note'].get('mode', '?'):<9}  {guest['shows']}{f' [{needs}]' if needs else ''}")
        print("\npykvm run NAME runs one, pykvm guests NAME shows its source; [in brackets]: what the host must offer")
    return 0


def _describe(name: str) -> dict[str, Any]:
    from pykvm.loaders import peek

    path = gallery.find(name)
    with open(path, "rb") as file:
        info = peek(file.read(), path)
    header = []
    for line in gallery.source(name).splitlines():
        if not line.startswith("#"):
            break
        header.append(line.lstrip("# ").rstrip())
    shows = header[0].partition(": ")[2] if header else ""
    return {"name": name, "shows": shows, "about": "\n".join(header[1:]).strip(), "note": info.note, "image": path}
