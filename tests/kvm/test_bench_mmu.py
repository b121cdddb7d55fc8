"""``pykvm bench mmu``: what its guests do, what it prints, Ctrl-C, and reports side by side. No times are asserted."""

import contextlib
import glob
import json
import os
import re

import pytest

from pykvm.abi import lib
from pykvm.assemble import asm
from pykvm.bench import mmu, mmuguest
from pykvm.bench.ept import caveats, compare, load_report
from pykvm.bench.mmu import WORKLOADS, bench_mmu, describe_host
from pykvm.bench.paired import Interrupted
from pykvm.cli.bench_mmu import comparison_table, main, report_table
from pykvm.errors import ConfigError, PykvmError
from pykvm.units import MIB, PAGE_SIZE

SIZE = 2 * MIB
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Little of everything: an emulated host has to do this too."""
    monkeypatch.setattr(mmu, "OPERATIONS", 512)
    monkeypatch.setattr(mmu, "MAP_PASSES", 1)


def report_of(**changes):
    """A report as JSON gives it, with one row."""
    host = {
        "cpu": "Some CPU", "under_a_hypervisor": "no", "emulator": "", "kernel": "6.1", "module": "kvm_intel",
        "two_level_paging": "EPT: on", "paging": "EPT", "host_levels": 4, "cpl0_emulated": False, "tsc_khz": 2000000,
    }  # fmt: skip
    estimate = {"median": 30.0, "low": 20.0, "high": 40.0}
    row = {
        "workload": "chase", "guest_page": 4096, "host_page": 2 << 20, "backing": "2M, hugetlb", "operations": 512, "per_op": estimate,
        "native": estimate, "native_as": "the same code", "native_faults_per_op": 0.0, "ratio": {"median": 1.0, "low": 0.9, "high": 1.1},
        "counters_per_op": {"exits": 0.0, "pf_taken": 0.25}, "mapped": {"pages_2m": 1},
    }  # fmt: skip
    report = {
        "schema": 1,
        "benchmark": "mmu",
        "host": host,
        "size": SIZE,
        "rounds": 3,
        "rows": [row],
        "misses": [],
        "walk": [],
        "notes": [],
    }
    for name, value in changes.items():
        if name in host:
            host[name] = value
        else:
            report[name] = value
    return json.loads(json.dumps(report))


def processes():
    """This process's children."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as file:
            text = file.read()
            if int(text.rpartition(")")[2].split()[1]) == os.getpid():
                found.add(path)
    return found


def written(folder, name, report):
    path = folder / name
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    return str(path)


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    """Every workload once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmu, "OPERATIONS", 512)
        patch.setattr(mmu, "FIRST_TOUCH", SIZE)
        return bench_mmu(size=SIZE, rounds=2)


def test_every_workload_has_rows(report):
    assert {row.workload for row in report.rows} == set(WORKLOADS)
    assert all(row.per_op.value > 0 for row in report.rows)
    alone = {row.workload for row in report.rows if row.native is None}
    assert alone == {"first_map"}
    assert json.loads(json.dumps(report.as_dict()))["schema"] == 1


def test_first_touch_faults_once_a_page(report):
    """On each host KVM counts a page fault for each fresh 4 KiB page; where memory is the host's already, KVM may map several at once."""
    row = next(row for row in report.rows if row.workload == "first_touch" and row.host_page == PAGE_SIZE)
    if not row.counters:
        pytest.skip("this KVM has no KVM_GET_STATS_FD")
    assert 0.9 < row.counters["pf_taken"] < 2.5
    assert 0.9 < row.native_faults < 1.1


def test_the_small_page_decides(report):
    """KVM maps a 2 MiB page only where the host has one; with shadow paging the guest has to have one too."""
    shadow = report.host["paging"] == "shadow"
    for row in report.rows:
        if row.workload != "chase" or not row.mapped or report.host["paging"] == "unknown":
            continue
        given = "100%" in row.backing or "hugetlb" in row.backing
        huge = row.host_page > PAGE_SIZE and (not shadow or row.guest_page > PAGE_SIZE) and given
        assert bool(row.mapped["pages_2m"]) == huge, (row.guest_page, row.host_page, row.mapped)


@pytest.mark.shadow
def test_paging_decides_who_walks():
    """The guest's kernel changes page tables without an exit under EPT and NPT; shadow paging has to see each change."""
    host = describe_host()
    if host["cpl0_emulated"] or host["paging"] == "unknown":
        pytest.skip("CPL0 code is emulated here, or what is in force cannot be known")
    rows = {row.workload: row for row in bench_mmu(["map_unmap", "switch"], SIZE, 1).rows}
    if not rows["switch"].counters:
        pytest.skip("this KVM has no KVM_GET_STATS_FD")
    if host["paging"] == "shadow":
        assert rows["map_unmap"].counters["exits"] > 0.9 and rows["switch"].counters["exits"] > 0.9
    else:
        assert rows["map_unmap"].counters["exits"] < 0.2 and rows["switch"].counters["exits"] < 0.2


