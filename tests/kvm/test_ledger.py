"""The exit ledger on KVM: both loops, no copy, nothing lost in silence, where exits come from, KVM's counters beside it."""

import gc
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import pykvm
from pykvm import ConfigError, KvmError, Machine, exits, kvmstats, probe, tracefs
from pykvm.abi import lib
from pykvm.bus import Native
from pykvm.ledger import Ledger
from tests.conftest import TIME_SCALE, TIMEOUT

PYKVM = [sys.executable, "-m", "pykvm"]
IO, HLT, MMIO = lib.KVM_EXIT_IO, lib.KVM_EXIT_HLT, lib.KVM_EXIT_MMIO


class Echo:
    """Reads give ``value``."""

    def __init__(self, value=0x42):
        self.value = value

    def read(self, offset, size):
        return self.value

    def write(self, offset, size, value):
        pass


def flat(source, bits=32, **options):
    mode = {16: "real", 32: "protected", 64: "long"}[bits]
    org = 0x7C00 if bits == 16 else 0x100000
    return Machine(pykvm.asm(source, bits=bits, org=org), **{"memory": "2M", "mode": mode, **options})


def plain(records):
    """What two runs have in common: all but times."""
    return [tuple(int(r[name]) for name in r.dtype.names if not name.startswith("tsc")) for r in records]


EVERY_KIND = """
    mov al, 1; out 0xe9, al             # the native loop keeps it
    mov dx, 0x300; in al, dx            # Python answers 0x42
    mov dx, 0x310; in eax, dx           # a constant
    mov eax, 0x12345678; out dx, eax    # a constant's write
    mov ebx, 0xd1000000; mov [ebx], ax; mov cl, [ebx + 4]
    mov dx, 0x300; mov edi, 0x110000; mov ecx, 2; rep insb
    mov dx, 0x999; in al, dx            # nobody's
    hlt
"""


def all_kinds(machine):
    machine.add_device(Echo(), port=0x300)
    machine.add_device(Echo(0xCAFE), port=0x310, length=4, native=Native.constant(0xCAFE))
    machine.add_device(Echo(7), gpa=0xD1000000, length=16, native=Native.constant(7))
    machine.run(TIMEOUT)
    return machine.ledger


@pytest.mark.shadow
def test_both_loops_keep_the_same_records():
    seen = {}
    for loop in ("python", "native"):
        with flat(EVERY_KIND, loop=loop, ledger=1000) as machine:
            ledger = all_kinds(machine)
            seen[loop] = plain(ledger.records), {row.name: row.count for row in ledger.by("rip")}
            records = ledger.records
            assert sum(machine.exit_counts().values()) == len(records)
            assert (records["tsc_after"] >= records["tsc_before"]).all() and (records["tsc_handled"] >= records["tsc_after"]).all()
            assert (records["tsc_before"][1:] >= records["tsc_handled"][:-1]).all()
    assert seen["python"][0] == seen["native"][0]
    assert len(seen["native"][1]) == 9 and seen["python"][1] == seen["native"][1]
    values = {record[2] for record in seen["native"][0]}
    assert {0x42, 0xCAFE, 0x12345678, 7, 0xFF} <= values


def test_records_are_the_memory_that_the_loop_writes(loop):
    with flat("1: out 0x80, al; inc al; cmp al, 10; jne 1b; hlt; jmp 1b", loop=loop, ledger=100) as machine:
        machine.run(TIMEOUT)
        ledger = machine.ledger
        first = ledger.records
        assert np.shares_memory(first, ledger.records) and np.shares_memory(first, ledger.of_vcpu(0))
        where = first.__array_interface__["data"][0]
        assert where == int(pykvm.abi.ffi.cast("uintptr_t", machine.runner.ring.cdata.data))
        assert len(first) == 11
        machine.memory.write_u8(0x100000, 0xF4)
        machine.run(TIMEOUT)
        assert len(first) == 11 and len(ledger.records) > 11
        value = int(first["value"][3])
    del machine, ledger
    gc.collect()
    assert int(first["value"][3]) == value == 3  # the memory lives as long as the array


