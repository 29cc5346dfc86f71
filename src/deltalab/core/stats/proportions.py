"""Proportions: intervals of one and of two, and the exact test of paired ones."""

import math

import numpy as np
from scipy import special
from scipy import stats as sps

from deltalab.core.errors import UserError
from deltalab.core.stats.base import Interval, Significance, Values, same_length


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, `k` of `n` (Wilson 1927). Never leaves [0, 1]; 0 of 100 is [0, .037].

    Raises: UserError unless 0 ≤ k ≤ n and n ≥ 1.
    """
    if not 0 <= k <= n or n < 1:
        raise UserError(
            f"no proportion: {k} of {n}.", next="at least one trial is needed, and no more successes than trials"
        )
    z = float(special.ndtri((1 + level) / 2))
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return Interval(k / n, (centre - half) / (n + z * z) if k else 0.0, (centre + half) / (n + z * z) if k < n else 1.0)


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
    same_length(x, y)
    lost, gained = int((x & ~y).sum()), int((~x & y).sum())
    if lost + gained == 0:
        return Significance(0.0, 1.0)
    return Significance(float(lost), float(sps.binomtest(lost, lost + gained, 0.5).pvalue))
