"""The exit ledger without KVM: tables of made-up records, files from anyone, KVM's counters and the trace as texts."""

import io
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm import kvmstats, tracefs
from pykvm.abi import ffi
from pykvm.cli import main
from pykvm.errors import ConfigError
from pykvm.ledger import BY, RECORD_DTYPE, Ledger, kind_name
from pykvm.ledgerfile import json_path
from pykvm.records import RecordRing

IO, HLT, MMIO, RDMSR = 2, 5, 6, 29
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def records(*rows):
    """Rows of (reason, qualifier, is_write, ticks in KVM, ticks in the handler) or dictionaries, one after the other in time."""
    made, now = np.zeros(len(rows), RECORD_DTYPE), 1000
    for record, (reason, qualifier, is_write, kvm, handler) in zip(made, rows, strict=True):
        record["reason"], record["qualifier"], record["is_write"], record["size"], record["count"] = reason, qualifier, is_write, 1, 1
        record["tsc_before"], record["tsc_after"], record["tsc_handled"] = now, now + kvm, now + kvm + handler
        now += kvm + handler
    return made


SOME = records((IO, 0x3F8, 1, 100, 10), (IO, 0x3F8, 1, 300, 30), (IO, 0x3F8, 0, 200, 5), (MMIO, 0xD0000000, 1, 50, 1), (HLT, 0, 0, 7, 0))


def ledger(of=SOME):
    return Ledger(records=of)


# --- records and tables -----------------------------------------------------------------------------------------------


def test_the_dtype_is_the_c_structure():
    fields = dict(ffi.typeof("struct pykvm_record").fields)
    assert RECORD_DTYPE.itemsize == ffi.sizeof("struct pykvm_record") == 64
    assert list(RECORD_DTYPE.names) == list(fields)
    for name, field in fields.items():
        assert RECORD_DTYPE.fields[name][1] == field.offset
        assert RECORD_DTYPE.fields[name][0].itemsize == ffi.sizeof(field.type)


def test_a_ring_that_keeps_takes_no_memory_while_it_is_empty():
    before = _resident()
    ring = RecordRing(1 << 24, keep=True)  # 1 GiB
    assert _resident() - before < 1 << 20
    assert ring.cdata.capacity == 1 << 24


def _resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_tables():
    by = {what: {row.name: row for row in ledger().by(what)} for what in BY}
    assert {name: row.count for name, row in by["reason"].items()} == {"IO": 3, "MMIO": 1, "HLT": 1}
    assert set(by["qualifier"]) == {"IO out 0x3f8", "IO in 0x3f8", "MMIO write 0xd0000000", "HLT"}
    assert set(by["port"]) == {"IO out 0x3f8", "IO in 0x3f8"}
    assert set(by["address"]) == {"MMIO write 0xd0000000"}
    assert {row.count for row in by["vcpu"].values()} == {5}
    out = by["port"]["IO out 0x3f8"]
    assert (out.count, out.kvm_total, out.kvm_median, out.kvm_p99) == (2, 400, 100, 300)
    assert (out.handler_total, out.handler_median, out.handler_p99, out.key) == (40, 10, 30, 0x3F8)


def test_times_are_nanoseconds_when_the_frequency_is_known():
    some = ledger()
    some.tsc_khz = 2_000_000
    assert some.by("address")[0].kvm_total == 25
    assert some.summary() == {"exits": 5, "lost": 0, "tsc_khz": 2_000_000, "kvm_ns": 328, "handler_ns": 23, "between_ns": 0}


def test_an_exit_that_nobody_has_answered_has_no_handler_time():
    made = SOME.copy()
    made["tsc_handled"][1] = 0
    row = ledger(made).by("port")[0]
    assert (row.count, row.kvm_total, row.handler_total, row.handler_median) == (2, 400, 10, 10)


@pytest.mark.parametrize(("by", "first"), [("kvm", 300), ("handler", 300), ("total", 300)])
def test_slowest(by, first):
    slow = ledger().slowest(2, by)
    assert int(slow["tsc_after"][0] - slow["tsc_before"][0]) == first
    assert len(slow) == 2


def test_wrong_names_are_refused():
    with pytest.raises(ConfigError, match="use one of reason"):
        ledger().by("colour")
    with pytest.raises(ConfigError, match="total"):
        ledger().slowest(1, "colour")


def test_an_empty_ledger():
    empty = ledger(records())
    assert [empty.by(what) for what in BY] == [[]] * len(BY)
    assert len(empty.slowest()) == 0
    assert empty.summary()["exits"] == 0


