"""The guest that a command runs: the options that say what machine it gets, that machine, and its console on stdin and stdout.

Shared by run, trace, walk, shell and gdb: an option for machines is added here, once.
"""

from __future__ import annotations

import os
import sys

from pykvm.cli import say
from pykvm.cli.options import Option, number
from pykvm.errors import ConfigError, GuestNeedsError
from pykvm.loaders import FORMATS
from pykvm.machine import Machine
from pykvm.units import parse_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.cli.options import Command

__all__ = ["DEFAULT_LIMIT", "GUEST_OPTIONS", "TIME_LIMIT", "Input", "Output", "open_machine", "parse_guest"]

MACHINE_OPTIONS = [
    Option("--memory", "RAM, in bytes or with K, M, G; what the image asks for, else 16M, or 128M for those with a boot protocol", "SIZE"),
    Option("--backing", "where RAM comes from", default="anonymous", choices=("anonymous", "memfd", "hugetlb")),
    Option("--mode", "CPU mode to start in; auto asks the image", default="auto", choices=("auto", "real", "protected", "long", "user")),
    Option("--entry", "guest physical address to start at, instead of the image's own", "GPA", convert=parse_address),
    Option("--append", "command line for the guest (RSI points at it, or its boot protocol says)", "TEXT", ""),
    Option("--initrd", "a module for a multiboot, PVH or Linux image, with words of its own; may be given again", "FILE[ TEXT]", many=True),
    Option("--format", "what the image is; auto looks, and says what it found", default="auto", choices=("auto", *FORMATS)),
    Option("--cpus", "vCPUs; those after the first wait for INIT and SIPI; what the image asks for, else 1", "N", convert=int),
    Option(
        "--irqchip",
        "interrupt controllers; what the image asks for, else none, but with --cpus kernel",
        choices=("none", "kernel", "split"),
    ),
    Option(
        "--platform",
        "devices around the CPUs; pc-test is what images made for QEMU expect; what the image asks for, else pykvm",
        choices=("pykvm", "pc-test"),
    ),
    Option("--cpu", "CPU model, such as haswell or 'host -avx2' (pykvm cpu lists them); all that this host's KVM offers", "MODEL"),
    Option("--pin", "run each vCPU on a host CPU of its own"),
    Option("--loop", "who handles exits first", default="native", choices=("python", "native")),
    Option("--strict", "an access that no device claims is a crash"),
    Option("--no-assist", "an instruction that KVM's emulator does not know is a crash: it is not finished in user space"),
]  # each is the argument of Machine of that name
GUEST_OPTIONS = [
    *MACHINE_OPTIONS,
    Option("--firmware", "instead of IMAGE: a flat image that ends at 4 GiB, started at the reset vector", "FILE"),
]
DEFAULT_LIMIT = 10.0  # seconds
TIME_LIMIT = Option("--timeout", "time limit in seconds", "SECONDS", DEFAULT_LIMIT, number)


class Output:
    """Console output to stdout: written at line ends, and at least ten times a second.

    Through Python's own buffer: Ctrl-C between a write and the note that it was made would print the same twice.
    """

    def __init__(self) -> None:
        self.stdout = sys.stdout.buffer
        self.flush = self.stdout.flush

    def write(self, data: bytes) -> None:
        self.stdout.write(data)
        if b"\n" in data:
            self.flush()


class Input:
    """stdin, asked without waiting; its end becomes Ctrl-D (0x04) once, as a terminal would send it."""

    def __init__(self, before: Output) -> None:
        self.before = before
        self.ended = False

    def poll(self) -> bytes:
        from select import select

        self.before.flush()
        try:
            if self.ended or not select((0,), (), (), 0)[0]:
                return b""
            if os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp():
                return b""  # typed for the job in the foreground, such as gdb
            data = os.read(0, 4096)
        except (OSError, ValueError):
            data = b""  # closed
        self.ended = not data
        return data or b"\x04"


def parse_guest(command: Command, argv: list[str], more: int = 0) -> tuple[str, list[str], dict[str, Any]]:
    """(image, up to ``more`` further operands, option values) of a command with GUEST_OPTIONS. Raises ConfigError."""
    firmware = any(word.partition("=")[0] == "--firmware" for word in argv)
    operands, o = command.parse(argv, 0 if firmware else 1, more + (not firmware))
    if o["firmware"] is None:
        return operands[0], operands[1:], o
    if o["format"] not in ("auto", "firmware"):
        raise ConfigError(f"--firmware FILE is firmware, and --format says {o['format']}: give one of the two")
    return o["firmware"], operands, {**o, "format": "firmware"}


def open_machine(image: str, o: dict[str, Any], **more: Any) -> Machine:
    """A machine as MACHINE_OPTIONS say; ``more``: further arguments of Machine. Raises what Machine does, and GuestNeedsError where this
    host lacks what the image's note says that it needs: a guest that cannot run says so, rather than crash."""
    options = {option.key: o[option.key] for option in MACHINE_OPTIONS}
    machine = Machine(image, **{**options, **more})
    try:
        if o["format"] == "auto" and not machine.info.note:
            say(f"pykvm: {_what(machine)}; --format insists on another")
        if machine.info.note.get("needs"):
            from pykvm.needs import unmet

            why = unmet(machine.info.note, machine.system)
            if why:
                raise GuestNeedsError(machine.info.path, why)
    except BaseException:
        machine.close()
        raise
    return machine


def _what(machine: Machine) -> str:
    """What the image was taken for, and why: a wrong guess must not stay unseen."""
    info = machine.info
    kind = {"flat": "a flat binary", "ELF32": "an ELF32 executable", "ELF64": "an ELF64 executable"}.get(info.kind, info.kind)
    return f"{info.path} is taken for {kind}, to start in {info.mode} mode at {machine.boot.entry:#x}: {info.why}"
