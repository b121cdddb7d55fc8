"""Live migration of real guests: they go on as if nothing had happened."""

import random
import socket
from time import sleep

import pytest

import pykvm
from pykvm import MigrationError
from pykvm.cli.migrate import PHASES
from pykvm.state import migrate as source
from pykvm.state.migrate import Migration
from pykvm.state.stream import Stream
from tests.conftest import TIMEOUT
from tests.kvm.moving import (
    CONSOLE,
    COUNTER,
    PASSES,
    Link,
    Receiving,
    Running,
    exit_code,
    goes_on,
    move,
    until,
    walker,
)
from tests.kvm.states import stop_at

pytestmark = pytest.mark.usefixtures("patient_source")


@pytest.mark.slow
def test_two_guests_move_at_once():
    """Each to a place of its own; and back to one process, where both end."""
    from concurrent.futures import ThreadPoolExecutor

    with walker(PASSES // 2) as one, walker(PASSES // 2) as other, ThreadPoolExecutor() as pool:
        machines, running = (one, other), [Running(one), Running(other)]
        pairs = [socket.socketpair() for _ in machines]
        theirs = [Receiving(b) for _, b in pairs]
        reports = list(pool.map(move, machines, [a for a, _ in pairs]))
        assert all(report["rounds"] for report in reports)
        for there, run in zip(theirs, running, strict=True):
            assert run.end().reason == "migrated"
            result = there.wait().running.end()
            assert (result.console, result.exit_code) == (CONSOLE, exit_code())
            there.close()


def test_it_is_the_guest_that_it_should_be():
    with walker(PASSES) as machine:
        result = machine.run(TIMEOUT)
        assert (result.console, result.exit_code) == (CONSOLE, exit_code())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"irqchip": "kernel"},
        pytest.param({"irqchip": "split"}, marks=pytest.mark.slow),
        pytest.param({"loop": "python"}, marks=pytest.mark.slow),
    ],
)
def test_a_guest_moves(options):
    with walker(PASSES // 2, **options) as machine:
        running = Running(machine)
        until(lambda: machine.console.data)
        link = Link()
        there = Receiving(link.destination)
        report = move(machine, link.source)
        here = running.end()
        assert here.reason == "migrated"
        assert machine.moved_to == "there"
        result = there.wait().running.end()
        assert (result.console, result.exit_code) == (CONSOLE, exit_code())
        assert here.console == CONSOLE[: len(here.console)]
        assert report["bytes"] == link.carried[0]
        assert report["downtime"] == pytest.approx(sum(report["last"][what] for what in PHASES))
        assert report["pages"] >= 1024 and report["zeros"] > 0
        with pytest.raises(pykvm.ConfigError, match="has moved to there"):
            machine.run(1)
        with pytest.raises(pykvm.ConfigError, match="has moved to there"):
            machine.resume()
        there.close()
        link.close()


@pytest.mark.slow
def test_output_on_its_way_moves_once():
    """What the native loop has collected, and nobody has seen yet."""
    code = pykvm.asm("sti; mov ecx, 20000; mov al, 'x'; 1: out 0xe9, al; dec ecx; jnz 1b; out 0xf4, al", bits=64, org=0x100000)
    printed = [bytearray(), bytearray()]
    with pykvm.Machine(code, mode="long", memory="2M", entry=0x100000, on_output=printed[0].extend) as machine:
        running = Running(machine)
        a, b = socket.socketpair()
        there = Receiving(b, prepare=lambda machine: None, on_output=printed[1].extend)
        move(machine, a)
        assert running.end().reason == "migrated"
        assert there.wait().running.end().console == "x" * 20000
        assert len(printed[0]) + len(printed[1]) == 20000
        there.close()


MOVES = 20  # at a random moment, before one at the first exit


@pytest.mark.parametrize("name", ["smp_user", "ipi", "lapic_timer", "pic_pit", "tsc_deadline", "xsave_live"])
@pytest.mark.slow
def test_gallery_guests_move_at_a_random_moment(name, system):
    """Two vCPUs, interrupts, vector registers: they end as without a move."""
    from tests.kvm.test_gallery import note_of, skip_unless_met

    skip_unless_met(name, system)
    note = note_of(name)
    with pykvm.Machine(name) as machine:
        whole = machine.run(TIMEOUT)
    for attempt in range(MOVES + 1):
        with pykvm.Machine(name) as machine:
            resume = machine.resume
            if attempt < MOVES:
                machine.pause()
                running = Running(machine)
                resume()
                sleep(random.Random(attempt).random() * 0.003 / (attempt + 1))  # it ends soon: each attempt is more careful
                machine.group.hold(TIMEOUT)
            else:  # it was faster each time: now it stands at its first exit
                assert stop_at(machine, 1)
                machine.save()  # which completes the access
                machine.group.hold(TIMEOUT)
                running = Running(machine)
            machine.resume = lambda resume=resume, machine=machine: (resume(), machine.group.hold(TIMEOUT))
            a, b = socket.socketpair()
            there = Receiving(b, prepare=lambda machine: None)
            try:
                move(machine, a)
            except MigrationError as error:
                assert "not running" in str(error)
                there.wait()
                machine.stop()
                running.thread.join(TIMEOUT)
                continue
            assert running.end().reason == "migrated"
            result = there.wait().running.end()
            there.close()
            assert (result.reason, result.exit_code, result.console) == (whole.reason, whole.exit_code, whole.console)
            assert note.get("console", "") in result.console
            return
    pytest.fail("the guest was faster than all moves")


@pytest.mark.slow
def test_there_and_back_again(machine):
    """From one machine to the next, five times; the last one ends."""
    machines = [machine]
    for hop in range(5):
        a, b = socket.socketpair()
        there = Receiving(b, most=PASSES // 2 + 2 * hop)
        move(machines[-1], a, f"hop {hop}")
        machines.append(there.wait().machine)
        assert goes_on(there.machine)
    assert sum(m.moved_to is None for m in machines) == 1
    last = machines[-1]
    last.bus.pio.find(0x50, 1).device.most = PASSES
    result = there.running.end()
    assert (result.console, result.exit_code) == (CONSOLE, exit_code())
    for moved in machines[1:]:
        moved.close()


@pytest.mark.slow
def test_what_the_host_writes_moves_too(machine):
    """While rounds are on their way, through write() and through a view."""
    view = machine.memory.view(0x300000, 8)
    a, b = socket.socketpair()
    there = Receiving(b, most=PASSES // 2)
    rounds = []

    def write(progress):
        if progress.phase == "copying":
            rounds.append(progress.round)
            view[0] = len(rounds)
            machine.memory.write_u64(0x310000, len(rounds))

    Migration(machine, a, "there", on_progress=write).run()
    there.wait()
    assert rounds
    assert there.machine.memory.read_u8(0x300000) == len(rounds)
    assert there.machine.memory.read_u64(0x310000) == len(rounds)
    there.close()


WRITER = """
        sti
        mov rbx, {pace}             # TSC units from one page to the next
round:  mov rdi, 0x200000
page:   inc qword ptr [rdi]
        rdtsc
        shl rdx, 32
        or rax, rdx
        lea rcx, [rax + rbx]
1:      rdtsc
        shl rdx, 32
        or rax, rdx
        cmp rax, rcx
        jb 1b
        add rdi, 4096
        cmp rdi, 0x400000
        jb page
        jmp round
"""


@pytest.mark.slow
def test_a_guest_that_writes_too_fast_is_slowed(monkeypatch):
    """It writes up to 100 MB/s, round and round in 2 MiB; the wire takes 5 MB/s, and what is left at the end shall take 30 ms."""
    sending = Stream.send

    def slowly(stream, kind, head=b"", body=b"", *rest):
        sleep(len(body) / 5e6)
        sending(stream, kind, head, body, *rest)

    monkeypatch.setattr(Stream, "send", slowly)
    monkeypatch.setattr(source, "REST", 0.0)
    monkeypatch.setattr(source, "FEW_PAGES", 0)
    with pykvm.Machine("halt") as machine:
        khz = machine.vcpu.get_tsc_khz() or 1_000_000
    code = pykvm.asm(WRITER.format(pace=khz // 25), bits=64, org=0x100000)
    with pykvm.Machine(code, mode="long", memory="4M", entry=0x100000) as machine:
        running = Running(machine)
        a, b = socket.socketpair()
        there = Receiving(b, prepare=lambda machine: None)
        report = move(machine, a, downtime=0.03)
        assert running.end().reason == "migrated"
        there.wait()
        shares = [row["slowed"] for row in report["rounds"]]
        assert shares == sorted(shares)
        assert report["slowed"] > 0  # it would not have come to an end else
        assert report["last"]["pages"] < 512
        before = there.machine.memory.read(COUNTER, 1 << 21)
        until(lambda: there.machine.memory.read(COUNTER, 1 << 21) != before)  # and it runs there
        there.close()


@pytest.mark.slow
def test_a_round_limit(machine, monkeypatch):
    monkeypatch.setattr(source, "FEW_PAGES", -1)
    monkeypatch.setattr(source, "MOST_ROUNDS", 3)
    monkeypatch.setattr(Migration, "_fits", lambda *_: False)
    view = machine.memory.view_slot(machine.memory.slots[0])
    a, b = socket.socketpair()
    there = Receiving(b)
    with pytest.raises(MigrationError, match="4096 KiB of memory are under numpy views"):
        move(machine, a)
    assert "gives up" in str(there.wait().error)
    assert goes_on(machine)
    del view


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ioeventfd", "coalesced", "irqfd"])
def test_what_a_guest_has_had_made_by_hypercall_moves(name, system):
    """Doorbells, coalesced pages and irqfds are made again where the guest goes, at whatever moment it moves."""
    test_gallery_guests_move_at_a_random_moment(name, system)
