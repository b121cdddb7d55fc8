"""`pykvm shell`: the words at the prompt, on a real guest; HTML for notebooks."""

import subprocess
import sys

import pytest

import pykvm
from pykvm import Machine
from pykvm.cli import main
from pykvm.debug.shell import Words
from tests.conftest import TIMEOUT


def shell(capfd, *codes, status=0, image="hello"):
    assert main(["shell", image, *(word for code in codes for word in ("--command", code))]) == status
    return capfd.readouterr()


def test_words(capfd):
    out, _ = shell(
        capfd,
        "brk('puts')",
        "cont()",
        "step(2)",
        "regs()",
        "walk('rsp')",
        "dis(n=3)",
        "mem('puts', 16)",
        "tables()",
        "unbrk('puts')",
        "cont()",
    )
    assert "breakpoint at" in out and "<puts>" in out
    assert "rdx=00000000000003f8" in out
    assert "PML4[  0]" in out and "2M pages" in out
    assert "lodsb" in out and "66 ba f8 03" in out
    assert "console: 'Hello from long mode.\\n'\nexit 0" in out


def test_objects(capfd):
    out, _ = shell(capfd, "m.vcpu is vcpu, ram is m.memory, pykvm.__version__ != ''")
    assert "(True, True, True)" in out


def test_a_crash_is_explained(capfd):
    out, _ = shell(capfd, "cont()", image="triple_fault")
    assert "triple fault" in out


def test_what_is_wrong(capfd):
    assert "did you mean puts" in shell(capfd, "brk('put')", status=64).err
    assert "ZeroDivisionError" in shell(capfd, "1/0", status=1).err
    assert "--command" in shell(capfd, "(", status=64).err
    assert "vCPUs 0 to 0" in shell(capfd, "cpu(3)", status=64).err


@pytest.mark.slow
def test_the_prompt():
    """Python's own, with a pipe for a terminal."""
    code = "import sys; sys.modules['IPython'] = None; from pykvm.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "triple_fault", "--shell-on-crash"],
        input="regs()\nbrk('nosuch')\n", capture_output=True, text=True, timeout=10 * TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 70
    assert "rip=" in done.stdout and "cr4=" in done.stdout  # AMD-V has lost the registers of a triple fault
    assert "ConfigError: 'nosuch' is no number and no symbol" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step(n=1)" in done.stderr


@pytest.mark.slow
def test_ipython_where_it_is(capfd):
    pytest.importorskip("IPython")
    done = subprocess.run(
        [sys.executable, "-m", "pykvm", "shell", "hello"],
        input="print(hex(m.boot.entry))\n",
        capture_output=True,
        text=True,
        timeout=10 * TIMEOUT,
    )
    assert "0x100000" in done.stdout


def test_html_for_notebooks():
    with Machine("hello") as machine:
        result = machine.run(TIMEOUT)
        words = Words(machine)
        shown = {
            "IO": result, "rflags: ": machine.vcpu.get_regs(), "PE MP": machine.vcpu.get_sregs(), "anonymous": machine.memory,
            "KVM_EXIT_IO": pykvm.IoOut(0x3F8, 1, b"<", 1),
            "4-level paging": machine.vm.page_tables(), "hva": machine.walk(0x100000), "lea": words.dis("_start"),
        }  # fmt: skip
        for text, value in shown.items():
            assert text in value._repr_html_(), text
    with Machine(pykvm.asm("mov al, '<'; out 0xe9, al; hlt", bits=64, org=0x100000), mode="long", memory="2M") as machine:
        assert "&lt;" in machine.run(TIMEOUT)._repr_html_()
