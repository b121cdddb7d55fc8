"""Registers, exits, results, memory and page tables as HTML, for notebooks (``_repr_html_``); everything is escaped."""

from __future__ import annotations

from html import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pykvm.abi import Struct
    from pykvm.debug.pagetables import PageTables
    from pykvm.exits import Exit
    from pykvm.memory import GuestMemory
    from pykvm.result import Result

__all__ = ["exit_html", "memory_html", "page_tables_html", "result_html", "struct_html", "table", "text_html"]

_ROWS = 200
_TABLE = '<table style="border-collapse:collapse;font-family:ui-monospace,monospace;font-size:12px">'
_CELL = ' style="text-align:left;padding:1px 10px 1px 0;white-space:pre"'


def text_html(text: str) -> str:
    """Text as it is."""
    return f'<pre style="font-size:12px;line-height:1.35">{escape(text)}</pre>'


def table(head: Iterable[str], rows: Iterable[Iterable[object]], caption: str = "", more: int = 0) -> str:
    """A table; ``more`` rows were left out."""
    lines = [_TABLE]
    if caption:
        lines.append(f'<caption style="text-align:left;padding-bottom:4px">{escape(caption)}</caption>')
    lines.append("<tr>" + "".join(f"<th{_CELL}>{escape(name)}</th>" for name in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td{_CELL}>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    if more:
        lines.append(f"<tr><td{_CELL}>... and {more} more</td></tr>")
    return "\n".join([*lines, "</table>"])


def struct_html(struct: Struct) -> str:
    """A kernel structure; registers four a row, with the names of the bits."""
    from pykvm.abi import Array
    from pykvm.abi import Struct as Nested
    from pykvm.x86.regs import _BITS, bit_names

    plain = [(name, value) for name, value in struct.fields() if isinstance(value, int) and name != "padding"]
    if {"rip", "rsp"} <= {name for name, _ in plain}:
        cells: list[object] = []
        for name, value in plain:
            cells += [name, f"{value:016x}"]
        rows: list[list[object]] = [cells[i : i + 8] for i in range(0, len(cells), 8)]
        flags = next(value for name, value in plain if name == "rflags")
        return table([""] * 8, rows, f"rflags: {bit_names('rflags', flags)}")
    rows = [[name, f"{value:#x}", bit_names(name, value) if name in _BITS else ""] for name, value in plain]
    for name, value in struct.fields():
        if isinstance(value, Nested):
            rows.append([name, " ".join(f"{n}={v:#x}" for n, v in value.fields() if isinstance(v, int) and n != "padding"), ""])
        elif isinstance(value, Array):
            data = value.to_bytes()
            rows.append([name, data[:32].hex(" ") + (" ..." if len(data) > 32 else ""), ""])
    return table(["field", "value", "bits"], rows)


def exit_html(exit: Exit) -> str:
    """An exit's fields."""
    from pykvm.exit_reason import reason_name

    rows = [[name, hex(value) if type(value) is int else repr(value)] for name in exit.__match_args__ for value in (getattr(exit, name),)]
    return table(["field", "value"], rows, f"{type(exit).__name__}: KVM_EXIT_{reason_name(exit.reason)}")


def result_html(result: Result) -> str:
    """How a run ended, its exits, the console's last lines."""
    code = "" if result.exit_code is None else f" {result.exit_code}"
    parts = [table(["exit", "count"], result.exits.items(), f"{result.reason}{code}")]
    if result.assisted:
        parts.append(table(["instruction", "count"], result.assisted.items(), "finished in user space"))
    if result.unclaimed:
        rows = [[s, f"{at:#x}", size, "write" if w else "read", n] for (s, at, size, w), n in list(result.unclaimed.items())[:_ROWS]]
        parts.append(table(["space", "address", "size", "direction", "count"], rows, "accesses that no device claims"))
    for text in (result.explanation, result.console[-4000:]):
        if text:
            parts.append(text_html(text))
    return "\n".join(parts)


def memory_html(memory: GuestMemory) -> str:
    """The slots."""
    rows: list[list[Any]] = []
    for s in memory.slots[:_ROWS]:
        rows.append([s.id, f"{s.gpa:#x}-{s.gpa + s.size - 1:#x}", s.size, s.backing, "read-only" if s.readonly else "", f"{s.hva:#x}"])
    return table(["slot", "gpa", "bytes", "backing", "", "hva"], rows, repr(memory), max(0, len(memory.slots) - _ROWS))


def page_tables_html(tables: PageTables) -> str:
    """The ranges."""
    rows = [[f"{m.gva:#018x}", f"{m.gva + m.size - 1:#018x}", f"{m.gpa:#x}", m.size, m.page_size, m.rights] for m in tables.ranges[:_ROWS]]
    caption = f"{tables.paging} paging, root at gpa {tables.root:#x}" + (f"; cut: {tables.cut}" if tables.cut else "")
    return table(["gva from", "to", "gpa", "bytes", "page", "rights"], rows, caption, max(0, len(tables.ranges) - _ROWS))
