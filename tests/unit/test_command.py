"""The two ways into the command, before it is under way: Ctrl-C while Python still imports it."""

import subprocess
import sys
from pathlib import Path

import pytest

import pykvm

ROOT = Path(pykvm.__file__).parent.parent
SCRIPT = ROOT / "native" / "pykvm"
ENTRIES = {"python -m pykvm": "runpy.run_module('pykvm', run_name='__main__')", "pykvm": f"runpy.run_path({str(SCRIPT)!r})"}
INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt)
sys.argv = ["pykvm", "run", "hello"]
{entry}
"""


@pytest.mark.parametrize("module", ["pykvm.cli", "pykvm.errors", "pykvm.cli.run", "pykvm.machine", "pykvm._native"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_ctrl_c_while_it_is_imported(entry, module):
    if entry == "pykvm" and not SCRIPT.exists():
        pytest.skip("the sources are not at hand")
    code = INTERRUPTED.format(module=module, entry=ENTRIES[entry])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr in ("", "pykvm: interrupted\n")