@pytest.mark.parametrize("ledger", [3, True])
def test_what_finds_no_room_is_counted(loop, ledger):
    with flat("mov ecx, 10; 1: out 0x80, al; mov dx, 0x300; in al, dx; dec ecx; jnz 1b; hlt", loop=loop, ledger=ledger) as machine:
        machine.add_device(Echo(), port=0x300)
        machine.run(TIMEOUT)
        assert len(machine.ledger) == min(21, 3 if ledger == 3 else 21)
        assert machine.ledger.lost == 21 - len(machine.ledger)
        records = machine.ledger.records
        assert [int(r["value"]) for r in records[:3]] == [int(records["value"][0]), 0x42, 0x42]  # no later answer lands in the last record
        assert machine.ledger.summary()["lost"] == machine.ledger.lost
        machine.ledger.clear()
        assert (len(machine.ledger), machine.ledger.lost) == (0, 0)


def test_bare_runs_are_counted_too():
    with flat("1: out 0x80, al; jmp 1b", ledger=2) as machine:
        machine.runner.sync_table()
        assert [type(machine.vcpu.run(TIMEOUT)) for _ in range(5)] == [exits.IoOut] * 5
        assert (len(machine.ledger), machine.ledger.lost) == (2, 3)


def test_an_access_whose_device_raised_has_one_record(loop):
    class Raises(Echo):
        def read(self, offset, size):
            self.value += 1
            if self.value == 0x43:
                raise RuntimeError("not yet")
            return self.value

    with flat("mov dx, 0x300; in al, dx; hlt", loop=loop, ledger=10) as machine:
        machine.add_device(Raises(), port=0x300)
        with pytest.raises(RuntimeError, match="not yet"):
            machine.run(TIMEOUT)
        assert [int(r["value"]) for r in machine.ledger.records] == [0]
        machine.run(TIMEOUT)
        assert [(int(r["reason"]), int(r["value"])) for r in machine.ledger.records] == [(IO, 0x44), (HLT, 0)]


def test_without_a_ledger():
    with flat("hlt") as machine, pytest.raises(ConfigError, match="ledger=True"):
        machine.ledger  # noqa: B018
    for wrong in (0, -1, 1 << 32):
        with pytest.raises(ConfigError, match="give a number"):
            flat("hlt", ledger=wrong)


def test_statistics_come_from_the_ledger():
    rows = []
    for options in ({}, {"ledger": True}):
        with flat(EVERY_KIND, stats=True, **options) as machine:
            machine.add_device(Echo(), port=0x300)
            rows.append({row.name: row.count for row in machine.run(TIMEOUT).stats})
            assert all(row.kvm_median > 0 for row in machine.stats_rows())
    assert rows[0] == rows[1] and rows[0]["HLT"] == 1


# --- where exits come from --------------------------------------------------------------------------------------------


@pytest.mark.shadow
@pytest.mark.parametrize(
    ("bits", "source", "wanted"),
    [
        (16, "start: out 0x80, al; mov dx, 0x81; out dx, al; in al, dx; hlt", ["out 0x80, al", "out dx, al", "in al, dx", "hlt"]),
        (32, "mov ebx, 0xd1000000; mov [ebx], eax; mov eax, [ebx]; hlt", ["mov dword ptr [ebx], eax", "mov eax, dword ptr [ebx]", "hlt"]),
        (64, "mov dx, 0x81; out dx, ax; out 0x7e, al; hlt", ["out dx, ax", "out 0x7e, al", "hlt"]),
        (32, "mov edi, 0xd1000000; mov ecx, 3; rep stosb; hlt", ["rep stosb byte ptr es:[edi], al", "hlt"]),
    ],
)
def test_instructions_are_named_wherever_rip_was_left(bits, source, wanted):
    with flat(source, bits, ledger=True) as machine:
        machine.run(TIMEOUT)
        ledger = machine.ledger
        assert [ledger.site(record).insn for record in ledger.records if record["qualifier"] != 1][-1] == "hlt"
        seen = list(dict.fromkeys(ledger.site(record).insn for record in ledger.records))
        assert seen == wanted
        assert len(ledger.by("rip")) == len(wanted)


