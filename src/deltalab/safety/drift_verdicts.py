"""Whether a group of weights drifted more than chance would have it, in a word, a sentence and numbers.

The hypotheses: H1, fragile safety, the group drifts more than random groups matched to it; H2, pathway creation, it drifts
alike. A large p is no evidence for H2: 'alike' needs a margin, and an equivalence test within it. How a claim has to
survive both the choice of entries and the choice of the seed is told in `deltalab.safety.null_draws`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from deltalab.core.errors import UserError
from deltalab.core.stats import Floats
from deltalab.safety.claims import Verdict, capital, evidence, family_words, kind_words, p_of, p_words, seeds_words
from deltalab.safety.null_draws import Row, against, direction

Outcome = Literal["drifts more", "alike", "drifts less", "measures disagree", "undecided"]
DECIDES, SECOND = "l2_per_sqrt", "cosine_distance"
"""‖ΔW‖/√n decides; the cosine has to agree or say nothing. Its distance is taken as the angle √(2 (1 − cos)), which
grows in step with ‖ΔW‖, so that one margin suits both."""
WORDS = {DECIDES: "the root-mean-square change", SECOND: "the angle turned"}


def drift_verdict(
    group: str, runs: Sequence[Mapping[str, Any]], *, margin: float | None = 0.1, alpha: float = 0.05, name: str = "drift"
) -> Verdict:  # fmt: skip
    """The verdict on one group at the last step of one or several trainings.

    group: its name, for the sentence. runs: one a seed, {"values": {measure: the group's}, "nulls": {kind: {measure: [one
    a random group]}}}, measures as of `DriftProbe.measure`; draw i is the same random group in every seed. The first kind
    decides (`magnitude`: matched on |W|); a claim that a further kind (`utility`) contradicts is not made.
    margin: difference from the null's mean, relative to it, that would not matter: what is shown to lie within it is
    'alike' even where it differs; None: then 'alike' cannot be said. alpha: of each test.
    Raises: UserError without runs, with runs of different nulls, or fewer than two draws.
    """
    if not runs:
        raise UserError(f"no training to judge the drift of {group} by.")
    kinds = list(runs[0]["nulls"])
    if not kinds or any(list(run["nulls"]) != kinds for run in runs):
        raise UserError(
            f"the trainings have different nulls for {group}.",
            found="; ".join(", ".join(run["nulls"]) or "none" for run in runs),
        )
    found = {
        kind: {
            measure: against(
                _lengths(measure, [run["values"][measure] for run in runs]),
                [_lengths(measure, run["nulls"][kind][measure]) for run in runs],
                margin,
            )
            for measure in WORDS
        }
        for kind in kinds
    }
    first = found[kinds[0]][DECIDES]
    numbers = {
        "kind": "drift", "group": group, "seeds": len(runs), "margin": margin, "alpha": alpha, "decides": DECIDES, "null": kinds[0],
        "draws": first["draws"], "nulls": found, "tests": [evidence("change", first["p"]), evidence("same", first["p_same"])],
    }  # fmt: skip
    return decide(Verdict("", "", numbers, name))


def decide(verdict: Verdict) -> Verdict:
    """The verdict that its numbers make, by the adjusted p-values in them."""
    numbers = verdict.numbers
    alpha, found = numbers["alpha"], numbers["nulls"][numbers["null"]]
    first, second = found[DECIDES], found[SECOND]
    raw = direction(first, first["p"], first["p_same"], alpha)
    shown = direction(first, p_of(numbers, "change"), p_of(numbers, "same"), alpha)
    other = direction(second, second["p"], second["p_same"], alpha)
    others = {
        kind: direction(f[DECIDES], f[DECIDES]["p"], f[DECIDES]["p_same"], alpha)
        for kind, f in numbers["nulls"].items()
    }
    against_it = [kind for kind, says in others.items() if kind != numbers["null"] and says not in (None, shown)]
    outcome: Outcome = "undecided"
    if other is not None and other != raw and not (raw is None and other == "alike"):
        outcome = "measures disagree"
    elif shown is not None and not against_it and not (shown == "alike" and other != "alike"):
        outcome = {"more": "drifts more", "less": "drifts less", "alike": "alike"}[shown]  # type: ignore[assignment]
    numbers = {**numbers, "says": {DECIDES: raw, SECOND: other}, "says_by_null": others}
    contradicted = against_it if outcome == "undecided" and shown is not None else []
    return verdict._replace(outcome=outcome, numbers=numbers, sentence=_sentence(outcome, numbers, contradicted))


def _lengths(measure: str, values: Row) -> Floats:
    """Cosine distances as angles, other measures as they are; NaN for None."""
    given = np.array(values, dtype=np.float64)
    return np.sqrt(2 * given) if measure == SECOND else given


def _sentence(outcome: Outcome, numbers: Mapping[str, Any], contradicted: Sequence[str]) -> str:
    group, draws, found = numbers["group"], numbers["draws"], numbers["nulls"][numbers["null"]]
    first = found[DECIDES]
    if first["ratio"] is None:
        still = (
            "it has no drift to speak of"
            if any(value is None or value <= 0 for value in first["value"])
            else "nothing moved"
        )
        if not any(first["null_mean"]):
            still = "nothing moved"
        return f"Whether {group} drifts otherwise than random entries is undecided: {still}."
    nulls = f"{draws} {kind_words(numbers['null'])}"
    within = f", within {100 * numbers['margin']:g} %" if numbers["margin"] else ""
    leaves = {
        "more": "says it drifts more",
        "less": "says it drifts less",
        "alike": "says it drifts alike",
        None: "leaves it open",
    }
    said = {
        "drifts more": f"{group} drifts more than {nulls} (H1, fragile safety)",
        "drifts less": f"{group} drifts less than {nulls} (neither H1 nor H2)",
        "alike": f"{group} drifts like {nulls}{within} (H2, pathway creation)",
        "measures disagree": f"the measures disagree on {group} against {nulls}; {WORDS[DECIDES]}, which decides, {leaves[numbers['says'][DECIDES]]}",
        "undecided": f"whether {group} drifts otherwise than {nulls} is undecided",
    }[outcome]
    shown = "; ".join(f"{WORDS[m]} is {_times(found[m])}" for m in WORDS)
    few = (
        f" With {draws} draws no two-sided p is below {first['least_p']:.3f}: draw more."
        if first["least_p"] >= numbers["alpha"]
        else ""
    )
    also = "".join(
        f" Against {kind_words(kind)} it is {_times(f[DECIDES])}{', which contradicts' if kind in contradicted else ''}."
        for kind, f in numbers["nulls"].items() if kind != numbers["null"]
    )  # fmt: skip
    return f"{capital(said)}: {shown}.{also}{few}{family_words(numbers)}{seeds_words(numbers['seeds'])}"


def _times(found: Mapping[str, Any]) -> str:
    if found["ratio"] is None:
        return "undefined"
    parts = [p_words(found["p"])]
    if found["cohen_d"] is not None:
        parts.append(f"{found['cohen_d']:+.1f} sd".replace("-", "−"))
    if found["p_same"] is not None:
        parts.append(f"equivalence {p_words(found['p_same'])}")
    limits = f" [{found['low']:.3f}, {found['high']:.3f}]" if found["low"] is not None else ""
    return f"{found['ratio']:.3f}{limits} times theirs ({', '.join(parts)})"
