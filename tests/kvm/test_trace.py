"""`pykvm trace` on real guests: what each exit says, filters, beginnings and ends, steps, watched memory, batches."""

import json
import re
import shutil
import subprocess
from itertools import pairwise

import pytest

import pykvm
from pykvm import GuestCrash, Machine
from pykvm.cli import main
from pykvm.debug.trace import Capture
from pykvm.debug.trace_text import Formatter
from pykvm.debug.tracer import Change, Tracer, Watch
from pykvm.debug.where import Locator
from pykvm.errors import ConfigError
from tests.conftest import TIMEOUT

OUTS = "mov ecx, {n}; mov dx, 0xe0; 1: mov al, cl; out dx, al; dec ecx; jnz 1b; hlt"


def flat(source, bits=64, **options):
    mode, org = {16: ("real", 0x7C00), 64: ("long", 0x100000)}[bits]
    return Machine(pykvm.asm(source, bits=bits, org=org), mode=mode, **{"memory": "2M", **options})


def events(machine, **options):
    found = []
    with Capture(machine, found.append, **options):
        machine.run(TIMEOUT)
    return found


def insns_and_words(machine, batch):
    """Of each exit, looked at when it is its turn."""
    told = []
    capture = Capture(machine, lambda event: told.append((str(locator.place(event).insn), formatter.what(event))), batch=batch)
    locator = Locator(machine)
    formatter = Formatter(capture, locator)
    with capture:
        machine.run(TIMEOUT)
    return told


def lines(capfd, *words, status=0):
    assert main(["trace", *words]) == status
    out, err = capfd.readouterr()
    return out.splitlines(), err


# --- capturing --------------------------------------------------------------------------------------------------------


def test_events_are_the_exits_in_order(loop):
    with flat(OUTS.format(n=5), loop=loop) as machine:
        found = events(machine)
        assert [e.n for e in found] == [1, 2, 3, 4, 5, 6]
        assert [e.value for e in found[:5]] == [5, 4, 3, 2, 1]
        assert [e.reason for e in found] == [2] * 5 + [5]
        assert [e.frozen().get_regs().rcx for e in found] == [5, 4, 3, 2, 1, 0]
        assert all(a.tsc_after <= b.tsc_before for a, b in pairwise(found))
        places = {Locator(machine).place(e).address for e in found[:5]}
        assert len(places) == 1


def test_batches_tell_the_same(loop):
    told = []
    for batch in (1, 64):
        with flat(OUTS.format(n=300), loop=loop) as machine:
            locator = Locator(machine)
            found = events(machine, batch=batch)
            assert [e.frozen().get_regs().rcx & 0xFF for e in found[:300]] == [e.value for e in found[:300]]
            told.append([(e.n, e.reason, e.qualifier, e.value, locator.place(e).address, str(locator.place(e).insn)) for e in found])
    assert told[0] == told[1]
    assert len(told[0]) == 301


def test_a_batch_keeps_what_was_there_at_each_exit(loop):
    """Code that rewrites itself after each exit, a mode that changes, REP data, a UART whose registers change their meaning."""
    source = """
        mov ebx, 3
    again:
        mov al, 5
    here:
        out 0xe0, al
        inc byte ptr [rip + here + 1]
    next:
        dec ebx
        jnz again
        mov al, 0x80
        mov edx, 0x3fb
        out dx, al
        mov al, 1
        mov edx, 0x3f8
        out dx, al
        mov al, 3
        mov edx, 0x3fb
        out dx, al
        mov al, 'A'
        mov edx, 0x3f8
        out dx, al
        hlt
    """
    for batch in (1, 64):
        with flat(source, loop=loop) as machine:
            told = insns_and_words(machine, batch)
        assert [insn for insn, _ in told[:3]] == ["out 0xe0, al", "out 0xe1, al", "out 0xe2, al"]
        assert [what for _, what in told[4:7:2]] == ["COM1 DLL <- 0x1", "COM1 THR <- 0x41 'A'"]


