"""Every gallery guest, with both run loops, ends as its note says."""

import pytest

from pykvm import GuestCrash, Machine, gallery
from tests.conftest import TIMEOUT

SHORT = 0.05  # for guests that never end


class Doubler:
    """The README's device."""

    def __init__(self):
        self.number = 0

    def write(self, offset, size, value):
        self.number = value

    def read(self, offset, size):
        return 2 * self.number


def start(name, **options):
    machine = Machine(name, **options)
    if name == "ten_line_device":
        machine.add_device(Doubler(), port=0x200, length=4)
    if name == "echo":
        machine.uart.receive(b"Hello, 1 2 3\n")
    return machine


@pytest.mark.shadow
@pytest.mark.parametrize("name", gallery.names())
def test_guest(name, loop):
    with start(name, loop=loop) as machine:
        note = machine.info.note
        if note["end"] == "crash":
            with pytest.raises(GuestCrash):
                machine.run(TIMEOUT)
            return
        result = machine.run(SHORT if note["end"] == "timeout" else TIMEOUT)
        assert result.reason == note["end"]
        assert result.exit_code == {"exit": int(note.get("exit", 0)), "halted": 0, "timeout": None}[note["end"]]
        assert note.get("console", "") in result.console


def test_gallery_is_complete():
    wanted = """hello hello_real hello_prot user_compute io_sizes io_rep mmio_rw mmio_straddle rom_write halt spin triple_fault
    exec_hole page_fault cpuid echo ten_line_device"""
    assert set(wanted.split()) <= set(gallery.names())


def test_consoles():
    with start("echo") as machine:
        assert machine.run(TIMEOUT).console == "HELLO, 1 2 3\n"
    with start("user_compute") as machine:
        assert machine.run(TIMEOUT).console.startswith("x87 ok\nSSE2 ok\n")
    with start("cpuid") as machine:
        assert "KVMKVMKVM" in machine.run(TIMEOUT).console
    with Machine("hello", append="and a command line") as machine:
        assert machine.run(TIMEOUT).console == "Hello from long mode.\nand a command line\n"


def test_exits_are_those_of_the_header():
    with start("hello") as machine:
        assert machine.run(TIMEOUT).exits == {"IO": len("Hello from long mode.\n") + 1}
    with start("halt") as machine:
        assert machine.run(TIMEOUT).exits == {"HLT": 1}
    with start("mmio_straddle") as machine:
        assert machine.run(TIMEOUT).exits == {"MMIO": 4, "IO": 1}
        assert machine.bus.unclaimed == {("mmio", 0xD0001000, 4, True): 1, ("mmio", 0xD0001000, 4, False): 1}


@pytest.mark.parametrize("name", ["io_sizes", "io_rep", "mmio_rw", "echo", "rom_write"])
def test_loops_give_the_same_records(name):
    def records(loop):
        with start(name, loop=loop, stats=True) as machine:
            taken = []
            machine.runner.on_records = lambda ring: taken.extend(
                (r.reason, r.qualifier, r.value, r.size, r.count, r.is_write, r.rip) for r in ring.drain()
            )
            result = machine.run(TIMEOUT)
            return taken, result.exits, result.console, result.reason

    assert records("python") == records("native")
