"""Whether refusals hang on a group of weights: what zeroing it does to them, against zeroing random groups like it.

The random groups say what removing so many weights of that size does by itself, to refusals and to skills. A group that
refusals hang on costs more of them than the random ones do; whether it costs them alone, the skills and the broken
replies tell. p is one-sided, as the claim is a loss: that of a
single case against a sample (Crawford & Howell 1998), since a few dozen random groups are all that can be evaluated and
a permutation test of n draws cannot go below 1/(n + 1), which no correction for several tests survives. It takes the
arcsine roots of the random groups' shares to be about normal; the permutation p is in the numbers beside it, and decides where they do not
vary at all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltalab.core.stats import Estimate, empirical_p
from deltalab.safety.claims import Verdict, capital, evidence, family_words, p_of, p_words


def ablation_verdict(
    group: str, fraction: float, before: Mapping[str, float], zeroed: Mapping[str, float],
    random: Sequence[Mapping[str, float]], *, alpha: float = 0.05, name: str = "ablation",
) -> Verdict:  # fmt: skip
    """The verdict on one group.

    fraction: of the scored weights. before, zeroed, random: shares `refused`, `complied` and `broken` of all harmful
    prompts, and `skills` (which may be missing): of the whole model, without the group, without each random group.
    """
    draws = {key: [one[key] for one in random] for key in zeroed}
    asked = [key for key in ("refused", "skills") if key in zeroed]
    p = {key: loss(zeroed[key], draws[key]) for key in asked}
    ranked = {key: empirical_p(zeroed[key], draws[key], "less") for key in asked}
    numbers = {
        "kind": "ablation", "group": group, "fraction": fraction, "alpha": alpha, "before": dict(before), "zeroed": dict(zeroed),
        "random": draws, "p": p, "p_permutation": ranked, "draws": len(random), "tests": [evidence("change", p["refused"])],
    }  # fmt: skip
    return decide(Verdict("", "", numbers, name))


def loss(value: float, draws: Sequence[float]) -> float:
    """p that the share `value` is no lower than the population of the draws. By arcsine roots: near 0 and 1 shares are skewed,
    and the plain t calls 7 in 100 of them at a true share of .98 (roots: 3), all 5 at .5."""
    if np.ptp(draws) == 0:
        return empirical_p(value, draws, "less")
    sample = np.arcsin(np.sqrt(np.asarray(draws, dtype=np.float64)))
    spread = float(sample.std(ddof=1)) * math.sqrt(1 + 1 / len(sample))
    return Estimate(math.asin(math.sqrt(value)) - float(sample.mean()), spread, len(sample) - 1).p(alternative="less")


def decide(verdict: Verdict) -> Verdict:
    """The verdict that its numbers make, by the adjusted p-value in them."""
    numbers = verdict.numbers
    p, alpha = p_of(numbers, "change") or 1.0, numbers["alpha"]
    carries = p < alpha
    skills = numbers["p"].get("skills")
    outcome = (
        "undecided"
        if not carries
        else "refusals and skills hang on it"
        if skills is not None and skills < alpha
        else "refusals hang on it"
    )
    return verdict._replace(outcome=outcome, sentence=_sentence(numbers) + family_words(numbers))


def _sentence(numbers: Mapping[str, Any]) -> str:
    before, zeroed, random = numbers["before"], numbers["zeroed"], numbers["random"]
    said = (
        f"{capital(numbers['group'])} at zero ({100 * numbers['fraction']:.1f} % of the scored weights): "
        f"{_of(before['refused'])} → {_of(zeroed['refused'])} of harmful prompts refused ({_spread(random['refused'])} with "
        f"{numbers['draws']} matched random groups at zero, {p_words(numbers['p']['refused'])}), "
        f"{_of(zeroed['complied'])} answered, {_of(zeroed['broken'])} broken text"
    )
    if "skills" in zeroed:
        said += (
            f"; skills {_of(before['skills'])} → {_of(zeroed['skills'])} ({_spread(random['skills'])} with random groups, "
            f"{p_words(numbers['p']['skills'])})"
        )
    return f"{said}."


def _of(share: float) -> str:
    return f"{100 * share:.0f} %"


def _spread(draws: Sequence[float]) -> str:
    """Median and range."""
    return f"{100 * float(np.median(draws)):.0f} % [{100 * min(draws):.0f}, {100 * max(draws):.0f}]"
