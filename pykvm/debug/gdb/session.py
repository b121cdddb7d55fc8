"""One gdb that is connected: its packets answered, one after the other, by a Control.

All-stop: a packet that lets the guest go on is answered when it stands still again. ``Session.handle(packet)`` is the whole protocol above
the packet layer and needs no socket; whatever comes gets an answer: an error, or the empty one by which gdb knows what a stub lacks.
"""

from __future__ import annotations

import os

from pykvm.debug.gdb.files import ImageFile
from pykvm.debug.gdb.monitor import monitor
from pykvm.debug.gdb.packets import PACKET_SIZE, escape, parse_hex, unescape
from pykvm.debug.gdb.target import Target
from pykvm.errors import ConfigError, PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.debug.control import Control
    from pykvm.debug.stepping import Access, Stopped
    from pykvm.vcpu import VCPU

__all__ = ["Session"]

_BAD, _UNREADABLE = b"E16", b"E0e"  # EINVAL and EFAULT; gdb shows the number at most
_SIGINT, _SIGTRAP, _SIGSEGV, _SIGXCPU = 2, 5, 11, 24  # gdb's own numbers (include/gdb/signals.def)
_SIGNALS = {"crash": _SIGSEGV, "interrupted": _SIGINT, "timeout": _SIGXCPU}
_ACCESS: dict[bytes, Access] = {b"2": "write", b"3": "read", b"4": "access"}
_WATCH = {"write": "watch", "read": "rwatch", "access": "awatch"}
_ENDS = ("exit", "halted", "reset", "power-off")
_FOREVER = 1 << 63  # steps
_ROOM = PACKET_SIZE // 2 - 16
_SUPPORTED = b"PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;qXfer:exec-file:read+;vContSupported+;swbreak+;hwbreak+" % PACKET_SIZE


