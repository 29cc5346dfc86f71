"""Statistics on plain arrays: intervals, tests, effect sizes. What scipy has is taken from scipy.

Everything takes sequences or numpy arrays and returns floats or small named tuples. Random procedures take a seed and
give the same answer for the same seed.
"""

from deltalab.core.stats.base import Alternative, Equivalence, Floats, Interval, Significance, Values
from deltalab.core.stats.means import (
    Estimate,
    bootstrap,
    crossed,
    influences,
    ratio,
    share_interval,
    student,
    t_interval,
)
from deltalab.core.stats.proportions import mcnemar, newcombe, newcombe_paired, wilson
from deltalab.core.stats.significance import (
    cliff_delta,
    cohen_d,
    empirical_p,
    holm,
    permutation,
    standing,
    tost,
    tost_single,
)

__all__ = [
    "Alternative", "Equivalence", "Estimate", "Floats", "Interval", "Significance", "Values", "bootstrap", "cliff_delta", "cohen_d", "crossed",
    "empirical_p", "holm", "influences", "mcnemar", "newcombe", "newcombe_paired", "permutation", "ratio", "share_interval", "standing", "student",
    "t_interval", "tost", "tost_single", "wilson",
]  # fmt: skip
