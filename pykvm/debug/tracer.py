"""A trace from its beginning to its end: what is captured, which of it is shown, and what memory changed meanwhile.

``sink`` gets the items: Event (an exit), Change (watched memory), Step (an instruction, steps.py).
"""

from __future__ import annotations

from pykvm.debug.reach import address_of, run_to
from pykvm.debug.trace import BATCH, Capture, Event
from pykvm.debug.tracefilter import Condition, is_condition
from pykvm.debug.where import Locator
from pykvm.errors import ConfigError, GuestMemoryError
from pykvm.units import parse_address, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TextIO, Union

    from pykvm.debug.control import Control
    from pykvm.debug.steps import Step
    from pykvm.machine import Machine
    from pykvm.result import Result

    Item = Union[Event, "Change", Step]  # noqa: UP007

__all__ = ["Change", "Tracer", "Watch"]

_MAX_WATCH = 1 << 20
_DEBUG = 4


class Change:
    """``before`` became ``after`` at ``gpa``, seen at the exit number ``n``."""

    __slots__ = ("after", "before", "gpa", "n")

    def __init__(self, n: int, gpa: int, before: bytes, after: bytes) -> None:
        self.n, self.gpa, self.before, self.after = n, gpa, before, after

    def __str__(self) -> str:
        if len(self.after) in (1, 2, 4, 8):
            values = (int.from_bytes(part, "little") for part in (self.before, self.after))
            return f"memory {self.gpa:#x}: " + " => ".join(f"{value:#x}" for value in values)
        more = " ..." if len(self.after) > 32 else ""
        return f"memory {self.gpa:#x}, {len(self.after)} bytes: {self.before[:32].hex(' ')} => {self.after[:32].hex(' ')}{more}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"n": self.n, "memory": self.gpa, "before": self.before.hex(), "after": self.after.hex()}


class Watch:
    """``size`` bytes at ``gpa``: what of them has changed since the last look."""

    def __init__(self, machine: Machine, gpa: int, size: int) -> None:
        if not 0 < size <= _MAX_WATCH:
            raise ConfigError(f"--watch {gpa:#x}: a length of 1 to {_MAX_WATCH} bytes, not {size}")
        self.gpa, self.size, self._memory = gpa, size, machine.memory
        try:
            self._last = machine.memory.read(gpa, size)
        except GuestMemoryError as error:
            raise ConfigError(f"--watch: {error}") from None

    @classmethod
    def parse(cls, machine: Machine, text: str) -> Watch:
        """``0x9f000:8``; a symbol may stand for the address where gva and gpa are the same."""
        where, _, length = text.partition(":")
        try:
            gpa = parse_address(where)
        except ConfigError:
            gpa = address_of(where, machine.symbols())
        return cls(machine, gpa, parse_size(length) if length else 8)

    def look(self, n: int) -> list[Change]:
        """The changed parts, from the first to the last byte of each run of changed 8-byte words."""
        before, now = self._last, self._memory.read(self.gpa, self.size)
        if now == before:
            return []
        self._last = now
        if self.size <= 8:
            return [Change(n, self.gpa, before, now)]
        words = [at for at in range(0, self.size, 8) if before[at : at + 8] != now[at : at + 8]]
        runs: list[list[int]] = []
        for at in words:
            if runs and runs[-1][1] == at:
                runs[-1][1] = at + 8
            else:
                runs.append([at, at + 8])
        return [Change(n, self.gpa + start, before[start:end], now[start:end]) for start, end in runs]


