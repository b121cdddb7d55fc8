"""Statistics of the benchmarks, against values that are known."""

import random
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.bench.paired import estimate, median, paired, ratio
from pykvm.bench.stats import cliffs_delta, holm, mann_whitney, quantile, quantiles

numbers = st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=30)


def test_mann_whitney_against_scipy():
    """The example of scipy.stats.mannwhitneyu, with method="asymptotic"."""
    u, p = mann_whitney([19, 22, 16, 29, 24], [20, 11, 17, 12])
    assert (u, round(p, 4)) == (17.0, 0.1113)


def test_mann_whitney_with_ties():
    """By hand: ranks 1.5 1.5 / 4 4 4 / 6, ties 2 and 3, variance 3*3/12 * (7 - 30/30)."""
    u, p = mann_whitney([1, 1, 2], [2, 2, 3])
    assert u == 1.0
    assert p == pytest.approx(0.1573, abs=2e-4)  # z = (3.5 - 0.5) / sqrt(4.5)


def test_no_difference_is_no_difference():
    assert mann_whitney([5.0] * 10, [5.0] * 7) == (35.0, 1.0)
    assert mann_whitney([1.0], [2.0])[1] == pytest.approx(1.0)
    assert cliffs_delta([5.0] * 10, [5.0] * 7) == 0


@given(numbers, numbers)
def test_cliffs_delta_is_what_it_says(a, b):
    direct = sum((y > x) - (y < x) for x in a for y in b) / (len(a) * len(b))
    assert cliffs_delta(a, b) == pytest.approx(direct)
    assert cliffs_delta(b, a) == pytest.approx(-direct)


@given(numbers, numbers)
def test_mann_whitney_is_symmetric(a, b):
    u, p = mann_whitney(a, b)
    v, q = mann_whitney(b, a)
    assert u + v == pytest.approx(len(a) * len(b))
    assert p == pytest.approx(q) and 0 <= p <= 1


def test_mann_whitney_rejects_as_often_as_it_should():
    chance = random.Random(1)
    draws = [[chance.gauss(0, 1) for _ in range(40)] for _ in range(600)]
    below = sum(mann_whitney(draws[i], draws[i + 1])[1] < 0.05 for i in range(0, 600, 2))
    assert 5 <= below <= 28  # 15 of 300


def test_holm():
    for order in permutations([0.01, 0.02, 0.03, 0.5]):
        assert dict(zip(order, holm(order), strict=True)) == {0.01: 0.04, 0.02: 0.06, 0.03: 0.06, 0.5: 0.5}
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_quantiles():
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3
    assert quantile([7.0], 0.99) == 7
    assert quantiles([3, 1, 2], steps=2) == [1, 2, 3]


@given(numbers)
def test_an_interval_holds_the_median(values):
    e = estimate(values)
    assert min(values) <= e.low <= e.value <= e.high <= max(values)


@pytest.mark.parametrize("n", [2, 5, 12, 41])
def test_the_interval_is_the_bootstraps(n):
    """Resampled, as the computed interval says it would come out; at most one place off, since resamples are chance."""
    chance = random.Random(n)
    values = sorted(chance.gauss(100, 10) for _ in range(n))
    medians = sorted(median(chance.choices(values, k=n)) for _ in range(4000))
    e = estimate(values)
    low, high = values.index(e.low), values.index(e.high)
    assert values[max(0, low - 1)] <= medians[100] <= values[min(n - 1, low + 1)]
    assert values[max(0, high - 1)] <= medians[3899] <= values[min(n - 1, high + 1)]


def test_pairs():
    assert paired([3.0, 5.0, 9.0], [1.0, 2.0, 3.0]).value == 3
    assert ratio([3.0, 5.0, 9.0], [1.0, 2.0, 3.0]).value == 3