def test_strings_have_all_their_elements(loop):
    source = "mov esi, 0x180000; mov edi, 0x180000; mov ecx, 400; mov edx, 0xe0; rep insb; mov ecx, 3; rep outsb; hlt"
    with flat(source, loop=loop) as machine:
        machine.memory.write(0x180000, b"abc")
        found = events(machine)
    reads = [e for e in found if e.size and not e.is_write]
    assert sum(e.count for e in reads) == 400 and all(len(e.data) == e.count for e in reads if e.count > 1)
    assert [e.rip for e in found if e.is_write and e.size]


def test_code_elsewhere_in_memory_is_found_elsewhere(loop):
    """The page of code is another one after the guest has written its page table."""
    source = """
        mov edi, 0x106000        # a second page with other code, which takes this one's place at the gva 0x400000
        mov word ptr [0x105000], 0xe0e6
        mov byte ptr [0x105002], 0xc3
        mov word ptr [0x106000], 0xe1e6
        mov byte ptr [0x106002], 0xc3
        mov dword ptr [0x107000], 0x105003
        mov rax, cr3
        mov rbx, [rax]
        and rbx, ~0xfff
        mov rcx, [rbx]
        and rcx, ~0xfff
        mov qword ptr [rcx + 16], 0x107003
        mov eax, 0x400000
        call rax
        mov dword ptr [0x107000], 0x106003
        invlpg [0x400000]
        out 0xe7, al
        call rax
        hlt
    """
    for batch in (1, 64):
        with flat(source, loop=loop) as machine:
            locator = Locator(machine)
            found = events(machine, batch=batch)
            assert [str(locator.place(e).insn) for e in found[:3]] == ["out 0xe0, al", "out 0xe7, al", "out 0xe1, al"]


def test_the_order_of_several_vcpus_is_that_of_time():
    source = """
        mov eax, 0xc4500; mov edi, 0xfee00300; mov [rdi], eax          # INIT to all others
        mov eax, 0xc4608; mov [rdi], eax                               # SIPI: vector 8
        mov ecx, 400; mov dx, 0xe0; 1: out dx, al; dec ecx; jnz 1b
        cli; hlt
    """
    with flat(source, cpus=2) as machine:
        machine.memory.write(0x8000, pykvm.asm("mov cx, 300; mov dx, 0xe4; 1: out dx, al; dec cx; jnz 1b; cli; hlt", bits=16, org=0x8000))
        found = events(machine, batch=16)
    assert [e.n for e in found] == [*range(1, len(found) + 1)]
    assert all(a.tsc_after <= b.tsc_after for a, b in pairwise(found))
    assert {e.vcpu for e in found} == {0, 1}
    assert [sum(e.qualifier == port for e in found) for port in (0xE0, 0xE4)] == [400, 300]


def test_a_capture_leaves_no_trace():
    with flat(OUTS.format(n=3), stats=True) as machine:
        found = events(machine)
        assert len(found) == 4
        assert sum(row.count for row in machine.stats_rows()) == 4
        assert machine.runner.ring.cdata.capacity > 1
    with flat("1: mov dx, 0xe0; out dx, al; hlt; jmp 1b") as machine:
        found = []
        with Capture(machine, found.append):
            machine.run(TIMEOUT)
        machine.run(TIMEOUT)
        assert len(found) == 2
        assert machine.result().exits == {"IO": 2, "HLT": 2}


def test_what_the_hook_raises_reaches_the_caller():
    def fail(event):
        raise RuntimeError("no")

    with flat(OUTS.format(n=3)) as machine:
        with pytest.raises(RuntimeError), Capture(machine, fail):
            machine.run(TIMEOUT)
        assert machine.run(TIMEOUT).reason == "halted"


