"""What the tests of live migration share: a guest that notices lost memory, machines in threads, and a link that can be cut."""

import socket
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic, sleep

import pykvm
from pykvm.errors import MigrationError
from pykvm.state.migrate import Migration
from pykvm.state.receive import Incoming
from tests.conftest import TIME_SCALE, TIMEOUT

PATIENCE = 10 * TIME_SCALE  # seconds for a frame
PASSES = 40
CONSOLE = "".join(chr(ord("a") + n % 26) for n in range(1, PASSES + 1))
COUNTER = 0x200000  # gpa of the first of the pages that the guest writes all the time
GUEST = f"""
        sti                         # interrupts on: see probe.interruptible_with_if_clear()
        xor r8d, r8d                # passes through the turnstile
        xor r9d, r9d                # a checksum of them
        xor r10d, r10d              # rounds, with those that wait
        xor r11d, r11d
again:  inc r10
        mov rdi, {COUNTER}
page:   cmp [rdi], r11              # every page holds what the last round wrote
        jne lost
        mov [rdi], r10
        add rdi, 4096
        cmp rdi, {COUNTER + 48 * 4096}
        jb page
        mov r11, r10
        in al, 0x50                 # the turnstile
        test al, al
        jz again
        inc r8
        imul r9, r9, 31
        add r9, r8
        mov eax, r8d
        xor edx, edx
        mov ecx, 26
        div ecx
        lea eax, [rdx + 'a']
        out 0xe9, al
        cmp r8d, {PASSES}
        jb again
        mov eax, r9d
        and al, 31
        out 0xf4, al
lost:   mov al, 63
        out 0xf4, al
"""


class Turnstile:
    """Lets the guest pass ``most`` times in all, and has it wait then."""

    def __init__(self, most):
        self.most, self.passed = most, 0

    def read(self, offset, size):
        if self.passed >= self.most:
            return 0
        self.passed += 1
        return 1

    def save(self):
        return {"version": 1, "passed": self.passed}

    def load(self, state):
        self.passed = state["passed"]


def walker(most, **options):
    """A machine with the guest above."""
    code = pykvm.asm(GUEST, bits=64, org=0x100000)
    machine = pykvm.Machine(code, mode="long", memory="4M", entry=0x100000, **options)
    machine.add_device(Turnstile(most), port=0x50)
    return machine


def exit_code():
    checksum = 0
    for n in range(1, PASSES + 1):
        checksum = checksum * 31 + n
    return checksum & 31


class Running:
    """A machine's run, in a thread."""

    def __init__(self, machine, timeout=TIMEOUT):
        self.machine, self.result = machine, None
        self._timeout = timeout
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()
        until(lambda: machine.group.running or self.result is not None)

    def _work(self):
        try:
            self.result = self.machine.run(self._timeout, explain=False)
        except BaseException as error:
            self.result = error

    def end(self):
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


class Receiving:
    """The destination, in a thread: ``machine`` and ``running``, or ``error``."""

    def __init__(self, sock, *, most=PASSES, run=True, patience=PATIENCE, prepare=None, **options):
        self.machine = self.running = self.error = None
        self._run = run
        prepare = prepare or (lambda machine: machine.add_device(Turnstile(most), port=0x50))
        self.incoming = Incoming(sock, patience=patience, prepare=prepare, **options)
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        try:
            self.machine = self.incoming.take()
        except MigrationError as error:
            self.error = error
            return
        if self._run:
            self.running = Running(self.machine)

    def wait(self):
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()
        return self

    def close(self):
        if self.machine is not None:
            self.machine.stop()
            if self.running is not None:
                self.running.thread.join(TIMEOUT)
            self.machine.close()


class Link:
    """Two sockets, ``source`` and ``destination``, and a wire between them that is cut after so many bytes in a direction; None: never."""

    def __init__(self, forward=None, backward=None):
        self.source, a = socket.socketpair()
        b, self.destination = socket.socketpair()
        self._ends = (a, b)
        self.carried = [0, 0]
        self.cut = Event()
        self.threads = [
            Thread(target=self._pump, args=(0, a, b, forward), daemon=True),
            Thread(target=self._pump, args=(1, b, a, backward), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def _pump(self, index, source, to, most):
        try:
            while most is None or self.carried[index] < most:
                data = source.recv(65536 if most is None else min(65536, most - self.carried[index]))
                if not data:
                    break
                to.sendall(data)
                self.carried[index] += len(data)
        except OSError:
            pass
        if most is not None and self.carried[index] >= most:
            self.cut.set()
        for end in self._ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        for end in self._ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self.threads:
            thread.join(TIMEOUT)
        for end in (*self._ends, self.source, self.destination):
            end.close()


def until(condition, timeout=TIMEOUT):
    """Wait for it; a condition that does not come is a failure."""
    deadline = monotonic() + timeout
    while not condition():
        assert monotonic() < deadline, "it did not happen"
        sleep(0.001)


def goes_on(machine):
    """Whether the guest above runs: its counter counts."""
    before = machine.memory.read_u64(COUNTER)
    until(lambda: machine.memory.read_u64(COUNTER) > before)
    return True


def move(machine, sock, to="there", patience=PATIENCE, **options):
    return Migration(machine, sock, to, patience=patience, **options).run()


@contextmanager
def half_way():
    """A guest that waits at its turnstile, half way, and writes memory all the time."""
    with walker(PASSES // 2) as machine:
        running = Running(machine)
        until(lambda: len(machine.console.data) == PASSES // 2)
        yield machine
        machine.stop()
        if machine.group.paused and machine.moved_to is None:
            machine.resume()
        running.thread.join(TIMEOUT)
