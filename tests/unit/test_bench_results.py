"""Files of ``pykvm bench``: what is read, compared and drawn, and what is refused with a reason."""

import builtins
import json

import pytest

from pykvm.assemble import asm
from pykvm.bench import plot
from pykvm.bench.compare import compare, read_results, table
from pykvm.bench.kind import CODE_GPA, COMMAND, IDT_GPA, bank
from pykvm.bench.kinds import KINDS, chosen
from pykvm.cli import bench
from pykvm.errors import ConfigError
from pykvm.exit_reason import ExitReason


def results(scale=1.0, **changes):
    values = {"C": [scale * (1000.0 + i) for i in range(20)], "guest C": [scale * (900.0 + i) for i in range(20)]}
    estimate = {"median": 1010.0 * scale, "low": 1000.0 * scale, "high": 1019.0 * scale}
    row = {
        "kind": "PIO out 8", "tsc_khz": 2_600_000, "values": values, "c": estimate, "decomposition": {"hardware and KVM": estimate},
        "over_c": {"native": estimate}, "rounds": 20, "reaches": "loops", "note": "",
        "guest": {"C": {**estimate, "p99": 2000.0, "quantiles": [900.0, 950.0, 2000.0]}},
    }  # fmt: skip
    absent = {"kind": "HLT", "tsc_khz": 2_600_000, "unavailable": "no such thing"}
    return {"schema": 2, "benchmark": "exits", "host": {"cpu": "x"}, "noise": {"quiet": True}, "rows": [row, absent], **changes}


def written(tmp_path, contents):
    path = tmp_path / "results.json"
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return str(path)


def test_what_is_sound_is_read(tmp_path):
    assert read_results(written(tmp_path, results()))["rows"][0]["kind"] == "PIO out 8"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "nothing that pykvm bench --json has written"),
        ('{"schema": 2}', "nothing that pykvm bench --json has written"),
        (results(schema=1), "has schema 1; this pykvm reads schema 2: measure again"),
        (results(schema="x"), "has schema x"),
        (results(benchmark="loop"), "is of bench loop"),
        (results(rows=3), "not of that form"),
        (results(rows=[{}]), "not of that form"),
        (results(rows=[{"kind": "a", "tsc_khz": 0}]), "not of that form"),
        (results(rows=[{**results()["rows"][0], "over_c": {"native": 3}}]), "not of that form"),
        (results(rows=[{**results()["rows"][0], "note": None}]), "not of that form"),
        (results(rows=[{"kind": "a", "tsc_khz": 1, "values": {"C": []}, "guest": {}, "decomposition": {}}]), "not of that form"),
        (results(rows=[{"kind": "a", "tsc_khz": 1, "values": {"C": ["x"]}, "guest": {}, "decomposition": {}}]), "not of that form"),
        (results(rows=[{"kind": "a", "tsc_khz": 1, "values": {"C": [1]}, "guest": {"C": 1}, "decomposition": {}}]), "not of that form"),
    ],
)
def test_what_is_not_is_refused(tmp_path, contents, message):
    with pytest.raises(ConfigError, match=message):
        read_results(written(tmp_path, contents))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no JSON"):
        read_results(str(tmp_path / "x"))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_results(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_results(str(tmp_path))


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, "same"), (1.2, "slower"), (0.8, "faster")])
def test_verdicts(scale, verdict):
    a, b = results(), results(scale)
    differences = compare(a, b)
    assert [(d.kind, d.loop, d.verdict) for d in differences] == [("PIO out 8", "C", verdict), ("PIO out 8", "guest C", verdict)]
    text = table(differences, a, b)
    assert ("PIO out 8" in text) == (verdict != "same")


def test_small_differences_count_when_asked_for():
    assert {d.verdict for d in compare(results(), results(1.025))} == {"same"}
    assert {d.verdict for d in compare(results(), results(1.025), 0.02)} == {"slower"}


def test_other_hosts_and_noise_are_said():
    a, b = results(), results(host={"cpu": "y"}, noise={"quiet": False})
    text = table(compare(a, b), a, b)
    assert "the hosts differ in cpu" in text and "the second was measured on a machine that was not quiet" in text


def test_nothing_in_common():
    with pytest.raises(ConfigError, match="no measured kind in common"):
        compare(results(), results(rows=[]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "a.json"], "compare takes two files"),
        (["exits", "a.json"], "one word too many"),
        (["plot", "a.json"], "plot takes two files"),
        (["nonsense"], "no benchmark is called"),
        (["exits", "--kind", "PIO sideways"], "unknown kind 'pio sideways'"),
        (["exits", "--plot", "x.gif"], "has to end with .svg, .png, .pdf"),
        (["exits", "--plot", "/no/such/folder/x.svg"], "there is no folder"),
    ],
)
def test_the_command_line(words, message):
    with pytest.raises(ConfigError, match=message):
        bench.main(words)


def test_without_matplotlib(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="--plot needs matplotlib: pip install"):
        plot.check(str(tmp_path / "x.svg"))


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_drawing(tmp_path, ending):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib, which is not installed")
    plot.draw(results(), str(tmp_path / f"x.{ending}"))
    assert (tmp_path / f"x.{ending}").stat().st_size > 1000
    with pytest.raises(ConfigError, match="nothing was measured"):
        plot.draw(results(rows=[]), str(tmp_path / f"x.{ending}"))


def test_a_file_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which is not installed")
    (tmp_path / "a.json").write_text(json.dumps(results()))
    assert bench.main(["plot", str(tmp_path / "a.json"), str(tmp_path / "a.svg")]) == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_a_file_becomes_tables(tmp_path, capsys):
    assert bench.main(["table", written(tmp_path, results(scale=-1.5))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| PIO out 8 | −1 515 ±−14 | −1 515 ±−14 |  | −1 515 ±−14 |  | −1 515 / 2 000 |  |  |"
    assert lines[-1] == "- HLT: no such thing"


def test_kinds_have_names_of_their_own():
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert [kind.name for kind in chosen(["pio OUT", "cpuid"])] == ["PIO out 8", "PIO out 16", "PIO out 32", "PIO out 8, CPL3", "CPUID"]


def test_every_exit_reason_of_x86_has_a_kind():
    others = ("S390", "DCR", "NMI", "OSI", "PAPR", "WATCHDOG", "EPR", "ARM", "RISCV", "LOONGARCH")  # NMI is POWER's
    plain = {"IO", "MMIO", "HYPERCALL"}  # whose kinds are known by what they do
    reasons = {kind.reason for kind in KINDS if kind.reason} | plain
    assert reasons == {reason.name for reason in ExitReason if not reason.name.startswith(others)}
    assert all(kind.reason for kind in KINDS if kind.reaches == "bare")


def test_the_bank_has_all_kinds():
    code, programs = bank(KINDS, asm)
    assert set(programs) == {kind.name for kind in KINDS}
    end = CODE_GPA + len(code)
    assert end <= IDT_GPA < COMMAND
    entries = [programs[kind.name].entry for kind in KINDS]
    assert entries == sorted(entries) and entries[-1] < end
    assert all(set(programs[kind.name].handlers) == set(kind.handlers) for kind in KINDS)