class Session:
    """``control`` for one client.

    ``send`` takes the data of a packet that is no reply: text for the terminal of gdb's user. ``over``: "" while it goes on, then
    "detached", "killed" or "ended"; ``stopped``: what the guest stands still for; ``running``: it does not; ``no_ack``: acknowledgements
    were agreed away.
    """

    def __init__(self, control: Control, send: Callable[[bytes], object], timeout: float | None = None) -> None:
        self.control, self.send, self.timeout = control, send, timeout
        self.machine = control.machine
        self.target = Target(self.machine)
        self.path = os.path.abspath(self.machine.info.path)
        self.file = ImageFile(self.path, self.machine.data)
        self.over = ""
        self.no_ack = self.running = False
        self.stopped: Stopped | None = None
        self._cpu = self._step_cpu = 0
        self._kinds: dict[int, bytes] = {}  # of breakpoints: gva -> Z0 or Z1

    def handle(self, packet: bytes) -> bytes:
        """The data of the reply."""
        try:
            return self._handle(packet)
        except PykvmError as error:
            return b"E." + escape(str(error).encode(errors="replace")[:_ROOM])

    def _handle(self, packet: bytes) -> bytes:
        kind, rest = packet[:1], packet[1:]
        match kind:
            case b"?":
                return self._why(self.stopped)
            case b"g":
                return b"".join(self.target.read(self._vcpu())).hex().encode()
            case b"G":
                return self._set_all(rest)
            case b"p":
                return self._get_one(rest)
            case b"P":
                return self._set_one(rest)
            case b"m":
                return self._read_memory(rest)
            case b"M" | b"X":
                return self._write_memory(rest, binary=kind == b"X")
            case b"Z" | b"z":
                return self._point(rest, insert=kind == b"Z")
            case b"s" | b"S" | b"c" | b"C":
                return self._resume(self._step_cpu if kind in (b"s", b"S") else None)
            case b"H":
                return self._select(rest)
            case b"T":
                return _BAD if self._thread(rest) is None else b"OK"
            case b"D":
                self.over = "detached"
                return b"OK"
            case b"k":
                self.over = "killed"
                return b"OK"
            case b"v":
                return self._verbose(rest)
            case b"q" | b"Q":
                return self._query(packet)
        return b""

    def _verbose(self, rest: bytes) -> bytes:
        if rest == b"Cont?":
            return b"vCont;c;C;s;S;r"
        if rest.startswith(b"Cont;"):
            return self._vcont(rest[5:])
        if rest.startswith(b"Kill"):
            self.over = "killed"
            return b"OK"
        if rest.startswith(b"File:"):
            return self.file.answer(rest[5:])
        return b""

    def _query(self, packet: bytes) -> bytes:
        if packet.startswith(b"qRcmd,"):
            return self._monitor(packet[6:])
        if packet.startswith(b"qThreadExtraInfo,"):
            return self._describe(packet[17:])
        name, _, rest = packet.partition(b":")
        match name:
            case b"qSupported":
                return _SUPPORTED
            case b"QStartNoAckMode":
                self.no_ack = True
                return b"OK"
            case b"qXfer":
                return self._transfer(rest)
            case b"qfThreadInfo":
                return b"m" + b",".join(b"%x" % (cpu + 1) for cpu in range(self.machine.cpus))
            case b"qsThreadInfo":
                return b"l"
            case b"qC":
                return b"QC%x" % (self._cpu + 1)
            case b"qAttached":
                return b"1"
            case b"qSymbol":
                return b"OK"
        return b""

    # --- threads -----------------------------------------------------------------------------------------------------

    def _vcpu(self) -> VCPU:
        return self.machine.vcpus[self._cpu]

    def _thread(self, text: bytes) -> int | None:
        """The vCPU of a thread id: threads count from 1."""
        number = parse_hex(text)
        return number - 1 if number is not None and 1 <= number <= self.machine.cpus else None

    def _select(self, rest: bytes) -> bytes:
        what, text = rest[:1], rest[1:]
        if text in (b"0", b"-1"):
            return b"OK"  # any, and all: the current one stays
        cpu = self._thread(text)
        if cpu is None or what not in (b"g", b"c"):
            return _BAD
        if what == b"g":
            self._cpu = cpu
        else:
            self._step_cpu = cpu
        return b"OK"

    def _describe(self, text: bytes) -> bytes:
        cpu = self._thread(text)
        if cpu is None:
            return _BAD
        view = self.control.view(cpu)
        return f"vCPU {cpu}: {view.mode} mode, CPL{view.cpl}".encode().hex().encode()

    # --- registers and memory ----------------------------------------------------------------------------------------

    def _get_one(self, rest: bytes) -> bytes:
        number = parse_hex(rest)
        if number is None or number >= len(self.target.registers):
            return _BAD
        return self.target.read(self._vcpu())[number].hex().encode()

    def _set_one(self, rest: bytes) -> bytes:
        number, data = parse_hex(rest.partition(b"=")[0]), _bytes(rest.partition(b"=")[2])
        if number is None or data is None:
            return _BAD
        self.target.write(self._vcpu(), number, data)
        return b"OK"

    def _set_all(self, rest: bytes) -> bytes:
        data = _bytes(rest)
        if data is None:
            return _BAD
        self.target.write_all(self._vcpu(), data)
        return b"OK"

    def _read_memory(self, rest: bytes) -> bytes:
        numbers = _numbers(rest, 2)
        if numbers is None:
            return _BAD
        gva, size = numbers
        data = self.control.view(self._cpu).read(gva, min(size, _ROOM))
        return data.hex().encode() if data or not size else _UNREADABLE

    def _write_memory(self, rest: bytes, *, binary: bool) -> bytes:
        head, _, body = rest.partition(b":")
        numbers, data = _numbers(head, 2), unescape(body) if binary else _bytes(body)
        if numbers is None or data is None or len(data) != numbers[1]:
            return _BAD
        self.control.write(numbers[0], data, self._cpu)
        return b"OK"

    # --- breakpoints and going on ------------------------------------------------------------------------------------

    def _point(self, rest: bytes, *, insert: bool) -> bytes:
        kind, _, where = rest.partition(b",")
        numbers = _numbers(where.partition(b";")[0], 2)
        if numbers is None or kind not in (b"0", b"1", b"2", b"3", b"4"):
            return _BAD if numbers is None else b""
        gva, size = numbers
        control = self.control
        if kind in _ACCESS:
            there = any((w.gva, w.size, w.access) == (gva, size, _ACCESS[kind]) for w in control.watchpoints)
            if insert and not there:
                control.add_watchpoint(gva, size, _ACCESS[kind])
            elif not insert and there:
                control.remove_watchpoint(gva, size, _ACCESS[kind])
        elif insert and gva not in control.breakpoints:
            control.add_breakpoint(gva, hardware=kind == b"1", cpu=self._cpu)
            self._kinds[gva] = kind
        elif not insert and self._kinds.get(gva) == kind:
            control.remove_breakpoint(gva)
            del self._kinds[gva]
        return b"OK"

    def _vcont(self, rest: bytes) -> bytes:
        """The first action that steps names the vCPU; else all go on."""
        for action in rest.split(b";"):
            what, _, thread = action.partition(b":")
            if what[:1] in (b"s", b"S"):
                cpu = self._thread(thread)
                return self._resume(self._step_cpu if cpu is None else cpu)
            if what[:1] == b"r":
                cpu, numbers = self._thread(thread), _numbers(what[1:], 2)
                if numbers is None:
                    return _BAD
                return self._resume(self._step_cpu if cpu is None else cpu, (numbers[0], numbers[1]))
            if what[:1] not in (b"c", b"C"):
                return _BAD
        return self._resume(None)

    def _resume(self, step: int | None, within: tuple[int, int] | None = None) -> bytes:
        """Let the guest go on, or step one vCPU (as long as it is ``within``), and say what it stands still for."""
        before = self.stopped
        if before is not None and before.reason == "crash":
            self.over = "ended"
            return b"X%02x" % _SIGSEGV
        self.running = True
        try:
            if step is None:
                self.stopped = self.control.cont(self.timeout)
            else:
                self.stopped = self.control.step(step, self.timeout, 1 if within is None else _FOREVER, within)
        except ConfigError as error:  # a vCPU that cannot be stepped: it stands where it stood
            self._say(f"pykvm: {error}\n")
            return b"T%02xthread:%x;" % (_SIGTRAP, (step or 0) + 1)
        finally:
            self.running = False
        if self.stopped.reason == "crash":
            self._say(f"pykvm: the guest crashed: {self.control.explain(self.stopped).splitlines()[0]}\n")
        self._cpu = self._step_cpu = self.stopped.cpu
        return self._why(self.stopped)

    def _why(self, stopped: Stopped | None) -> bytes:
        """The stop reply."""
        if stopped is None:
            return b"T%02xthread:%x;" % (_SIGTRAP, self._cpu + 1)
        if stopped.reason in _ENDS:
            self.over = "ended"
            return b"W%02x" % ((stopped.code or 0) & 0xFF)
        reply = b"T%02xthread:%x;" % (_SIGNALS.get(stopped.reason, _SIGTRAP), stopped.cpu + 1)
        if stopped.watchpoint is not None:
            reply += b"%s:%x;" % (_WATCH[stopped.watchpoint.access].encode(), stopped.watchpoint.gva)
        elif stopped.reason == "breakpoint":
            reply += b"hwbreak:;" if self._kinds.get(stopped.rip) == b"1" else b"swbreak:;"
        return reply

    # --- transfers and commands --------------------------------------------------------------------------------------

    def _transfer(self, rest: bytes) -> bytes:
        what, _, rest = rest.partition(b":read:")
        annex, _, where = rest.rpartition(b":")
        numbers = _numbers(where, 2)
        if numbers is None:
            return _BAD
        if what == b"features" and annex == b"target.xml":
            data = self.target.xml()
        elif what == b"exec-file" and self.machine.info.format.startswith("ELF"):
            data = self.path.encode(errors="surrogateescape")
        else:
            return b"E00"
        offset, size = numbers
        part = data[offset : offset + min(size, _ROOM)]
        return (b"m" if offset + len(part) < len(data) else b"l") + escape(part)

    def _monitor(self, text: bytes) -> bytes:
        line = _bytes(text)
        if line is None:
            return _BAD
        self._say(monitor(self.control, self._cpu, line.decode(errors="replace")))
        return b"OK"

    def _say(self, text: str) -> None:
        """On the terminal of gdb's user, who listens while the guest runs or a monitor command does."""
        data = text.encode()
        for at in range(0, len(data), _ROOM // 2):
            self.send(b"O" + data[at : at + _ROOM // 2].hex().encode())


def _bytes(text: bytes) -> bytes | None:
    """What hex digits say."""
    try:
        return bytes.fromhex(text.decode("ascii")) if not set(text) & set(b" \t\n\r\f\v") else None
    except ValueError:
        return None


def _numbers(text: bytes, count: int) -> list[int] | None:
    """``count`` hex numbers with commas between."""
    numbers = [parse_hex(part) for part in text.split(b",")]
    found = [n for n in numbers if n is not None]
    return found if len(found) == len(numbers) == count else None
