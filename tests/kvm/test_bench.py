"""``pykvm bench``: what it prints, and Ctrl-C in the midst of it. No times are asserted: they are what it is there to find out."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pykvm.bench.exits import KINDS, bench_exits
from pykvm.bench.paired import Interrupted, measure
from pykvm.cli import bench
from tests.conftest import TIME_SCALE

PATIENCE = 60 * TIME_SCALE
LOOPS = {"native", "python", "naive cffi, no device"}
slow = pytest.mark.slow


def interrupt_at(n):
    """A progress callback during whose n-th call somebody presses Ctrl-C."""
    calls = iter(range(1, n + 1))

    def progress(*_):
        if next(calls) == n:
            raise KeyboardInterrupt

    return progress


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_measure_takes_turns_and_drops_the_first_round():
    order = []
    variants = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    taken = measure(variants, 3)
    assert "".join(order) == "abcbcacababc"
    assert taken == {"a": [6.0, 8.0, 10.0], "b": [4.0, 9.0, 11.0], "c": [5.0, 7.0, 12.0]}


@pytest.mark.parametrize("variant", ["a", "b"])
def test_ctrl_c_keeps_complete_rounds_and_goes_on_up(variant):
    calls = []

    def run(name):
        calls.append(name)
        if calls.count(name) == 4 and name == variant:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(Interrupted) as caught:
        measure({name: lambda name=name: run(name) for name in "ab"}, 10)
    assert caught.value.measured == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_ctrl_c_with_nothing_measured():
    def variant():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        measure({"a": variant}, 10)
    assert not isinstance(caught.value, Interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        measure({"a": lambda: 1.0}, 10, interrupt_at(1))  # the first round does not count
    assert not isinstance(caught.value, Interrupted)


# --- exits ------------------------------------------------------------------------------------------------------------


@slow
def test_exits():
    rows = bench_exits(list(KINDS), batch=20, rounds=2)
    assert [row.kind for row in rows] == list(KINDS)
    assert all(row.rounds == 2 and set(row.over_c) == LOOPS for row in rows)


@slow
@pytest.mark.parametrize(("at", "rounds"), [(4, [3]), (2, [1]), (7, [5, 1])])
def test_ctrl_c_ends_all_kinds(at, rounds):
    """Five rounds and the first make six calls a kind."""
    with pytest.raises(Interrupted) as caught:
        bench_exits(list(KINDS), batch=10, rounds=5, progress=interrupt_at(at + (len(rounds) > 1)))
    assert [row.rounds for row in caught.value.measured] == rounds
    assert [row.kind for row in caught.value.measured] == list(KINDS)[: len(rounds)]


@slow
@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_what_was_measured(monkeypatch, capsys, as_json):
    progress = interrupt_at(3)
    monkeypatch.setattr(bench, "_progress", lambda label: progress)
    assert bench.main(["exits", "--batch", "10", *["--json"] * as_json]) == 130
    out, err = capsys.readouterr()
    assert err == "pykvm: interrupted; this is what was measured until then\n"
    if as_json:
        assert [(row["kind"], row["rounds"]) for row in json.loads(out)["rows"]] == [("PIO out", 2)]
    else:
        assert [line.split("  ")[0] for line in out.splitlines()[2:]] == ["exit", "PIO out"]


@slow
def test_start_prints_what_was_measured(monkeypatch, capsys):
    progress = interrupt_at(3)
    monkeypatch.setattr(bench, "_progress", lambda label: progress)
    assert bench.main(["start", "--rounds", "1"]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("create VM, run to the first exit, close\n") and "a whole process" not in out
    assert "interrupted" in err


@slow
def test_ctrl_c_in_the_c_loop():
    """A batch that would take a quarter of an hour; the first round's first is the C loop."""
    words = [sys.executable, "-m", "pykvm", "bench", "exits", "--kind", "PIO out", "--batch", "100000000"]
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not runs_a_vcpu(process.pid) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2 * TIME_SCALE)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, stdout, stderr) == (130, b"", b"pykvm: interrupted\n")


def runs_a_vcpu(pid):
    folder = f"/proc/{pid}/fd"
    try:
        return any("kvm-vcpu" in os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder))
    except OSError:
        return False


@slow
def test_the_c_loop_goes_on_after_other_signals():
    """A handler that does not raise: nothing is lost, nothing counted twice."""
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        rows = bench_exits(["PIO out", "MMIO read"], batch=3000, rounds=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert heard
    assert [row.rounds for row in rows] == [2, 2]


# --- irq and loop -----------------------------------------------------------------------------------------------------


@slow
def test_bench_irq_counts_only_interrupts_that_came(capsys):
    assert bench.main(["irq", "--batch", "20", "--rounds", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["benchmark"] == "irq"
    assert min(told["c"]["median"], told["python"]["median"]) > 0
    assert told["ratio"]["low"] <= told["ratio"]["median"] <= told["ratio"]["high"]


@slow
def test_bench_loop_counts_what_each_vcpu_does(capsys):
    assert bench.main(["loop", "--rounds", "1", "--cpus", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 3
    assert all(row["one_per_second"]["median"] > 0 and list(row["ratios"]) == ["2"] for row in rows)
