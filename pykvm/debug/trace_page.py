"""The page of ``pykvm trace --html``: one file, nothing from the network, light or dark as the reader's system is.

Everything that comes from a guest or an image is escaped here, or goes through JSON into textContent. The table and the registers need the
script; the rest is there without.
"""

from __future__ import annotations

from html import escape

from pykvm.debug.trace_style import SCRIPT, STYLE
from pykvm.debug.trace_text import format_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["page"]

_COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6e", "#a855c7", "#d64550", "#149aa8", "#8a7a1f", "#6b78e5", "#c2498e", "#7a8694", "#555f6b")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LANE, _LEFT, _WIDTH = 30, 132, 1080


def page(d: dict[str, Any]) -> str:
    """The whole file. ``d`` is Report.data()."""
    import json

    kinds = [kind for kind, _ in d["kinds"]]
    colours = {kind: _COLOURS[min(i, len(_COLOURS) - 1)] for i, kind in enumerate(kinds)}
    embedded = {name: d[name] for name in ("events", "registers", "first", "left_out", "steps", "cpus")} | {"colours": colours}
    embedded |= {"span": _span(d["density"]), "left": _LEFT, "width": _WIDTH}
    script_data = (
        json.dumps(embedded, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{escape(d['title'])}: trace</title><style>{STYLE}</style></head><body>",
        _header(d, colours),
        _timeline(d, colours),
        _events(d),
        '<div class="two">',
        _hot(d, colours),
        _console(d),
        "</div>",
        _code(d),
        '<div class="two">',
        _memory(d),
        _tables(d),
        "</div>",
        f'<script type="application/json" id="data">{script_data}</script><script>{SCRIPT}</script></body></html>',
    ]
    return "\n".join(part for part in parts if part)


def _header(d: dict[str, Any], colours: dict[str, str]) -> str:
    unit = ("instruction" if d["steps"] else "exit") + "s" * (d["count"] != 1)
    cpus = f"{d['cpus']} vCPUs" if d["cpus"] > 1 else "1 vCPU"
    chips = [f"<b>{d['count']:,}</b> {unit}", escape(f"{d['mode']} mode"), cpus]
    if not d["steps"]:
        chips.insert(1, f"<b>{escape(format_time(d['density']['end']))}</b>")
    bad = " bad" if d["crashed"] else ""
    legend = "".join(
        f'<span class="key"><i style="background:{colours[kind]}"></i>{escape(kind)} <b>{n:,}</b></span>' for kind, n in d["kinds"][:12]
    )
    why = ""
    if d["explanation"]:
        first, _, rest = d["explanation"].partition("\n")
        more = f"<details><summary>evidence</summary><pre>{escape(rest.strip())}</pre></details>" if rest.strip() else ""
        why = f'<div class="why"><p>{escape(first)}</p>{more}</div>'
    return (
        f'<header><h1>{escape(d["title"])}</h1><p class="path">{escape(d["image"])}</p>'
        f'<p class="chips"><span class="end{bad}">{escape(d["end"])}</span>{"".join(f"<span>{chip}</span>" for chip in chips)}</p>'
        f'<p class="legend">{legend}</p>{why}</header>'
    )


def _span(density: dict[str, Any]) -> float:
    """Nanoseconds that the timeline shows: a little more than there were events."""
    return max(float(density["end"]) * 1.02, 1.0)


def _timeline(d: dict[str, Any], colours: dict[str, str]) -> str:
    density, lanes = d["density"], d["density"]["lanes"]
    if not lanes:
        return '<section><h2>Timeline</h2><p class="none">No events.</p></section>'
    span, inner = _span(density), _WIDTH - _LEFT - 10
    height = _LANE * len(lanes) + 28
    out = [f'<svg id="timeline" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="events over time">']
    for tick in range(6):
        x = _LEFT + inner * tick / 5
        label = f"{span * tick / 5 / 1000:,.0f}" if d["steps"] else format_time(span * tick / 5)
        anchor = "start" if tick == 0 else "end" if tick == 5 else "middle"
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{height - 5}" text-anchor="{anchor}">{escape(label)}</text>')
    for row, (lane, bins) in enumerate(sorted(lanes.items(), key=lambda item: -sum(item[1]))):
        y, most = row * _LANE, max(bins)
        colour = colours.get(lane, _COLOURS[-1])
        out.append(f'<line class="base" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y + _LANE - 4}" y2="{y + _LANE - 4}"/>')
        out.append(f'<text class="lane" x="{_LEFT - 10}" y="{y + _LANE - 9}" text-anchor="end">{escape(lane[:18])}</text>')
        for i, n in enumerate(bins):
            x = _LEFT + inner * i * density["width"] / span
            if n and x < _WIDTH - 10:
                tall = 6 + (_LANE - 12) * (n / most) ** 0.5
                wide = min(max(inner * density["width"] / span - 0.4, 2.0), _WIDTH - 10 - x)
                label = f"{lane}: {n} at {format_time(i * density['width'])}" if not d["steps"] else f"{n} steps"
                out.append(
                    f'<rect x="{x:.1f}" y="{y + _LANE - 4 - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{colour}">'
                    f"<title>{escape(label)}</title></rect>"
                )
    out.append(f'<line id="cursor" y1="0" y2="{height - 20}" x1="-5" x2="-5"/></svg>')
    hint = (
        "instructions, from the first to the last"
        if d["steps"]
        else "time in the guest and in handlers" + ("" if d["cpus"] > 1 else "; what the trace itself took is left out")
    )
    return f"<section><h2>Timeline <small>{hint}</small></h2>{''.join(out)}</section>"


def _events(d: dict[str, Any]) -> str:
    left = (
        f" The first {d['first']:,} and the last {len(d['events']) - d['first']:,}; {d['left_out']:,} between them were left out."
        if d["left_out"]
        else ""
    )
    name = "Instructions" if d["steps"] else "Exits"
    hint = "Click one for its registers; the arrow keys move on."
    columns = "<th>vCPU</th>" * (d["cpus"] > 1) + '<th class="r">time</th>' * (not d["steps"])
    return (
        f'<section><h2>{name} <small>{hint}{left}</small></h2><div class="events"><div class="list">'
        '<input id="filter" type="search" placeholder="filter: puts, 0x3f8, mmio ..." aria-label="filter">'
        '<div class="scroll" tabindex="0"><table id="events"><thead><tr><th class="r">#</th>'
        f"{columns}<th>instruction at</th>"
        "<th>instruction</th><th>what</th></tr></thead><tbody></tbody></table></div></div>"
        '<aside id="registers"><h3>Registers</h3><p class="none">Choose an event.</p></aside></div></section>'
    )


def _hot(d: dict[str, Any], colours: dict[str, str]) -> str:
    if not d["hot"]:
        return '<section><h2>Hot places</h2><p class="none">None.</p></section>'
    most, total, rows = d["hot"][0]["c"], max(d["count"], 1), []
    for place in d["hot"]:
        where = escape(place["at"]) + (f' <span class="sym">{escape(place["s"])}</span>' if place["s"] else "")
        bar = f'<i style="width:{100 * place["c"] / most:.1f}%;background:{colours.get(place["k"], _COLOURS[-1])}"></i>'
        rows.append(
            f'<tr><td class="r">{place["c"]:,}</td><td class="r dim">{100 * place["c"] / total:.1f} %</td><td class="bar">{bar}</td>'
            f"<td>{where}</td><td>{escape(place['i'])}</td></tr>"
        )
    more = f'<p class="none">{d["elsewhere"]:,} events were at too many other places to count apart.</p>' if d["elsewhere"] else ""
    return f'<section><h2>Hot places</h2><div class="wide"><table class="hot">{"".join(rows)}</table></div>{more}</section>'


def _console(d: dict[str, Any]) -> str:
    cut = f'<p class="none">{d["console_cut"]:,} characters before these were left out.</p>' if d["console_cut"] else ""
    text = "".join(c if c == "\n" or c == "\t" or c.isprintable() else "\ufffd" for c in d["console"])
    body = f'<pre class="console">{escape(text)}</pre>' if text else '<p class="none">The guest printed nothing.</p>'
    return f"<section><h2>Console</h2>{cut}{body}</section>"


def _code(d: dict[str, Any]) -> str:
    if not d["code"]:
        return ""
    most = max((line["c"] for part in d["code"] for line in part["lines"]), default=1) or 1
    boxes = []
    for part in d["code"]:
        rows = []
        for line in part["lines"]:
            heat = f' style="--heat:{line["c"] / most:.2f}"' if line["c"] else ""
            count = f"{line['c']:,}" if line["c"] else ""
            rows.append(
                f'<tr{" class=hit" if line["c"] else ""}{heat}><td class="r n">{count}</td><td class="dim">{escape(line["a"])}</td>'
                f'<td class="dim b">{escape(line["b"])}</td><td>{escape(line["i"])}</td><td class="dim">{escape(line["l"])}</td></tr>'
            )
        boxes.append(f'<div class="fn"><h3>{escape(part["name"])}</h3><table>{"".join(rows)}</table></div>')
    return (
        f'<section><h2>Code <small>how often each instruction made an event</small></h2><div class="code">{"".join(boxes)}</div></section>'
    )


def _memory(d: dict[str, Any]) -> str:
    blocks = []
    for s in d["slots"]:
        kind = "rom" if s["readonly"] else "ram"
        inner = "".join(
            f'<i style="left:{100 * (g["gpa"] - s["gpa"]) / s["size"]:.3f}%;width:max(3px,{100 * g["size"] / s["size"]:.3f}%)" '
            f'title="image, gpa {g["gpa"]:#x}, {g["size"]} bytes"></i>'
            for g in d["segments"]
            if s["gpa"] <= g["gpa"] < s["gpa"] + s["size"]
        )
        name = f"{'ROM' if s['readonly'] else 'RAM'}, {s['backing'] if len(s['backing']) < 30 else 'file'}"
        blocks.append((s["gpa"], s["size"], kind, name, f'<div class="in">{inner}</div>' if inner else ""))
    blocks += [(r["base"], r["length"], "mmio", r["name"], "") for r in d["mmio"]]
    rows, end = [], 0
    for gpa, size, kind, name, inner in sorted(blocks, key=lambda block: block[0]):
        if gpa > end:
            rows.append(f'<div class="gap">{escape(_round(gpa - end))} of nothing</div>')
        end = max(end, gpa + size)
        rows.append(
            f'<div class="block {kind}"><span>{escape(name)}</span><code>{gpa:#x} - {gpa + size - 1:#x}</code>'
            f"<em>{escape(_round(size))}</em>{inner}</div>"
        )
    ports = "".join(
        f"<tr><td>{r['base']:#06x}</td><td class=dim>{r['length']} port{'s' * (r['length'] > 1)}</td><td>{escape(r['name'])}</td></tr>"
        for r in d["pio"]
    )
    note = " <small>the bar: where the image is</small>" if d["segments"] else ""
    return (
        f'<section><h2>Guest physical memory{note}</h2><div class="map">{"".join(rows)}</div><h3>Ports</h3><table>{ports}</table></section>'
    )


def _round(size: int) -> str:
    """``"15.9M"``: sizes for reading."""
    for unit, letter in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= unit:
            return f"{size // unit}{letter}" if size % unit == 0 else f"{size / unit:.1f}{letter}"
    return f"{size} bytes"


def _tables(d: dict[str, Any]) -> str:
    t = d["tables"]
    if t["paging"] == "off":
        return '<section><h2>Page tables</h2><p class="none">Paging is off: linear addresses are physical.</p></section>'
    ranges = "".join(
        f"<tr><td>{escape(r['gva'])}</td><td>{escape(r['end'])}</td><td>{escape(r['gpa'])}</td><td class=r>{escape(_round(r['size']))}</td>"
        f"<td class=r>{escape(_round(r['page']))}</td><td>{escape(r['r'])}</td></tr>"
        for r in t["ranges"]
    )
    notes = [f"... and more: {t['cut']}"] if t["cut"] else []
    notes += [f"{t['malformed']} entries are malformed and map nothing"] if t["malformed"] else []
    notes += [f"the tree is cut: {t['tree_cut']}"] if t["tree_cut"] else []
    tree = "".join(_node(node) for node in t["tree"])
    return (
        f"<section><h2>Page tables <small>{escape(t['paging'])} paging, root at gpa {escape(t['root'])}, at the end</small></h2>"
        '<div class="wide"><table><thead><tr><th>gva from</th><th>to</th><th>gpa</th>'
        "<th class=r>size</th><th class=r>page</th><th>rights</th></tr></thead>"
        f'{ranges}</table></div><div class="tree">{tree}</div>{"".join(f"<p class=none>{escape(note)}</p>" for note in notes)}</section>'
    )


def _node(n: dict[str, Any]) -> str:
    index = f"{n['index']}" if n["count"] == 1 else f"{n['index']}-{n['index'] + n['count'] - 1}"
    name = f"<b>{escape(n['level'])}[{index}]</b> <code>{escape(n['value'])}</code>"
    if n["kind"] == "table":
        below = "".join(_node(child) for child in n["below"]) or '<div class="leaf dim">empty</div>'
        opened = " open" if len(n["below"]) <= 8 else ""
        return f"<details{opened}><summary>{name} table at gpa {escape(n['gpa'])}</summary><div>{below}</div></details>"
    if n["kind"] == "bad":
        return f'<div class="leaf bad">{name} malformed</div>'
    count = f"{n['count']} pages of {_round(n['page'])}" if n["count"] > 1 else f"a page of {_round(n['page'])}"
    return f'<div class="leaf">{name} gva {escape(n["gva"])} &rarr; gpa {escape(n["gpa"])}, {escape(count)}, {escape(n["r"])}</div>'
