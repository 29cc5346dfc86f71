"""How a group of weights stands against random groups, over one or several trainings.

Two things would be drawn anew if the study were repeated, and a claim has to survive both:

    the choice of entries   a random group has a drift of its own, which comes back in every training on the same data.
                            The null draws say how large it is: the permutation test, exact for any number of draws.
    the training            another seed moves every group otherwise: Student's t over the seeds.

Either alone calls a random group special too often. t over seeds is sure of a deviation that the group merely happens to
have; permutation within one training is sure of one that another seed would not show. So p is the larger of the two, for
each direction (an intersection–union test, Berger 1982), and with one seed only the first can be made. The draws must
therefore be the same random groups in each seed, in the same order, where the group is the same in each.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deltalab.core.errors import UserError
from deltalab.core.stats import Alternative, Floats, cliff_delta, empirical_p, standing, student, tost_single

FEWEST = 2
Row = Sequence[float | None] | Floats


def against(values: Row, draws: Sequence[Row], margin: float | None = None, level: float = 0.95) -> dict[str, Any]:
    """One positive measure of a group against the same measure of random groups, as logarithms of ratios to their mean.

    values: one a seed. draws: one row a seed, one value a random group, entry i the same group in each row. margin: ratio
    less one within which a difference would not matter.
    Returns JSON: `ratio` (geometric mean over seeds) with `low` and `high` over seeds, `per_seed`, the null's band, `p` of
    a difference, `p_same` within the margin, effect sizes in the null's terms; all None where nothing moved.
    Raises: UserError for seeds with different numbers of draws, or fewer than two draws.
    """
    null, measured = table(draws), np.array(values, dtype=np.float64)
    shown = [float(v) if math.isfinite(v) else None for v in measured]
    found: dict[str, Any] = {"value": shown, "draws": null.shape[1], "null_mean": null.mean(1).tolist()}
    if not (measured > 0).all() or (null <= 0).any():
        return {**found, "ratio": None, "p": None, "p_same": None}
    means = null.mean(1, keepdims=True)
    own = np.log(measured / means[:, 0])
    return found | compare(own, np.log(null / means), math.log1p(margin) if margin else None, level)


def compare(own: Floats, null: Floats, margin: float | None, level: float = 0.95) -> dict[str, Any]:
    """The group's logarithms, (seeds,), against those of the draws, (seeds, draws), both from the draws' mean; see `against`."""
    value, drawn = float(own.mean()), null.mean(0)
    sides: tuple[Alternative, Alternative] = ("greater", "less")
    p = {side: empirical_p(value, drawn, side) for side in sides}
    found: dict[str, Any] = {"p_choice": min(1.0, 2 * min(p.values())), "p_seeds": None, "low": None, "high": None}
    same = tost_single(value, drawn, margin).p if margin else None
    if len(own) > 1:
        of_mean = float(drawn.std(ddof=1)) / math.sqrt(len(drawn))  # what so many draws leave open about their own mean
        over = student(own)
        over = over._replace(se=math.hypot(over.se, of_mean))
        interval = over.interval(level)
        p = {side: max(p[side], over.p(0.0, side)) for side in sides}
        found |= {"p_seeds": over.p(), "low": math.exp(interval.low), "high": math.exp(interval.high)}
        if margin and same is not None:
            same = max(same, over.within(-margin, margin).p)
    effect = standing(value, drawn)
    band = np.exp(np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
    return found | {
        "ratio": math.exp(value), "per_seed": np.exp(own).tolist(), "band": {"low": float(band[0]), "high": float(band[1])},
        "p": min(1.0, 2 * min(p.values())), "least_p": min(1.0, 2 / (len(drawn) + 1)), "p_same": same, "more": p["greater"] < p["less"],
        "cohen_d": effect if math.isfinite(effect) else None, "cliff_delta": cliff_delta([value], drawn),
    }  # fmt: skip


def direction(found: dict[str, Any], p: float | None, same: float | None, alpha: float) -> str | None:
    """'alike', 'more', 'less', or None for nothing shown. p, same: of the two tests, adjusted or not."""
    if same is not None and same < alpha:
        return "alike"
    if p is None or p >= alpha:
        return None
    return "more" if found["more"] else "less"


def table(draws: Sequence[Row]) -> Floats:
    """(seeds, draws) without the random groups in which the measure is undefined for some seed.

    Raises: UserError for rows of different lengths, or fewer than two random groups left.
    """
    lengths = {len(row) for row in draws}
    if len(lengths) != 1:
        raise UserError("seeds have different numbers of random groups.", found=", ".join(map(str, sorted(lengths))),
                        next="draw the same random groups for every seed")  # fmt: skip
    table = np.array([np.array(row, dtype=np.float64) for row in draws])  # None is NaN
    kept = table[:, np.isfinite(table).all(0)]
    if kept.shape[1] < FEWEST:
        raise UserError(f"a verdict needs random groups to compare with, not {kept.shape[1]}.",
                        next="39 at the least for a two-sided p below .05; 999 for a family of tests")  # fmt: skip
    return kept
