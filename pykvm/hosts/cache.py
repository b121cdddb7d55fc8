"""Where what is expensive to make is kept: $PYKVM_CACHE, else $XDG_CACHE_HOME/pykvm, else ~/.cache/pykvm.

Entries are named by the hash of what they are made from and appear by rename, so a half-made one is never seen.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["cache_dir", "cached"]


def cache_dir() -> Path:
    """The folder, made if need be."""
    base = os.environ.get("PYKVM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pykvm")
    path = Path(base)
    path.mkdir(parents=True, exist_ok=True)
    return path


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The entry ``name``; when it is missing, ``make(folder)`` fills a temporary folder that then takes its place."""
    final = cache_dir() / name
    if final.exists():
        return final
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_dir()))
    try:
        make(work)
        work.chmod(0o755)
        try:
            work.rename(final)
        except OSError:
            if not final.exists():  # somebody else was faster: theirs is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final
