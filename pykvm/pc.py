"""The devices that every machine has, at the PC's own ports (platform.py): UART, RTC, debug ports, reset, and scratch registers.

``Pc`` is the platform "pykvm"; pctest.py makes "pc-test" of it.
"""

from __future__ import annotations

from pykvm.bus import Native
from pykvm.console import Console
from pykvm.devices.debugconsole import DebugConsole
from pykvm.devices.debugexit import DebugExit
from pykvm.devices.post import PostPort
from pykvm.devices.reset import KeyboardController, ResetControl
from pykvm.devices.rtc import Rtc
from pykvm.devices.scratch import Scratch
from pykvm.devices.uart16550 import Uart16550
from pykvm.errors import ConfigError
from pykvm.platform import (
    COM1,
    COM1_GSI,
    DEBUG_CONSOLE,
    DEBUG_EXIT,
    KBD_DATA,
    POST,
    RESET_CONTROL,
    RTC_GSI,
    RTC_INDEX,
    SCRATCH_GPA,
    SCRATCH_PORT,
)
from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.bus import Bus
    from pykvm.irq import IrqLine
    from pykvm.memory import GuestMemory
    from pykvm.vm import VM

__all__ = ["Board", "Pc"]


class Board:
    """What devices are wired to. ``stop(reason, code)`` ends the run; ``irq(gsi)`` gives an interrupt line, None without an irqchip;
    ``poll`` asks for console input."""

    __slots__ = ("bus", "console", "cpus", "irq", "memory", "poll", "stop")

    def __init__(
        self,
        bus: Bus,
        memory: GuestMemory,
        console: Console,
        stop: Callable[..., object],
        irq: Callable[[int], IrqLine] | None,
        poll: Callable[[], bytes] | None,
        cpus: int,
    ) -> None:
        self.bus, self.memory, self.console, self.stop, self.irq, self.poll, self.cpus = bus, memory, console, stop, irq, poll, cpus


class Pc:
    """Puts the devices on the bus; ``uart``, ``post`` and ``rtc`` are attributes, and ``debug_port``, what firmware has logged."""

    def __init__(self, board: Board) -> None:
        bus, irq, stop = board.bus, board.irq, board.stop
        pio = bus.pio
        self.debug_port = Console()
        self.tables: list[tuple[int, int]] = []  # where prepare() has put tables, as (start, end)
        self.uart = Uart16550(board.console.extend, None if irq is None else irq(COM1_GSI).set, poll=board.poll)
        self.post = PostPort()
        self.rtc = Rtc(memory=board.memory.ram_size, irq=None if irq is None else irq(RTC_GSI).set, cpus=board.cpus)
        pio.add(COM1, 8, self.uart)
        pio.add(DEBUG_EXIT, 4, DebugExit(stop))
        pio.add(POST, 1, self.post)
        pio.add(RTC_INDEX, 2, self.rtc)
        pio.add(KBD_DATA, 5, KeyboardController(stop))
        bus.mmio.add(SCRATCH_GPA, PAGE_SIZE, Scratch(PAGE_SIZE))
        self._add_own(board, DebugConsole(board.console), ResetControl(stop))

    def _add_own(self, board: Board, console: DebugConsole, reset: ResetControl) -> None:
        """What platforms do not have in common."""
        pio = board.bus.pio
        pio.add(DEBUG_CONSOLE, 1, console, native=Native.append(console.sink))
        pio.add(RESET_CONTROL, 1, reset)
        pio.add(SCRATCH_PORT, 8, Scratch(8))

    def prepare(self, memory: GuestMemory, vm: VM, *, firmware: bool) -> int:
        """What a guest finds in memory at its start, beside the image: nothing on this platform. Returns the gpa of the RSDP, or 0."""
        return 0

    wake: Callable[[], object] | None = None

    def fall_asleep(self) -> None:
        """The machine is suspended from now on, until ``wake()`` is called."""
        raise NotImplementedError

    @property
    def power_button(self) -> Callable[[], object]:
        """To be called from a vCPU's thread: asks the guest to power off, or wakes it. Raises ConfigError: there is no such button."""
        raise ConfigError("this machine has no power button: run it with --platform pc-test")

    @property
    def asleep(self) -> bool:
        """Whether the machine is suspended, and something may wake it."""
        return False

    def tick(self) -> None:
        """Between two entries of the vCPU, now and then: time passes, and input comes in."""
        self.uart.tick()
        self.rtc.tick()
