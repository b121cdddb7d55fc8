"""What tests of saved states share: memory copied, machines stopped at an exit, guests run to their ends."""

import json

import pytest

from pykvm import GuestCrash, GuestMemory, Machine
from pykvm.debug.reach import run_until
from pykvm.needs import unmet
from pykvm.state.machinestate import MachineState
from tests.conftest import TIMEOUT

# What these print is a time, or how two vCPUs raced: no two runs are the same.
TIMED = ("kvmclock", "tsc", "spinlock")
POLLING = ("pm_timer",)  # how many exits these have depends on how fast they come


class Doubler:
    """The README's device, which states itself."""

    def __init__(self):
        self.number = 0

    def write(self, offset, size, value):
        self.number = value

    def read(self, offset, size):
        return 2 * self.number

    def save(self):
        return {"number": self.number}

    def load(self, state):
        self.number = state["number"]


def start(name, **options):
    """A gallery guest with all that it wants."""
    machine = Machine(name, **options)
    why = unmet(machine.info.note, machine.system)
    if why:
        machine.close()
        pytest.skip(why)
    add_devices(machine, name)
    if name == "echo":
        machine.uart.receive(b"Hello, 1 2 3\n")
    return machine


def add_devices(machine, name):
    if name == "ten_line_device":
        machine.add_device(Doubler(), port=0x200, length=4)


def copy(memory):
    """The same bytes in other memory."""
    other = GuestMemory()
    for slot in memory.slots:
        other.add(slot.gpa, slot.size, readonly=slot.readonly).map[:] = slot.map[:]
    return other


def stop_at(machine, exit):
    """Run up to its ``exit``-th exit; whether that came."""
    return run_until(machine, str(exit), TIMEOUT) == "until"


def end(machine):
    """How it ends: reason, code, console."""
    try:
        result = machine.run(TIMEOUT, explain=False)
    except GuestCrash as crash:
        return "crash", None, crash.result.console
    return result.reason, result.exit_code, result.console


def again(machine, **options):
    """The machine restored from its state, which has been through JSON, and a copy of its memory."""
    state = machine.save()
    return Machine.restore(MachineState.from_json(state.to_json()), copy(machine.memory), **options)


def a_state():
    """A state as JSON's tree, and the memory that goes with it."""
    with start("pic_pit") as machine:
        stop_at(machine, 3)
        return json.loads(machine.save().to_json()), copy(machine.memory)