@pytest.mark.parametrize("pages", [2, 512])
def test_the_chain_is_one_cycle_over_all_pages(pages):
    ram = bytearray(pages * PAGE_SIZE)
    mmuguest.fill_chain(ram, len(ram))
    at, seen = 0, []
    for _ in range(pages):
        seen.append(at // PAGE_SIZE)
        at = int.from_bytes(ram[at : at + 8], "little")
    assert at == 0 and sorted(seen) == list(range(pages))


def test_guest_and_process_read_the_same(system):
    """The chase ends elsewhere when it is not a whole cycle: the guest's result is the process's."""
    with mmuguest.Function(asm(mmuguest.FUNCTIONS["chase"])) as function, mmuguest.Ram(SIZE, False) as ram:
        mmuguest.fill_chain(ram.bytes, SIZE)
        guest = mmuguest.user_guest(system, "chase", ram, PAGE_SIZE, 77)
        function(ram.hva, 77)
        guest.run()
        assert guest.memory.read_u64(mmuguest.RESULT_GPA) == function.result != 0
        guest.close()


def test_memory_is_aligned_and_alone():
    a, b = mmuguest.Ram(SIZE, False), mmuguest.Ram(SIZE, False)
    assert a.hva % SIZE == b.hva % SIZE == 0
    a.populate()
    assert mmuguest.smaps_field(a.hva, "Anonymous") == SIZE
    assert mmuguest.smaps_field(b.hva, "Anonymous") == 0
    a.discard()
    assert mmuguest.smaps_field(a.hva, "Anonymous") == 0 and bytes(a.bytes[0:8]) == bytes(8)
    a.close()
    b.close()
    assert mmuguest.smaps_field(0x1234, "Size") == 0


def test_code_is_never_writable_and_executable():
    with mmuguest.Function(b"\xc3") as function, open("/proc/self/maps") as maps:
        line = next(line for line in maps if line.startswith(f"{function.at:x}-"))
    assert line.split()[1] == "r-xp"
    assert lib.pykvm_bench_code(b"\x90" * 5000, 5000) < 0


@slow
def test_nothing_is_left_behind():
    before = processes()
    fds, maps, cpus = len(os.listdir("/proc/self/fd")), 0, os.sched_getaffinity(0)
    for turn in range(3):
        bench_mmu(["first_map", "switch"], SIZE, 1)
        with open("/proc/self/maps") as file:
            now = len(file.readlines())
        maps = now if turn == 0 else maps
        assert now <= maps + 2
    assert len(os.listdir("/proc/self/fd")) == fds
    assert os.sched_getaffinity(0) == cpus
    assert processes() == before


def test_what_cannot_be_measured():
    for wrong in ({"size": 3 * MIB}, {"size": MIB}, {"size": 1 << 40}, {"workloads": ["chess"]}):
        with pytest.raises(ConfigError):
            bench_mmu(**{"size": SIZE, "rounds": 1, **wrong})


def test_a_guest_that_reads_something_else_is_an_error(monkeypatch):
    read_u64 = mmuguest.GuestMemory.read_u64
    monkeypatch.setattr(mmuguest.GuestMemory, "read_u64", lambda self, gpa: read_u64(self, gpa) + 1)
    with pytest.raises(PykvmError, match="something else"):
        bench_mmu(["chase"], SIZE, 1)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def stop_at(workload, i):
    def progress(name, done, rounds):
        if (name, done) == (workload, i):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("at", "rows"), [(("switch", 0), ["first_map"]), (("switch", 2), ["first_map", "switch"])])
@slow
def test_ctrl_c_keeps_what_was_measured(at, rows):
    before = processes()
    with pytest.raises(Interrupted) as caught:
        bench_mmu(["first_map", "switch"], SIZE, 3, progress=stop_at(*at))
    assert [row.workload for row in caught.value.measured.rows] == rows
    assert processes() == before


def test_ctrl_c_with_nothing_measured():
    with pytest.raises(KeyboardInterrupt) as caught:
        bench_mmu(["first_map"], SIZE, 3, progress=stop_at("first_map", 0))
    assert not isinstance(caught.value, Interrupted)


@slow
def test_ctrl_c_prints_and_says_so(capsys, monkeypatch):
    from pykvm.cli import bench_mmu as cli

    monkeypatch.setattr(cli, "_progress", lambda: stop_at("switch", 0))
    assert main(["--workload", "first_map", "--workload", "switch", "--size", "2M", "--rounds", "1", "--json"]) == 130
    out, err = capsys.readouterr()
    assert [row["workload"] for row in json.loads(out)["rows"]] == ["first_map"]
    assert "interrupted" in err