def test_symbols_are_named():
    with Machine("hello", ledger=True) as machine:
        machine.run(TIMEOUT)
        rows = machine.ledger.by("rip")
        assert [row.count for row in rows] == [22, 1]
        assert all("+0x" in row.name for row in rows)
        assert rows[0].key == int(machine.ledger.records["rip"][0]) - probe.out_leaves_rip_past("long")


# --- several vCPUs ----------------------------------------------------------------------------------------------------

START = """
    mov edi, 0xfee00000
    mov dword ptr [edi + 0xf0], 0x1ff
    mov dword ptr [edi + 0x300], 0xc4500
    mov dword ptr [edi + 0x300], 0xc4607
"""


def test_several_vcpus(tmp_path):
    """Each writes its own ring; together they are in order of time. (STI: see probe.interruptible_with_if_clear().)"""
    machine = flat(
        START + "mov ecx, 20; 1: out 0x80, al; dec ecx; jnz 1b; sti; 2: pause; cmp byte ptr [0x8000], 1; jne 2b; mov al, 0; out 0xf4, al",
        cpus=2,
        ledger=100,
    )
    with machine:
        machine.memory.write(0x7000, pykvm.asm("mov cx, 20; 1: out 0x81, al; loop 1b; mov byte ptr [0x8000], 1; 9: hlt; jmp 9b", bits=16))
        machine.run(TIMEOUT)
        ledger = machine.ledger
        assert [set(ledger.of_vcpu(i)["vcpu"]) for i in (0, 1)] == [{0}, {1}]
        assert [len(ledger.of_vcpu(i)) for i in (0, 1)] == [21, 20]
        assert all(np.shares_memory(ledger.of_vcpu(i), ledger.of_vcpu(i)) for i in (0, 1))
        together = ledger.records
        assert len(together) == 41 and (np.diff(together["tsc_before"].astype(np.int64)) >= 0).all()
        assert {row.name: row.count for row in ledger.by("vcpu")} == {"vCPU 0": 21, "vCPU 1": 20}
        assert len(ledger.kvm_after["vcpus"]) == 2
        ledger.save(tmp_path / "two.npy")
    back = Ledger.load(tmp_path / "two.npy")
    assert back.vcpus == 2 and len(back.of_vcpu(1)) == 20
    assert [row.as_dict() for row in back.by("rip")] == [row.as_dict() for row in ledger.by("rip")]


# --- files and commands -----------------------------------------------------------------------------------------------


def test_file_round_trip(tmp_path):
    path = tmp_path / "hello.npy"
    with Machine("hello", ledger=True) as machine:
        machine.run(TIMEOUT)
        machine.ledger.save(path)
        kept = machine.ledger
        tables = {what: [row.as_dict() for row in kept.by(what)] for what in ("reason", "port", "rip")}
    back = Ledger.load(path)
    assert np.array_equal(back.records, kept.records) and np.array_equal(np.load(path, allow_pickle=False), kept.records)
    assert {what: [row.as_dict() for row in back.by(what)] for what in tables} == tables
    assert back.about["image"].endswith("hello.elf") and back.about["mode"] == "long"
    assert back.kvm_counters() == kept.kvm_counters()


