"""``pykvm host``: emulated KVM hosts, VT-x in Bochs and AMD-V in QEMU, for machines without the hardware."""

from __future__ import annotations

import json
import os
import sys
import time

from pykvm.cli.options import Command, Option, number, whole
from pykvm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RUN = Command(
    "host run",
    "[OPTIONS] -- COMMAND...",
    "Boot an emulated host (Debian's kernel, this Python, this pykvm), run COMMAND in it, return COMMAND's status.\n"
    "A host boots in about 10 s (amd) or a minute (intel). Files given with --put are in COMMAND's working folder.\n"
    "Exit status: COMMAND's own (128 + n when signal n killed it, 127 when it does not exist), or pykvm's: 64 usage; 69 an emulator, a\n"
    "package, a kernel or a CPU model is missing on this machine; 70 the host failed: it panicked or died, could not be set up, or a file\n"
    "could not be copied; 124 the time limit. COMMAND may end with those too: with --json, an object comes out only if it ran to its end.",
    [
        Option("--cpu", "amd (QEMU), intel (Bochs), or a model from pykvm host list", "CPU", "intel"),
        Option("--paging", "EPT or NPT on, or off: shadow paging", default="on", choices=("on", "off")),
        Option("--memory", "the host's memory", "SIZE", "1536M"),
        Option("--cpus", "the host's CPUs", "N", 1, whole),
        Option("--append", "further kernel options, such as mitigations=off", "TEXT", ""),
        Option("--put", "a file or folder to copy in; may be repeated", "FILE", many=True),
        Option("--get", "a file or folder to copy out afterwards; may be repeated", "FILE", many=True),
        Option("--timeout", "limit for COMMAND in seconds; the boot has ten minutes", "SECONDS", 600.0, number),
        Option("--json", "one JSON object instead of the command's output"),
    ],
    [
        "pykvm host run --cpu intel -- pykvm run hello",
        "pykvm host run --cpu amd --paging off -- pykvm doctor",
        "pykvm host run --append mitigations=off -- pykvm bench exits",
    ],
    rest=True,
)
LIST = Command(
    "host list",
    "",
    "The CPU models of the installed emulators, and which virtualization they have.",
    [Option("--json", "JSON instead of text")],
    [],
)
FETCH = Command("host fetch", "", "Get Debian's kernel package for the hosts into the cache.", [], [])
_COMMANDS = {"run": RUN, "list": LIST, "fetch": FETCH}


def main(argv: list[str]) -> int:
    """Dispatch to run, list or fetch."""
    if not argv or argv[0] in ("-h", "--help"):
        print("\n\n".join(command.help() for command in _COMMANDS.values()))
        return 0 if argv else 64
    if argv[0] not in _COMMANDS:
        raise ConfigError(f"no host command is called {argv[0]!r}: use run, list or fetch")
    rest = argv[1:]
    if argv[0] == "list":
        return _list(LIST.parse(rest)[1]["json"])
    if argv[0] == "fetch":
        return _fetch(rest)
    # What follows -- is the command's own, options and all.
    cut = rest.index("--") if "--" in rest else len(rest)
    _, options = RUN.parse(rest[:cut])
    command = rest[cut + 1 :]
    if not command:
        raise ConfigError("no command to run: pykvm host run --cpu intel -- pykvm run hello")
    return _run(command, options)


def _list(as_json: bool) -> int:
    from pykvm.hosts.emulators import ALIASES, EMULATORS, models

    found = sorted(models(), key=lambda m: (m.virtualization.startswith("none"), m.emulator))
    names = {model: alias for alias, model in ALIASES.items()}
    if as_json:
        print(json.dumps([{"name": m.name, "emulator": m.emulator, "virtualization": m.virtualization} for m in found], indent=2))
    else:
        for m in found:
            print(f"{m.name:<28} {m.emulator:<6} {m.virtualization:<12} {names.get(m.name, '')}".rstrip())
    for emulator in EMULATORS:
        if not emulator.installed():
            print(
                f"pykvm: {emulator.name} is not installed: sudo apt-get install {' '.join(dict.fromkeys(emulator.packages.values()))}",
                file=sys.stderr,
            )
    return 0 if found else 69


def _fetch(rest: list[str]) -> int:
    FETCH.parse(rest)
    from pykvm.hosts.debian import fetch

    kernel = fetch()
    print(f"Linux {kernel.version}: {kernel.image}")
    return 0


class _Progress:
    """What the boot is doing, on stderr: one changing line on a terminal, else a line each."""

    def __init__(self, quiet: bool) -> None:
        self.start, self.quiet, self.tty = time.monotonic(), quiet, sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if not self.quiet:
            line = f"[{time.monotonic() - self.start:5.1f} s] {text}"
            print(f"\r\x1b[K{line}" if self.tty else line, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def done(self) -> None:
        if self.tty and not self.quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _run(command: list[str], o: dict[str, Any]) -> int:
    from pykvm.hosts.session import boot

    for path in o["put"]:
        if not os.path.exists(path):
            raise ConfigError(f"--put {path}: there is no such file")
    progress = _Progress(o["json"])

    def show(data: bytes, is_stderr: bool) -> None:
        while data:
            data = data[os.write(2 if is_stderr else 1, data) :]

    try:
        with boot(o["cpu"], paging=o["paging"], memory=o["memory"], cpus=o["cpus"], append=o["append"], progress=progress) as host:
            for path in o["put"]:
                host.put(path)
            progress.done()
            done = host.run(command, timeout=o["timeout"], on_output=None if o["json"] else show)
            for path in o["get"]:
                try:
                    host.get(path)
                except HostError as error:
                    if not done.returncode:
                        raise
                    print(f"pykvm: {error}", file=sys.stderr)  # the command's own status tells more
    except TimeoutError as error:
        progress.done()
        print(f"pykvm: {error or 'the host did not boot in time'}", file=sys.stderr)
        return 124
    except HostError:
        progress.done()
        raise
    if o["json"]:
        print(json.dumps({"command": command, "status": done.returncode, "stdout": done.stdout, "stderr": done.stderr}, indent=2))
    return done.returncode