def test_reads_have_their_answers():
    class Device:
        register_names = {0: ("STATUS", "COMMAND")}

        def read(self, offset, size):
            return 0x5A

        def write(self, offset, size, value):
            pass

    with flat("in al, 0x99; out 0x99, al; hlt") as machine:
        machine.add_device(Device(), port=0x99, name="mine")
        tracer = Tracer(machine)
        out = []
        tracer.sink = lambda item: out.append(formatter.what(item))
        formatter = Formatter(tracer.capture, tracer.locator)
        tracer.run(TIMEOUT)
    assert out == ["mine STATUS -> 0x5a", "mine COMMAND <- 0x5a", "HLT"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_text(capfd):
    out, err = lines(capfd, "hello")
    assert len(out) == 23
    assert re.search(r"<puts\+0x9> +out dx, al +; COM1 THR <- 0x48 'H'$", out[0])
    assert out[-1].endswith("out 0xf4, al                     ; debug exit <- 0x0")
    assert "23 exits; exit 0" in err


def test_real_mode_and_switches(capfd):
    out, _ = lines(capfd, "far_modes")
    assert ["puts16" in out[0], "puts32" in out[8], "puts64" in out[-3]] == [True] * 3
    assert all("out dx, al" in line for line in out[:-1])


def test_json_and_filters(capfd):
    out, err = lines(capfd, "mmio_rw", "--json", "--filter", "reason=mmio,dir=read", "--filter", "port=0xf0-0xf7")
    rows = [json.loads(line) for line in out]
    assert [row["reason"] for row in rows] == ["MMIO"] * 5 + ["IO"]
    assert (
        rows[0]
        | {"gpa": 0xD0000000, "direction": "read", "size": 1, "value": 0x11, "device": "scratch", "insn": "movzx eax, byte ptr [rbx]"}
        == rows[0]
    )
    assert rows[-1]["port"] == 0xF4
    assert "10 exits, 6 shown" in err


def test_registers(capfd):
    out, _ = lines(capfd, "hello", "--regs", "--limit", "1")
    assert "rdx=00000000000003f8" in " ".join(out)


def test_ends(capfd):
    out, err = lines(capfd, "hello", "--until", "3")
    assert len(out) == 3 and "stopped at 3" in err
    out, _ = lines(capfd, "hello", "--until", "value=0x6f")
    assert out[-1].endswith("'o'") and len(out) == 5
    out, _ = lines(capfd, "hello", "--from", "value=0x6f", "--limit", "2")
    assert "'o'" in out[0] and "' '" in out[1] and len(out) == 2


def test_symbols_as_beginning_and_end(capfd):
    out, err = lines(capfd, "hello", "--until", "done")
    assert out[-1].endswith(r"'\n'") and len(out) == 22
    assert "22 exits; stopped at done" in err
    out, _ = lines(capfd, "hello", "--from", "done")
    assert len(out) == 1 and "debug exit" in out[0]


def test_crashes_are_explained(capfd):
    out, err = lines(capfd, "triple_fault", status=70)
    assert "SHUTDOWN" in out[-1]
    assert "crashed" in err


def test_watched_memory(capfd):
    out, _ = lines(capfd, "walk_two_level", "--watch", "0x102000:4K", "--limit", "1")
    assert re.search(r"memory 0x102688: 0x0 => 0x103003", out[0]) or "memory 0x102688" in out[0]


def test_watch_reports_runs_of_words():
    with flat("hlt") as machine:
        watch = Watch(machine, 0x1000, 64)
        assert watch.look(1) == []
        machine.memory.write(0x1008, b"\1" * 16)
        machine.memory.write(0x1038, b"\2")
        first, second = watch.look(2)
        assert (first.gpa, len(first.after), second.gpa) == (0x1008, 16, 0x1038)
        assert isinstance(first, Change) and watch.look(3) == []
        with pytest.raises(ConfigError):
            Watch(machine, 0, 0)


def test_msrs_say_their_values(capfd):
    out, _ = lines(capfd, "msr_user")
    assert any("wrmsr" in line and "MSR 0x12345 <- 0x5566778811223344" in line for line in out)
    assert any("rdmsr" in line and "MSR 0x12345 -> 0x" in line for line in out)


@pytest.mark.parametrize(
    "words",
    [["--filter", "nosuch=1"], ["--filter", "port=x"], ["--filter", "reason=hl"], ["--until", "nosuch"], ["--watch", "0xfffffff0000:8"]],
)
def test_what_makes_no_sense(capfd, words):
    assert main(["trace", "hello", *words]) == 64
    assert capfd.readouterr().err


def test_the_limit_is_what_has_stopped_it(capfd):
    _, err = lines(capfd, "hello", "--until", "hlt", "--limit", "1")
    assert err.endswith("stopped after 1 line\n")


def test_a_page_has_to_have_a_place(capfd, tmp_path):
    for place in (tmp_path / "none" / "x.html", tmp_path):
        assert main(["trace", "hello", "--html", str(place)]) == 64
        assert str(place) in capfd.readouterr().err


def test_several_vcpus(capfd):
    out, _ = lines(capfd, "sipi")
    assert any(" cpu1 " in line and "COM1 THR" in line for line in out)


# --- steps ------------------------------------------------------------------------------------------------------------


def stepped(source, bits=64, **options):
    with flat(source, bits) as machine:
        steps = []
        tracer = Tracer(machine, step=True, sink=steps.append, **options)
        result = tracer.run(TIMEOUT)
        return steps, result


def test_steps_show_registers_and_memory():
    steps, result = stepped("mov eax, 5; mov rsp, 0x9f000; mov [0x9e000], eax; push rax; pop rbx; xor eax, eax; out 0xe0, al; hlt")
    assert result.reason == "halted"
    assert [str(s.place.insn).split()[0] for s in steps] == ["mov", "mov", "mov", "push", "pop", "xor", "out", "hlt"]
    assert steps[0].registers == {"rax": (0, 5)}
    assert steps[2].memory == [(0x9E000, b"\0" * 4, b"\5\0\0\0")]
    assert steps[3].memory == [(0x9EFF8, b"\0" * 8, b"\5" + b"\0" * 7)]
    assert steps[4].registers["rbx"] == (0, 5)
    assert "scratch" in steps[6].exit


def test_a_step_that_is_finished_in_user_space():
    steps, _ = stepped("mov eax, 0xff; popcnt ebx, eax; hlt")
    assert steps[1].registers["rbx"] == (0, 8)
    assert steps[1].exit in ("", "INTERNAL_ERROR: KVM's emulator does not know it")  # where KVM emulates CPL0 code


def test_an_exception_that_a_device_injects_comes_amid_steps(capfd):
    out, _ = lines(capfd, "inject_exception", "--step")
    assert out[-1].endswith("debug exit <- 0x0")


def test_steps_at_cpl3_show_no_exit_of_the_debuggers_own():
    """Where KVM cannot single-step CPL3, an OUT is planted behind each instruction: it is none of the guest's."""
    with Machine(pykvm.asm("mov eax, 1; inc eax; nop; out 0xe0, al; inc eax", bits=64), mode="user") as machine:
        steps = []
        Tracer(machine, step=True, sink=steps.append, limit=4).run(TIMEOUT)
    assert [bool(s.exit) for s in steps] == [False, False, False, True]
    assert "scratch" in steps[3].exit
    assert steps[1].registers["rax"] == (1, 2)


def test_steps_in_real_mode():
    steps, _ = stepped("mov ax, 0x900; mov ds, ax; mov byte ptr [0x10], 7; hlt", 16)
    assert steps[1].registers["ds"] == (0, 0x900)
    assert steps[2].memory == [(0x9010, b"\0", b"\7")]


def test_steps_from_and_until(capfd):
    out, err = lines(capfd, "hello", "--step", "--from", "puts", "--until", "port=0x3f8")
    assert "<puts>" in out[0] and "COM1 THR <- 0x48 'H'" in out[-1]
    assert len(out) == 5 and "instructions" in err


def test_a_step_that_crashes():
    with Machine("triple_fault") as machine:
        steps = []
        with pytest.raises(GuestCrash):
            Tracer(machine, step=True, sink=steps.append).run(TIMEOUT)
        assert str(steps[-1].place.insn) == "ud2"


# --- source lines -----------------------------------------------------------------------------------------------------


def test_source_lines(capfd, tmp_path):
    if not shutil.which("as") or not shutil.which("ld"):
        pytest.skip("no binutils")
    source = tmp_path / "lines.s"
    source.write_text(".intel_syntax noprefix\n.globl _start\n_start:\n mov al, 3\n out 0xe0, al\n hlt\n")
    subprocess.run(["as", "--64", "-g", "-o", tmp_path / "lines.o", source], check=True)
    subprocess.run(["ld", "-Ttext=0x100000", "-o", tmp_path / "lines.elf", tmp_path / "lines.o"], check=True, stderr=subprocess.DEVNULL)
    out, _ = lines(capfd, str(tmp_path / "lines.elf"), "--mode", "long")
    assert out[0].endswith("lines.s:5")


@pytest.mark.slow
def test_a_long_trace_needs_no_more_memory(tmp_path):
    code = """
import resource, sys
from pykvm.debug.tracer import Tracer
import pykvm, os
source = "mov ecx, %s; mov dx, 0xe0; 1: out dx, al; dec ecx; jnz 1b; hlt" % sys.argv[1]
with pykvm.Machine(pykvm.asm(source, bits=64, org=0x100000), mode="long", memory="2M") as m:
    t = Tracer(m)
    t.sink = t.text_printer(open(os.devnull, "w"))
    t.run(300)
    print(t.seen, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    import sys

    sizes = []
    for n in (1000, 60000):
        done = subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True)
        seen, rss = map(int, done.stdout.split())
        assert seen == n + 1
        sizes.append(rss)
    assert sizes[1] - sizes[0] < 4096  # KiB


# --- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = "</script><img src=x onerror=alert(1)>"


def page_of(tmp_path, *words, status=0):
    path = tmp_path / "out.html"
    assert main(["trace", *words, "--html", str(path)]) == status
    return path.read_text()


def test_page(capfd, tmp_path):
    text = page_of(tmp_path, "hello")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert len(data["events"]) == 23 and data["left_out"] == 0
    assert data["events"][0]["w"] == "COM1 THR <- 0x48 'H'"
    assert len(data["events"][0]["regs"]) == len(data["registers"])
    for part in ("Timeline", "Hot places", "Hello from long mode.", "PML4[0]", "keyboard controller", "out dx, al"):
        assert part in text
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", text)


def test_page_of_a_crash_and_of_steps(capfd, tmp_path):
    assert "ud2" in page_of(tmp_path, "triple_fault", status=70)
    text = page_of(tmp_path, "hello", "--step", "--limit", "20")
    assert "Instructions" in text and "=&gt;" not in text.split("<script")[0].split("Console")[0].split("Hot places")[0][-200:]


def test_hostile_guests_write_no_page(capfd, tmp_path):
    code = "".join(f"mov al, {ord(c)}; out 0xe9, al;" for c in HOSTILE)
    (tmp_path / "x.bin").write_bytes(pykvm.asm(code + "hlt", bits=64, org=0x100000))
    with Machine(str(tmp_path / "x.bin"), mode="long", memory="2M") as machine:
        from pykvm.debug.trace_html import Report

        tracer = Tracer(machine)
        tracer.locator.symbols = pykvm.symbols.Symbols({HOSTILE: 0x100000})
        report = Report(tracer)
        tracer.sink = report.add
        report.save(str(tmp_path / "x.html"), tracer.run(TIMEOUT))
    text = (tmp_path / "x.html").read_text()
    assert HOSTILE not in text and "<img" not in text
    assert text.count("</script>") == 2


def test_long_traces_make_bounded_pages(tmp_path, monkeypatch):
    from pykvm.debug import trace_html

    monkeypatch.setattr(trace_html, "FIRST", 20)
    monkeypatch.setattr(trace_html, "LAST", 10)
    with flat(OUTS.format(n=100)) as machine:
        tracer = Tracer(machine)
        report = trace_html.Report(tracer)
        tracer.sink = report.add
        data = report.data(tracer.run(TIMEOUT))
    assert [e["n"] for e in data["events"]] == [*range(1, 21), *range(92, 102)]
    assert (data["count"], data["left_out"]) == (101, 71)
    assert sum(map(sum, data["density"]["lanes"].values())) == 101


def test_density_keeps_counts():
    from pykvm.debug.trace_html import Density

    density = Density()
    for i in range(1000):
        density.add(f"lane {i % 15}", i * 7919.0)
    assert sum(map(sum, density.lanes.values())) == 1000
    assert len(density.lanes) <= 11 and density.width * 400 > 999 * 7919
