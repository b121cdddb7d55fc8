"""gdb's ``monitor`` commands: what pykvm knows of the guest that gdb has no command for."""

from __future__ import annotations

from pykvm.errors import ConfigError, PykvmError
from pykvm.units import parse_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.debug.control import Control

__all__ = ["monitor"]

HELP = """monitor gpa ADDRESS [BYTES]   guest physical memory
monitor walk ADDRESS          the page walk of a linear address, level by level
monitor regs                  all registers of the current vCPU, bits by name
monitor exits                 what the guest has exited for so far
monitor devices               ports and MMIO that devices claim
monitor slots                 memory slots
"""
_LIMIT = 1024


def monitor(control: Control, cpu: int, line: str) -> str:
    """The text that a command prints; what is wrong with it, when something is."""
    words = line.split()
    name = words[0] if words else "help"
    try:
        match name, words[1:]:
            case "gpa", [at] | [at, _] as arguments:
                return _dump(control, parse_address(at), int(arguments[1], 0) if len(arguments) > 1 else 64)
            case "walk", [at]:
                return control.view(cpu).walk(parse_address(at)).explain() + "\n"
            case "regs", []:
                from pykvm.x86.regs import format_regs

                view = control.view(cpu)
                return f"vCPU {cpu}: {view.mode} mode, {view.bits}-bit code, CPL{view.cpl}\n{format_regs(view.regs, view.sregs)}\n"
            case "exits", []:
                exits = control.machine.result().exits
                return "".join(f"{reason:<16} {count:>8}\n" for reason, count in exits.items()) or "none so far\n"
            case "devices", []:
                bus = control.machine.bus
                return "".join(f"{kind:<5} {r!r}\n" for kind, space in (("port", bus.pio), ("mmio", bus.mmio)) for r in space.ranges)
            case "slots", []:
                return "".join(f"{slot!r}\n" for slot in control.memory.slots)
            case "help", _:
                return HELP
    except (PykvmError, ValueError) as error:
        return f"{error}\n"
    return f"monitor {line.strip()!r} is no command; there are:\n{HELP}"


def _dump(control: Control, gpa: int, size: int) -> str:
    if not 1 <= size <= _LIMIT:
        raise ConfigError(f"{size} bytes: give 1 to {_LIMIT}")
    data = control.read_physical(gpa, size)
    lines = []
    for at in range(0, size, 16):
        row = data[at : at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{gpa + at:#010x}: {row.hex(' '):<47}  {text}\n")
    return "".join(lines)
