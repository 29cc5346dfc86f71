"""Whether a group of weights drifted more than chance would have it, in a word, a sentence and numbers.

The hypotheses: H1, fragile safety, the group drifts more than random groups matched to it; H2, pathway creation, it drifts
alike. A large p is no evidence for H2: 'alike' needs a margin, and an equivalence test within it. The nulls are random
groups of the same training, so they say what another *choice of entries* would have shown; what another *seed* would
have shown they do not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from deltalab.core.errors import UserError
from deltalab.core.stats import cliff_delta, empirical_p, standing, tost_single

Outcome = Literal["drifts more", "alike", "drifts less", "measures disagree", "undecided"]
DECIDES, SECOND = "l2_per_sqrt", "cosine_distance"
"""‖ΔW‖/√n decides; the cosine has to agree or say nothing. Its distance is taken as the angle √(2 (1 − cos)), which
grows in step with ‖ΔW‖, so that one margin suits both."""
WORDS = {DECIDES: "the root-mean-square change", SECOND: "the angle turned"}


class Verdict(NamedTuple):
    """outcome: one of `Outcome`. sentence: the same in words. numbers: what it rests on, JSON."""

    outcome: Outcome
    sentence: str
    numbers: dict[str, Any]


def drift_verdict(
    group: str,
    values: Mapping[str, float | None],
    null: Mapping[str, Sequence[float | None]],
    *,
    margin: float | None = None,
    alpha: float = 0.05,
) -> Verdict:
    """The verdict on one group at the last step of one training.

    group: its name, for the sentence. values: measure → the group's (`DriftProbe.measure`, "overall"). null: measure →
    one value a random group. margin: difference from the null's mean, relative to it, that would not matter: what is shown
    to lie within it is 'alike' even where it differs; None: then 'alike' cannot be said. alpha: of the two-sided test of
    each measure, and of the equivalence test.
    Raises: UserError without null draws.
    """
    against = {
        DECIDES: _against(values[DECIDES], null[DECIDES], margin, alpha),
        SECOND: _against(_angle(values[SECOND]), [_angle(v) for v in null[SECOND]], margin, alpha),
    }
    draws = against[DECIDES]["draws"]
    outcome = _outcome(against[DECIDES]["says"], against[SECOND]["says"])
    numbers = {
        "group": group,
        "draws": draws,
        "margin": margin,
        "alpha": alpha,
        "seeds": 1,
        "decides": DECIDES,
        **against,
    }
    return Verdict(outcome, _sentence(group, outcome, numbers), numbers)


def _against(value: float | None, null: Sequence[float | None], margin: float | None, alpha: float) -> dict[str, Any]:
    """One measure of the group against that of the null draws."""
    drawn = np.array([v for v in null if v is not None], dtype=float)
    if len(drawn) < 2:
        raise UserError(
            f"a verdict needs random groups to compare with, not {len(drawn)}.",
            next="20 at the least; 99 give p down to .02, two-sided",
        )
    mean = float(drawn.mean())
    if value is None or mean == 0:  # undefined, or nothing moved at all
        return {
            "value": value,
            "null_mean": mean,
            "draws": len(drawn),
            "ratio": None,
            "p": None,
            "p_equivalence": None,
            "says": None,
        }
    p = empirical_p(value, drawn, "two-sided")
    equivalence = tost_single(value, drawn, margin * mean) if margin else None
    alike = equivalence is not None and equivalence.p < alpha
    effect = standing(value, drawn)
    return {
        "value": value, "null_mean": mean, "null_sd": float(drawn.std(ddof=1)), "draws": len(drawn), "ratio": value / mean, "p": p,
        "least_p": min(1.0, 2 / (len(drawn) + 1)), "standing": effect if math.isfinite(effect) else None, "cliff_delta": cliff_delta([value], drawn),
        "p_equivalence": equivalence.p if equivalence else None,
        "says": "alike" if alike else None if p >= alpha else "more" if value > mean else "less",
    }  # fmt: skip


def _outcome(first: str | None, second: str | None) -> Outcome:
    """From what the deciding and the second measure say: more, less, alike or nothing."""
    if second is not None and first != second and not (first is None and second == "alike"):
        return "measures disagree"
    if first == "alike":
        return "alike" if second == "alike" else "undecided"
    outcomes: dict[str | None, Outcome] = {"more": "drifts more", "less": "drifts less", None: "undecided"}
    return outcomes[first]


def _angle(distance: float | None) -> float | None:
    return None if distance is None else math.sqrt(2 * distance)


def _sentence(group: str, outcome: Outcome, numbers: Mapping[str, Any]) -> str:
    first, second, draws = numbers[DECIDES], numbers[SECOND], numbers["draws"]
    if first["ratio"] is None:
        return f"Whether {group} drifts otherwise than random entries is undecided: {'it has no drift to speak of' if first['value'] is None else 'nothing moved'}."
    within = f", within {100 * numbers['margin']:g} %" if numbers["margin"] else ""
    said = {
        "drifts more": f"{group} drifts more than {draws} matched random groups (H1, fragile safety)",
        "drifts less": f"{group} drifts less than {draws} matched random groups (neither H1 nor H2)",
        "alike": f"{group} drifts like {draws} matched random groups{within} (H2, pathway creation)",
        "measures disagree": f"the measures disagree on {group} against {draws} matched random groups; {WORDS[DECIDES]}, which decides, "
        + {
            "more": "says it drifts more",
            "less": "says it drifts less",
            "alike": "says it drifts alike",
            None: "leaves it open",
        }[first["says"]],
        "undecided": f"whether {group} drifts otherwise than {draws} matched random groups is undecided",
    }[outcome]
    shown = "; ".join(f"{WORDS[m]} is {_times(a)}" for m, a in ((DECIDES, first), (SECOND, second)))
    few = (
        f" With {draws} draws no two-sided p is below {first['least_p']:.3f}: draw more."
        if first["least_p"] >= numbers["alpha"]
        else ""
    )
    return f"{said[0].upper()}{said[1:]}: {shown}.{few} One seed: how another training would come out is not measured."


def _times(against: Mapping[str, Any]) -> str:
    if against["ratio"] is None:
        return "undefined"
    parts = [_p(against["p"])]
    if against["standing"] is not None:
        parts.append(f"{against['standing']:+.1f} sd")
    if against["p_equivalence"] is not None:
        parts.append(f"equivalence {_p(against['p_equivalence'])}")
    return f"{against['ratio']:.3f} times theirs ({', '.join(parts)})"


def _p(value: float) -> str:
    """A p-value in words: never "0.000"."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
