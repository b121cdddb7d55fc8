"""The README's programs do what the README says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="only the tests are here, not the README")

WANTED = {  # a word of the program -> what it prints
    "class Doubler": "<Result exit code=42, 3 exits, 0 characters>\n",
    "vm.create_vcpu": "ABCDE\nexit 42\n",
    "m.interrupt": "<Result exit code=42, 3 exits, 0 characters>\n",
}


def programs():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if README.exists() else []


def test_all_programs_are_known():
    assert len(programs()) == len(WANTED)


@pytest.mark.parametrize("word", WANTED)
def test_program(word, capsys):
    (program,) = (p for p in programs() if word in p)
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == WANTED[word]


def test_the_session_is_what_a_prompt_shows(capsys):
    """The addresses and fds aside."""
    (session,) = re.findall(r"```pycon\n(.*?)```", README.read_text(), re.DOTALL)
    import contextlib
    import io
    import sys

    names, shown = {}, io.StringIO()
    with contextlib.redirect_stdout(shown):
        for line in session.splitlines():
            if line.startswith(">>> "):
                code = line[4:]
                try:
                    value = eval(code, names)
                except SyntaxError:
                    exec(code, names)
                else:
                    sys.displayhook(value)
    said = [line for line in session.splitlines() if not line.startswith(">>> ")]

    def plain(text):
        return re.sub(r"fd \d+", "fd N", text)

    assert plain(shown.getvalue()).split() == plain("\n".join(said)).split()
