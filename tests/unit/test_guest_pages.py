"""The gallery's sources have their form, and the pages made from them are not stale."""

import importlib.util
import re
from pathlib import Path

import pytest

from pykvm.cli.guests import GROUPS
from pykvm.needs import NEEDS

ROOT = Path(__file__).parents[2]
GUESTS = sorted((ROOT / "guests").glob("*.S"))
spec = importlib.util.spec_from_file_location("make_guests", ROOT / "docs" / "make_guests.py")
make_guests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_guests)

each_guest = pytest.mark.parametrize("source", GUESTS, ids=lambda path: path.stem)


def test_pages_are_what_the_generator_makes_now():
    assert make_guests.stale() == [], "run: python docs/make_guests.py"


@each_guest
def test_header(source):
    guest = make_guests.Guest(source)
    assert guest.shows and not guest.shows.endswith(".")
    wanted = [part for part in make_guests.PARTS if part != "Exit code" or guest.note["end"] == "exit"]
    assert list(guest.parts) == wanted, "Exits:, See:, Exit code: each begin a line, in this order"
    assert all(text.endswith(".") for text in guest.parts.values())


@each_guest
def test_size(source):
    lines = source.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert '.include "guest.inc"' in lines


@each_guest
def test_note(source):
    note = make_guests.Guest(source).note
    assert note["group"] in GROUPS
    assert note["mode"] in ("real", "protected", "long", "user")
    assert note["end"] in make_guests.ENDS
    assert ("exit" in note) == (note["end"] == "exit")
    for name in filter(None, note.get("needs", "").split(",")):
        assert name in NEEDS or re.fullmatch("cap:KVM_CAP_[A-Z0-9_]+", name), name
    # Every code that the source gives is explained.
    explained = make_guests.Guest(source).parts.get("Exit code", "")
    for code in re.findall(r"^\s+exit (\d+)$", source.read_text(encoding="utf-8"), re.M):
        assert re.search(rf"\b{code}\b", explained) or "the size" in explained, code


def test_guest_inc_names_the_groups():
    text = (ROOT / "guests" / "guest.inc").read_text(encoding="utf-8")
    listed = re.search(r"group=\w+.*?lists it: (.*)", text)[1]
    assert listed.split(", ") == list(GROUPS)
