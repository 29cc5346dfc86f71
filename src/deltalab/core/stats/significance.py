"""Effect sizes and tests: permutation, equivalence, Holm's correction."""

import math

import numpy as np
from scipy import special
from scipy import stats as sps

from deltalab.core.errors import UserError
from deltalab.core.stats.base import (
    Alternative,
    Equivalence,
    Floats,
    Significance,
    Values,
    as_floats,
    quotient,
    same_length,
)


def cohen_d(x: Values, y: Values) -> float:
    """Standardised difference of means, (mean x − mean y) / pooled standard deviation. Infinite if neither varies."""
    a, b = as_floats(x, 2), as_floats(y, 2)
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return quotient(float(a.mean() - b.mean()), math.sqrt(pooled))


def cliff_delta(x: Values, y: Values) -> float:
    """P(X > Y) − P(X < Y) over all pairs, in [−1, 1]; 2·AUC − 1."""
    a, b = as_floats(x), np.sort(as_floats(y))
    below, not_above = np.searchsorted(b, a, "left"), np.searchsorted(b, a, "right")
    return float((below.sum() + not_above.sum()) / (len(a) * len(b)) - 1)


def standing(value: float, null: Values) -> float:
    """How many standard deviations of the null draws `value` lies above their mean. Infinite if they do not vary."""
    draws = as_floats(null, 2)
    return quotient(float(value - draws.mean()), float(draws.std(ddof=1)))


def empirical_p(value: float, null: Values, alternative: Alternative = "greater") -> float:
    """p of `value` against draws of a null: (1 + number at least as extreme) / (n + 1), never zero.

    Two-sided: twice the smaller of the one-sided values, at most 1. With n draws no one-sided p is below 1/(n + 1).
    """
    draws = as_floats(null)
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
    a, b = as_floats(x), as_floats(y)
    if paired:
        same_length(a, b)
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
    a = as_floats(x, 2)
    if isinstance(y, float | int):
        difference, spread, df = float(a.mean() - y), math.sqrt(a.var(ddof=1) / len(a)), float(len(a) - 1)
    elif paired:
        b = as_floats(y)
        same_length(a, b)
        return tost(a - b, 0.0, margin)
    else:
        b = as_floats(y, 2)
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
    draws = as_floats(null, 2)
    spread = float(draws.std(ddof=1)) * math.sqrt(1 + 1 / len(draws))
    return _two_one_sided(float(value - draws.mean()), spread, float(len(draws) - 1), margin)


def _two_one_sided(difference: float, spread: float, df: float, margin: float) -> Equivalence:
    lower, upper = quotient(difference + margin, spread), quotient(difference - margin, spread)
    return Equivalence(difference, float(special.stdtr(df, -lower)), float(special.stdtr(df, upper)))


def holm(p: Values) -> Floats:
    """Holm's adjusted p-values, in the order given: each may be compared with α itself (Holm 1979)."""
    values = as_floats(p)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
