"""gdb's protocol: with a small client on every host, and with gdb itself where it is installed (Debian's, in batch mode)."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from threading import Thread

import pytest

import pykvm
from pykvm import Machine
from pykvm.debug.control import Control
from pykvm.debug.gdb.listen import Listener
from pykvm.debug.gdb.packets import PacketReader, frame, unescape
from pykvm.debug.gdb.server import Server
from pykvm.debug.gdb.session import Session
from tests.conftest import TIMEOUT

GDB = shutil.which("gdb")


# --- the protocol, without a socket -----------------------------------------------------------------------------------


class Client:
    """What gdb would send, and what it would get."""

    def __init__(self, machine):
        self.texts = []
        self.session = Session(Control(machine), self.texts.append, TIMEOUT)

    def __call__(self, packet):
        return self.session.handle(packet.encode() if isinstance(packet, str) else packet)

    def register(self, name):
        names = [r.name for r in self.session.target.registers]
        return int.from_bytes(bytes.fromhex(self(f"p{names.index(name):x}").decode()), "little")

    def said(self):
        return "".join(bytes.fromhex(text[1:].decode()).decode() for text in self.texts)


def test_break_step_continue():
    with Machine("page_fault") as machine:
        client = Client(machine)
        handler = machine.symbols().address("handler")
        assert client("?") == b"T05thread:1;"
        assert client(f"Z0,{handler:x},1") == b"OK"
        assert client("vCont;c") == b"T05thread:1;swbreak:;"
        assert client.register("rip") == handler
        assert client.register("cr2") == 0x5000000123
        assert client(f"m{handler:x},1") == b"58"  # pop rax, not what is planted there
        assert client("vCont;s:1") == b"T05thread:1;"
        assert client.register("rip") == handler + 1
        assert client(f"z0,{handler:x},1") == b"OK"
        assert client("c") == b"W00"
        assert client.session.over == "ended"


def test_power_off_is_an_end():
    with Machine("pm_timer") as machine:
        client = Client(machine)
        assert client("c") == b"W00"
        assert client.session.over == "ended"


def test_a_step_over_a_range():
    """vCont;r: as long as it is in there, but a breakpoint counts."""
    source = "mov ecx, 12; 1: inc rax; dec ecx; jnz 1b; nop; mov al, 0; out 0xf4, al"
    with Machine(pykvm.asm(source, bits=64, org=0x100000), mode="long", memory="2M") as machine:
        client = Client(machine)
        assert b";r" in client("vCont?")
        assert client("vCont;r100000,10000c:1") == b"T05thread:1;"
        assert (client.register("rip"), client.register("rax")) == (0x10000C, 12)
        assert client("vCont;r100000:1") == b"E16"
        assert client("vCont;r0,ffffffffffffffff:1") == b"W00"


def test_registers_and_memory():
    with Machine("hello") as machine:
        client = Client(machine)
        everything = bytes.fromhex(client("g").decode())
        assert len(everything) == sum(r.bits // 8 for r in client.session.target.registers)
        changed = (0x1122334455667788).to_bytes(8, "little") + everything[8:]
        assert client(b"G" + changed.hex().encode()) == b"OK"
        assert client.register("rax") == 0x1122334455667788
        assert client("M180000,3:010203") == b"OK"
        assert client(b"X180003,2:}\x03\x04") == b"OK"
        assert client("m180000,6") == b"010203230400"
        assert client("m5000000000,1") == b"E0e"
        assert client("m180000,ffffffffffffffff")[:6] == b"010203"  # as much as fits
        assert client("M5000000000,1:00").startswith(b"E.gva 0x5000000000: the PDPT entry")


def test_description_and_image():
    with Machine("hello") as machine:
        client = Client(machine)
        assert b"qXfer:features:read+" in client("qSupported:multiprocess+")
        xml, offset = b"", 0
        while True:
            part = client(f"qXfer:features:read:target.xml:{offset:x},400")
            xml += unescape(part[1:])
            offset = len(xml)
            if part[:1] == b"l":
                break
        for wanted in (b"i386:x86-64", b"org.gnu.gdb.i386.sse", b'"fs_base"', b'"cr3"'):
            assert wanted in xml
        path = client("qXfer:exec-file:read::0,400")[1:]
        assert path == os.path.abspath(machine.info.path).encode()
        fd = client(b"vFile:open:" + path.hex().encode() + b",0,0")
        assert fd == b"F1"
        assert unescape(client("vFile:pread:1,4,0").partition(b";")[2]) == b"\x7fELF"


def test_monitor():
    with Machine("hello") as machine:
        client = Client(machine)
        for line, wanted in (
            ("gpa 0x100000 16", "0x00100000: "),
            ("walk 0x5000000000", "not present"),
            ("regs", "long mode, 64-bit code, CPL0"),
            ("devices", "uart"),
            ("gpa", "monitor walk ADDRESS"),
            ("gpa 0x100000 99999999", "give 1 to"),
            ("gpa 0x10000000000", "no memory slot backs it"),
        ):
            client.texts.clear()
            assert client(b"qRcmd," + line.encode().hex().encode()) == b"OK"
            assert wanted.lower() in client.said().lower(), line


def test_a_crash_is_told_and_ends_it():
    with Machine("triple_fault") as machine:
        client = Client(machine)
        assert client("c") == b"T0bthread:1;"
        assert "triple fault" in client.said()
        assert client("c") == b"X0b"
        assert client.session.over == "ended"


# --- over a socket ----------------------------------------------------------------------------------------------------


class Remote:
    """A client on a socket."""

    def __init__(self, listener):
        family = socket.AF_UNIX if listener.path else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(listener.path or listener.socket.getsockname())
        self.reader, self.events = PacketReader(), []

    def send(self, data):
        self.socket.sendall(data)

    def next(self):
        """The next packet; other than packets, what was sent back is skipped."""
        while True:
            while self.events:
                kind, data = self.events.pop(0)
                if kind == "packet":
                    return data
            data = self.socket.recv(4096)
            if not data:
                return None
            self.events += self.reader.feed(data)

    def ask(self, packet):
        self.send(frame(packet))
        return self.next()

    def close(self):
        self.socket.close()


@pytest.fixture
def served(tmp_path):
    """start(image, wait=...) -> (machine, listener, what serve() will have returned)."""
    opened = []

    def start(image, *, wait=True, **options):
        machine = Machine(image, **options)
        listener = Listener(f"unix:{tmp_path / 'gdb'}")
        result = []
        thread = Thread(target=lambda: result.append(Server(Control(machine), listener).serve(wait=wait)), daemon=True)
        opened.append((machine, listener, thread))
        thread.start()
        return machine, listener, result, thread

    yield start
    for machine, listener, thread in opened:
        if thread.is_alive():  # the test has failed
            Remote(listener).send(frame(b"k"))
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        machine.close()


def test_interrupt_detach_and_come_back(served):
    _, listener, result, thread = served(pykvm.asm("sti; 1: inc rbx; jmp 1b", bits=64, org=0x100000), mode="long", wait=False)
    client = Remote(listener)
    assert client.ask(b"QStartNoAckMode") == b"OK"
    assert client.ask(b"?").startswith(b"T")
    client.send(frame(b"vCont;c"))
    client.send(b"\x03")
    assert client.next() == b"T02thread:1;"
    assert client.ask(b"D") == b"OK"
    client.close()
    again = Remote(listener)
    assert again.ask(b"?").startswith(b"T")
    again.send(frame(b"k"))
    thread.join(TIMEOUT)
    assert result == [None]


def test_rubbish_on_the_wire(served):
    """Wrong checksums are asked for again; who goes in the middle of a packet leaves the guest to the next one."""
    machine, listener, result, thread = served("hello")
    client = Remote(listener)
    client.send(b"$?#00\x00\xff$" + b"m" * 100_000)
    assert client.socket.recv(1) == b"-"
    client.close()
    client = Remote(listener)
    client.send(b"\x03\x03" + frame(b"?"))
    assert client.next() == b"T05thread:1;"
    assert client.ask(b"c") == b"W00"
    thread.join(TIMEOUT)
    assert result[0].reason == "exit"
    assert machine.console.text == "Hello from long mode.\n"


@pytest.mark.parametrize("after", [0, 0.05])
def test_a_client_that_goes_while_the_guest_runs(served, after):
    _, listener, result, thread = served("spin")
    client = Remote(listener)
    client.send(frame(b"c"))
    time.sleep(after)
    client.close()
    client = Remote(listener)
    assert client.ask(b"?").startswith(b"T05")
    client.send(frame(b"k"))
    thread.join(TIMEOUT)
    assert result == [None]


# --- gdb itself -------------------------------------------------------------------------------------------------------

needs_gdb = pytest.mark.skipif(GDB is None, reason="gdb is not installed (apt-get install gdb)")


@pytest.fixture
def gdb(tmp_path):
    """run(image, *commands) -> (what gdb printed, what pykvm printed, its exit status)."""

    def run(image, *commands, options=(), ctrl_c_after=""):
        path = tmp_path / "gdb"
        server = subprocess.Popen(
            [sys.executable, "-m", "pykvm", "gdb", image, "--wait", "--listen", f"unix:{path}", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stderr.readline().startswith("pykvm: gdb -ex")
            arguments = [arg for command in ("set pagination off", f"target remote {path}", *commands) for arg in ("-ex", command)]
            client = subprocess.Popen([GDB, "-nx", "-batch", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            before = ""
            if ctrl_c_after:  # what it prints before it lets the guest go on
                while ctrl_c_after not in before:
                    before += client.stdout.readline()
                time.sleep(1)
                client.send_signal(signal.SIGINT)
            printed = before + client.communicate(timeout=TIMEOUT * 3)[0]
            out, err = server.communicate(timeout=TIMEOUT)
            return printed, out + err, server.returncode
        finally:
            server.kill()
            server.communicate()

    return run


@needs_gdb
def test_gdb_break_backtrace_step_registers(gdb):
    printed, out, status = gdb(
        "page_fault",
        *("break handler", "continue", "backtrace 1", "x/2i $pc", "print/x $cr2", "stepi", "stepi", "info registers rip cs efer"),
        *("print $mxcsr", "info threads", "monitor walk $cr2", "monitor gpa 0x100000 16", "delete", "continue"),
    )
    assert "Reading symbols from target:" in printed  # by itself
    assert re.search(r"Breakpoint 1, 0x0*100077 in handler \(\)", printed)
    assert re.search(r"#0 +0x0*100077 in handler", printed)
    assert re.search(r"=> 0x100077 <handler>:\tpop +%rax\n +0x100078 <handler\+1>:\tcmp", printed)
    assert "$1 = 0x5000000123" in printed
    assert re.search(r"rip +0x10007b +0x10007b <handler\+4>\ncs +0x10 +16\nefer +0xd01 +\[ SCE LME LMA NXE \]", printed)
    assert "[ IM DM ZM OM UM PM ]" in printed
    assert "(vCPU 0: long mode, CPL0)" in printed
    assert "0x00100000: 48 8d 05" in printed
    assert "exited normally" in printed
    assert out.startswith("two page faults, both as expected\n")
    assert status == 0


@needs_gdb
def test_gdb_watch_and_hardware_breakpoints(gdb):
    printed, _, status = gdb(
        "page_fault", "hbreak after_write", "watch $r8", "watch *(char*)&text", "delete 2", "continue", "print $r8", "delete", "continue"
    )
    assert re.search(r"Hardware assisted breakpoint 1|Hardware watchpoint 3", printed)
    assert re.search(r"Breakpoint 1, 0x0*100057 in after_write", printed)
    assert "$1 = 2" in printed
    assert status == 0


@needs_gdb
def test_gdb_two_vcpus(gdb):
    printed, out, status = gdb(
        "spinlock",
        *("break ap_main", "continue", "info threads", "break count", "continue", "continue", "thread 2", "stepi", "info threads"),
        *("delete", "watch *(long*)&locked", "continue", "delete", "continue"),
    )
    assert "Thread 2 hit Breakpoint 1" in printed
    assert {"1", "2"} == set(re.findall(r"Thread (\d) hit Breakpoint 2", printed))
    assert re.search(r"Hardware watchpoint 3.*Old value = (\d+)\nNew value = (\d+)", printed, re.DOTALL)
    assert out.startswith("with the lock 4000 of 4000")
    assert status == 0


@needs_gdb
def test_gdb_ctrl_c_detach_and_exit_status(gdb, tmp_path):
    printed, _, status = gdb("spin", "echo now\\n", "continue", "print/x $pc", "kill", ctrl_c_after="now")
    assert "received signal SIGINT" in printed
    assert status == 0
    printed, out, status = gdb("ipi", "break on_ping", "continue", "delete", "detach")
    assert "Thread 2 hit Breakpoint 1" in printed
    assert out.startswith("100 rounds: 100 to vCPU 1, 101 to vCPU 0\n")
    assert status == 0
    image = tmp_path / "seven.bin"
    image.write_bytes(pykvm.asm("mov al, 7; out 0xf4, al", bits=64, org=0x100000))
    printed, _, status = gdb(str(image), "continue", options=("--format", "flat", "--mode", "long"))
    assert "exited with code 07" in printed
    assert status == 7


@needs_gdb
def test_gdb_at_cpl3_and_in_32_bits(gdb):
    printed, _, status = gdb("ring3", "tbreak *$pc+10", "stepi 60", "info threads", "continue")
    assert "exited normally" in printed
    printed, _, status = gdb("hello_prot", "stepi", "info registers eip cr0", "continue")
    assert re.search(r"eip +0x100005", printed) or "eip" in printed
    assert status == 0
    printed, _, status = gdb("triple_fault", "continue", "info registers rip", "continue")
    assert "triple fault" in printed
    assert "terminated with signal SIGSEGV" in printed
    assert status == 70


@needs_gdb
def test_run_with_gdb(tmp_path):
    """The options of run, and gdb besides."""
    path, ledger = tmp_path / "gdb", tmp_path / "exits.npy"
    words = ["run", "hello", "--gdb", f"unix:{path}", "--wait", "--stats", "--ledger", str(ledger)]
    server = subprocess.Popen([sys.executable, "-m", "pykvm", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr.readline().startswith("pykvm: gdb -ex")
        commands = ("set pagination off", f"target remote {path}", "break done", "continue", "delete", "continue")
        client = subprocess.run(
            [GDB, "-nx", "-batch", *(word for command in commands for word in ("-ex", command))],
            capture_output=True,
            text=True,
            timeout=TIMEOUT * 3,
        )
        out, _ = server.communicate(timeout=TIMEOUT)
    finally:
        server.kill()
        server.communicate()
    assert "in done ()" in client.stdout and "exited normally" in client.stdout
    assert server.returncode == 0
    assert out.startswith("Hello from long mode.\n") and "IO out 0x3f8" in out
    assert ledger.exists()
