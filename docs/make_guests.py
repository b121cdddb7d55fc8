"""Makes docs/guests/: a page for each gallery guest, from its header and its note, and an index by group.

    python docs/make_guests.py           write them
    python docs/make_guests.py --check   only say what is stale (tests/unit/test_guest_pages.py does the same)

Nothing needs to be built first: the sources are read, not the images.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
GUESTS = HERE.parent / "guests"
PAGES = HERE / "guests"
sys.path.insert(0, str(HERE.parent))

from pykvm.cli.guests import GROUPS  # noqa: E402  (from this checkout, which need not be installed)
from pykvm.loaders.note import parse  # noqa: E402

PARTS = ("Exits", "See", "Exit code")
ENDS = {
    "exit": "debug exit with code {exit}",
    "halted": "HLT",
    "crash": "a crash, which is what it shows",
    "power-off": "power-off, by ACPI",
    "timeout": "never: the time limit stops it",
}


class Guest:
    """A source's header and note: ``shows``, ``about`` (free text), ``parts`` ("Exits", "See", "Exit code"), ``note``."""

    def __init__(self, source: Path) -> None:
        self.name = source.stem
        self.lines = source.read_text(encoding="utf-8").splitlines()
        header = []
        for line in self.lines:
            if not line.startswith("#"):
                break
            header.append(line[1:].strip())
        name, _, self.shows = header[0].partition(": ")
        if name != self.name:
            raise ValueError(f"{source}: the first line has to be '# {self.name}: what it shows'")
        self.about: list[str] = []
        self.parts: dict[str, str] = {}
        part = ""
        for line in header[1:]:
            key, colon, rest = line.partition(":")
            if colon and key in PARTS:
                part, line = key, rest.strip()
            if part:
                self.parts[part] = f"{self.parts.get(part, '')} {line}".strip()
            elif line:
                self.about.append(line)
        text = "\n".join(self.lines)
        note = re.search(r"^note_begin\n(.*?)^note_end", text, re.M | re.S)
        if note is None:
            raise ValueError(f"{source}: there is no note")
        content = "".join(re.findall(r'\.ascii\s+"(.*)"', note[1])).encode().decode("unicode_escape")
        self.note = parse(content.encode(), str(source), 0)

    def page(self) -> str:
        """The guest's page."""
        n = self.note
        out = [f"# {self.name}", "", _sentence(self.shows), ""]
        if self.about:
            out += [" ".join(self.about), ""]
        out += ["```sh", f"pykvm run {self.name}", "```", "", "| | |", "|---|---|"]
        rows = [("Group", f"[{n['group']}](README.md#{n['group']})"), *((key, self.parts[key]) for key in PARTS if key in self.parts)]
        rows += [("Starts in", f"{n['mode']} mode, {n['memory']} of RAM")]
        rows += [("Read-only memory", n["rom"])] if "rom" in n else []
        rows += [("Ends with", ENDS[n["end"]].format(exit=n.get("exit", 0)))]
        rows += [("Prints", f"`{n['console']}`")] if "console" in n else []
        rows += [("Needs", f"`{n['needs']}`; a host without it skips the guest and says why (pykvm/needs.py)")] if "needs" in n else []
        others = [(f"`{key}=`", f"`{n[key]}`") for key in n if key not in _SHOWN]
        out += [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows + others]
        return "\n".join([*out, "", f"Source: [guests/{self.name}.S](../../guests/{self.name}.S)", ""])


_SHOWN = ("group", "mode", "memory", "rom", "end", "exit", "console", "needs")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def guests() -> list[Guest]:
    """All of guests/, by name."""
    return [Guest(source) for source in sorted(GUESTS.glob("*.S"))]


def pages() -> dict[str, str]:
    """File name to content: the index and a page for each guest."""
    every = guests()
    index = [
        "# The guests",
        "",
        "What comes with pykvm to run, by group. `pykvm guests` lists them too, `pykvm guests NAME` shows one's source. These pages are",
        "made by `python docs/make_guests.py` from the sources' headers and notes: edit those.",
        "",
    ]
    for group, about in GROUPS.items():
        members = [guest for guest in every if guest.note.get("group") == group]
        if members:
            index += [f"## {group}", "", _sentence(about), "", "| guest | mode | shows | needs |", "|---|---|---|---|"]
            index += [f"| [{g.name}]({g.name}.md) | {g.note['mode']} | {g.shows} | {g.note.get('needs', '')} |" for g in members]
            index.append("")
    return {"README.md": "\n".join(index), **{f"{guest.name}.md": guest.page() for guest in every}}


def stale() -> list[str]:
    """Names of pages that are missing, differ from what would be made now, or belong to no guest."""
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def main() -> int:
    """Write, or check."""
    names = stale()
    if "--check" in sys.argv[1:]:
        for name in names:
            print(f"stale: docs/guests/{name}")
        return 1 if names else 0
    PAGES.mkdir(exist_ok=True)
    wanted = pages()
    for name in names:
        if name in wanted:
            (PAGES / name).write_text(wanted[name], encoding="utf-8")
            print(f"wrote docs/guests/{name}")
        else:
            (PAGES / name).unlink()
            print(f"removed docs/guests/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
