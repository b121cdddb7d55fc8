"""Running a machine up to a place: an exit that meets a condition, or the first instruction at a symbol.

Both leave it as it stands there, to be looked at and run on.
"""

from __future__ import annotations

from pykvm.errors import ConfigError, GuestCrash
from pykvm.x86.regs import linear_rip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from pykvm.debug.control import Control, Stopped
    from pykvm.debug.trace import Event
    from pykvm.machine import Machine
    from pykvm.result import Result
    from pykvm.symbols import Symbols

__all__ = ["address_of", "end_of", "run_to", "run_until"]


def address_of(text: str, symbols: Symbols, registers: Any = None) -> int:
    """A linear address: a number, ``symbol``, ``symbol+0x10``, or, where ``registers`` are given, ``rip``, ``rsp`` ...

    Raises ConfigError, with the nearest name.
    """
    name, plus, more = text.partition("+")
    offset = _offset(more) if plus else 0
    try:
        value: int | None = int(name, 0)
    except ValueError:
        value = symbols.address(name)
        if value is None and registers is not None and name.lower() in {field for field, _ in registers.fields()}:
            value = int(getattr(registers, name.lower()))
    if value is None:
        near = _near(name, symbols)
        hint = f"did you mean {near}?" if near else "the image has no symbols" if not len(symbols) else "nm lists the image's symbols"
        raise ConfigError(f"{text!r} is no number and no symbol of the image: {hint}")
    if not 0 <= value + offset < 1 << 64:
        raise ConfigError(f"{text!r} is not a 64-bit address")
    return value + offset


def _offset(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ConfigError(f"{text!r} is no number to add to a symbol") from None


def _near(name: str, symbols: Symbols) -> str:
    from difflib import get_close_matches

    names = [known for _, known in symbols._sorted[:10000]]
    return next(iter(get_close_matches(name, names, 1)), "")


def run_until(machine: Machine, condition: str, timeout: float | None) -> str:
    """Run until an exit meets ``condition`` (debug/tracefilter.py): "until", or why the run ended before. Raises GuestCrash."""
    from pykvm.debug.trace import Capture
    from pykvm.debug.tracefilter import Condition
    from pykvm.debug.where import Locator

    found = False

    def look(event: Event) -> None:
        nonlocal found
        if wanted.matches(event):
            found = True
            machine.stop("until")

    capture = Capture(machine, look, batch=1)
    wanted = Condition(condition, capture.names, Locator(machine))
    with capture:
        try:
            reason = machine.run(timeout, explain=False).reason
            return "until" if found else reason
        except GuestCrash:
            if found:
                return "until"
            raise
        finally:
            for runner in machine.runners:
                runner.take_back_stop()


def run_to(machine: Machine, address: int, timeout: float | None, control: Control | None = None) -> str:
    """Run until a vCPU is about to execute ``address``: "breakpoint", or why the run ended before. Raises GuestCrash."""
    vcpu = machine.vcpu
    if linear_rip(vcpu.get_regs(), vcpu.get_sregs()) == address:
        return "breakpoint"
    from pykvm.debug.control import Control

    control = control or Control(machine)
    control.add_breakpoint(address)
    try:
        stopped = control.cont(timeout)
    finally:
        control.detach()
    if stopped.reason == "crash":
        raise_crash(machine, stopped)
    return str(stopped.reason)


def end_of(machine: Machine, stopped: Stopped) -> Result:
    """What Machine.run() would have returned, or raised."""
    if stopped.reason == "crash":
        raise_crash(machine, stopped)
    result = machine.result(stopped.reason)
    result.exit_code = stopped.code if stopped.reason == "exit" else 0 if stopped.reason in ("halted", "power-off") else None
    if stopped.reason == "timeout":
        from pykvm.debug.explain import explain_stop
        from pykvm.runner import Stop

        result.explanation = explain_stop(machine, stopped.stop or Stop("timeout"))
    return result


def raise_crash(machine: Machine, stopped: Stopped) -> NoReturn:
    """What Machine.run() would have raised."""
    from pykvm.debug.explain import explain_stop
    from pykvm.runner import Stop

    stop = stopped.stop or Stop("crash")
    result = machine.result("crash")
    result.explanation = explain_stop(machine, stop)
    raise GuestCrash(result.explanation, result)
