"""A whole machine: RAM, one vCPU, the platform's devices and an image, wired together.

>>> with pykvm.Machine("hello") as m:
...     r = m.run(timeout=5)
...     print(r.console, r.exits)
"""

from __future__ import annotations

import os

from pykvm import gallery
from pykvm.bus import Bus, Native
from pykvm.console import Console
from pykvm.devices.debugconsole import DebugConsole
from pykvm.devices.debugexit import DebugExit
from pykvm.devices.post import PostPort
from pykvm.devices.reset import KeyboardController, ResetControl
from pykvm.devices.rtc import Rtc
from pykvm.devices.scratch import Scratch
from pykvm.devices.uart16550 import Uart16550
from pykvm.errors import ConfigError, GuestCrash, GuestImageError
from pykvm.loaders import load, peek
from pykvm.memory import GuestMemory
from pykvm.platform import (
    CMDLINE_GPA,
    COM1,
    DEBUG_CONSOLE,
    DEBUG_EXIT,
    EXCEPTION_REPORT,
    KBD_DATA,
    POST,
    RESET_CONTROL,
    RTC_INDEX,
    SCRATCH_GPA,
    SCRATCH_PORT,
)
from pykvm.runner import Runner, Stop
from pykvm.system import System
from pykvm.units import PAGE_SIZE, parse_address, parse_size
from pykvm.x86.modes import mode_named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Literal

    from pykvm.bus import Device, Range
    from pykvm.memory import MemSlot
    from pykvm.records import RecordRing, StatRow
    from pykvm.symbols import Symbols

__all__ = ["Machine", "Result"]

DEFAULT_MEMORY = "16M"


class Result:
    """What a run gave.

    ``reason``: "halted" (HLT), "exit" (debug exit), "reset", "stopped" (stop() was called) or "timeout".
    ``exit_code``: the debug exit's value, 0 when the guest halted, else None.
    ``console``: what the guest has printed so far. ``exits``: exits by reason since the machine was made.
    ``unclaimed``: accesses that no device claimed, (space, address, size, is_write) to their number.
    ``stats``: with ``stats=True``, a row for each kind of exit (records.StatRow), else None.
    ``explanation``: where and why the guest was stopped by the time limit, else an empty string.
    """

    __slots__ = ("_counts", "console", "exit_code", "explanation", "reason", "stats", "unclaimed")

    def __init__(self, machine: Machine, stop: Stop) -> None:
        self.reason = stop.reason
        self.exit_code = stop.code if stop.reason == "exit" else 0 if stop.reason == "halted" else None
        self.console = machine.console.text
        self._counts = machine.exit_counts()
        self.unclaimed = dict(machine.bus.unclaimed)
        self.stats: list[StatRow] | None = machine.stats_rows()
        self.explanation = ""

    @property
    def exits(self) -> dict[str, int]:
        """Exits by KVM's reason, e.g. {"IO": 23, "HLT": 1}; most frequent first."""
        from pykvm.exit_reason import reason_name

        return {reason_name(r): n for r, n in sorted(self._counts.items(), key=lambda item: -item[1])}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "reason": self.reason,
            "exit_code": self.exit_code,
            "console": self.console,
            "exits": self.exits,
            "unclaimed": [
                {"space": space, "address": at, "size": size, "direction": "write" if is_write else "read", "count": n}
                for (space, at, size, is_write), n in self.unclaimed.items()
            ],
            "stats": None if self.stats is None else [row.as_dict() for row in self.stats],
            "explanation": self.explanation or None,
        }

    def __repr__(self) -> str:
        code = f" code={self.exit_code}" if self.exit_code is not None else ""
        return f"<Result {self.reason}{code}, {sum(self._counts.values())} exits, {len(self.console)} characters>"


