"""``pykvm trace``: every exit of a guest as it happens, in words.

Exit status as for pykvm run, but 0 when --until was reached.
"""

from __future__ import annotations

import sys

from pykvm.cli import run, say
from pykvm.cli.guest import GUEST_OPTIONS, TIME_LIMIT, Input, Output, open_machine, parse_guest
from pykvm.cli.options import Command, Option, whole
from pykvm.errors import ConfigError, GuestCrash
from pykvm.wholefile import check_place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.debug.tracer import Tracer
    from pykvm.result import Result

COMMAND = Command(
    "trace",
    "IMAGE",
    "Run a guest and print each exit to user space: number, time, instruction, device, register and value.\n"
    "EXIT and FILTER: reason=io,port=0x3f8 (all must hold), hlt, gpa=0xd0000000-0xd0000fff, dir=in, symbol=puts, device=RTC, 17.",
    [
        Option("--filter", "show only such exits; several: those that meet any", "FILTER", many=True),
        Option("--from", "show nothing before this EXIT, or before the first instruction at this symbol", "EXIT|SYMBOL"),
        Option("--until", "stop at this EXIT, or before the first instruction at this symbol", "EXIT|SYMBOL"),
        Option("--step", "every instruction, with the registers and the memory that it changes"),
        Option("--watch", "report what changes in guest physical memory between exits", "GPA:LEN", many=True),
        Option("--regs", "the general registers at each exit too"),
        Option("--limit", "stop after so many lines", "N", None, whole),
        Option("--html", "write a page that shows it all to FILE", "FILE"),
        *GUEST_OPTIONS,
        TIME_LIMIT,
        Option("--json", "one JSON object a line"),
    ],
    [
        "pykvm trace hello",
        "pykvm trace io_sizes --filter port=0xe0-0xe7 --filter reason=mmio",
        "pykvm trace hello --step --from puts --limit 40",
        "pykvm trace page_fault --html page_fault.html",
    ],
)


def main(argv: list[str]) -> int:
    """Trace it; returns the exit status."""
    image, _, o = parse_guest(COMMAND, argv)
    from pykvm.debug.tracer import Tracer

    if o["html"] and o["json"]:
        raise ConfigError("--html and --json: choose one")
    if o["html"]:
        check_place("--html", o["html"])
    with open_machine(image, o, poll_input=Input(Output()).poll) as machine:
        tracer = Tracer(
            machine,
            filters=o["filter"],
            begin=o["from"],
            until=o["until"],
            watch=o["watch"],
            step=o["step"],
            limit=o["limit"],
        )
        machine.on_heartbeat = sys.stdout.flush
        crash, interrupted = None, False
        if o["html"]:
            from pykvm.debug.trace_html import Report

            report = Report(tracer)
            tracer.sink = report.add
        else:
            tracer.sink = tracer.json_printer(sys.stdout, o["regs"]) if o["json"] else tracer.text_printer(sys.stdout, o["regs"])
        try:
            result = tracer.run(o["timeout"])
        except GuestCrash as error:
            if error.result is None:
                raise
            crash, result = error, error.result
        except KeyboardInterrupt:
            interrupted, result = True, machine.result("interrupted")
        status = 130 if interrupted else 70 if crash else 0 if result.reason == "until" else run._status(result, False)
        if o["html"]:
            report.save(o["html"], result)
        sys.stdout.flush()
        _report(tracer, result, status, o)
        return status


def _report(tracer: Tracer, result: Result, status: int, o: dict[str, Any]) -> None:
    """How it ended, in one line or, for a crash, in full."""
    shown = "" if tracer.shown == tracer.seen else f", {tracer.shown} shown"
    code = "" if result.exit_code is None else f" {result.exit_code}" if result.reason == "exit" else ""
    unit = ("instruction" if o["step"] else "exit") + "s" * (tracer.seen != 1)
    end = {
        "until": f"stopped after {tracer.shown} line{'s' * (tracer.shown != 1)}" if tracer.at_limit else f"stopped at {o['until']}",
        "crash": "crashed",
    }.get(result.reason, result.reason)
    say(f"pykvm: {tracer.seen} {unit}{shown}; {end}{code}")
    if o["html"]:
        say(f"pykvm: {o['html']} shows it")
    if status == 70:
        say(f"pykvm: the guest crashed: {result.explanation}")
    elif status == 124:
        say(f"pykvm: time limit of {o['timeout']:g} s: {result.explanation}")
