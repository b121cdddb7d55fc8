"""Paired measurements: rounds in which every variant runs once, in rotating order, and differences taken within a round.

A shared machine drifts by more than the differences of interest; what two variants did within the same few milliseconds can still be
compared. The interval is a bootstrap over rounds (percentile method, 95 %).
"""

from __future__ import annotations

import random

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


def estimate(values: Sequence[float], resamples: int = 400) -> Estimate:
    """The median with its bootstrap interval; the same values give the same interval."""
    chance = random.Random(len(values))
    medians = sorted(median(chance.choices(values, k=len(values))) for _ in range(resamples))
    return Estimate(median(values), medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1])


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