class Machine:
    """A guest with one vCPU, a context manager.

    ``image``: the name of a gallery guest, a path (anything with a ``/`` or a file that exists), or the bytes of an image.
    ``memory``: bytes or "16M"; by default what the image's note asks for. ``mode``: "auto", "real", "protected", "long", "user".
    ``backing``: where RAM comes from (GuestMemory.add): "anonymous", "memfd" or "hugetlb".
    ``entry``: gpa to start at instead of the image's own. ``append``: a command line, which RSI points at.
    ``loop``: "native" or "python". ``stats``: record every exit. ``strict``: an access that nobody claims is a crash.
    ``on_output``: called with bytes as the guest prints; ``poll_input``: called for console input, returns bytes.

    The parts are attributes: ``system``, ``vm``, ``vcpu``, ``memory``, ``bus``, ``uart``, ``console``, ``post``, ``rtc``, ``info``.
    Raises GuestImageError, ConfigError, KvmUnavailableError, KvmError.
    """

    def __init__(
        self,
        image: str | os.PathLike[str] | bytes,
        *,
        memory: int | str | None = None,
        backing: Literal["anonymous", "memfd", "hugetlb"] = "anonymous",
        mode: str = "auto",
        entry: int | None = None,
        append: str = "",
        loop: str = "native",
        stats: bool = False,
        strict: bool = False,
        on_output: Callable[[bytes], object] | None = None,
        poll_input: Callable[[], bytes] | None = None,
        system: System | None = None,
    ) -> None:
        self._closed = False
        self._ring: RecordRing | None = None
        self.data, path = _read_image(image)
        self.info = peek(self.data, path, mode)
        self.strict = strict
        size = parse_size(memory if memory is not None else self.info.note.get("memory", DEFAULT_MEMORY))
        _check_memory_size(size)
        start_mode = mode_named(self.info.mode)
        self._own_system = system is None
        self.system = System() if system is None else system
        self.memory = GuestMemory()
        try:
            self.memory = GuestMemory.of_size(size, backing)
            self.vm = self.system.create_vm()
            self.vm.add_memory(self.memory)
            self.boot = load(self.info, self.data, self.memory, entry)
            self._write_command_line(append)
            self.vcpu = self.vm.create_vcpu()
            self.vcpu.set_cpuid2(self.system.get_supported_cpuid().as_guest())
            start_mode.apply(self.vcpu, self.memory, self.boot.entry, self.boot.registers)
            self.console = Console(on_output=on_output)
            self.bus = Bus()
            self._add_platform(poll_input)
            self._add_rom()
            if stats:
                self._enable_stats()
            self.runner = Runner(self.vcpu, self.bus, loop, self._ring)
            self.runner.on_records = self._take_records
        except BaseException:
            self.close()
            raise

    # --- wiring ------------------------------------------------------------------------------------------------------

    def _write_command_line(self, text: str) -> None:
        if not text:
            return
        line = text.encode(errors="surrogateescape") + b"\0"  # as sys.argv has what is not UTF-8
        if len(line) > PAGE_SIZE:
            raise ConfigError(f"the command line has {len(line)} bytes; there is room for {PAGE_SIZE}")
        for s in self.info.segments:
            if s.gpa < CMDLINE_GPA + PAGE_SIZE and s.gpa + s.memsz > CMDLINE_GPA:
                raise ConfigError(f"the image covers gpa {CMDLINE_GPA:#x}, where the command line goes: run it without --append")
        self.memory.write(CMDLINE_GPA, line)

    def _add_platform(self, poll_input: Callable[[], bytes] | None) -> None:
        pio = self.bus.pio
        self.uart = Uart16550(self.console.extend, poll=poll_input)
        self.post = PostPort()
        self.rtc = Rtc(memory=self.memory.size)
        pio.add(COM1, 8, self.uart)
        pio.add(DEBUG_CONSOLE, 1, DebugConsole(self.console), native=Native.append(self.console))
        pio.add(DEBUG_EXIT, 4, DebugExit(self.stop))
        pio.add(POST, 1, self.post)
        pio.add(RTC_INDEX, 2, self.rtc)
        pio.add(RESET_CONTROL, 1, ResetControl(self.stop))
        pio.add(KBD_DATA, 5, KeyboardController(self.stop))
        pio.add(SCRATCH_PORT, 8, Scratch(8))
        pio.add(EXCEPTION_REPORT, 4, _ExceptionReport(self))
        self.bus.mmio.add(SCRATCH_GPA, PAGE_SIZE, Scratch(PAGE_SIZE))
        if self.strict:
            self.bus.on_unclaimed = lambda space, at, size, is_write, value: self.stop("crash")

    def _add_rom(self) -> None:
        """The read-only slot that the image's note asks for ("rom=0xc0100000:4K"); writes to it vanish."""
        wanted = self.info.note.get("rom")
        if wanted:
            gpa, _, size = wanted.partition(":")
            try:
                slot = self.add_memory(parse_address(gpa), parse_size(size), readonly=True)
            except ConfigError as error:
                raise GuestImageError(self.info.path, None, f"the rom that its pykvm note asks for: {error}") from None
            self.bus.mmio.add(slot.gpa, slot.size, _Rom(), native=Native.IGNORE)

    def add_device(self, device: Device, *, port: int | None = None, gpa: int | None = None, length: int = 1, **options: Any) -> Range:
        """Register a device of your own at an I/O ``port`` or at a ``gpa``, for ``length`` ports or bytes.

        Raises DeviceOverlapError, and ConfigError when it lies inside RAM, where it would never be asked.
        """
        if (port is None) == (gpa is None):
            raise ConfigError("give a device either port= or gpa=")
        if port is not None:
            return self.bus.pio.add(port, length, device, **options)
        assert gpa is not None
        for slot in self.memory.slots:
            if gpa < slot.gpa + slot.size and slot.gpa < gpa + length and not slot.readonly:
                raise ConfigError(
                    f"gpa {gpa:#x} is inside {slot!r}: an access there never exits; choose one outside RAM, such as 0xd0000000"
                )
        return self.bus.mmio.add(gpa, length, device, **options)

    def add_memory(self, gpa: int, size: int, **options: Any) -> MemSlot:
        """One more memory slot (GuestMemory.add), given to KVM at once: ROM with ``readonly=True``, shared files, ..."""
        slot = self.memory.add(gpa, size, **options)
        try:
            self.vm.add_slot(slot)
        except BaseException:
            self.memory.remove(slot)
            raise
        return slot

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, timeout: float | None = None) -> Result:
        """Run until the guest stops, or for ``timeout`` seconds. May be called again to go on.

        Raises GuestCrash, with the explanation and the result so far, when the guest cannot go on; and whatever a device raises.
        """
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"a time limit of {timeout} seconds: give a positive number, or None for no limit")
        if self._closed:
            raise ConfigError("the machine is closed")
        stop = self.runner.run(timeout)
        result = Result(self, stop)
        if stop.reason in ("crash", "timeout"):
            from pykvm.debug.explain import explain_stop

            result.explanation = explain_stop(self, stop)
        if stop.reason == "crash":
            raise GuestCrash(result.explanation, result)
        return result

    def result(self, reason: str = "stopped") -> Result:
        """What there is so far, between runs."""
        return Result(self, Stop(reason))

    def stop(self, reason: str = "stopped", code: int | None = None) -> None:
        """End the run, from a device or another thread; ``reason`` becomes the result's."""
        self.runner.stop(reason, code)

    def exit_counts(self) -> dict[int, int]:
        """Exits by number of their reason."""
        return {reason: n for reason, n in enumerate(self.vcpu.native.counts) if n}

    def insn_rip(self) -> int | None:
        """The linear address of the instruction that made the last exit, wherever this host's KVM has left RIP; None when unknown."""
        from pykvm.debug.insn import insn_rip
        from pykvm.debug.view import CpuView
        from pykvm.exits import decode

        return insn_rip(CpuView(self.vcpu, self.memory), decode(self.vcpu.native))

    def symbols(self) -> Symbols:
        """The image's symbols; empty for a flat image."""
        from pykvm.symbols import Symbols

        return Symbols.from_elf(self.data, self.info.path) if self.info.format.startswith("ELF") else Symbols({})

    # --- records -----------------------------------------------------------------------------------------------------

    def _enable_stats(self) -> None:
        from pykvm.records import RecordRing, Stats

        self._ring = RecordRing()
        khz = self.vcpu.get_tsc_khz() if self.system.check_extension("KVM_CAP_GET_TSC_KHZ") else 0
        self._stats = Stats(khz)

    def _take_records(self, ring: RecordRing) -> None:
        for record in ring.drain():
            self._stats.add(record)

    def stats_rows(self) -> list[StatRow] | None:
        """The rows of ``--stats``, or None without ``stats=True``."""
        return None if self._ring is None else self._stats.rows

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close vCPU, VM and /dev/kvm, then let go of the memory."""
        self._closed = True
        if hasattr(self, "vm"):
            self.vm.close()
        self.memory.close()
        if self._own_system:
            self.system.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else repr(self.vcpu)
        name = os.path.basename(self.info.path).removesuffix(".elf")
        return f"<Machine {name}: {self.info.mode} mode, {self.memory!r}, {state}>"


class _Rom:
    """A write to a read-only slot vanishes. Reads do not come here."""

    name = "ROM"

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class _ExceptionReport:
    """The port that user mode's minimal kernel writes an exception's vector to: the run ends, explained."""

    name = "exception report"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def write(self, offset: int, size: int, value: int) -> None:
        self.machine.stop("crash", value)


def _read_image(image: str | os.PathLike[str] | bytes) -> tuple[bytes, str]:
    if isinstance(image, bytes):
        return image, "image"
    name = os.fspath(image)
    path = gallery.find(name) if isinstance(image, str) and "/" not in name and not os.path.exists(name) else name
    try:
        with open(path, "rb") as file:
            return file.read(), path
    except OSError as error:
        raise GuestImageError(path, None, f"cannot be read: {error.strerror}") from None


def _check_memory_size(size: int) -> None:
    if size <= 0:
        raise ConfigError("a guest needs memory: give --memory at least 64K, such as 16M")
    if size % PAGE_SIZE:
        raise ConfigError(f"memory size {size} is not a multiple of the page size ({PAGE_SIZE}): try {-(-size // PAGE_SIZE) * PAGE_SIZE}")
