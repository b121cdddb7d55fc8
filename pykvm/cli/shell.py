"""``pykvm shell``: a Python prompt in front of a guest.

Exit status: 0, or 1 when a --command raised something that is no error of pykvm's.
"""

from __future__ import annotations

import sys

from pykvm.cli.guest import GUEST_OPTIONS, open_machine, parse_guest
from pykvm.cli.options import Command, Option
from pykvm.errors import ConfigError, PykvmError

COMMAND = Command(
    "shell",
    "IMAGE",
    "A Python prompt (IPython's where it is installed) with the guest loaded and not yet run: m, vcpu, ram, step(), cont(), brk(),\n"
    "walk(), dis(), regs(), and all of pykvm. The guest has no input: the prompt needs stdin.",
    [
        Option("--command", "run this Python code instead of a prompt; several are run one after another", "CODE", many=True),
        *GUEST_OPTIONS,
    ],
    ["pykvm shell hello", "pykvm shell hello --command 'brk(\"puts\")' --command 'cont()' --command 'regs()'"],
)


def main(argv: list[str]) -> int:
    """Open the prompt; returns the exit status."""
    image, _, o = parse_guest(COMMAND, argv)
    with open_machine(image, o) as machine:
        from pykvm.debug.shell import interact, run_code

        if not o["command"]:
            interact(machine, repr(machine))
            return 0
        try:
            run_code(machine, "\n".join(o["command"]))
        except SyntaxError as error:
            raise ConfigError(f"--command: {error}") from None
        except (PykvmError, OSError, KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            sys.stdout.flush()
            print(f"pykvm: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        return 0
