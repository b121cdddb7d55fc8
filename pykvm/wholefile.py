"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["check_place", "replace_file"]


def check_place(option: str, path: str) -> None:
    """Raises ConfigError where replace_file() could not write: what a run is to be kept in is looked at before it, not after."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ConfigError(f"{option} {path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise ConfigError(f"{option} {path}: that is a folder: name a file in it")
    if not os.access(path if _is_special(path) else folder, os.W_OK):  # a file is replaced, which its folder must allow
        raise ConfigError(f"{option} {path}: it cannot be written there")


def replace_file(path: str, write: Callable[[Any], object]) -> None:
    """A new file in the place of ``path``: ``write`` gets it, open for bytes. Raises OSError."""
    if _is_special(path):
        with open(path, "wb") as file:
            write(file)
        return
    new = f"{path}.{os.getpid()}.new"
    try:
        with open(new, "wb") as file:
            write(file)
        os.replace(new, path)
    except BaseException:
        if os.path.exists(new):
            os.unlink(new)
        raise


def _is_special(path: str) -> bool:
    """Whether it is /dev/null, a pipe or the like: nothing may be put in its place."""
    return os.path.exists(path) and not os.path.isfile(path)
