"""Where the instructions of an exit go in user space: one exit after another is single-stepped (ptrace), through each loop.

What KVM_RUN does is the same for all loops; what lies between two of them is counted here, by the function it is in, and by part: what
that function is there for. These are instructions, not times, and the same each time. Functions come from the symbol tables of the files
that are mapped; code without a symbol (static functions of a stripped interpreter) is counted by file.
"""

from __future__ import annotations

import os
import signal
from bisect import bisect_right
from collections import Counter
from errno import errorcode

from pykvm.abi import ffi, lib
from pykvm.bench.kind import MAX_SAMPLES, SAMPLES
from pykvm.bench.setup import NAIVE, Bank, Prepared
from pykvm.errors import ConfigError
from pykvm.runner import LOOPS
from pykvm.system import System
from pykvm.vcpu import FOREVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from pykvm.bench.kind import Kind

__all__ = ["Steps", "bench_steps"]

# What a function is there for: (part, how its name or, after a space, its file begins). The first that fits counts.
_PARTS = (
    ("system call", ("ioctl", "__errno_location")),
    ("cffi", ("_cffi", "save_errno", "restore_errno", "_my_PyLong", " _cffi_backend")),
    ("loop in C", (" _native",)),
    ("GIL", ("take_gil", "drop_gil", "PyEval_SaveThread", "PyEval_RestoreThread", "pthread_", "_PyThreadState_", "__tls_get_addr")),
    ("integers", ("PyLong_", "_PyLong_", "long_", "PyNumber_", "_PyNumber_", "PyObject_IsTrue", "PyObject_GetItem", "memory_")),
    ("bytecode", ("_PyEval_EvalFrame",)),
    (
        "calls",
        ("PyObject_Vectorcall", "cfunction_", "method_", "_PyObject_", "_Py_CheckFunctionResult", "_PyFrame_", "_PyEval", "PyThreadState_"),
    ),
)
PARTS = ("system call", "loop in C", "cffi", "GIL", "bytecode", "integers", "calls", "device", "other")
_PUSH, _CLEAR = ("_PyFrame_Push", "_PyEvalFramePushAndInit"), ("_PyFrame_Clear", "_PyEvalFrameClearAndPop")

WARM_UP = 200  # exits: Python specializes its bytecode after some
EXITS = 5  # of which the median counts
_ROOM = 1 << 20


class Steps:
    """Instructions of user space from one KVM_RUN to the next: for each loop, where each of them is, (file, function), in order."""

    def __init__(self, kind: str, taken: dict[str, list[tuple[str, str]]]) -> None:
        self.kind = kind
        self.by_loop = {loop: dict(Counter(places)) for loop, places in taken.items()}
        self.parts = {loop: dict(Counter(_parts(places))) for loop, places in taken.items()}

    @property
    def totals(self) -> dict[str, int]:
        """Of each loop."""
        return {loop: sum(parts.values()) for loop, parts in self.by_loop.items()}

    @property
    def places(self) -> list[tuple[str, str]]:
        """All (file, function), those that take most first."""
        most: Counter[tuple[str, str]] = Counter()
        for parts in self.by_loop.values():
            for place, n in parts.items():
                most[place] = max(most[place], n)
        return [place for place, _ in most.most_common()]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {"file": file, "function": function, **{loop: parts.get((file, function), 0) for loop, parts in self.by_loop.items()}}
            for file, function in self.places
        ]
        return {"kind": self.kind, "totals": self.totals, "parts": self.parts, "places": rows}


def bench_steps(kind: Kind) -> Steps:
    """Step through plain C, the native loop, the Python loop and the minimal loop of cffi.

    ``kind``: a plain access, which all of them answer. Raises ConfigError, also where no process may be traced.
    """
    if kind.reaches != "loops" or kind.device or kind.reason:
        raise ConfigError(f"{kind.name!r} is not answered by all loops in the same way: use PIO or MMIO")
    guests = Bank([kind])
    return Steps(kind.name, {loop: _stepped(kind, guests, loop) for loop in ("C", *reversed(LOOPS), NAIVE)})


