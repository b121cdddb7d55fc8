"""The command ``pykvm``: finds the subcommand, runs it, and turns exceptions into one line on stderr and an exit status.

Exit statuses: 64 usage; 65 bad image; 69 no usable KVM; 70 the guest crashed; 74 the output cannot be written; 75 a migration did not take
place, 76 it may have; 124 time limit; 130 Ctrl-C; 141 nobody reads the output; `pykvm run` itself adds 0 and 1-63 (cli/run.py). Of hosts:
69 something is missing; 70 it failed.
Parsing is in cli/options.py; each command is one module, imported when it is called.
"""

from __future__ import annotations

import os
import sys

from pykvm.errors import (
    AsmError,
    CapabilityError,
    ConfigError,
    GuestCrash,
    GuestImageError,
    HostError,
    KvmError,
    KvmUnavailableError,
    PykvmError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import NoReturn

__all__ = ["COMMANDS", "leave", "main", "say"]

COMMANDS = {
    "run": "run a guest: a gallery name or an image file",
    "trace": "every exit as it happens, in words; or every instruction; or a page that shows it all",
    "walk": "where addresses of a guest lead, level by level",
    "shell": "a Python prompt in front of a guest: step, break, look",
    "ledger": "tables of the exits that run --ledger has recorded",
    "guests": "the gallery: what each guest shows, its exits, its source",
    "doctor": "what this host's KVM is and can do, and where that was read",
    "cpu": "CPU models: what this host can give of each, and what KVM makes of it",
    "bench": "measure exits beside a plain C loop",
    "snapshot": "run a guest up to a place, and save it in a directory",
    "resume": "go on with a guest that was saved",
    "gdb": "run a guest under gdb: breakpoints, steps, memory, one thread a vCPU",
    "migrate": "move a running guest to another process, while it runs",
    "receive": "wait for a guest that migrates here, and run it",
    "control": "ask or tell a machine that runs with --control: status, pause, resume, snapshot, quit",
    "host": "run a command inside an emulated VT-x or AMD-V host",
}
_STATUS: list[tuple[type[PykvmError], int]] = [
    (GuestCrash, 70),
    (KvmUnavailableError, 69),
    (CapabilityError, 69),
    (KvmError, 69),
    (GuestImageError, 65),
    (AsmError, 65),
    (ConfigError, 64),
    (HostError, 70),
]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        _open_closed_streams()
    try:
        status = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:  # outside of a command
        say("pykvm: interrupted")
        return 130
    except OSError as error:  # KvmErrors were caught: what is left is the output
        # What Python would still flush at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return 141
        what = "writing the output" if error.filename is None else error.filename
        say(f"pykvm: {what}: {error.strerror}")
        return 74


def leave(status: int) -> NoReturn:
    """End the process, for the script ``pykvm``. To take the interpreter apart object by object takes 3 ms, and nobody would see it done:
    that is left out where no function waits for the exit and no other thread was ever made."""
    if "atexit" in sys.modules or "threading" in sys.modules:
        sys.exit(status)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass  # main() has told
    os._exit(status)


def say(text: str) -> None:
    """A line on stderr. Where it cannot be written it is lost: the exit status tells what it would have told."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where what waits in the buffer goes at exit


def _open_closed_streams() -> None:
    """No file that is opened from here on may become fd 0, 1 or 2: the guest's output would go to it."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd < 2:
        fd = os.dup(fd)
    if fd > 2:
        os.close(fd)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 64
    if arguments[0] == "--version":
        from pykvm import __version__

        print(f"pykvm {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _complain(ConfigError(_unknown("command", name, COMMANDS)))
    try:
        status: int = _imported(f"pykvm.cli.{name}").main(rest)
        return status
    except PykvmError as error:
        return _complain(error)
    except KeyboardInterrupt:
        say("pykvm: interrupted")
        return 130
    except MemoryError:
        say("pykvm: out of memory")
        return 71


def _imported(name: str) -> ModuleType:
    """A module, without the package importlib, and without garbage collections: all that an import makes is there to stay."""
    import gc

    if not gc.isenabled():
        return __import__(name, fromlist=["main"])
    gc.disable()
    try:
        return __import__(name, fromlist=["main"])
    finally:
        gc.enable()


def _complain(error: PykvmError) -> int:
    sys.stdout.flush()
    if isinstance(error, GuestCrash):
        say(f"pykvm: the guest crashed: {error.explanation}")
    else:
        say(f"pykvm: {error}")
    console = getattr(error, "console", "")
    if console:
        say("--- the last console lines ---")
        say(console)
    return getattr(error, "exit_status", 0) or next((status for kind, status in _STATUS if isinstance(error, kind)), 1)


def _unknown(what: str, name: str, known: dict[str, str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1)
    return f"unknown {what} {name!r}; " + (f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}")


def _help() -> str:
    lines = ["usage: pykvm COMMAND [OPTIONS]", "", "Run and look into tiny guests on Linux KVM.", ""]
    lines += [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
    lines += ["", "pykvm COMMAND --help tells more. Start with: pykvm run hello --stats"]
    return "\n".join(lines)
