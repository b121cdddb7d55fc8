"""``pykvm guests``: the gallery."""

from __future__ import annotations

from pykvm import gallery
from pykvm.cli.options import Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

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
        width = max(len(guest["name"]) for guest in chosen)
        for guest in chosen:
            print(f"{guest['name']:<{width}}  {guest['note'].get('mode', '?'):<9}  {guest['shows']}")
        print("\npykvm run NAME runs one, pykvm guests NAME shows its source")
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