def pykvm_command(*words, **options):
    done = subprocess.run([*PYKVM, *words], capture_output=True, text=True, timeout=60 * TIME_SCALE, check=False, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
def test_run_and_show(tmp_path):
    path = str(tmp_path / "hello.npy")
    done = pykvm_command("run", "hello", "--ledger", path, "--stats")
    assert (done.returncode, done.stderr) == (0, "") and "IO out 0x3f8" in done.stdout
    assert len(np.load(path)) == 23
    shown = pykvm_command("ledger", path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "23 exits of hello.elf in long mode" in shown.stdout and "puts+0x" in shown.stdout
    got = json.loads(pykvm_command("ledger", path, "--json").stdout)
    assert got["summary"]["exits"] == 23 and got["kvm_counters"]["exits"] >= 23


@pytest.mark.slow
def test_a_crash_and_a_time_limit_leave_a_ledger(tmp_path):
    path = str(tmp_path / "x.npy")
    assert pykvm_command("run", "triple_fault", "--ledger", path).returncode == 70
    assert len(Ledger.load(path)) == 1
    assert pykvm_command("run", "spin", "--timeout", "0.1", "--ledger", path).returncode == 124
    assert len(Ledger.load(path)) == 0


@pytest.mark.slow
def test_command_line_complaints(tmp_path):
    full = pykvm_command("run", "hello", "--ledger", str(tmp_path / "x.npy"), "--ledger-exits", "5")
    assert full.returncode == 0 and "no room for 18 exits" in full.stderr
    assert "18 more exits found no room" in pykvm_command("ledger", str(tmp_path / "x.npy")).stdout
    for words in (
        ("--ledger", str(tmp_path / "none" / "x.npy")),
        ("--ledger", str(tmp_path)),
        ("--trace-exits",),
    ):
        done = pykvm_command("run", "hello", *words)
        assert (done.returncode, done.stdout) == (64, "") and done.stderr.count("\n") == 1
    assert pykvm_command("run", "hello", "--ledger", "/dev/full").returncode == 74
    assert not os.path.exists("/dev/full.json")


# --- what the kernel counts -------------------------------------------------------------------------------------------


@pytest.mark.shadow
def test_kvms_counters():
    with flat("mov ecx, 50; mov ebx, 0xd1000000; 1: mov [ebx], eax; dec ecx; jnz 1b; hlt", ledger=True) as machine:
        if not machine.system.check_extension("KVM_CAP_BINARY_STATS_FD"):
            pytest.skip("this host's KVM has no KVM_CAP_BINARY_STATS_FD")
        for of in (machine.vm, machine.vcpu):
            fd = of.get_stats_fd()
            assert kvmstats.read_stats(fd)
            os.close(fd)
        machine.run(TIMEOUT)
        counters = machine.ledger.kvm_counters()
        assert counters["exits"] >= 51
        assert counters["mmio_exits"] >= 50
        open_files = len(os.listdir("/proc/self/fd"))
        kvmstats.snapshot(machine.vm)
        assert len(os.listdir("/proc/self/fd")) == open_files
        machine.vm.close()
        with pytest.raises(KvmError):
            machine.vcpu.get_stats_fd()


@pytest.mark.shadow
def test_the_cpus_exit_reasons():
    why = tracefs.why_not()
    if why:
        pytest.skip(why)
    before = {root: set(os.listdir(f"{root}/instances")) for root in tracefs.ROOTS if os.path.isdir(f"{root}/instances")}
    with flat("mov ecx, 20; 1: out 0x80, al; dec ecx; jnz 1b; cpuid; hlt", ledger=True) as machine:
        with machine.ledger.trace():
            machine.run(TIMEOUT)
        hardware = machine.ledger.hardware
    assert hardware["lost"] == 0
    reasons = hardware["reasons"]
    named = {"IO_INSTRUCTION", "io"} & set(reasons)
    assert named and sum(reasons[name]["count"] for name in named) >= 20
    if hardware["clock"] == "x86-tsc":
        assert sum(reasons[name]["led_to"].get("IO out 0x80", 0) for name in named) >= 18
        assert any("HLT" in reasons[name]["led_to"] for name in reasons)
    assert {root: set(os.listdir(f"{root}/instances")) for root in before} == before


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_unused_ledger_costs_no_memory_and_leaves_nothing():
    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    def once():
        with flat("hlt", ledger=1 << 22) as machine:  # 256 MiB
            machine.run(TIMEOUT)

    once()
    gc.collect()
    before, fds = resident(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        once()
        time.sleep(0.01)
    gc.collect()
    assert resident() - before < 8 << 20
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.slow
def test_to_run_hello_imports_nothing_more_than_the_command():
    """What that is, tests/unit/test_imports.py says: no numpy, and no ledger."""
    code = "import sys; import pykvm.cli.run as r; had = set(sys.modules); r.main(['hello']); print(set(sys.modules) - had)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60 * TIME_SCALE, check=False)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
