"""vCPUs that share devices ask one at a time, whichever way an access takes; and the lock is given back whatever happens."""

import os
import signal
import threading
import time

import pytest

import pykvm
from pykvm import Machine
from pykvm.exit_reason import ExitReason
from pykvm.smp import DeviceLock
from tests.conftest import TIMEOUT, Running

AP_PAGE, DONE = 0x7000, 0x8000
START = """
    mov edi, 0xfee00000
    mov dword ptr [edi + 0xf0], 0x1ff       # the APIC is enabled
    mov dword ptr [edi + 0x300], 0xc4500    # INIT to all others
    mov dword ptr [edi + 0x300], 0xc4607    # start-up IPI, page 0x7000
"""
WAIT = f"; 8: pause; cmp byte ptr [{DONE}], 0; je 8b"
END = "; xor eax, eax; out 0xf4, al"
AP_END = f"; mov byte ptr [{DONE}], 1; 9: hlt; jmp 9b"


def two(bsp, ap, loop="python"):
    """vCPU 0 runs ``bsp`` in protected mode, vCPU 1 ``ap`` in real mode, both at once; then vCPU 0 waits for the other and exits with 0."""
    machine = Machine(pykvm.asm(START + bsp + WAIT + END, bits=32, org=0x100000), mode="protected", memory="2M", cpus=2, loop=loop)
    machine.memory.write(AP_PAGE, pykvm.asm(ap + AP_END, bits=16))
    return machine


class Alone:
    """Lets other threads run while it is asked, and notes whether one of them comes in."""

    def __init__(self):
        self.inside, self.most, self.asked = 0, 0, 0

    def read(self, offset, size):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.asked += 1
        time.sleep(0 if self.asked % 8 else 0.0005)  # short, and longer than another vCPU waits awake
        self.inside -= 1
        return 0

    def write(self, offset, size, value):
        self.read(offset, size)


def test_one_at_a_time(loop):
    with two("mov ecx, 100; 1: out 0x52, al; in al, 0x53; loop 1b", "mov cx, 100; 1: out 0x53, al; in al, 0x52; loop 1b", loop) as machine:
        device = Alone()
        machine.add_device(device, port=0x52, length=2)
        assert machine.run(TIMEOUT).exit_code == 0
        assert (device.asked, device.most) == (400, 1)


def test_nobody_asks_while_another_thread_has_it(loop):
    taken, go = threading.Event(), threading.Event()
    with two("1: out 0x52, al; out 0x52, al", "out 0x52, al", loop) as machine:
        device = Alone()
        machine.add_device(device, port=0x52)
        holder = threading.Thread(target=lambda: machine.runner.holding(lambda: (taken.set(), go.wait(TIMEOUT))))
        holder.start()
        assert taken.wait(TIMEOUT)
        with Running(machine) as other:
            exits = [vcpu.native.counts for vcpu in machine.vcpus]
            deadline = time.monotonic() + TIMEOUT
            while not all(counts[ExitReason.IO] for counts in exits):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert device.asked == 0
            go.set()
            other.thread.join(TIMEOUT)
        holder.join()
        assert (other.result.exit_code, device.asked) == (0, 3)


def test_a_device_may_take_it_again(loop):
    """The first access goes the long way, the others have a slot."""

    class Again:
        got = ()

        def write(self, offset, size, value):
            self.got += (machine.runners[1].holding(lambda: value + 1),)

    with two("mov ecx, 5; 1: mov al, cl; out 0x52, al; loop 1b", "nop", loop) as machine:
        device = Again()
        machine.add_device(device, port=0x52)
        assert machine.run(TIMEOUT).exit_code == 0
        assert device.got == (6, 5, 4, 3, 2)
        assert machine.runner.lock.cdata.owner == 0


@pytest.mark.parametrize("at", [1, 3])
def test_an_exception_gives_it_back(at, loop):
    """Of the long way, and of an access with a slot: the other vCPU is asked all the same, and the next run goes on."""

    class Fails:
        asked = 0

        def write(self, offset, size, value):
            self.asked += 1
            if self.asked == at:
                raise RuntimeError("not today")

    with two("mov ecx, 5; 1: out 0x52, al; loop 1b; out 0x54, al", "out 0x54, al", loop) as machine:
        device, other = Fails(), Alone()
        machine.add_device(device, port=0x52)
        machine.add_device(other, port=0x54)
        with pytest.raises(RuntimeError, match="not today"):
            machine.run(TIMEOUT)
        assert machine.runner.lock.cdata.owner == 0
        assert machine.run(TIMEOUT).exit_code == 0
        assert (device.asked, other.asked) == (6, 2)


def test_signal_handlers_run_in_who_waits_for_it():
    """vCPU 0 waits for vCPU 1, which waits in a device for what the handler does."""
    entered, handled = threading.Event(), threading.Event()
    waited = []

    class Waits:
        def write(self, offset, size, value):
            entered.set()
            waited.append(handled.wait(TIMEOUT))

    class Quick:
        def write(self, offset, size, value):
            pass

    def send():
        if entered.wait(TIMEOUT):
            os.kill(os.getpid(), signal.SIGUSR1)

    old = signal.signal(signal.SIGUSR1, lambda *_: handled.set())
    sender = threading.Thread(target=send)
    try:
        with two(WAIT.replace(str(DONE), str(DONE + 1)) + "; out 0x54, al", f"mov byte ptr [{DONE + 1}], 1; out 0x52, al") as machine:
            machine.add_device(Waits(), port=0x52)
            machine.add_device(Quick(), port=0x54)
            sender.start()
            assert machine.run(TIMEOUT).exit_code == 0
    finally:
        signal.signal(signal.SIGUSR1, old)
        sender.join()
    assert waited == [True]


def test_whoever_does_not_have_it_gives_nothing_back():
    lock = DeviceLock()

    def fail():
        raise ZeroDivisionError

    def elsewhere():
        from pykvm.abi import lib

        lib.pykvm_unlock_to(lock.cdata, 0)  # as one that was interrupted on the way to take it

    def inside():
        with pytest.raises(ZeroDivisionError):
            lock.holding(fail)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return lock.cdata.owner, lock.cdata.depth

    owner, depth = lock.holding(inside)
    assert owner and depth == 1
    assert (lock.cdata.owner, lock.cdata.depth) == (0, 0)
