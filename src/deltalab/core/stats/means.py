"""Means with their errors: over seeds, over items that every seed shares, of a ratio; bootstrap of clusters.

How far a mean is to be trusted depends on what would be drawn anew if the experiment were repeated:

    student(x)       the values themselves: one a seed; also items nested in seeds, through the seeds' means
    crossed(table)   seeds *and* items, where every seed answers the same items: both are a source of chance
    ratio(a, b)      items, of Σa/Σb − 1 over pairs (a, b)

With items nested in seeds, Student's t over the seeds' means is the exact interval of the balanced normal model, and it
covers at 3 and 5 seeds. A bootstrap over two levels does not (docs/results/calibration.md): three seeds resampled spread too
little by √(2/3), and their quantiles lack what t has over the normal.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special
from scipy import stats as sps

from deltalab.core.errors import UserError
from deltalab.core.stats.base import (
    Alternative,
    Equivalence,
    Floats,
    Interval,
    Values,
    as_floats,
    quotient,
    same_length,
)
from deltalab.core.stats.proportions import wilson


class Estimate(NamedTuple):
    """A mean, its standard error, and the degrees of freedom that the error is known with."""

    value: float
    se: float
    df: float

    def interval(self, level: float = 0.95) -> Interval:
        """value ± t · se."""
        half = float(special.stdtrit(self.df, (1 + level) / 2)) * self.se
        return Interval(self.value, self.value - half, self.value + half)

    def p(self, mean: float = 0.0, alternative: Alternative = "two-sided") -> float:
        """p of the t test that the mean is `mean`."""
        t = quotient(self.value - mean, self.se)
        below, above = float(special.stdtr(self.df, t)), float(special.stdtr(self.df, -t))
        return {"less": below, "greater": above, "two-sided": min(1.0, 2 * min(below, above))}[alternative]

    def within(self, low: float, high: float) -> Equivalence:
        """Two one-sided t tests that the mean lies between `low` and `high` (Schuirmann 1987)."""
        return Equivalence(self.value, self.p(low, "greater"), self.p(high, "less"))


def student(x: Values) -> Estimate:
    """Mean of independent values, (n,), with n − 1 degrees of freedom. Of seeds, one value each: the mean of its items.

    Raises: UserError with fewer than two values.
    """
    a = as_floats(x, 2)
    return Estimate(float(a.mean()), float(a.std(ddof=1)) / math.sqrt(len(a)), len(a) - 1.0)


def crossed(table: Values) -> Estimate:
    """Mean of a table (seeds, items) in which every seed has the same items, both drawn at random.

    The variance of the mean, σ²_seed/S + σ²_item/n + σ²_rest/(S·n), is (MS_seed + MS_item − MS_rest)/(S·n) by the mean
    squares of the two-way table without replication, with Satterthwaite's degrees of freedom (Satterthwaite 1946; Searle,
    Casella & McCulloch 1992, §4.3). Neither of the first two mean squares expects more than the whole: where the rest is
    larger than one of them, the other is taken alone.
    Raises: UserError unless the table has at least two rows and two columns.
    """
    y = np.asarray(table, dtype=np.float64)
    if y.ndim != 2 or min(y.shape) < 2:
        raise UserError(f"a table of {' × '.join(map(str, y.shape))} has no seeds and items to separate.",
                        next="give one row a seed and one column an item, at least two of each")  # fmt: skip
    seeds, items = y.shape
    as_floats(y)
    mean, rows, columns = y.mean(), y.mean(1), y.mean(0)
    ms_seed = items * float(rows.var(ddof=1))
    ms_item = seeds * float(columns.var(ddof=1))
    rest_df = (seeds - 1) * (items - 1)
    ms_rest = float(((y - rows[:, None] - columns + mean) ** 2).sum()) / rest_df
    if ms_rest >= min(ms_seed, ms_item):
        whole, df = max((ms_seed, seeds - 1.0), (ms_item, items - 1.0))
    else:
        whole = ms_seed + ms_item - ms_rest
        df = whole**2 / (ms_seed**2 / (seeds - 1) + ms_item**2 / (items - 1) + ms_rest**2 / rest_df)
    return Estimate(float(mean), math.sqrt(whole / (seeds * items)), df)


def ratio(after: Values, before: Values) -> Estimate:
    """Relative change Σ after / Σ before − 1 over paired items, (n,) each (the ratio estimator, Cochran 1977, §6.4)."""
    return student(influences(after, before))


def influences(after: Values, before: Values) -> Floats:
    """One value an item, with the relative change Σ after / Σ before − 1 for their mean and its error for theirs.

    Raises: UserError for unequal lengths, or if the mean of `before` is not above zero.
    """
    a, b = as_floats(after, 2), as_floats(before, 2)
    if len(a) != len(b):
        raise UserError(f"paired values have lengths {len(a)} and {len(b)}.", next="pair them item by item")
    if b.mean() <= 0:
        raise UserError(f"no relative change from a mean of {b.mean():g}.")
    change = a.mean() / b.mean()
    values: Floats = (a - change * b) / b.mean() + change - 1
    return values


def share_interval(flags: Sequence[Values], level: float = 0.95) -> Interval:
    """A share over several seeds that answered the same items: one list of booleans a seed.

    The interval of the table seeds × items (`crossed`), but never narrower than Wilson's on the items with the seeds'
    average count, which alone knows what 0 of 100 is worth. One seed: Wilson's.
    Raises: UserError for lists of different lengths.
    """
    if len({len(row) for row in flags}) != 1:
        raise UserError(
            "the seeds have answered different numbers of items.", found=", ".join(str(len(row)) for row in flags)
        )
    table = np.array([np.asarray(row, dtype=bool) for row in flags])
    of_items = wilson(round(float(table.sum()) / len(table)), table.shape[1], level)
    if len(table) == 1:
        return of_items
    value, low, high = crossed(table.astype(float)).interval(level)
    return Interval(value, max(0.0, min(low, of_items.low)), min(1.0, max(high, of_items.high)))


def t_interval(x: Values, level: float = 0.95) -> Interval:
    """Student's interval of a mean; what to use over 3 or 5 seeds, where a percentile bootstrap covers .74 and .82."""
    a = as_floats(x, 2)
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
    a = as_floats(x)
    labels = (
        np.arange(len(a)) if clusters is None else np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]
    )
    same_length(a, labels)
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
