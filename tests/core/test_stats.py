"""Statistics against scipy, statsmodels, brute force and published examples."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats as sps
from statsmodels.stats import contingency_tables, multitest, proportion, weightstats

from deltalab.core import stats
from deltalab.core.errors import UserError

RNG = np.random.default_rng(0)
X, Y = RNG.normal(0.3, 1, 12), RNG.normal(0, 1.7, 15)


@pytest.mark.parametrize(("k", "n"), [(0, 100), (100, 100), (7, 20), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson(k, n, level):
    got = stats.wilson(k, n, level)
    assert got == pytest.approx((k / n, *proportion.proportion_confint(k, n, 1 - level, "wilson")), abs=1e-12)


def test_wilson_of_none_in_a_hundred():
    assert stats.wilson(0, 100).high == pytest.approx(0.037, abs=5e-4)
    assert stats.wilson(0, 100).low == 0
    assert str(stats.wilson(0, 100)) == "0.000 [0.000, 0.037]"


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_proportion(k, n):
    with pytest.raises(UserError, match="no proportion"):
        stats.wilson(k, n)


@pytest.mark.parametrize("counts", [(56, 70, 48, 80), (0, 10, 0, 20), (10, 10, 0, 10)])
def test_newcombe(counts):
    got = stats.newcombe(*counts)
    want = proportion.confint_proportions_2indep(*counts, method="newcomb", compare="diff")
    assert got[1:] == pytest.approx(want, abs=1e-12)
    assert got.value == pytest.approx(counts[0] / counts[1] - counts[2] / counts[3])


def test_newcombe_paired_published_example():
    """Newcombe 1998 (Statistics in Medicine 17:2635), 36, 12, 2, 0: difference .20, .0569 to .3404."""
    got = stats.newcombe_paired(36, 12, 2, 0)
    assert got == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    swapped = stats.newcombe_paired(36, 2, 12, 0)
    assert swapped == pytest.approx((-0.2, -0.3404, -0.0569), abs=5e-5)


def test_newcombe_paired_of_agreement_and_of_extremes():
    assert stats.newcombe_paired(10, 0, 0, 10).value == 0
    low, high = stats.newcombe_paired(0, 20, 0, 0)[1:]
    assert -1 <= low < 1 <= high <= 1 + 1e-12


def test_newcombe_paired_covers():
    """At n = 60 the coverage over simulated pairs is near .95."""
    rng, hits, runs = np.random.default_rng(1), 0, 200
    for _ in range(runs):
        cells = rng.multinomial(60, [0.5, 0.25, 0.1, 0.15])
        low, high = stats.newcombe_paired(*map(int, cells))[1:]
        hits += low <= 0.15 <= high
    assert 0.92 <= hits / runs <= 0.985


def test_mcnemar():
    before = RNG.random(60) < 0.7
    after = before & (RNG.random(60) < 0.7) | (RNG.random(60) < 0.1)
    table = [[(before & after).sum(), (before & ~after).sum()], [(~before & after).sum(), (~before & ~after).sum()]]
    want = contingency_tables.mcnemar(table, exact=True)
    got = stats.mcnemar(before, after)
    assert got.p == pytest.approx(want.pvalue, rel=1e-12)
    assert got.statistic == (before & ~after).sum()
    assert stats.mcnemar(before, before) == (0, 1)


def test_cohen_d():
    t = sps.ttest_ind(X, Y).statistic
    assert stats.cohen_d(X, Y) == pytest.approx(t * math.sqrt(1 / len(X) + 1 / len(Y)), rel=1e-12)
    assert stats.cohen_d([1, 1], [0, 0]) == math.inf
    assert stats.cohen_d([1, 1], [1, 1]) == 0


def test_cliff_delta_over_all_pairs():
    a, b = RNG.integers(0, 5, 20), RNG.integers(1, 6, 15)
    want = np.mean([np.sign(float(x - y)) for x, y in itertools.product(a, b)])
    assert stats.cliff_delta(a, b) == pytest.approx(want, abs=1e-12)
    assert stats.cliff_delta([3, 4], [1, 2]) == 1


def test_standing():
    assert stats.standing(3.0, [0, 1, 2]) == pytest.approx(2.0)
    assert stats.standing(0, [1, 1]) == -math.inf


def test_empirical_p():
    null = np.arange(99.0)
    assert stats.empirical_p(1000, null) == pytest.approx(0.01)
    assert stats.empirical_p(-1, null, "less") == pytest.approx(0.01)
    assert stats.empirical_p(1000, null, "two-sided") == pytest.approx(0.02)
    assert stats.empirical_p(49, null, "two-sided") == 1
    assert stats.empirical_p(90, null) == pytest.approx(sum(n >= 90 for n in [*null, 90]) / 100)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_permutation_exact(alternative):
    x, y = X[:4], Y[:4]
    pool, observed = np.concatenate([x, y]), x.mean() - y.mean()
    values = [pool[list(c)].mean() - np.delete(pool, list(c)).mean() for c in itertools.combinations(range(8), 4)]
    above, below = np.mean(np.array(values) >= observed - 1e-12), np.mean(np.array(values) <= observed + 1e-12)
    want = {"greater": above, "less": below, "two-sided": min(1, 2 * min(above, below))}[alternative]
    got = stats.permutation(x, y, alternative=alternative)
    assert got == pytest.approx((observed, want))


def test_permutation_paired_exact():
    d = X[:6] - Y[:6]
    values = [np.mean(d * signs) for signs in itertools.product([1, -1], repeat=6)]
    want = np.mean(np.array(values) >= d.mean() - 1e-12)
    assert stats.permutation(X[:6], Y[:6], paired=True, alternative="greater").p == pytest.approx(want)


def test_permutation_is_seeded():
    assert stats.permutation(X, Y, draws=200, seed=3) == stats.permutation(X, Y, draws=200, seed=3)


def test_tost():
    got = stats.tost(X, Y, 0.8)
    p, lower, upper = weightstats.ttost_ind(X, Y, -0.8, 0.8, usevar="unequal")
    assert (got.p, got.p_lower, got.p_upper) == pytest.approx((p, lower[1], upper[1]), rel=1e-9)
    paired = stats.tost(X, Y[:12], 0.8, paired=True)
    p, lower, upper = weightstats.ttost_paired(X, Y[:12], -0.8, 0.8)
    assert (paired.p, paired.p_lower, paired.p_upper) == pytest.approx((p, lower[1], upper[1]), rel=1e-9)
    single = stats.tost(X, 0.1, 0.8)
    assert single.p_lower == pytest.approx(sps.ttest_1samp(X, 0.1 - 0.8, alternative="greater").pvalue)
    assert single.p_upper == pytest.approx(sps.ttest_1samp(X, 0.1 + 0.8, alternative="less").pvalue)


def test_tost_single_is_the_t_test_of_one_value_against_a_sample():
    """A two-sample t test whose first sample has one value."""
    for margin in (0.5, 5.0):
        got = stats.tost_single(0.4, Y, margin)
        lower = sps.ttest_ind([0.4 + margin], Y, alternative="greater").pvalue
        upper = sps.ttest_ind([0.4 - margin], Y, alternative="less").pvalue
        assert (got.p_lower, got.p_upper) == pytest.approx((lower, upper), rel=1e-9)
    assert stats.tost_single(1.0, [1, 1, 1], 0.1).p == 0


@pytest.mark.parametrize("margin", [0, -1])
def test_equivalence_needs_a_margin(margin):
    with pytest.raises(UserError, match="margin"):
        stats.tost(X, Y, margin)
    with pytest.raises(UserError, match="margin"):
        stats.tost_single(1, X, margin)


def test_holm():
    p = [0.04, 0.01, 0.03, 0.005, 0.5, 0.04]
    assert stats.holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_t_interval():
    want = sps.ttest_1samp(X, 0).confidence_interval(0.9)
    assert stats.t_interval(X, 0.9) == pytest.approx((X.mean(), want.low, want.high))


def test_bootstrap_without_clusters_is_scipys():
    want = sps.bootstrap(
        (X,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(0)
    ).confidence_interval
    got = stats.bootstrap(X, draws=20000)
    assert got[1:] == pytest.approx((want.low, want.high), abs=0.02)
    assert got.value == pytest.approx(X.mean())


def test_bootstrap_resamples_whole_clusters():
    """Ten copies of a value in one cluster say no more than the value once."""
    repeated, labels = np.repeat(X, 10), np.repeat([f"p{i}" for i in range(len(X))], 10)
    assert stats.bootstrap(repeated, labels, seed=1)[1:] == pytest.approx(
        stats.bootstrap(X, [f"p{i}" for i in range(len(X))], seed=1)[1:]
    )
    narrow = stats.bootstrap(repeated, seed=1)
    assert narrow.high - narrow.low < 0.5 * (stats.bootstrap(X).high - stats.bootstrap(X).low)


def test_bootstrap_of_another_statistic():
    values = [1.0, 2.0, 3.0, 4.0, 100.0, 5.0]
    labels = ["a", "a", "b", "b", "c", "c"]
    got = stats.bootstrap(values, labels, statistic=lambda v: float(np.median(v)), draws=300)
    assert got.value == 3.5
    assert got == stats.bootstrap(values, labels, statistic=lambda v: float(np.median(v)), draws=300)
    means = stats.bootstrap(values, labels, statistic=lambda v: float(v.mean()), draws=300)
    assert means == pytest.approx(stats.bootstrap(values, labels, draws=300))


def test_too_few_or_broken_values():
    with pytest.raises(UserError, match="too few"):
        stats.t_interval([1.0])
    with pytest.raises(UserError, match="not finite"):
        stats.cohen_d([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(UserError, match="lengths 2 and 3"):
        stats.mcnemar([1, 0], [1, 0, 1])
    with pytest.raises(UserError, match="two clusters"):
        stats.bootstrap([1, 2], ["a", "a"])
