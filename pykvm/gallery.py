"""The gallery: the guests that come with pykvm, assembled by the build into pykvm/images with their sources beside them."""

from __future__ import annotations

import os

from pykvm.errors import GuestImageError

__all__ = ["IMAGES", "find", "names", "source"]

IMAGES = os.path.join(os.path.dirname(__file__), "images")


def names() -> list[str]:
    """All guests, sorted."""
    try:
        return sorted(entry[:-4] for entry in os.listdir(IMAGES) if entry.endswith(".elf"))
    except FileNotFoundError:
        return []


def find(name: str) -> str:
    """The path of a guest's image. Raises GuestImageError with the nearest name."""
    path = os.path.join(IMAGES, name + ".elf")
    if os.path.exists(path):
        return path
    known = names()
    if not known:
        raise GuestImageError(name, None, "no file of that name, and the gallery is empty: build it with `make`")
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else "`pykvm guests` lists them"
    raise GuestImageError(name, None, f"no file and no gallery guest of that name; {hint}")


def source(name: str) -> str:
    """The assembly source of a guest."""
    with open(find(name)[:-4] + ".S", encoding="utf-8") as file:
        return file.read()
