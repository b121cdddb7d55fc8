"""Two files of ``pykvm bench exits --json``, judged row by row: which differences are more than chance and more than small."""

from __future__ import annotations

from pykvm.bench.paired import median
from pykvm.bench.stats import cliffs_delta, holm, mann_whitney
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["LEAST", "SCHEMA", "Difference", "compare", "read_results", "table"]

SCHEMA = 2
LEAST = 0.03
ALPHA, EFFECT = 0.01, 0.474  # |Cliff's delta| from there on is called large (Romano et al. 2006)
_NUMBER = (int, float)


class Difference:
    """One loop of one kind in both files: medians, ratio, p corrected for the number of comparisons, Cliff's delta, verdict."""

    def __init__(self, kind: str, loop: str, a: list[float], b: list[float], least: float) -> None:
        self.kind, self.loop, self.least = kind, loop, least
        self.a, self.b = median(a), median(b)
        self.ratio = self.b / self.a if self.a else float("nan")
        self.p = mann_whitney(a, b)[1]
        self.delta = cliffs_delta(a, b)

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "same": of the second file."""
        if self.p >= ALPHA or abs(self.delta) < EFFECT or abs(self.b - self.a) < self.least * abs(self.a):
            return "same"
        return "slower" if self.delta > 0 else "faster"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind, "loop": self.loop, "a": self.a, "b": self.b, "ratio": self.ratio, "p": self.p, "delta": self.delta,
            "verdict": self.verdict,
        }  # fmt: skip


def read_results(path: str) -> dict[str, Any]:
    """The contents of a file that ``pykvm bench exits --json`` has written. Raises ConfigError for anything else."""
    from json import loads

    try:
        with open(path, encoding="utf-8") as file:
            contents = loads(file.read())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(contents, dict) or "schema" not in contents or "benchmark" not in contents:
        raise ConfigError(f"{path} is JSON, but nothing that pykvm bench --json has written")
    if contents["benchmark"] == "mmu":
        raise ConfigError(f"{path} is of bench mmu: pykvm bench mmu --compare A B puts two of those side by side")
    if contents["benchmark"] != "exits":
        raise ConfigError(f"{path} is of bench {contents['benchmark']}: only those of bench exits can be compared or drawn")
    if contents["schema"] != SCHEMA:
        raise ConfigError(f"{path} has schema {contents['schema']}; this pykvm reads schema {SCHEMA}: measure again")
    if not _is_sound(contents):
        raise ConfigError(f"{path} says that it has schema {SCHEMA}, but its rows are not of that form")
    return contents


def _is_sound(contents: dict[str, Any]) -> bool:
    """Whether the rows have what is read here, in plot.py and in tables.py."""
    rows = contents.get("rows")
    if not isinstance(rows, list) or not isinstance(contents.get("host"), dict):
        return False
    for row in rows:
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("kind"), str)
            or not isinstance(row.get("tsc_khz"), int)
            or row["tsc_khz"] <= 0
        ):
            return False
        if "unavailable" in row:
            continue
        values, guest, parts = row.get("values"), row.get("guest"), row.get("decomposition")
        if not isinstance(values, dict) or not isinstance(guest, dict) or not isinstance(parts, dict):
            return False
        if not all(isinstance(v, list) and v and all(isinstance(x, _NUMBER) for x in v) for v in values.values()):
            return False
        if not all(_is_estimate(e) for e in [*guest.values(), *parts.values(), *([row["c"]] if row.get("c") else [])]):
            return False
        if not all(isinstance(g.get("quantiles"), list) and len(g["quantiles"]) > 1 for g in guest.values()):
            return False
        over = row.get("over_c")
        if not isinstance(over, dict) or not all(map(_is_estimate, over.values())):
            return False
        if not all(isinstance(g.get("p99"), _NUMBER) for g in guest.values()):
            return False
        if not isinstance(row.get("rounds"), int) or not all(isinstance(row.get(name), str) for name in ("reaches", "note")):
            return False
    return True


def _is_estimate(e: object) -> bool:
    return isinstance(e, dict) and all(isinstance(e.get(name), _NUMBER) for name in ("median", "low", "high"))


def compare(a: dict[str, Any], b: dict[str, Any], least: float = LEAST) -> list[Difference]:
    """All that both have measured, the second beside the first. Raises ConfigError when that is nothing.

    ``least``: the smallest share of a median that counts. Two processes that do the same differ by a percent or two, certainly and each
    time: by where their pages happen to lie.
    """
    rows = {row["kind"]: row for row in b["rows"] if "values" in row}
    differences = [
        Difference(row["kind"], loop, values, rows[row["kind"]]["values"][loop], least)
        for row in a["rows"]
        if row["kind"] in rows and "values" in row
        for loop, values in row["values"].items()
        if loop in rows[row["kind"]]["values"]
    ]
    if not differences:
        raise ConfigError("the two files have no measured kind in common")
    for difference, p in zip(differences, holm([d.p for d in differences]), strict=True):
        difference.p = p
    return differences


def table(differences: list[Difference], a: dict[str, Any], b: dict[str, Any]) -> str:
    """What differs, and how much is the same."""
    lines = []
    for name in ("cpu", "kernel", "vendor_modules", "parameters", "mitigations", "kernel_options"):
        if a["host"].get(name) != b["host"].get(name):
            lines.append(f"the hosts differ in {name.replace('_', ' ')}: what differs below may come from that")
    for which, contents in (("first", a), ("second", b)):
        noise = contents.get("noise")
        if isinstance(noise, dict) and noise.get("quiet") is False:
            lines.append(f"the {which} was measured on a machine that was not quiet")
    telling = [d for d in differences if d.verdict != "same"]
    if telling:
        lines += ["", f"{'exit':<24}{'loop':<24}{'first':>10}{'second':>10}{'ratio':>8}{'p':>9}{'delta':>8}  second is"]
        for d in sorted(telling, key=lambda d: -abs(d.ratio - 1)):
            lines.append(f"{d.kind:<24}{d.loop:<24}{d.a:>10.0f}{d.b:>10.0f}{d.ratio:>8.3f}{d.p:>9.1g}{d.delta:>+8.2f}  {d.verdict}")
        lines.append("")
    same = len(differences) - len(telling)
    least = differences[0].least if differences else LEAST
    lines += [
        f"{same} of {len(differences)} medians are the same; a difference is one of {100 * least:g} % or more",
        f"with p < {ALPHA:g} (Mann-Whitney, Holm's correction) and a Cliff's delta of at least {EFFECT:g} either way",
    ]
    return "\n".join(lines)
