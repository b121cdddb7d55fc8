"""How the command's process ends: cli.leave(), and the script that calls it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "native/pykvm"
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def left(code, **options):
    """The finished process that ran ``code`` and left with status 7."""
    options = {"stdout": subprocess.PIPE, "env": BUFFERED, **options}
    code = f"import sys; from pykvm.cli import leave\n{code}\nleave(7)"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False, timeout=60, **options)
    assert done.returncode == 7, done.stderr
    return done


def test_what_waits_in_buffers_is_written():
    done = left("sys.stdout.write('out' * 10000 + ', no line end'); sys.stderr.write('err, no line end')")
    assert done.stdout == "out" * 10000 + ", no line end"
    assert done.stderr == "err, no line end"


def test_nothing_is_left_to_take_apart():
    done = left("class Kept:\n    def __del__(self): print('taken apart')\nsys.kept = Kept()")
    assert done.stdout == ""


@pytest.mark.parametrize(
    "code",
    [
        "import atexit; atexit.register(print, 'done')",
        "import weakref\nclass Folder: pass\nkept = Folder()\nweakref.finalize(kept, print, 'done')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('done'))).start()",
    ],
)
def test_who_waits_for_the_exit_has_it(code):
    assert left(code).stdout == "done\n"


def test_output_that_nobody_reads_changes_no_status():
    with open("/dev/full", "w") as full:
        assert left("sys.stdout.write('lost')", stdout=full).stderr == ""


def test_the_script_prints_all_and_gives_the_status():
    done = subprocess.run([sys.executable, SCRIPT, "--version"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "pykvm 0.1.0\n", "")
    done = subprocess.run([sys.executable, SCRIPT, "rum"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == "pykvm: unknown command 'rum'; did you mean run?\n"
