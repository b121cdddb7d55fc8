"""Assembles guests/*.S into images: ``python guests/build.py OUTDIR``. setup.py calls build() for pykvm/images.

Each NAME.S becomes OUTDIR/NAME.elf, with its source beside it for the gallery. Only what changed is made again; an
image that has lost its source goes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pykvm.assemble import assemble_image  # noqa: E402  (from this checkout, which need not be installed)


def build(out: Path) -> list[str]:
    """Make the images in ``out``; returns the names of those made now. Raises AsmError."""
    out.mkdir(parents=True, exist_ok=True)
    tools = [*HERE.glob("*.inc"), HERE / "guest.ld", HERE / "build.py", HERE.parent / "pykvm" / "assemble.py"]
    newest_tool = max(path.stat().st_mtime for path in tools)
    sources = sorted(HERE.glob("*.S"))
    made = []
    for source in sources:
        image = out / f"{source.stem}.elf"
        if image.exists() and image.stat().st_mtime >= max(source.stat().st_mtime, newest_tool):
            continue
        temporary = image.with_suffix(".tmp")
        assemble_image(str(source), str(temporary), str(HERE / "guest.ld"))
        (out / source.name).write_bytes(source.read_bytes())
        os.replace(temporary, image)
        made.append(source.stem)
    for stale in list(out.iterdir()):
        if stale.suffix == ".elf" and not (HERE / f"{stale.stem}.S").exists() and b"pykvm\0" in stale.read_bytes():
            stale.unlink()  # one of ours that has lost its source: nobody else's file has the note
            stale.with_suffix(".S").unlink(missing_ok=True)
    return made


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python guests/build.py OUTDIR")
    for name in build(Path(sys.argv[1])):
        print(f"assembled {name}")