def _parts(places: list[tuple[str, str]]) -> Iterator[str]:
    """What each instruction is for. A method in Python is known by the frame that is made for it, and is all one part."""
    inside = leaving = False
    for file, function in places:
        if function in _PUSH:
            inside = True
        if leaving and function not in _CLEAR:
            inside = leaving = False
        leaving = leaving or (inside and function in _CLEAR)
        part = next(
            (
                part
                for part, starts in _PARTS
                if f"{function} {file}".startswith(tuple(s for s in starts if s[0] != " "))
                or any(s[0] == " " and file.startswith(s[1:]) for s in starts)
            ),
            "other",
        )
        yield "device" if inside and part != "system call" else part


def _stepped(kind: Kind, guests: Bank, loop: str) -> list[tuple[str, str]]:
    pid = os.fork()
    if not pid:
        try:
            _traced(kind, guests, loop)
        finally:
            os._exit(1)
    try:
        _check(lib.pykvm_bench_trace(pid))
        at = ffi.new("uint64_t[]", _ROOM)
        exits = []
        for i in range(EXITS):
            count = _check(lib.pykvm_bench_steps(pid, 1 if i else WARM_UP, at, _ROOM))
            exits.append(ffi.unpack(at, count))
        exits.sort(key=len)
        return _places(pid, exits[EXITS // 2])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _check(got: int) -> int:
    if got < 0:
        raise ConfigError(f"a process of its own cannot be stepped through here (ptrace: {errorcode.get(-got, -got)})")
    return got


def _traced(kind: Kind, guests: Bank, loop: str) -> None:
    """In the child: run the guest on and on."""
    with System() as system:
        ready = Prepared(kind, guests, system)
        ready.command(SAMPLES, MAX_SAMPLES)  # more than are looked at; the guest writes low bits of its TSC, which are rarely 0
        runner = ready.machine.runner
        runner.loop, runner.heartbeat = loop if loop in LOOPS else "native", FOREVER
        _check(lib.pykvm_bench_traced())
        if loop == "C":
            ready.c(0)
        elif loop == NAIVE:
            ready.naive()
        else:
            runner.run()


def _places(pid: int, addresses: Iterable[int]) -> list[tuple[str, str]]:
    """In which (file, function) each of the addresses is."""
    mappings = _mappings(pid)
    tables: dict[str, _Functions] = {}
    found = []
    for address in addresses:
        start, offset, path = next((m[0], m[2], m[3]) for m in mappings if m[0] <= address < m[1])
        if path not in tables:
            tables[path] = _Functions(path)
        found.append((os.path.basename(path), tables[path].name(address - start + offset)))
    return found


def _mappings(pid: int) -> list[tuple[int, int, int, str]]:
    """(start, end, offset in the file, path) of the executable ones."""
    found = []
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            span, flags, offset, _, _, *path = line.split(None, 5)
            if "x" in flags:
                start, end = span.split("-")
                found.append((int(start, 16), int(end, 16), int(offset, 16), path[0].rstrip("\n") if path else "?"))
    return found


class _Functions:
    """The functions of an ELF file by where their code is in the file; none of what is no file."""

    def __init__(self, path: str) -> None:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile

        self._found: list[tuple[int, int, str]] = []
        try:
            with open(path, "rb") as file:
                elf = ELFFile(file)
                spans = [(s["p_vaddr"], s["p_memsz"], s["p_offset"]) for s in elf.iter_segments("PT_LOAD")]
                section: Any
                for section in elf.iter_sections():
                    if section["sh_type"] not in ("SHT_SYMTAB", "SHT_DYNSYM"):
                        continue
                    for symbol in section.iter_symbols():
                        if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_size"]:
                            value = symbol["st_value"]
                            at = next((value - v + offset for v, size, offset in spans if v <= value < v + size), None)
                            if at is not None:
                                self._found.append((at, at + symbol["st_size"], symbol.name))
        except (OSError, ELFError):
            pass
        self._found.sort()

    def name(self, at: int) -> str:
        """The function that has the code at this offset, or "other code"."""
        i = bisect_right(self._found, (at, 1 << 64, "")) - 1
        return self._found[i][2] if i >= 0 and at < self._found[i][1] else "other code"
