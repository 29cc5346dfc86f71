"""Statistics on plain arrays: intervals, tests, effect sizes. What scipy has is taken from scipy.

Everything takes sequences or numpy arrays and returns floats or small named tuples. Random procedures take a seed and
give the same answer for the same seed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats as sps

from deltalab.core.errors import UserError

Floats = NDArray[np.float64]
Values = Sequence[Any] | NDArray[Any]
Alternative = Literal["two-sided", "greater", "less"]


class Interval(NamedTuple):
    """An estimate with its confidence limits."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Significance(NamedTuple):
    """A test statistic and its p-value."""

    statistic: float
    p: float


class Equivalence(NamedTuple):
    """Two one-sided tests: `p` is the larger of the two; equivalent at level α if p < α."""

    difference: float
    p_lower: float
    p_upper: float

    @property
    def p(self) -> float:
        return max(self.p_lower, self.p_upper)


# ---- proportions --------------------------------------------------------------------------------------------------


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, `k` of `n` (Wilson 1927). Never leaves [0, 1]; 0 of 100 is [0, .037].

    Raises: UserError unless 0 ≤ k ≤ n and n ≥ 1.
    """
    if not 0 <= k <= n or n < 1:
        raise UserError(
            f"no proportion: {k} of {n}.", next="at least one trial is needed, and no more successes than trials"
        )
    low, high = sps.binomtest(k, n).proportion_ci(level, "wilson")
    return Interval(k / n, float(low), float(high))


def newcombe(k1: int, n1: int, k2: int, n2: int, level: float = 0.95) -> Interval:
    """Difference k1/n1 − k2/n2 of two *independent* proportions (Newcombe 1998, hybrid score)."""
    p, l1, u1 = wilson(k1, n1, level)
    q, l2, u2 = wilson(k2, n2, level)
    return Interval(p - q, p - q - math.hypot(p - l1, u2 - q), p - q + math.hypot(u1 - p, q - l2))


def newcombe_paired(both: int, first: int, second: int, neither: int, level: float = 0.95) -> Interval:
    """Difference of two proportions over the *same* items, first − second (Newcombe 1998 on paired data, method 10).

    both, neither: items on which the two agree; first, second: items on which only the one has it.
    """
    n = both + first + second + neither
    p, l1, u1 = wilson(both + first, n, level)
    q, l2, u2 = wilson(both + second, n, level)
    phi = _phi(both, first, second, neither)
    low = (p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2
    high = (q - l2) ** 2 - 2 * phi * (q - l2) * (u1 - p) + (u1 - p) ** 2
    return Interval(p - q, p - q - math.sqrt(max(low, 0.0)), p - q + math.sqrt(max(high, 0.0)))


def _phi(a: int, b: int, c: int, d: int) -> float:
    """The correlation of a 2×2 table, with Newcombe's continuity correction when it is positive."""
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    cross = a * d - b * c
    corrected = max(cross - (a + b + c + d) / 2, 0.0) if cross > 0 else float(cross)
    return corrected / math.sqrt(margins)


def mcnemar(before: Values, after: Values) -> Significance:
    """Exact McNemar test that two yes/no outcomes on the same items are equally frequent.

    before, after: booleans, (n,) each. The statistic is the number of items that only `before` has.
    """
    x, y = np.asarray(before, bool), np.asarray(after, bool)
    _same_length(x, y)
    lost, gained = int((x & ~y).sum()), int((~x & y).sum())
    if lost + gained == 0:
        return Significance(0.0, 1.0)
    return Significance(float(lost), float(sps.binomtest(lost, lost + gained, 0.5).pvalue))


# ---- effect sizes -------------------------------------------------------------------------------------------------


def cohen_d(x: Values, y: Values) -> float:
    """Standardised difference of means, (mean x − mean y) / pooled standard deviation. Infinite if neither varies."""
    a, b = _array(x, 2), _array(y, 2)
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return _ratio(float(a.mean() - b.mean()), math.sqrt(pooled))


def cliff_delta(x: Values, y: Values) -> float:
    """P(X > Y) − P(X < Y) over all pairs, in [−1, 1]; 2·AUC − 1."""
    a, b = _array(x), _array(y)
    return float(2 * sps.mannwhitneyu(a, b, method="asymptotic").statistic / (len(a) * len(b)) - 1)


def standing(value: float, null: Values) -> float:
    """How many standard deviations of the null draws `value` lies above their mean. Infinite if they do not vary."""
    draws = _array(null, 2)
    return _ratio(float(value - draws.mean()), float(draws.std(ddof=1)))


def _ratio(difference: float, spread: float) -> float:
    if spread > 0:
        return difference / spread
    return math.copysign(math.inf, difference) if difference else 0.0


# ---- tests --------------------------------------------------------------------------------------------------------


def empirical_p(value: float, null: Values, alternative: Alternative = "greater") -> float:
    """p of `value` against draws of a null: (1 + number at least as extreme) / (n + 1), never zero.

    Two-sided: twice the smaller of the one-sided values, at most 1. With n draws no one-sided p is below 1/(n + 1).
    """
    draws = _array(null)
    above = (1 + int((draws >= value).sum())) / (len(draws) + 1)
    below = (1 + int((draws <= value).sum())) / (len(draws) + 1)
    return {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]


