"""What became of a group's mean score under tuning: outcomes A and B of the score dynamics, and what lies beside them.

The relative change c = after / before − 1 of the group's mean score, on samples that the selection of the group did not see
(on those that it saw, the winners' luck is measured too: a fall by itself). The outcomes are regions of c,

    A representational drift   c < −10 %          B global redistribution   |c| < 5 %
    falls by 5–10 %                               rises                     c > 5 %

and the outcome is the region that holds c for sure: p is that of the t tests at the region's borders (two-sided at one
border, two one-sided tests between two), the error of c being

    several seeds              that over the seeds' changes, on the samples at hand
    several seeds, samples     that over seeds *and* samples: what the former lacks for a claim about other samples is
                               much (docs/results/calibration.md)
    one seed, samples given    that over the samples (ratio estimator)
    one seed, no samples       unknown: then the outcome is 'undecided', whatever the random groups did. They show what
                               another choice of entries would have given on the same samples and the same training, and
                               say nothing of how sure c itself is; they decide the second sentence only.

The second sentence is another question: whether the group's score changed otherwise than that of random groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from deltalab.core.errors import UserError
from deltalab.core.stats import Estimate, Floats, crossed, influences, student
from deltalab.safety.claims import (
    Verdict,
    capital,
    evidence,
    family_words,
    kind_words,
    p_of,
    p_words,
    per_cent,
    seeds_words,
)
from deltalab.safety.null_draws import Row, compare, table

Outcome = Literal["representational drift", "global redistribution", "falls by 5–10 %", "rises", "undecided"]


def score_verdict(
    group: str, runs: Sequence[Mapping[str, Any]], *, fall: float = 0.10, stable: float = 0.05, alpha: float = 0.05, name: str = "score dynamics"
) -> Verdict:  # fmt: skip
    """The verdict on one group's mean score over one or several trainings.

    group: its name, for the sentence. runs: one a seed, {"before": mean score, "after": mean score, "nulls": {kind:
    {"before": [one a random group], "after": […]}}, "samples": {"before": [one a sample], "after": […]} (optional: the
    group's mean score on each sample alone, which scores that are means over samples have)}. Draw i is the same random
    group in every seed; samples are taken to be the same in every seed where the scores before tuning are.
    fall, stable: the borders. alpha: of each test.
    Raises: UserError without runs, for a mean score that is not above zero, or unless 0 < stable < fall < 1.
    """
    if not runs:
        raise UserError(f"no training to judge the scores of {group} by.")
    if not 0 < stable < fall < 1:
        raise UserError(
            f"borders at {fall:g} and {stable:g} are no borders.", next="0 < stable < fall < 1: 0.10 and 0.05, say"
        )
    if any(not run["before"] > 0 or not run["after"] > 0 for run in runs):
        raise UserError(
            f"the mean score of {group} is not above zero.", next="scores must be positive for a relative change"
        )
    changes = np.array([run["after"] / run["before"] - 1 for run in runs])
    estimate, error = _estimate(runs, changes)
    value = float(changes.mean())
    low, high = estimate.interval(1 - alpha)[1:] if estimate else (None, None)
    relative = {kind: _relative(runs, kind) for kind in runs[0].get("nulls", {})}
    first = next(iter(relative), None)
    p = _p_of_region(estimate, fall, stable) if estimate else None
    region = _region(value, fall, stable)
    numbers = {
        "kind": "score", "group": group, "seeds": len(runs), "fall": fall, "stable": stable, "alpha": alpha, "before": [r["before"] for r in runs],
        "after": [r["after"] for r in runs], "change": value, "per_seed": changes.tolist(), "low": low, "high": high, "error": error,
        "region": region, "null": first, "nulls": relative,
        "tests": [
            evidence("same" if region == "global redistribution" else "change", p),
            *([evidence("change", relative[first]["p"], "against random groups")] if first else []),
        ],
    }  # fmt: skip
    return decide(Verdict("", "", numbers, name))


def decide(verdict: Verdict) -> Verdict:
    """The verdict that its numbers make, by the adjusted p-values in them."""
    numbers, region = verdict.numbers, verdict.numbers["region"]
    p = p_of(numbers, "same" if region == "global redistribution" else "change")
    outcome: Outcome = region if p is not None and p < numbers["alpha"] else "undecided"
    return verdict._replace(
        outcome=outcome,
        sentence=f"{_first(outcome, numbers)}{_second(numbers)}{family_words(numbers)}{seeds_words(numbers['seeds'])}",
    )


def _region(change: float, fall: float, stable: float) -> Outcome:
    if change < -fall:
        return "representational drift"
    return "falls by 5–10 %" if change < -stable else "global redistribution" if change <= stable else "rises"


def _p_of_region(estimate: Estimate, fall: float, stable: float) -> float:
    """p of the claim that the change lies in the region in which it was found."""
    match _region(estimate.value, fall, stable):
        case "representational drift":
            return estimate.p(-fall)
        case "falls by 5–10 %":
            return estimate.within(-fall, -stable).p
        case "global redistribution":
            return estimate.within(-stable, stable).p
    return estimate.p(stable)


def _estimate(runs: Sequence[Mapping[str, Any]], changes: Floats) -> tuple[Estimate | None, str]:
    """The mean change with its error, and over what the error is."""
    samples = [run.get("samples") for run in runs]
    if all(s is not None for s in samples):
        each = [influences(s["after"], s["before"]) for s in samples if s is not None]
        shifted = [row - row.mean() + change for row, change in zip(each, changes, strict=True)]
        if len(runs) == 1:
            return student(shifted[0]), "over samples"
        before = [np.asarray(s["before"], dtype=np.float64) for s in samples if s is not None]
        if all(np.array_equal(b, before[0]) for b in before):
            return crossed(np.stack(shifted)), "over seeds and samples"
        return student(changes), "over seeds, each with its own samples"
    return (student(changes), "over seeds, on these samples") if len(runs) > 1 else (None, "unknown")


def _relative(runs: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """The group's log change against those of random groups."""
    null = np.log(table([_ratios(run["nulls"][kind]) for run in runs]))
    own = np.log([run["after"] / run["before"] for run in runs])
    centre = null.mean(1, keepdims=True)
    found = compare(own - centre[:, 0], null - centre, None)
    return {**found, "draws": null.shape[1], "null_change": float(np.exp(centre.mean()) - 1)}


def _ratios(draws: Mapping[str, Row]) -> list[float | None]:
    """after / before of each random group; None where one of the two is missing or zero."""
    return [a / b if a and b else None for a, b in zip(draws["after"], draws["before"], strict=True)]


def _first(outcome: Outcome, numbers: Mapping[str, Any]) -> str:
    group, fall, stable = numbers["group"], 100 * numbers["fall"], 100 * numbers["stable"]
    said = {
        "representational drift": f"the mean score of {group} falls by more than {fall:g} % (A, representational drift)",
        "falls by 5–10 %": f"the mean score of {group} falls by {stable:g} to {fall:g} % (between A and B)",
        "global redistribution": f"the mean score of {group} stays within {stable:g} % (B, global redistribution)",
        "rises": f"the mean score of {group} rises by more than {stable:g} % (neither A nor B)",
        "undecided": f"what became of the mean score of {group} is undecided",
    }[outcome]
    if numbers["low"] is None:
        return f"{capital(said)}: {per_cent(numbers['change'])}, and without the samples' own scores or a second seed nothing tells how sure that is."
    p = numbers["tests"][0]["p"]
    limits = f"[{per_cent(numbers['low'])}, {per_cent(numbers['high'])}]"
    return f"{capital(said)}: {per_cent(numbers['change'])} {limits} {numbers['error']} ({p_words(p)})."


def _second(numbers: Mapping[str, Any]) -> str:
    """How the change compares with that of random groups."""
    kind = numbers["null"]
    if kind is None:
        return ""
    found, p = numbers["nulls"][kind], p_of(numbers, "change", "against random groups")
    says = "differs from" if p is not None and p < numbers["alpha"] else "is not shown to differ from"
    beyond = per_cent(found["ratio"] - 1)
    return f" The change {says} that of {found['draws']} {kind_words(kind)}, {per_cent(found['null_change'])}: {beyond} beyond theirs ({p_words(found['p'])})."
