"""Which instruction made an event: address, text, symbol, source line; remembered, since guests make most exits at few places."""

from __future__ import annotations

from bisect import bisect_right

from pykvm.debug.insn import insn_rip
from pykvm.debug.trace import MomentView
from pykvm.disasm import Insn, disassemble
from pykvm.errors import GuestImageError
from pykvm.symbols import Symbols
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.debug.trace import Event
    from pykvm.machine import Machine

__all__ = ["Lines", "Locator", "Place"]

_PLACES = 1 << 14
_LONGEST = 15
_MAX_LINES = 1 << 20
_FAR = 4096  # code of no line table entry: an address this far past one has no source line


class Place:
    """``address`` (linear, None when it cannot be told), ``insn``, ``symbol`` ("puts+0x8"), ``source`` ("boot.c:12")."""

    __slots__ = ("address", "bits", "insn", "source", "symbol")

    def __init__(self, address: int | None, bits: int, insn: Insn | None, symbol: str, source: str) -> None:
        self.address, self.bits, self.insn, self.symbol, self.source = address, bits, insn, symbol, source


class Locator:
    """Finds places in one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        try:
            self.symbols = machine.symbols()
        except GuestImageError:
            self.symbols = Symbols({})
        self.lines = Lines.of(machine)
        self._places: dict[tuple[Any, ...], Place] = {}

    def view(self, event: Event) -> CpuView:
        """The vCPU as it was at the event."""
        return MomentView(event, self.machine.memory)

    def place(self, event: Event) -> Place:
        """Where the event came from."""
        key = (event.rip, event.reason, event.qualifier, event.size, event.is_write, event.context)
        known = self._places.get(key)
        if known is not None and _is_there(known, event):
            return known
        view = self.view(event)
        place = self.at(view, insn_rip(view, event.exit))
        here = disassemble(view.read(view.rip, _LONGEST), view.rip, view.bits, 1)
        if not (here and here[0].mnemonic.startswith("rep")):  # there registers decide
            if len(self._places) >= _PLACES:
                self._places.clear()
            self._places[key] = place
        return place

    def at(self, view: CpuView, address: int | None) -> Place:
        """A place by its linear address."""
        if address is None:
            return Place(None, view.bits, None, "", "")
        code = disassemble(view.read(address, _LONGEST), address, view.bits, 1)
        return Place(address, view.bits, code[0] if code else None, self.symbols.name(address), self.lines.name(address))


def _is_there(place: Place, event: Event) -> bool:
    """Whether that instruction was where it was before: guests write code too."""
    if place.address is None or place.insn is None:
        return False
    at, code = event.code
    start = place.address - at
    return start >= 0 and code[start : start + place.insn.size] == place.insn.bytes


class Lines:
    """Source lines of an ELF image with DWARF line tables."""

    def __init__(self, rows: list[tuple[int, str, int]]) -> None:
        self._rows = sorted(rows)
        self._starts = [row[0] for row in self._rows]

    @classmethod
    def of(cls, machine: Machine) -> Lines:
        """Those of the machine's image; pyelftools is imported only when it has some. A broken table gives what could be read."""
        if not machine.info.format.startswith("ELF") or b".debug_line" not in machine.data:
            return cls([])
        rows: list[tuple[int, str, int]] = []
        try:
            _read_lines(machine.data, rows)
        except Exception:  # pyelftools raises whatever a broken table leads it to
            pass
        return cls(rows)

    def name(self, address: int) -> str:
        """``"boot.c:12"``, or an empty string."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address - self._starts[at] > _FAR or not self._rows[at][2]:
            return ""
        return f"{self._rows[at][1]}:{self._rows[at][2]}"

    def __len__(self) -> int:
        return len(self._rows)


def _read_lines(data: bytes, rows: list[tuple[int, str, int]]) -> None:
    from io import BytesIO

    from elftools.elf.elffile import ELFFile

    dwarf = ELFFile(BytesIO(data)).get_dwarf_info()
    for unit in dwarf.iter_CUs():
        program = dwarf.line_program_for_CU(unit)
        if program is None:
            continue
        files = program.header["file_entry"]
        first = 0 if program.header["version"] >= 5 else 1
        for entry in program.get_entries():
            state = entry.state
            if state is None:
                continue
            index = state.file - first
            raw = files[index].name if 0 <= index < len(files) else b"?"
            text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
            name = "".join(c if c.isprintable() else "?" for c in text.rpartition("/")[2])[:200]
            rows.append((int(state.address), name, 0 if state.end_sequence else int(state.line)))
            if len(rows) >= _MAX_LINES:
                return