def test_names():
    made = records((RDMSR, 0x10, 0, 1, 1), (99, 0, 0, 1, 1), (MMIO, 0x1000, 0, 1, 1))
    assert [kind_name(record) for record in made] == ["X86_RDMSR 0x10", "EXIT_99", "MMIO read 0x1000"]
    assert kind_name(made[2], of_statistics=True) == "MMIO read"


any_u64 = st.integers(0, 2**64 - 1)


@FEW
@given(st.lists(st.binary(min_size=64, max_size=64), max_size=20))
def test_tables_of_any_bytes(rows):
    made = ledger(np.frombuffer(b"".join(rows), RECORD_DTYPE))
    for what in BY:
        table = made.by(what)
        if what not in ("port", "address"):
            assert sum(row.count for row in table) == len(rows)
        assert all(row.kvm_total >= row.kvm_p99 >= row.kvm_median >= 0 for row in table)
        assert all(row.handler_total >= row.handler_p99 >= row.handler_median >= 0 for row in table)
    assert sum(row.count for row in made.stat_rows()) == len(rows)
    assert made.summary()["exits"] == len(rows)
    assert len(made.slowest(5)) == min(5, len(rows))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """The path of a ledger that save() has written."""
    path = str(tmp_path / "some.npy")
    some = ledger()
    some.tsc_khz, some.about = 1_000_000, {"image": "x.elf", "mode": "real"}
    some.kvm_before = {"vm": [{"pages_4k": 1}], "vcpus": [{"exits": 1, "hist": [0, 0]}]}
    some.kvm_after = {"vm": [{"pages_4k": 1}], "vcpus": [{"exits": 6, "hist": [0, 3]}]}
    some.hardware = {"clock": "x86-tsc", "lost": 0, "reasons": {"IO_INSTRUCTION": {"count": 3, "led_to": {"IO out 0x3f8": 2}}}}
    some.save(path)
    return path


def test_round_trip(saved):
    back = Ledger.load(saved)
    assert np.array_equal(back.records, SOME)
    assert np.array_equal(np.load(saved, allow_pickle=False), SOME)
    assert (back.tsc_khz, back.lost, back.about["mode"]) == (1_000_000, 0, "real")
    assert back.kvm_counters() == {"exits": 5, "hist": [0, 3]}
    assert back.hardware["reasons"]["IO_INSTRUCTION"] == {"count": 3, "led_to": {"IO out 0x3f8": 2}}
    assert sorted(os.listdir(os.path.dirname(saved))) == ["some.json", "some.npy"]


def test_records_alone_have_no_frequency(saved):
    os.unlink(json_path(saved))
    back = Ledger.load(saved)
    assert (back.tsc_khz, back.unit, len(back)) == (0, "tsc", 5)


def test_a_json_of_other_records_is_refused(saved):
    np.save(saved, SOME[::-1])
    with pytest.raises(ConfigError, match="other records"):
        Ledger.load(saved)


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        ledger().save(tmp_path / "x.npy")
    assert os.listdir(tmp_path) == []


def test_other_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npy"
    for array in (np.arange(5), np.zeros((2, 2), RECORD_DTYPE), np.array([{}, None], object), np.zeros((), RECORD_DTYPE)):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(ConfigError, match="not a ledger"):
            Ledger.load(path)
    with pytest.raises(ConfigError, match="No such file"):
        Ledger.load(tmp_path / "none.npy")
    with pytest.raises(ConfigError, match="directory"):
        Ledger.load(tmp_path)


@FEW
@given(st.integers(0, 1000), st.binary(max_size=8))
def test_cut_off_or_longer(saved, length, more):
    with open(saved, "rb") as file:
        whole = file.read()
    changed = whole[:length] + more
    with open(saved, "wb") as file:
        file.write(changed)
    try:
        if changed == whole:
            assert len(Ledger.load(saved)) == 5
        else:
            with pytest.raises(ConfigError, match=r"some\.(npy|json)"):
                Ledger.load(saved)
    finally:
        with open(saved, "wb") as file:
            file.write(whole)


def _npy(header, data=b""):
    text = header.encode("latin-1", "replace")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@FEW