# --- the command ------------------------------------------------------------------------------------------------------


@slow
def test_text_names_the_paging(capsys):
    assert main(["--workload", "chase", "--size", "2M", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^paging in force: (EPT|NPT|shadow|unknown)", out, re.M)
    assert re.search(r"^ +4K +4K +4 +(24|29) +4 +4K$", out, re.M)
    assert re.search(r"^chase +4K on 4K ", out, re.M)


def test_json_is_what_compare_reads(capsys, tmp_path):
    assert main(["--workload", "first_map", "--size", "2M", "--rounds", "1", "--json", "--emulator", "Bochs"]) == 0
    out = capsys.readouterr().out
    path = written(tmp_path, "a.json", out)
    assert load_report(path)["host"]["emulator"] == "Bochs"
    assert main(["--compare", path, path]) == 0
    text = capsys.readouterr().out
    assert "first_map" in text and "charges nothing for page walks" in re.sub(r"\s+", " ", text)
    assert main(["--compare", path, path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["b_over_a"] == 1.0


@pytest.mark.parametrize("line", ["--compare", "--compare one.json", "one.json", "--size 3M", "--workload chess", "--rounds 0"])
def test_wrong_command_lines(line):
    with pytest.raises(ConfigError) as caught:
        main(line.split())
    assert "\n" not in str(caught.value)


# --- reports ----------------------------------------------------------------------------------------------------------


def test_compare_pairs_rows():
    a, b = report_of(), report_of(paging="shadow", two_level_paging="EPT: off (shadow paging)")
    b["rows"][0]["per_op"]["median"] = 60.0
    b["rows"].append({**b["rows"][0], "workload": "switch"})
    (pair,) = compare(a, b)
    assert (pair.workload, pair.guest_page, pair.host_page, pair.times) == ("chase", 4096, 2 << 20, 2.0)
    text = comparison_table(a, b)
    line = next(line for line in text.splitlines() if line.startswith("chase")).split()
    assert line[1:] == ["4K", "on", "2M", "30.0", "60.0", "2.00", "0", "0", "1.00", "1.00", "19", "4"]
    assert "A: EPT" in comparison_table(a, a) and "B: EPT" in comparison_table(a, a)


@slow
def test_a_comparison_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib, which is not installed")
    a = written(tmp_path, "a.json", json.dumps(report_of()))
    b = written(tmp_path, "b.json", json.dumps(report_of(paging="shadow", two_level_paging="EPT: off (shadow paging)")))
    picture = tmp_path / "ept.svg"
    assert main(["--compare", a, b, "--plot", str(picture)]) == 0
    assert "<svg" in picture.read_text() and "chase" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="goes with --compare"):
        main(["--plot", str(picture)])
    with pytest.raises(ConfigError, match="has to end with"):
        main(["--compare", a, b, "--plot", "x.gif"])


def test_a_report_without_counters_or_counterpart_prints():
    a = report_of(paging="unknown", two_level_paging="unknown")
    a["rows"][0].update(native=None, ratio=None, native_as="", counters_per_op={}, mapped={})
    line = next(line for line in report_table(a).splitlines() if line.startswith("chase")).split()
    assert line[-5:] == ["-", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"emulator": "Bochs"}, "nothing for page walks"), ({"emulator": "QEMU TCG"}, "nothing of hardware"),
     ({"cpl0_emulated": True}, "measure that emulator"), ({"under_a_hypervisor": "yes"}, "itself a guest"), ({}, None)],
)  # fmt: skip
def test_what_has_to_be_said(change, said):
    lines = caveats(report_of(**change)["host"])
    assert (said is None and not lines) or (len(lines) == 1 and said in lines[0])


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "is not JSON"), ("{", "is not JSON"), ("[" * 100000, "is not JSON"), ("[]", "no report"), ("null", "no report"),
     ('{"benchmark": "exits", "schema": 1}', "no report"), ('{"benchmark": "mmu", "schema": 99}', "has schema 99"),
     ('{"benchmark": "mmu", "schema": 1}', "damaged"), (report_of(rows=[{}]), "damaged"), (report_of(rows=7), "damaged"),
     (report_of(tsc_khz="fast"), "damaged"), (report_of(tsc_khz=0), "damaged"), (report_of(misses=[1]), "damaged")],
)  # fmt: skip
def test_what_is_no_report(tmp_path, content, said):
    path = written(tmp_path, "x.json", content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_report(path)
    assert "\n" not in str(caught.value) and "x.json" in str(caught.value)


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError) as caught:
            load_report(str(path))
        assert "\n" not in str(caught.value)


def test_what_cannot_be_compared():
    with pytest.raises(ConfigError, match="working sets"):
        compare(report_of(), report_of(size=4 * MIB))
    with pytest.raises(ConfigError, match="in common"):
        compare(report_of(), report_of(rows=[]))
