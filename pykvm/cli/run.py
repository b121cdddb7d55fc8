"""``pykvm run``: one guest, its console on stdout, what happened on stderr.

Exit status: 0 the guest halted, powered off or debug-exited with 0; n (1-63) debug exit code n, larger ones give 63 and are printed;
64 usage; 65 bad image; 69 no usable KVM; 70 the guest crashed; 124 time limit; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from pykvm.cli import say
from pykvm.cli.guest import DEFAULT_LIMIT, GUEST_OPTIONS, Input, Output, open_machine, parse_guest
from pykvm.cli.options import Command, Option, number, whole
from pykvm.errors import ConfigError, GuestCrash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.machine import Machine
    from pykvm.records import StatRow
    from pykvm.result import Result
    from pykvm.state.remote import ControlServer

GDB_PORT = "127.0.0.1:1234"
RUN_OPTIONS = [
    Option(
        "--timeout",
        f"time limit in seconds (default {DEFAULT_LIMIT:g}); with --gdb there is none, and one given is for a run at a time",
        "SECONDS",
        None,
        number,
    ),
    Option("--control", "answer at this socket while the guest runs: pykvm control, and pykvm migrate", "unix:PATH"),
    Option("--stats", "a table of the exits: count, total and median time"),
    Option("--ledger", "record every exit in FILE.npy, which pykvm ledger shows and numpy.load reads", "FILE.npy"),
    Option("--ledger-exits", "how many exits of each vCPU the ledger has room for", "N", 1 << 20, whole),
    Option("--trace-exits", "with --ledger, the CPU's own exit reasons too: takes root and tracefs, and slows exits down"),
    Option("--shell-on-crash", "a crash or the time limit leads to a Python prompt (pykvm shell)"),
    Option(
        "--gdb",
        f"serve it to gdb at HOST:PORT, or at unix:PATH, which only its owner may use (default {GDB_PORT})",
        "[WHERE]",
        without=GDB_PORT,
        takes=lambda word: word.startswith("unix:") or (":" in word and word.rpartition(":")[2].isdigit()),
    ),
    Option("--wait", "with --gdb, the guest does not start before gdb says so"),
    Option("--remote", "allow --gdb at addresses that other machines can reach: who connects owns the guest"),
    Option("--debug-port", "show what firmware logs on port 0x402 (platform pc-test), on stderr"),
    Option("--json", "one JSON object instead of text"),
    Option("--qemu-exit-status", "debug exit code n becomes status (n << 1) | 1, as with QEMU's isa-debug-exit"),
]
COMMAND = Command(
    "run",
    "IMAGE",
    "Run a guest until it halts, exits, crashes or its time is up. IMAGE is a gallery name (pykvm guests) or a file:\n"
    "multiboot, PVH, Linux, ELF32 or ELF64, or a flat binary. The guest's console (COM1 and port 0xe9) is stdout, stdin is its input.",
    [*GUEST_OPTIONS, *RUN_OPTIONS],
    [
        "pykvm run hello --stats",
        "pykvm run boot.bin --mode real --memory 1M",
        "pykvm run kernel --cpus 2 --append 'console=com1' --initrd 'disk.img its own words'",
        "pykvm run --firmware /usr/share/seabios/bios.bin --debug-port",
        "echo hello | pykvm run echo",
        "pykvm run page_fault --gdb --wait",
    ],
)


def main(argv: list[str]) -> int:
    """Run it; returns the exit status."""
    image, _, o = parse_guest(COMMAND, argv)
    check(o)
    output = Output()
    return finish(open_machine(image, o, **options_of(o, output)), o, output)


def options_of(o: dict[str, Any], output: Output) -> dict[str, Any]:
    """The arguments of Machine that come of RUN_OPTIONS."""
    return {
        "stats": o["stats"],
        "ledger": o["ledger_exits"] if o["ledger"] else False,
        "on_output": None if o["json"] else output.write,
        "poll_input": Input(output).poll,
    }


def finish(machine: Machine, o: dict[str, Any], output: Output) -> int:
    """Run a machine as RUN_OPTIONS say, report, and close it; returns the exit status."""
    with machine:
        machine.on_heartbeat = output.flush
        if o["debug_port"]:
            machine.debug_port.on_output = _log
        crash = None
        interrupted = False
        limit = o["timeout"] or (None if o["gdb"] else DEFAULT_LIMIT)
        try:
            with _control(machine, o["control"]):
                result = _ran(machine, o, limit)
        except GuestCrash as error:
            if error.result is None:
                raise
            crash, result = error, error.result
        except KeyboardInterrupt:
            interrupted, result = True, machine.result("interrupted")
        finally:
            output.flush()
        if o["ledger"]:
            machine.ledger.save(o["ledger"])
            if machine.ledger.lost:
                say(f"pykvm: the ledger had no room for {machine.ledger.lost} exits: --ledger-exits N makes room for more")
        status = 130 if interrupted else 70 if crash else _status(result, o["qemu_exit_status"])
        if o["json"]:
            import json

            info = machine.info
            about = {"image": info.path, "format": info.kind, "why": info.why, "mode": info.mode}
            print(json.dumps({**about, "status": status, "insn_rip": machine.insn_rip(), **result.as_dict()}, indent=2))
        else:
            _report(machine, result, status, limit)
        if o["shell_on_crash"] and status in (70, 124):
            from pykvm.debug.shell import interact

            interact(machine, repr(machine))
        return status


def _log(data: bytes) -> None:
    """What firmware logs, to stderr; where that cannot be written it is lost, as what say() says."""
    try:
        os.write(2, data)
    except OSError:
        pass


def check(o: dict[str, Any]) -> None:
    """What is wrong with the values of RUN_OPTIONS is said before there is a machine."""
    _check_ledger(o)
    if not o["gdb"] and (o["wait"] or o["remote"]):
        raise ConfigError(f"{'--wait' if o['wait'] else '--remote'} is about gdb: give --gdb too")
    if o["gdb"] and o["control"]:
        raise ConfigError("--gdb and --control: choose one; a guest that moves would take gdb's breakpoints along")


def _check_ledger(o: dict[str, Any]) -> None:
    """Where the ledger cannot be written is said before the guest runs, not after."""
    path = o["ledger"]
    if path is None:
        if o["trace_exits"]:
            raise ConfigError("--trace-exits adds to a ledger: give --ledger FILE.npy too")
        return
    from pykvm.wholefile import check_place

    check_place("--ledger", path)


def _control(machine: Machine, where: str | None) -> ControlServer | _Nothing:
    if where is None:
        return _Nothing()
    from pykvm.state.remote import ControlServer
    from pykvm.unixsocket import path_of

    return ControlServer(machine, path_of(where, "--control"), say=lambda text: say(f"pykvm: {text}"))


class _Nothing:
    """No control socket. (contextlib would be one more import for each start.)"""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _ran(machine: Machine, o: dict[str, Any], limit: float | None) -> Result:
    """By itself, or for gdb."""
    if o["trace_exits"]:
        with machine.ledger.trace():
            return _ran(machine, {**o, "trace_exits": False}, limit)
    if o["gdb"]:
        from pykvm.cli.gdb import serve

        return serve(machine, o["gdb"], wait=o["wait"], remote=o["remote"], timeout=limit)
    return machine.run(limit)


def _status(result: Result, qemu: bool) -> int:
    if result.reason == "timeout":
        return 124
    code = result.exit_code
    if qemu and result.reason == "exit" and code is not None:
        return (code << 1 | 1) & 0xFF
    return min(code or 0, 63)


def _report(machine: Machine, result: Result, status: int, timeout: float | None) -> None:
    """What a person wants to know beyond the console; nothing for a guest that ended well."""
    if result.console and not result.console.endswith("\n"):
        sys.stdout.write("\n")
    if result.stats is not None:
        print(_table(result.stats))
        for name, count in sorted(result.assisted.items(), key=lambda item: -item[1]):
            print(f"assisted: {name}, {count} time{'s' * (count > 1)}")
    sys.stdout.flush()
    wanted = machine.info.note.get("mode", machine.info.mode)
    if wanted != machine.info.mode:
        say(f"pykvm: the image asks for {wanted} mode; it was started in {machine.info.mode} mode, as --mode said")
    missing = machine.cpu_model.missing(machine.system) if machine.cpu_model is not None else frozenset()
    if missing:
        say(f"pykvm: this host's KVM cannot give: {' '.join(sorted(missing))}; the guest runs without")
    for (index, write), count in [] if machine.msrs is None else machine.msrs.refused.items():
        say(f"pykvm: #GP: {'WRMSR to' if write else 'RDMSR from'} {index:#x}{f', {count} times' if count > 1 else ''}")
    for (space, at, size, is_write), count in list(result.unclaimed.items())[:8]:
        where = f"port {at:#x}" if space == "pio" else f"gpa {at:#x}"
        what = f"{'write to' if is_write else 'read from'} {where}, {size} byte{'s' * (size > 1)}"
        say(f"pykvm: no device claims: {what}{f', {count} times' if count > 1 else ''}")
    if len(result.unclaimed) > 8:
        say(f"pykvm: ... and {len(result.unclaimed) - 8} more kinds of accesses that no device claims")
    if machine.console.dropped:
        say(f"pykvm: {machine.console.dropped} bytes of console output were too many to keep")
    if status == 130:
        say("pykvm: interrupted")
    elif status == 70:
        say(f"pykvm: the guest crashed: {result.explanation}")
    elif status == 124:
        say(f"pykvm: time limit of {timeout or 0:g} s: {result.explanation}")
    elif result.reason == "reset":
        say("pykvm: the guest reset itself")
    elif result.reason == "killed":
        say("pykvm: killed by gdb")
    elif result.reason == "quit":
        say("pykvm: ended from the control socket")
    elif status == 63 and (result.exit_code or 0) > 63:
        say(f"pykvm: debug exit code {result.exit_code} ({result.exit_code:#x})")
    if machine.moved_to is not None:
        say(f"pykvm: the guest has moved to {machine.moved_to}, and goes on there")


def _table(rows: list[StatRow]) -> str:
    """The exits by kind. "in KVM" is KVM_RUN from in to out: the guest's own instructions are in it."""
    width = max([len(row.name) for row in rows] + [4])
    lines = [f"{'exit':<{width}} {'count':>8} {'in KVM: total':>14} {'median':>9} {'handler: total':>15} {'median':>9}"]
    for row in rows:
        lines.append(
            f"{row.name:<{width}} {row.count:>8} {_time(row.kvm_total):>14} {_time(row.kvm_median):>9} "
            f"{_time(row.handler_total):>15} {_time(row.handler_median):>9}"
        )
    return "\n".join(lines)


def _time(ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{ns:.0f} ns"