class Tracer:
    """Traces one run of a machine; cli/trace.py says what the arguments mean. ``seen`` counts events, ``shown`` what the sink got."""

    def __init__(
        self,
        machine: Machine,
        *,
        filters: Iterable[str] = (),
        begin: str | None = None,
        until: str | None = None,
        watch: Iterable[str] = (),
        step: bool = False,
        limit: int | None = None,
        sink: Callable[[Item], object] = lambda item: None,
    ) -> None:
        self.machine, self.sink, self.limit = machine, sink, limit
        self.locator = Locator(machine)
        watched, prompt = list(watch), until is not None and is_condition(until)
        # The guest must not go on before these have been seen to: memory is looked at after each exit, and the run ends at one.
        self.capture = Capture(machine, self._event, batch=1 if watched or prompt or limit is not None else BATCH)
        self.filters = [Condition(text, self.capture.names, self.locator) for text in filters]
        self._begin, self._begin_at = self._place(begin)
        self._until, self._until_at = self._place(until)
        self._until_name = until
        self.watches = [Watch.parse(machine, text) for text in watched]
        self.step = step
        self.seen = self.shown = 0
        self._showing = self._begin is None
        self._stopped = False
        self._control: Control | None = None  # while a breakpoint is planted

    def _place(self, text: str | None) -> tuple[Condition | None, int | None]:
        """A condition on exits, or the address of a symbol."""
        if text is None:
            return None, None
        if is_condition(text):
            return Condition(text, self.capture.names, self.locator), None
        return None, address_of(text, self.locator.symbols)

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, timeout: float | None) -> Result:
        """Run the machine, giving the sink what is to be shown. Raises what Machine.run() raises."""
        try:
            if self.step:
                from pykvm.debug.steps import run_steps

                return run_steps(self, timeout)
            if self._begin_at is not None:
                reason = run_to(self.machine, self._begin_at, timeout)
                if reason != "breakpoint":
                    return self.machine.result(reason)
            with self.capture:
                if self._until_at is None:
                    return self.machine.run(timeout)
                from pykvm.debug.control import Control

                self._control = Control(self.machine)
                reason = run_to(self.machine, self._until_at, timeout, self._control)
                return self.machine.result("until" if reason == "breakpoint" or self._stopped else reason)
        finally:
            if self._stopped:
                for runner in self.machine.runners:
                    runner.take_back_stop()

    def _event(self, event: Event) -> None:
        if self._stopped:
            return  # what was on its way when the end was reached
        if self._control is not None and self._is_breakpoint(event, self._control):
            self.capture.count -= 1
            return
        self.seen += 1
        if not self._showing and self._begin is not None:
            self._showing = self._begin.matches(event)
        changes = [change for watch in self.watches for change in watch.look(event.n)]
        if self._showing:
            for change in changes:
                self.give(change)
            if not self.filters or any(condition.matches(event) for condition in self.filters):
                self.give(event)
        if self._until is not None and self._until.matches(event):
            self.stop()

    def take_step(self, step: Step, event: Event | None) -> None:
        """An instruction has run, and has made the exit ``event`` or none."""
        if not self._showing and self._begin is not None:
            self._showing = event is not None and self._begin.matches(event)
        changes = [change for watch in self.watches for change in watch.look(step.n)]
        if self._showing:
            if not self.filters or (event is not None and any(condition.matches(event) for condition in self.filters)):
                self.give(step)
            for change in changes:
                self.give(change)
        if self._until is not None and event is not None and self._until.matches(event):
            self.stop()

    def _is_breakpoint(self, event: Event, control: Control) -> bool:
        """Whether it is the debugger's own: a DEBUG exit, or the OUT that was planted."""
        if event.reason == _DEBUG:
            return True
        planted = event.is_pio and event.is_write and event.size != 1
        return planted and control._planted.out_by(self.locator.view(event), event.qualifier) is not None

    def give(self, item: Item) -> None:
        """To the sink, unless the limit has been reached."""
        if self._stopped:
            return
        self.shown += 1
        self.sink(item)
        if self.at_limit:
            self.stop()

    def stop(self) -> None:
        """The end is reached."""
        self._stopped = True
        self.machine.stop("until")

    @property
    def at_limit(self) -> bool:
        """Whether the sink has got as many items as were asked for."""
        return self.limit is not None and self.shown >= self.limit

    @property
    def stopped(self) -> bool:
        """Whether the end was reached."""
        return self._stopped

    @property
    def until_condition(self) -> Condition | None:
        """The end as a condition on exits."""
        return self._until

    @property
    def until_address(self) -> int | None:
        """The end as an address."""
        return self._until_at

    @property
    def begin_address(self) -> int | None:
        """The beginning as an address."""
        return self._begin_at

    # --- printing ----------------------------------------------------------------------------------------------------

    def text_printer(self, out: TextIO, registers: bool = False) -> Callable[[Item], object]:
        """A sink that writes lines."""
        from pykvm.debug.trace_text import Formatter, registers_line

        formatter = Formatter(self.capture, self.locator)

        def write(item: Item) -> None:
            if isinstance(item, Event):
                out.write(formatter.line(item) + "\n")
                if registers:
                    out.write(registers_line(item.frozen().get_regs()) + "\n")
            elif isinstance(item, Change):
                out.write(f"{'':>6} {'':>11}  {item}\n")
            else:
                out.write(f"{item}\n")

        return write

    def json_printer(self, out: TextIO, registers: bool = False) -> Callable[[Item], object]:
        """A sink that writes one object a line."""
        import json

        from pykvm.debug.trace_text import Formatter

        formatter = Formatter(self.capture, self.locator)

        def write(item: Item) -> None:
            about = formatter.as_dict(item, registers=registers) if isinstance(item, Event) else item.as_dict()
            out.write(json.dumps(about, separators=(",", ":")) + "\n")

        return write
