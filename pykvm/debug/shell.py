"""``pykvm shell``: a Python prompt in front of a machine, with a few short words for what is asked most."""

from __future__ import annotations

from pykvm.debug.control import Control
from pykvm.debug.reach import address_of
from pykvm.disasm import window
from pykvm.errors import GuestImageError, PykvmError
from pykvm.symbols import Symbols
from pykvm.x86.regs import format_regs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.debug.control import Stopped
    from pykvm.machine import Machine

__all__ = ["Shown", "Words", "interact", "run_code"]

HELP = """m the machine, vcpu the first vCPU, ram its memory; all of pykvm's API is there, and:
  step(n=1)             run n instructions         regs()            the registers
  cont(timeout=10)      run on                     dis(where, n=10)  instructions, from RIP or an address or a symbol
  brk(where)            a breakpoint there         walk(where)       where an address leads, level by level
  unbrk(where)          take it away               tables()          what the page tables map
  cpu(n)                look at vCPU n             mem(gpa, n=64)    bytes of guest physical memory
  where is a number, a symbol, symbol+0x10 or a register's name; words() shows this again."""


class Shown(str):
    """Text that a prompt shows as it is."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from pykvm.debug.html import text_html

        return text_html(self)


class Words:
    """The words, for one machine; ``names()`` is what the prompt knows."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.control = machine, Control(machine)
        try:
            self.symbols = machine.symbols()
        except GuestImageError:
            self.symbols = Symbols({})
        self.id = 0

    def names(self) -> dict[str, Any]:
        """Everything by name."""
        import pykvm

        m = self.machine
        own = ("step", "cont", "brk", "unbrk", "walk", "dis", "regs", "tables", "mem", "cpu", "words")
        return {
            "pykvm": pykvm,
            "m": m,
            "vcpu": m.vcpu,
            "ram": m.memory,
            "control": self.control,
            **{name: getattr(self, name) for name in own},
        }

    def words(self) -> Shown:
        """What there is."""
        return Shown(HELP)

    def _address(self, where: int | str | None) -> int:
        view = self.control.view(self.id)
        if where is None:
            return view.rip
        return where if isinstance(where, int) else address_of(where, self.symbols, view.regs)

    def _here(self, stopped: Stopped) -> Shown:
        """Why it stopped, and the instruction that comes next; what a crash was about."""
        self.id = stopped.cpu
        if stopped.reason == "crash":
            return Shown(self.control.explain(stopped))
        view = self.control.view(stopped.cpu)
        code = window(view.read, view.rip, view.bits, 0, 1, self.symbols)
        name = stopped.reason if stopped.code is None else f"{stopped.reason} {stopped.code}"
        return Shown(code if stopped.reason == "step" else f"{name}\n{code}")

    def step(self, n: int = 1) -> Shown:
        """Run ``n`` instructions of the vCPU at hand, or as many as there are until a breakpoint."""
        return self._here(self.control.step(self.id, count=n))

    def cont(self, timeout: float | None = 10.0) -> Shown:
        """Run on, for at most ``timeout`` seconds (None: without end)."""
        before = len(self.machine.console.text)
        here = self._here(self.control.cont(timeout))
        said = self.machine.console.text[before:]
        return Shown(f"console: {said!r}\n{here}" if said else here)

    def brk(self, where: int | str) -> Shown:
        """Stop before the instruction there."""
        address = self._address(where)
        self.control.add_breakpoint(address)
        return Shown(f"breakpoint at {address:#x}")

    def unbrk(self, where: int | str) -> Shown:
        """No more."""
        address = self._address(where)
        self.control.remove_breakpoint(address)
        return Shown(f"no breakpoint at {address:#x} any more")

    def walk(self, where: int | str, access: str = "") -> Shown:
        """Both levels of translation (m.walk() gives it as an object)."""
        return Shown(self.machine.walk(self._address(where), access, cpu=self.id).explain())

    def dis(self, where: int | str | None = None, n: int = 10) -> Shown:
        """Instructions."""
        view = self.control.view(self.id)
        return Shown(window(view.read, self._address(where), view.bits, 4 if where is None else 0, n, self.symbols))

    def regs(self) -> Shown:
        """The registers (vcpu.get_regs() gives them to change)."""
        view = self.control.view(self.id)
        return Shown(format_regs(view.regs, view.sregs))

    def tables(self) -> Shown:
        """What the page tables map (m.vm.page_tables() gives it as an object)."""
        return Shown(str(self.machine.vm.page_tables(vcpu=self.machine.vcpus[self.id])))

    def mem(self, gpa: int | str, n: int = 64) -> Shown:
        """Bytes of guest physical memory."""
        at = self._address(gpa)
        data = self.machine.memory.read(at, n)
        lines = []
        for i in range(0, n, 16):
            row = data[i : i + 16]
            text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
            lines.append(f"{at + i:#010x}  {row.hex(' '):<47}  {text}")
        return Shown("\n".join(lines))

    def cpu(self, n: int) -> Shown:
        """Look at another vCPU."""
        self.machine.walk(0, cpu=n)  # says so when there is none
        self.id = n
        return self.dis(n=1)


def interact(machine: Machine, banner: str = "") -> None:
    """A prompt until end of file: IPython's where it is installed, else Python's own. Errors of pykvm are one line."""
    words = Words(machine)
    names = words.names()
    text = f"{banner}\n{HELP}" if banner else HELP
    try:
        from IPython.terminal.embed import InteractiveShellEmbed
    except ImportError:
        _plain(names, text)
        return
    shell = InteractiveShellEmbed(banner1=text, user_ns=names, confirm_exit=False)
    shell.set_custom_exc((PykvmError,), lambda self, kind, value, tb, tb_offset=None: print(f"{kind.__name__}: {value}"))
    shell()


def _plain(names: dict[str, Any], text: str) -> None:
    from code import InteractiveConsole

    class Console(InteractiveConsole):
        def showtraceback(self) -> None:
            import sys

            error = sys.exc_info()[1]
            if isinstance(error, PykvmError):
                self.write(f"{type(error).__name__}: {error}\n")
            else:
                super().showtraceback()

    try:
        import readline
        from rlcompleter import Completer

        readline.set_completer(Completer(names).complete)
        readline.parse_and_bind("tab: complete")
    except ImportError:
        pass
    Console(names).interact(text, "")


def run_code(machine: Machine, code: str) -> None:
    """Run statements as at the prompt: what each expression gives is shown. Raises what they raise."""
    import ast
    import sys

    names = Words(machine).names()
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.Expr):
            sys.displayhook(eval(compile(ast.Expression(node.value), "<command>", "eval"), names))
        else:
            exec(compile(ast.Module([node], []), "<command>", "exec"), names)
