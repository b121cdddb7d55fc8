"""Flat binaries: the file is the memory. Real-mode ones go to 0x7C00, as a BIOS does it, others to 1 MiB."""

from __future__ import annotations

from pykvm.loaders.image import ImageInfo, Segment
from pykvm.platform import LOAD_GPA, REAL_LOAD_GPA

__all__ = ["peek"]


def peek(data: bytes, path: str, mode: str, why: str = "") -> ImageInfo:
    """A flat image has no header: ``mode`` "auto" means real."""
    chosen = "real" if mode == "auto" else mode
    gpa = REAL_LOAD_GPA if chosen == "real" else LOAD_GPA
    return ImageInfo(path, "flat", chosen, gpa, [Segment(gpa, 0, len(data), len(data))], {}, why=why)