@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=200).map(lambda b: b"\x93NUMPY\x01\x00" + b),
        st.text(max_size=200).map(_npy),
        st.builds(
            lambda descr, shape, order: _npy(str({"descr": descr, "fortran_order": order, "shape": shape})),
            st.sampled_from([RECORD_DTYPE.descr, "|O", "<u8", [("a", "|O")], "V64", 3]),
            st.sampled_from([(0,), (1,), (2**62,), (-1,), (1, 1), (), "x", (2**70,)]),
            st.sampled_from([True, False, None]),
        ),
        st.sampled_from(["(" * 5000, "{'a':" * 3000, "[" * 100 + "]" * 100, "__import__('os')"]).map(_npy),
    )
)
def test_hostile_records(tmp_path, data):
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    try:
        assert len(Ledger.load(path)) == 0
    except ConfigError as error:
        assert str(path) in str(error)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=8,
)
KEYS = ["format", "records", "crc32", "lost", "tsc_khz", "about", "sites", "kvm_before", "kvm_after", "hardware"]


@FEW
@given(st.dictionaries(st.sampled_from(KEYS), st.one_of(json_values, st.just(...)), max_size=3))
def test_hostile_json(saved, changes):
    """A key that became something else, or is gone (...). What loads can be shown, and what cannot is a ConfigError."""
    with open(json_path(saved)) as file:
        whole = file.read()
    about = json.loads(whole)
    for key, value in changes.items():
        if value is ...:
            del about[key]
        else:
            about[key] = value
    try:
        with open(json_path(saved), "w") as file:
            json.dump(about, file)
        try:
            loaded = Ledger.load(saved)
        except ConfigError as error:
            assert "some.json" in str(error)
        else:
            loaded.summary(), loaded.by("rip"), loaded.kvm_counters(), repr(loaded)
            assert main(["ledger", saved]) == 0
    finally:
        with open(json_path(saved), "w") as file:
            file.write(whole)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null", '{"format": 1}', '{"format": 2}', "\0", "1" * 5000])
def test_broken_json(saved, text):
    with open(json_path(saved), "w") as file:
        file.write(text)
    with pytest.raises(ConfigError, match=r"some\.json"):
        Ledger.load(saved)


