"""Command lines: what is understood, and what each mistake is answered with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.cli.options import Command, Option, number, whole
from pykvm.errors import ConfigError


def command(rest=False):
    return Command(
        "run",
        "IMAGE",
        "Run it.",
        [
            Option("--memory", "how much", "SIZE"),
            Option("--timeout", "how long", "SECONDS", 10.0, number),
            Option("--mode", "which", default="auto", choices=("auto", "real", "long")),
            Option("--env", "more than once", "NAME=VALUE", many=True),
            Option("--exit-status", "a switch"),
            Option("--no-assist", "a switch that turns off"),
            Option("-q", "a short one"),
            Option("--gdb", "a value or none", "[WHERE]", without="here", takes=lambda word: ":" in word),
        ],
        ["pykvm run hello"],
        rest,
    )


DEFAULTS = {"memory": None, "timeout": 10.0, "mode": "auto", "env": [], "exit_status": False, "assist": True, "q": False, "gdb": None}


@pytest.mark.parametrize(
    ("argv", "operands", "changed"),
    [
        ("", [], {}),
        ("a b", ["a", "b"], {}),
        ("a --memory 4M b", ["a", "b"], {"memory": "4M"}),
        ("--memory=4M a", ["a"], {"memory": "4M"}),
        ("--memory=a=b", [], {"memory": "a=b"}),
        ("--memory 1 --memory 2", [], {"memory": "2"}),
        ("--timeout 0.5 --mode long", [], {"timeout": 0.5, "mode": "long"}),
        ("--env A=1 --env=B=2", [], {"env": ["A=1", "B=2"]}),
        ("--exit-status -q", [], {"exit_status": True, "q": True}),
        ("--no-assist", [], {"assist": False}),
        ("--memory -1", [], {"memory": "-1"}),
        ("--gdb a", ["a"], {"gdb": "here"}),
        ("--gdb a:1 b", ["b"], {"gdb": "a:1"}),
        ("--gdb=a b", ["b"], {"gdb": "a"}),
        ("a --gdb", ["a"], {"gdb": "here"}),
        ("-", ["-"], {}),
        ("-q -- -q --help", ["-q", "--help"], {"q": True}),
    ],
)
def test_parse(argv, operands, changed):
    assert command().parse(argv.split(), 0, 2) == (operands, DEFAULTS | changed)


def test_an_empty_value_is_a_value():
    assert command().parse(["--memory", ""])[1]["memory"] == ""
    assert command().parse(["--memory="])[1]["memory"] == ""


def test_lists_are_not_shared_between_calls():
    one = command()
    one.parse(["--env", "A"])
    assert one.parse([])[1]["env"] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--memroy 4M", "unknown option --memroy; did you mean --memory"),
        ("--xyz", "unknown option --xyz; pykvm run --help lists them"),
        ("-x", "unknown option -x"),
        ("--memory", "--memory needs a value: --memory SIZE"),
        ("--exit-status=1", "--exit-status takes no value"),
        ("--mode fast", "--mode fast: use one of auto, real, long"),
        ("--timeout soon", "'soon' is not a number"),
        ("a b c", "'c' is one word too many: pykvm run IMAGE"),
        ("", "something is missing: pykvm run IMAGE"),
    ],
)
def test_mistakes(argv, message):
    with pytest.raises(ConfigError) as caught:
        command().parse(argv.split(), 1, 2)
    assert message in str(caught.value)


def test_a_converters_value_error_names_the_option():
    option = Option("--base", "", "N", convert=int)
    with pytest.raises(ConfigError, match="--base: invalid literal"):
        option.value_of("x1")


def test_rest_takes_any_number_of_operands():
    argv = ["amd", "-q", "--", "ls", "-l", "--", "x"]
    operands, values = command(rest=True).parse(argv, 1, 1)
    assert (operands, values["q"]) == (["amd", "ls", "-l", "--", "x"], True)
    with pytest.raises(ConfigError):
        command(rest=False).parse(argv, 1, 1)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        command().parse(["a", flag, "--nonsense"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: pykvm run IMAGE [OPTIONS]\n")
    assert "examples:\n  pykvm run hello" in text
    lines = text.splitlines()
    assert f"{'  --timeout SECONDS':<34}how long (default 10.0)" in lines
    assert f"{'  --mode auto|real|long':<34}which (default auto)" in lines
    assert f"{'  --exit-status':<34}a switch" in lines
    assert f"{'  --env NAME=VALUE':<34}more than once" in lines


def test_help_wraps_a_long_left_side():
    text = Command("x", "", "", [Option("--a-rather-long-name", "what it does", "ITS-VALUE-NAME")], []).help()
    assert f"  --a-rather-long-name ITS-VALUE-NAME\n{'':<34}what it does" in text
    assert "examples" not in text


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("0.25", 0.25), ("1e3", 1000.0), (" 2 ", 2.0)])
def test_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf", "-inf", "1e9", "1e-999", "0x10"])
def test_number_refuses(text):
    with pytest.raises(ConfigError):
        number(text)


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("0x10", 16), ("0b11", 3), ("1_000", 1000)])
def test_whole(text, value):
    assert whole(text) == value


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1.5", "010", "9" * 5000])
def test_whole_refuses(text):
    with pytest.raises(ConfigError):
        whole(text)


WORDS = ["--memory", "--memory=", "--timeout", "--timeout=1", "--mode", "long", "--env", "--env=x", "--exit-status", "--", "-", "--="]


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6).filter(lambda w: w not in ("-h", "--help"))), max_size=8))
def test_any_command_line_is_understood_or_refused(argv):
    try:
        operands, values = command(rest=True).parse(argv)
    except ConfigError as error:
        assert str(error)
    else:
        assert values.keys() == DEFAULTS.keys()
        assert set(operands) <= set(argv)
        assert values["mode"] in ("auto", "real", "long") and 0 < values["timeout"] < 1e9
        assert isinstance(values["exit_status"], bool)


@given(st.text())
def test_numbers_are_understood_or_refused(text):
    for convert in (number, whole):
        try:
            assert convert(text) > 0
        except ConfigError as error:
            assert "give a positive number" in str(error) or "is not a" in str(error)
