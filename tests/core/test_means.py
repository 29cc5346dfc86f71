"""Means with their errors against scipy, statsmodels and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats as sps
from statsmodels.formula.api import ols
from statsmodels.stats import weightstats
from statsmodels.stats.anova import anova_lm

from deltalab.core import stats
from deltalab.core.errors import UserError

RNG = np.random.default_rng(3)
X = RNG.normal(0.3, 1, 5)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("mean", [0.0, 0.4, -2.0])
def test_student_is_the_one_sample_t_test(mean, alternative):
    got, want = stats.student(X), sps.ttest_1samp(X, mean, alternative=alternative)
    assert got.p(mean, alternative) == pytest.approx(want.pvalue, rel=1e-10)
    assert got.df == 4
    limits = sps.ttest_1samp(X, 0).confidence_interval(0.9)
    assert got.interval(0.9) == pytest.approx((X.mean(), limits.low, limits.high), rel=1e-10)


def test_equivalence_is_two_one_sided_tests():
    p, lower, upper = weightstats.DescrStatsW(X).ttost_mean(-0.9, 1.1)
    got = stats.student(X).within(-0.9, 1.1)
    assert (got.p, got.p_lower, got.p_upper) == pytest.approx((p, lower[1], upper[1]), rel=1e-10)


def test_values_that_do_not_vary():
    same = stats.student([0.25, 0.25, 0.25])
    assert (same.p(0.0), same.p(0.25), same.p(0.1, "less")) == (0, 1, 1)
    assert same.interval() == (0.25, 0.25, 0.25)


def long_form(table):
    seeds, items = table.shape
    return {"y": table.ravel(), "seed": np.repeat(np.arange(seeds), items), "item": np.tile(np.arange(items), seeds)}


def test_crossed_has_the_mean_squares_of_the_two_way_table():
    """Against statsmodels' analysis of variance, with Satterthwaite's formula written out."""
    table = RNG.normal(size=(4, 9)) + RNG.normal(size=(4, 1)) + 2 * RNG.normal(size=9)
    anova = anova_lm(ols("y ~ C(seed) + C(item)", long_form(table)).fit())
    a, b, e = (anova["sum_sq"] / anova["df"]).to_numpy()
    assert e < min(a, b)
    got = stats.crossed(table)
    assert got.value == pytest.approx(table.mean())
    assert got.se**2 == pytest.approx((a + b - e) / table.size)
    assert got.df == pytest.approx((a + b - e) ** 2 / (a**2 / 3 + b**2 / 8 + e**2 / 24))


def test_crossed_takes_the_larger_of_the_two_where_the_rest_exceeds_one():
    table = RNG.normal(size=(3, 40))
    table -= table.mean(1, keepdims=True)  # seeds that agree better than chance
    got = stats.crossed(table)
    assert got.se**2 == pytest.approx(3 * table.mean(0).var(ddof=1) / table.size)
    assert got.df == 39


def test_crossed_of_items_that_say_the_same_is_student_over_seeds():
    table = np.repeat(X[:, None], 7, axis=1)
    assert stats.crossed(table) == pytest.approx(stats.student(X))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (5,)])
def test_crossed_needs_seeds_and_items(shape):
    with pytest.raises(UserError, match="no seeds and items"):
        stats.crossed(np.zeros(shape))


def covered(estimate, table_of, truth=0.0, runs=1500):
    hits = sum((i := estimate(table_of()).interval()).low <= truth <= i.high for _ in range(runs))
    return hits / runs


@pytest.mark.parametrize(("seeds", "spread"), itertools.product((3, 5), ((1, 0, 1), (0, 1, 1), (0.2, 1, 1), (1, 5, 3))))
def test_crossed_covers(seeds, spread):
    """Seeds and items drawn anew; spread: of seeds, items and the rest. Conservative where the seeds do not differ."""
    rng, (s, i, e) = np.random.default_rng([seeds, int(10 * spread[0])]), spread
    got = covered(
        stats.crossed,
        lambda: s * rng.normal(size=(seeds, 1)) + i * rng.normal(size=40) + e * rng.normal(size=(seeds, 40)),
    )
    assert 0.93 <= got <= 0.985


@pytest.mark.parametrize("seeds", [3, 5])
def test_student_over_seed_means_covers_nested_items_and_two_bootstraps_do_not(seeds):
    rng = np.random.default_rng(seeds)

    def table():
        return rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, 30))

    assert 0.935 <= covered(lambda t: stats.student(t.mean(1)), table, runs=2000) <= 0.965

    def resampled(t):
        rows = rng.integers(seeds, size=(300, seeds))
        drawn = t[rows[:, :, None], rng.integers(30, size=(300, seeds, 30))].mean((1, 2))
        return stats.Interval(t.mean(), *np.quantile(drawn, [0.025, 0.975]))

    hits = sum((i := resampled(table())).low <= 0 <= i.high for _ in range(300))
    assert hits / 300 < 0.9


def test_ratio_is_the_delta_methods():
    before, after = RNG.gamma(2, 1, 50), RNG.gamma(2, 0.8, 50)
    got = stats.ratio(after, before)
    r = after.sum() / before.sum()
    cov = np.cov(after, before)
    gradient = np.array([1 / before.mean(), -r / before.mean()])
    assert got.value == pytest.approx(r - 1)
    assert got.se == pytest.approx(math.sqrt(gradient @ cov @ gradient / 50))
    assert stats.influences(after, before).mean() == pytest.approx(r - 1)
    with pytest.raises(UserError, match="lengths 2 and 3"):
        stats.ratio([1, 2], [1, 2, 3])
    with pytest.raises(UserError, match="no relative change"):
        stats.ratio([1, 2], [0, 0])


def test_ratio_covers():
    rng = np.random.default_rng(9)

    def pairs():
        common = rng.gamma(3, 1, 64)
        return common * rng.gamma(20, 0.9 / 20, 64), common

    hits = 0
    for _ in range(1500):
        after, before = pairs()
        i = stats.ratio(after, before).interval()
        hits += i.low <= -0.1 <= i.high
    assert 0.93 <= hits / 1500 <= 0.97


def test_share_interval():
    one = [[True] * 40 + [False] * 60]
    assert stats.share_interval(one) == stats.wilson(40, 100)
    none = np.zeros((3, 100), bool).tolist()
    assert stats.share_interval(none) == stats.wilson(0, 100)
    apart = [[True] * n + [False] * (100 - n) for n in (20, 50, 80)]
    want = stats.crossed(np.array(apart, float)).interval()
    assert stats.share_interval(apart) == pytest.approx((0.5, max(0, want.low), min(1, want.high)))
    with pytest.raises(UserError, match="different numbers of items"):
        stats.share_interval([[True], [True, False]])


def test_share_interval_covers():
    """Items of their own difficulty, seeds of their own level."""
    rng, hits = np.random.default_rng(4), 0
    for _ in range(600):
        flags = rng.random((3, 80)) < 1 / (1 + np.exp(-(rng.normal(0, 0.5, (3, 1)) + rng.normal(0, 1.5, 80))))
        i = stats.share_interval(flags.tolist())
        hits += i.low <= 0.5 <= i.high
    assert 0.93 <= hits / 600 <= 0.99
