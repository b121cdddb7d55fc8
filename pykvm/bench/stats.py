"""Statistics in plain Python: quantiles, the Mann-Whitney test, Cliff's delta, Holm's correction."""

from __future__ import annotations

from math import erfc, sqrt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["cliffs_delta", "holm", "mann_whitney", "quantile", "quantiles"]


def quantile(ordered: Sequence[float], q: float) -> float:
    """The ``q``-quantile of sorted values, between neighbours by straight line."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def quantiles(values: Sequence[float], steps: int = 100) -> list[float]:
    """Minimum, the ``steps`` - 1 quantiles between, maximum."""
    ordered = sorted(values)
    return [quantile(ordered, i / steps) for i in range(steps + 1)]


def _rank_sum(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """(sum of the ranks of ``a`` in both together, ties sharing theirs; sum of t**3 - t over ties)."""
    both = sorted([(value, 0) for value in a] + [(value, 1) for value in b])
    ranks, ties, i = 0.0, 0.0, 0
    while i < len(both):
        j = i
        while j < len(both) and both[j][0] == both[i][0]:
            j += 1
        ranks += sum((i + j + 1) / 2 for k in range(i, j) if both[k][1] == 0)
        ties += float((j - i) ** 3 - (j - i))
        i = j
    return ranks, ties


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """(U of ``a``, two-sided p) by the normal approximation, corrected for ties and for continuity."""
    n, m = len(a), len(b)
    ranks, ties = _rank_sum(a, b)
    u = ranks - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1))) if total > 1 else 0.0
    if variance <= 0:
        return u, 1.0
    z = max(0.0, abs(u - n * m / 2) - 0.5) / sqrt(variance)
    return u, erfc(z / sqrt(2))


def cliffs_delta(a: Sequence[float], b: Sequence[float]) -> float:
    """How often a value of ``b`` is above one of ``a``, less how often below: -1 to 1, 0 for no difference."""
    ranks, _ = _rank_sum(a, b)
    u = ranks - len(a) * (len(a) + 1) / 2
    return 1 - 2 * u / (len(a) * len(b))


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p-values, corrected for how many there are (Holm's step-down)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected
