"""The CPU's own exit reasons, from the kernel's tracepoint ``kvm:kvm_exit``.

KVM's exit reasons say why KVM_RUN came back; the CPU's say why the guest stopped: EPT_MISCONFIG rather than MMIO, and most of them never
leave the kernel. The tracepoint names them, VMX's and SVM's alike. It takes root and a mounted tracefs, and each event costs time: the
exits in a traced run are slower than those in another.

A trace instance of our own is used (Linux Documentation/trace/ftrace.rst, "Instances") and removed at the end, and only the threads of
this process are traced. Where the clock ``x86-tsc`` is there, events have the same time as exit records.
"""

from __future__ import annotations

import os
import re

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["ROOTS", "ExitTrace", "why_not"]

ROOTS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
_EVENT = "events/kvm/kvm_exit"
_CLOCK = "x86-tsc"
_BUFFER_KB = 8192  # for each CPU: some 80 000 events
# "  name-123  [000] d..1.  5123456: kvm_exit: vcpu 0 reason IO_INSTRUCTION rip 0x1000 info1 0x0 ..."; older kernels leave vcpu out
_LINE = re.compile(r" ([0-9.]+): kvm_exit: (?:vcpu (\d+) )?reason (\S+)")
_OVERRUN = re.compile(r"^(?:overrun|dropped events): (\d+)", re.MULTILINE)


def why_not(roots: tuple[str, ...] = ROOTS) -> str:
    """One line: why this process cannot trace KVM's exits, and what to do; empty when it can."""
    for root in roots:
        if os.access(f"{root}/{_EVENT}/enable", os.W_OK) and os.access(f"{root}/instances", os.W_OK):
            return ""
    mounted = [root for root in roots if os.path.isdir(f"{root}/events")]
    if mounted:
        if os.path.isdir(f"{mounted[0]}/events") and os.access(f"{mounted[0]}/instances", os.W_OK):
            return "this kernel has no tracepoint kvm:kvm_exit: is the module kvm loaded, and the kernel built with CONFIG_FTRACE?"
        return f"{mounted[0]} may not be written: tracing takes root"
    if os.geteuid():
        return "tracefs cannot be seen: tracing takes root"
    if not os.path.isdir(roots[0]):
        return "this kernel has no tracefs (CONFIG_FTRACE)"
    return f"tracefs is not mounted: mount -t tracefs tracefs {roots[0]}"


class ExitTrace:
    """A context manager: kvm:kvm_exit is on for this process inside of it. Afterwards ``events`` has (time, vCPU, reason) of each exit in
    order, ``lost`` how many found no room, and ``clock`` is "x86-tsc" when times are TSC values. vCPU is -1 where the kernel does not
    tell. Raises ConfigError when tracing is not permitted."""

    def __init__(self, roots: tuple[str, ...] = ROOTS) -> None:
        self.events: list[tuple[int, int, str]] = []
        self.lost = 0
        self.clock = ""
        self._roots = roots
        self._instance = ""

    def __enter__(self) -> ExitTrace:
        why = why_not(self._roots)
        if why:
            raise ConfigError(f"the CPU's exit reasons cannot be traced: {why}")
        root = next(root for root in self._roots if os.access(f"{root}/{_EVENT}/enable", os.W_OK))
        number = 0
        while not self._instance:
            try:
                name = f"{root}/instances/pykvm-{os.getpid()}{f'-{number}' if number else ''}"
                os.mkdir(name)
                self._instance = name
            except FileExistsError:
                number += 1
            except OSError as error:
                raise ConfigError(f"the CPU's exit reasons cannot be traced: {root}/instances: {error.strerror}") from None
        try:
            self._write("buffer_size_kb", str(_BUFFER_KB))
            if self._write("trace_clock", _CLOCK):
                self.clock = _CLOCK
            self._write("options/overwrite", "0")  # the first events stay; later ones are counted
            self._write("options/event-fork", "1")  # vCPUs after the first get their threads when the run begins
            if not self._write("set_event_pid", " ".join(os.listdir("/proc/self/task"))) or not self._write(f"{_EVENT}/enable", "1"):
                raise ConfigError("the CPU's exit reasons cannot be traced: kvm:kvm_exit cannot be switched on")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._write(f"{_EVENT}/enable", "0")
            self._read()
        finally:
            self._remove()

    def _write(self, name: str, text: str) -> bool:
        try:
            with open(f"{self._instance}/{name}", "w") as file:
                file.write(text)
        except OSError:
            return False
        return True

    def _read(self) -> None:
        with open(f"{self._instance}/trace", errors="replace") as file:
            self.events = [event for event in map(parse, file) if event is not None]
        for cpu in os.listdir(f"{self._instance}/per_cpu"):
            with open(f"{self._instance}/per_cpu/{cpu}/stats") as file:
                self.lost += sum(int(number) for number in _OVERRUN.findall(file.read()))

    def _remove(self) -> None:
        if self._instance:
            try:
                os.rmdir(self._instance)
            except OSError:
                self._write(f"{_EVENT}/enable", "0")  # someone reads it: leave it there, but off
            self._instance = ""


def parse(line: str) -> tuple[int, int, str] | None:
    """(time, vCPU, reason) of a line of the trace, None for any other."""
    found = _LINE.search(line)
    if found is None:
        return None
    time, vcpu, reason = found.groups()
    return int(time.replace(".", "") or "0"), -1 if vcpu is None else int(vcpu), reason