def test_texts_from_a_file_cannot_steer_the_terminal(saved, capsys):
    with open(json_path(saved)) as file:
        about = json.load(file)
    about["about"] = {"image": "\x1b]0;evil\x07\ud800.elf"}
    about["sites"] = [[0, 0, IO, 1, 1, 0, "\x1b[2J", "nop"]]
    with open(json_path(saved), "w") as file:
        json.dump(about, file)
    assert main(["ledger", saved]) == 0
    assert "\x1b" not in capsys.readouterr().out


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_text(saved, capsys):
    assert main(["ledger", saved]) == 0
    out = capsys.readouterr().out
    assert "5 exits of x.elf in real mode" in out
    for title in (
        "by KVM's exit reason",
        "by port",
        "by guest physical address",
        "by instruction",
        "the slowest exits",
        "KVM_GET_STATS_FD",
    ):
        assert title in out
    assert "IO_INSTRUCTION         3  2 IO out 0x3f8" in out
    assert main(["ledger", saved, "--by", "qualifier", "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "... and 3 more with 3 exits" in out and "slowest" not in out


def test_command_json(saved, capsys):
    assert main(["ledger", saved, "--json", "--slowest", "3"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["summary"]["exits"] == 5
    assert {row["name"]: row["count"] for row in got["tables"]["reason"]} == {"IO": 3, "MMIO": 1, "HLT": 1}
    assert [exit["kvm_ns"] for exit in got["slowest"]] == [300, 200, 100]
    assert got["kvm_counters"] == {"exits": 5, "hist": [0, 3]}


def test_command_csv(saved, capsys):
    import csv

    assert main(["ledger", saved, "--csv", "--by", "port"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["by"], row["name"], row["key"], row["count"]) for row in rows] == [
        ("port", "IO out 0x3f8", "1016", "2"),
        ("port", "IO in 0x3f8", "1016", "1"),
    ]


def test_command_complaints(saved, capsys, tmp_path):
    assert main(["ledger", str(tmp_path / "none.npy")]) == 64
    assert "none.npy: cannot be read" in capsys.readouterr().err
    assert main(["ledger", saved, "--json", "--csv"]) == 64
    assert main(["ledger"]) == 64


# --- KVM's counters ---------------------------------------------------------------------------------------------------


def _stats_file(**counters):
    name_size = 16
    at = 24
    data = at + len(counters) * (16 + name_size)
    descriptors, values = b"", b""
    for name, value in counters.items():
        value = value if isinstance(value, list) else [value]
        descriptors += struct.pack("IhHII", 0, 0, len(value), len(values), 0) + name.encode().ljust(name_size, b"\0")
        values += struct.pack(f"{len(value)}Q", *value)
    return struct.pack("6I", 0, name_size, len(counters), 24, at, data) + descriptors + values


def _read(content):
    fd = os.memfd_create("stats")
    try:
        os.write(fd, content)
        return kvmstats.read_stats(fd)
    finally:
        os.close(fd)


def test_counters():
    assert _read(_stats_file(exits=5, hist=[1, 2, 3])) == {"exits": 5, "hist": [1, 2, 3]}


@FEW
@given(st.integers(0, 120), st.binary(max_size=40))
def test_broken_counters(at, junk):
    whole = _stats_file(exits=5, hist=[1, 2, 3])
    assert isinstance(_read(whole[:at] + junk + whole[at + len(junk) :]), dict)


def test_difference():
    before = {"vm": [{"pages": 3}], "vcpus": [{"exits": 1, "h": [0, 1], "same": 4}, {"exits": 2, "h": [0, 0], "same": 0}]}
    after = {"vm": [{"pages": 1}], "vcpus": [{"exits": 5, "h": [0, 3], "same": 4}, {"exits": 3, "h": [1, 0], "same": 0}]}
    assert kvmstats.difference(before, after) == {"pages": -2, "exits": 5, "h": [1, 2]}
    assert kvmstats.difference({}, {}) == {}


# --- the trace --------------------------------------------------------------------------------------------------------

TRACE = """# tracer: nop
#
          python3-321     [000] d..1.     5000100: kvm_exit: vcpu 0 reason EXTERNAL_INTERRUPT rip 0x100 info1 0x0 info2 0x0
          python3-321     [000] d..1.     5000200: kvm_exit: vcpu 0 reason IO_INSTRUCTION rip 0x100 info1 0x0 info2 0x0
          python3-322     [001] d..1.     5000300: kvm_exit: vcpu 1 reason EPT_MISCONFIG rip 0x100 info1 0x0 info2 0x0
          python3-321     [000] d..1.    12.000400: kvm_exit: reason npf rip 0x100 info 0 0
"""


@pytest.fixture
def tracing(tmp_path):
    """What looks like a tracefs, but for what its files do."""
    root = tmp_path / "tracing"
    (root / "events/kvm/kvm_exit").mkdir(parents=True)
    (root / "events/kvm/kvm_exit/enable").write_text("0")
    (root / "instances").mkdir()
    return str(root)


def test_lines_of_the_trace():
    events = [tracefs.parse(line) for line in TRACE.splitlines()]
    assert events == [
        None,
        None,
        (5000100, 0, "EXTERNAL_INTERRUPT"),
        (5000200, 0, "IO_INSTRUCTION"),
        (5000300, 1, "EPT_MISCONFIG"),
        (12000400, -1, "npf"),
    ]


def test_why_not(tmp_path, tracing):
    assert tracefs.why_not((tracing,)) == ""
    (tmp_path / "empty").mkdir()
    why = tracefs.why_not((str(tmp_path / "empty"),))
    assert ("mount -t tracefs" in why) if os.geteuid() == 0 else ("root" in why)
    os.unlink(f"{tracing}/events/kvm/kvm_exit/enable")
    assert "kvm:kvm_exit" in tracefs.why_not((tracing,))
    with pytest.raises(ConfigError, match="cannot be traced"):
        tracefs.ExitTrace((tracing,)).__enter__()


def test_a_trace_that_cannot_be_switched_on_leaves_no_instance(tracing):
    with pytest.raises(ConfigError, match="switched on"), tracefs.ExitTrace((tracing,)):
        pass
    assert os.listdir(f"{tracing}/instances") == [] or "set_event_pid" in os.listdir(f"{tracing}/instances/pykvm-{os.getpid()}")


def test_which_exits_came_to_user_space():
    made = np.zeros(2, RECORD_DTYPE)
    made["reason"], made["qualifier"], made["is_write"] = IO, 0x80, 1
    made["tsc_before"], made["tsc_after"] = [5000000, 6000000], [5000250, 6000100]
    some = ledger(made)
    trace = tracefs.ExitTrace()
    trace.events = [event for event in map(tracefs.parse, TRACE.splitlines()) if event]
    trace.clock, trace.lost = "x86-tsc", 7
    some.note_trace(trace)
    assert some.hardware["lost"] == 7
    assert some.hardware["reasons"] == {
        "EXTERNAL_INTERRUPT": {"count": 1, "led_to": {}},
        "IO_INSTRUCTION": {"count": 1, "led_to": {"IO out 0x80": 1}},
        "EPT_MISCONFIG": {"count": 1, "led_to": {}},
        "npf": {"count": 1, "led_to": {}},
    }
