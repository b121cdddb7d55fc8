"""``pykvm walk``: addresses through both levels of translation, in a guest that was run up to some place.

Exit status: 0 all were translated (and allowed, with --access); 1 one was not; else as for pykvm run.
"""

from __future__ import annotations

import sys

from pykvm.cli import say
from pykvm.cli.guest import GUEST_OPTIONS, TIME_LIMIT, Input, Output, open_machine, parse_guest
from pykvm.cli.options import Command, Option
from pykvm.errors import ConfigError, GuestCrash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.debug.translate import Translation
    from pykvm.machine import Machine

COMMAND = Command(
    "walk",
    "IMAGE [OPTIONS] [GVA...]",
    "Run a guest up to a place, then show where addresses lead: each level of its page tables, the guest physical address, the\n"
    "memslot, the address in this process and in the host's memory. GVA is a number, a symbol (+ offset) or a register such as rsp.",
    [
        Option("--at", "stop before the first instruction at this symbol or address", "SYMBOL"),
        Option("--until", "stop at this exit: hlt, port=0xf4, 17 (the 17th) ...; without either, where the run ends", "EXIT"),
        Option("--access", "say whether this would fail, and why", choices=("read", "write", "fetch")),
        Option("--user", "the access comes from CPL3, not as the vCPU stands"),
        Option("--vcpu", "whose registers", "N", 0, int),
        Option("--tables", "list all that the page tables map, as ranges"),
        *GUEST_OPTIONS,
        TIME_LIMIT,
        Option("--json", "one JSON object instead of text"),
    ],
    [
        "pykvm walk walk_two_level 0x123456789123",
        "pykvm walk page_fault --until hlt --access write rsp",
        "pykvm walk hello --at puts --tables",
    ],
)


def main(argv: list[str]) -> int:
    """Run and walk; returns the exit status."""
    image, addresses, o = parse_guest(COMMAND, argv, 1 << 10)
    if o["at"] and o["until"]:
        raise ConfigError("--at and --until: give one place to stop at")
    if not addresses and not o["tables"]:
        raise ConfigError("no address: give at least one GVA, or --tables")
    with open_machine(image, o, poll_input=Input(Output()).poll) as machine:
        from pykvm.debug.reach import address_of

        symbols = machine.symbols()
        ended = _run(machine, o)
        vcpu = machine._runner(o["vcpu"]).vcpu
        regs = vcpu.get_regs()
        user = True if o["user"] else None
        walks = [machine.walk(address_of(text, symbols, regs), o["access"] or "", user, vcpu.id) for text in addresses]
        if o["json"]:
            _print_json(machine, o, walks, ended)
        else:
            print("\n".join([walk.explain() for walk in walks] + ([str(machine.vm.page_tables(vcpu=vcpu))] if o["tables"] else [])))
            sys.stdout.flush()
            say(f"pykvm: {ended}")
        return 1 if any(walk.denied or walk.gpa is None for walk in walks) else 0


def _run(machine: Machine, o: dict[str, Any]) -> str:
    """Where the guest stands now, in words."""
    from pykvm.debug.reach import address_of, run_to, run_until

    try:
        if o["at"]:
            reason = run_to(machine, address_of(o["at"], machine.symbols()), o["timeout"])
            return f"at {o['at']}" if reason == "breakpoint" else f"{o['at']} was not reached: the run ended first ({reason})"
        if o["until"]:
            reason = run_until(machine, o["until"], o["timeout"])
            return f"at {o['until']}" if reason == "until" else f"no exit was {o['until']}: the run ended first ({reason})"
        return f"the run ended: {machine.run(o['timeout'], explain=False).reason}"
    except GuestCrash as error:
        return f"the guest crashed: {error}"


def _print_json(machine: Machine, o: dict[str, Any], walks: list[Translation], ended: str) -> None:
    import json

    about: dict[str, Any] = {"image": machine.info.path, "stopped": ended, "walks": [walk.as_dict() for walk in walks]}
    if o["tables"]:
        about["tables"] = machine.vm.page_tables(vcpu=machine.vcpus[o["vcpu"]]).as_dict()
    print(json.dumps(about, indent=2))