def permutation(
    x: Values,
    y: Values,
    *,
    paired: bool = False,
    alternative: Alternative = "two-sided",
    draws: int = 9999,
    seed: int = 0,
) -> Significance:
    """Permutation test of the difference of means; exact where there are at most `draws` arrangements.

    paired: signs of x − y are exchanged, in place of labels.
    """
    a, b = _array(x), _array(y)
    if paired:
        _same_length(a, b)
    result = sps.permutation_test(
        (a, b), lambda u, v, axis: u.mean(axis=axis) - v.mean(axis=axis), vectorized=True, alternative=alternative,
        permutation_type="samples" if paired else "independent", n_resamples=draws, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Significance(float(result.statistic), float(result.pvalue))


def tost(x: Values, y: Values | float, margin: float, *, paired: bool = False) -> Equivalence:
    """Two one-sided t tests of |mean x − mean y| < margin (Schuirmann 1987).

    y: a sample (Welch's unequal variances, or `paired`), or a number that the mean of x is compared with.
    """
    if margin <= 0:
        raise UserError(
            f"equivalence needs a margin above zero, not {margin}.", next="say how large a difference would not matter"
        )
    a = _array(x, 2)
    if isinstance(y, float | int):
        difference, spread, df = float(a.mean() - y), math.sqrt(a.var(ddof=1) / len(a)), float(len(a) - 1)
    elif paired:
        b = _array(y)
        _same_length(a, b)
        return tost(a - b, 0.0, margin)
    else:
        b = _array(y, 2)
        u, v = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        difference, spread = float(a.mean() - b.mean()), math.sqrt(u + v)
        df = float((u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))) if u + v > 0 else math.inf
    return _two_one_sided(difference, spread, df, margin)


def tost_single(value: float, null: Values, margin: float) -> Equivalence:
    """Equivalence of one value with the population that the null draws come from (t of a single case, Crawford & Howell 1998).

    The value is one draw of its own population with the spread of the null's, so the standard error of the difference
    is sd·√(1 + 1/n), with n − 1 degrees of freedom.
    """
    if margin <= 0:
        raise UserError(
            f"equivalence needs a margin above zero, not {margin}.", next="say how large a difference would not matter"
        )
    draws = _array(null, 2)
    spread = float(draws.std(ddof=1)) * math.sqrt(1 + 1 / len(draws))
    return _two_one_sided(float(value - draws.mean()), spread, float(len(draws) - 1), margin)


def _two_one_sided(difference: float, spread: float, df: float, margin: float) -> Equivalence:
    lower, upper = _ratio(difference + margin, spread), _ratio(difference - margin, spread)
    return Equivalence(difference, float(sps.t.sf(lower, df)), float(sps.t.cdf(upper, df)))


def holm(p: Values) -> Floats:
    """Holm's adjusted p-values, in the order given: each may be compared with α itself (Holm 1979)."""
    values = _array(p)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


# ---- intervals of means -------------------------------------------------------------------------------------------


def t_interval(x: Values, level: float = 0.95) -> Interval:
    """Student's interval of a mean; what to use over 3 or 5 seeds, where a percentile bootstrap covers .74 and .82."""
    a = _array(x, 2)
    half = float(sps.t.ppf((1 + level) / 2, len(a) - 1) * a.std(ddof=1) / math.sqrt(len(a)))
    return Interval(float(a.mean()), float(a.mean()) - half, float(a.mean()) + half)


def bootstrap(
    x: Values, clusters: Values | None = None, *, statistic: Callable[[Floats], float] | None = None,
    level: float = 0.95, draws: int = 2000, seed: int = 0,
) -> Interval:  # fmt: skip
    """Percentile bootstrap of a statistic (default: the mean), resampling whole clusters.

    clusters: one label a value; values of one label (several samples of one prompt) are drawn together. None: each is
    its own. Raises: UserError with fewer than two clusters.
    """
    a = _array(x)
    labels = (
        np.arange(len(a)) if clusters is None else np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]
    )
    _same_length(a, labels)
    members = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    if len(members) < 2:
        raise UserError("a bootstrap needs at least two clusters.", found=f"{len(members)}")
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(members), size=(draws, len(members)))
    if statistic is None:
        sums, sizes = np.array([a[m].sum() for m in members]), np.array([len(m) for m in members])
        values: Floats = sums[picks].sum(1) / sizes[picks].sum(1)
    else:
        values = np.array([statistic(a[np.concatenate([members[i] for i in row])]) for row in picks])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(a.mean()) if statistic is None else float(statistic(a)), float(low), float(high))


def _array(x: Values, least: int = 1) -> Floats:
    values = np.asarray(x, dtype=np.float64).ravel()
    if len(values) < least:
        raise UserError(f"too few values: {len(values)}, at least {least} needed.")
    if not np.isfinite(values).all():
        raise UserError(f"{int((~np.isfinite(values)).sum())} of {len(values)} values are not finite.")
    return values


def _same_length(x: NDArray[Any], y: NDArray[Any]) -> None:
    if len(x) != len(y):
        raise UserError(f"paired values have lengths {len(x)} and {len(y)}.", next="pair them item by item")
