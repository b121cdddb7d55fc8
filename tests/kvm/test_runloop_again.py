"""The run loop knows the last access to a device again (native/runloop.c): the same words, and still what is there now."""

import pytest

import pykvm
from pykvm import Machine
from pykvm.bus import Native
from tests.conftest import TIMEOUT

EXIT = "; xor eax, eax; out 0xf4, al"


def flat(source, loop):
    return Machine(pykvm.asm(source + EXIT, bits=32, org=0x100000), mode="protected", memory="2M", loop=loop)


class Seen:
    """Notes each access, and answers with how many there were."""

    def __init__(self, log, name=""):
        self.log, self.name = log, name

    def write(self, offset, size, value):
        self.log.append((self.name, offset, size, value))

    def read(self, offset, size):
        self.log.append((self.name, offset, size))
        return len(self.log)


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("mov edx, 0x300; mov eax, 0x01020304; out dx, al; out dx, al; out dx, ax; out dx, eax; out dx, al", [1, 1, 2, 4, 1]),
        ("mov ebx, 0xd1000000; mov eax, 0x01020304; mov [ebx], eax; mov [ebx], eax; mov [ebx], al; mov [ebx], ax", [4, 4, 1, 2]),
    ],
    ids=["ports", "memory"],
)
def test_sizes_on_one_register(source, want, loop):
    log = []
    with flat(source, loop) as machine:
        machine.add_device(Seen(log), port=0x300, length=4)
        machine.add_device(Seen(log), gpa=0xD1000000, length=4)
        assert machine.run(TIMEOUT).exit_code == 0
    assert log == [("", 0, size, 0x01020304 & ((1 << 8 * size) - 1)) for size in want]


def test_reads_and_writes_take_turns(loop):
    """Each read gets its own answer, and values of every width arrive whole."""
    log = []
    source = "mov edx, 0x300; in al, dx; in al, dx; out dx, al; in al, dx; out dx, al; "
    source += "mov eax, 0xffffffff; out dx, eax; out dx, eax; mov eax, 7; out dx, eax"
    with flat(source, loop) as machine:
        machine.add_device(Seen(log), port=0x300, length=4)
        assert machine.run(TIMEOUT).exit_code == 0
    read = ("", 0, 1)
    assert log == [read, read, ("", 0, 1, 2), read, ("", 0, 1, 4), *[("", 0, 4, 0xFFFFFFFF)] * 2, ("", 0, 4, 7)]


def test_a_rep_is_no_access_again(loop):
    log = []
    with flat("mov edx, 0x300; mov edi, 0x110000; cld; in al, dx; in al, dx; mov ecx, 3; rep insb; in al, dx", loop) as machine:
        machine.add_device(Seen(log), port=0x300)
        assert machine.run(TIMEOUT).exit_code == 0
        assert machine.memory.read(0x110000, 3) == bytes((3, 4, 5))
    assert len(log) == 6


def test_a_device_that_another_takes_the_place_of(loop):
    """Amid a run, by the device itself: the same access reaches who is there now, and nobody when nobody is."""
    log = []

    class First(Seen):
        def write(self, offset, size, value):
            super().write(offset, size, value)
            if len(log) == 2:
                machine.remove_device(here[0])
                here[0] = machine.add_device(Second(log, "second"), port=0x300)

    class Second(Seen):
        def write(self, offset, size, value):
            super().write(offset, size, value)
            if len(log) == 4:
                machine.remove_device(here[0])

    with flat("mov edx, 0x300; mov ecx, 6; 1: mov al, cl; out dx, al; dec ecx; jnz 1b", loop) as machine:
        here = [machine.add_device(First(log, "first"), port=0x300)]
        machine.add_device(Seen(log, "neighbour"), port=0x310)  # has the other's place in the table when that is gone
        result = machine.run(TIMEOUT)
    assert result.exit_code == 0
    assert log == [("first", 0, 1, 6), ("first", 0, 1, 5), ("second", 0, 1, 4), ("second", 0, 1, 3)]


def test_another_loop_does_otherwise_with_the_same_access():
    """What the Python loop gives to the device's method, the native loop appends by itself, from its first access on."""
    sink, log = bytearray(), []

    class Output(Seen):
        def write(self, offset, size, value):
            super().write(offset, size, value)
            sink.append(value)
            if len(log) == 3:
                machine.stop()

    with flat("mov edx, 0x300; mov ecx, 6; 1: mov al, cl; out dx, al; dec ecx; jnz 1b", "python") as machine:
        machine.add_device(Output(log), port=0x300, native=Native.append(sink))
        assert machine.run(TIMEOUT).reason == "stopped"
        machine.runner.loop = "native"
        assert machine.run(TIMEOUT).exit_code == 0
    assert sink == bytes((6, 5, 4, 3, 2, 1)) and len(log) == 3


def test_values_of_64_bits(loop):
    """Of one, two and three of Python's 30-bit digits, by turns."""
    log, values = [], [1, 0x1122334455667788, 2, 0xFFFFFFFF, 0xFFFFFFFF00000000]
    source = "mov ebx, 0xd1000000; " + "; ".join(f"mov rax, {value:#x}; mov [rbx], rax" for value in values)
    code = pykvm.asm(source + EXIT, bits=64, org=0x100000)
    with Machine(code, mode="long", memory="2M", loop=loop) as machine:
        machine.add_device(Seen(log), gpa=0xD1000000, length=8)
        assert machine.run(TIMEOUT).exit_code == 0
    assert log == [("", 0, 8, value) for value in values]
