"""Paired measurements: rounds in which every variant runs once, in rotating order, and differences taken within a round.

A shared machine drifts by more than the differences of interest; what two variants did within the same few milliseconds can still be
compared. The interval is that of a bootstrap over rounds (percentile method, 95 %).
"""

from __future__ import annotations

from math import exp, lgamma, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = ["Estimate", "Interrupted", "measure", "median", "paired"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after something has been measured: ``measured`` is what measure() or a benchmark would have returned, as far as it got."""

    def __init__(self, measured: Any) -> None:
        super().__init__()
        self.measured = measured


class Estimate:
    """A median and its 95 % interval."""

    __slots__ = ("high", "low", "value")

    def __init__(self, value: float, low: float, high: float) -> None:
        self.value, self.low, self.high = value, low, high

    def scaled(self, factor: float) -> Estimate:
        """In another unit."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"median": self.value, "low": self.low, "high": self.high}


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def estimate(values: Sequence[float]) -> Estimate:
    """The median with its bootstrap interval. What resampling would tend to is known: how many of n draws fall among the k lowest values is
    binomial, so the interval is computed, and the same values give the same one."""
    ordered, n = sorted(values), len(values)
    low = _first(n, (n + 1) // 2, 0.025)
    high = _first(n, n // 2 + 1, 0.975)
    return Estimate(median(ordered), ordered[low - 1], ordered[high - 1])


def _first(n: int, m: int, wanted: float) -> int:
    """The smallest k such that, with probability ``wanted``, the m-th lowest of n draws is among the k lowest of n values."""
    low, high = 1, n
    while low < high:
        k = (low + high) // 2
        if _at_least(n, k / n, m) >= wanted:
            high = k
        else:
            low = k + 1
    return low


def _at_least(n: int, p: float, m: int) -> float:
    """The probability of m or more hits in n trials."""
    if p >= 1:
        return 1.0
    step = log(p) - log(1 - p)
    term = lgamma(n + 1) - lgamma(m + 1) - lgamma(n - m + 1) + m * log(p) + (n - m) * log(1 - p)
    total = 0.0
    for hits in range(m, n + 1):
        total += exp(term)
        if hits < n:
            term += log((n - hits) / (hits + 1)) + step
    return total


def paired(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """The median difference to ``base``, round by round."""
    return estimate([v - b for v, b in zip(values, base, strict=True)])


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """The median ratio to ``base``, round by round."""
    return estimate([v / b for v, b in zip(values, base, strict=True)])


def measure(
    variants: dict[str, Callable[[], float]], rounds: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[float]]:
    """Each variant once a round, first in turn; one round to warm up is thrown away.

    Ctrl-C raises Interrupted with the rounds that are complete; KeyboardInterrupt when none is.
    """
    names = list(variants)
    rounds_taken: list[dict[str, float]] = []  # Ctrl-C may come between any two steps, but an append is one
    try:
        for i in range(rounds + 1):
            order = names[i % len(names) :] + names[: i % len(names)]
            round_ = {name: variants[name]() for name in order}
            if i:
                rounds_taken.append(round_)
            if progress is not None:
                progress(i, rounds)
    except KeyboardInterrupt:
        if not rounds_taken:
            raise
        raise Interrupted(_by_name(names, rounds_taken)) from None
    return _by_name(names, rounds_taken)


def _by_name(names: list[str], rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [round_[name] for round_ in rounds] for name in names}
