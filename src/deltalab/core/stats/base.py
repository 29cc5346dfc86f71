"""What the statistics share: types, results, and the check that values are numbers."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


def as_floats(x: Values, least: int = 1) -> Floats:
    """The values as a flat array of float64.

    Raises: UserError for fewer than `least`, or if one is not finite.
    """
    values = np.asarray(x, dtype=np.float64).ravel()
    if len(values) < least:
        raise UserError(f"too few values: {len(values)}, at least {least} needed.")
    if not np.isfinite(values).all():
        raise UserError(f"{int((~np.isfinite(values)).sum())} of {len(values)} values are not finite.")
    return values


def same_length(x: NDArray[Any], y: NDArray[Any]) -> None:
    """Raises: UserError for paired values of different lengths."""
    if len(x) != len(y):
        raise UserError(f"paired values have lengths {len(x)} and {len(y)}.", next="pair them item by item")


def quotient(difference: float, spread: float) -> float:
    """difference / spread; infinite where nothing spreads, and 0 where nothing differs either."""
    if spread > 0:
        return difference / spread
    return math.copysign(math.inf, difference) if difference else 0.0
