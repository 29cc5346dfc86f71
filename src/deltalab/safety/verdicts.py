"""Verdicts in words from plain values, over one or several trainings. Nothing here loads a model.

drift_verdict    whether a group of weights drifted more than random ones: H1, H2, and what lies beside them
score_verdict    what became of a group's mean score: A, B, and what lies beside them
ablation_verdict whether refusals hang on a group: zeroed, against random ones zeroed
refusals, …      what became of shares of prompts
family           the verdicts of one study together: p-values adjusted, outcomes decided anew
"""

from collections.abc import Callable, Sequence

from deltalab.safety import ablation_verdicts, drift_verdicts, rate_verdicts, score_verdicts
from deltalab.safety.ablation_verdicts import ablation_verdict
from deltalab.safety.claims import Verdict, decided
from deltalab.safety.drift_verdicts import drift_verdict
from deltalab.safety.rate_verdicts import Change, Comparison, change, false_refusals, freezing, refusals, skills
from deltalab.safety.score_verdicts import score_verdict

__all__ = [
    "Change",
    "Comparison",
    "Verdict",
    "ablation_verdict",
    "change",
    "drift_verdict",
    "false_refusals",
    "family",
    "freezing",
    "refusals",
    "score_verdict",
    "skills",
]

DECIDE: dict[str, Callable[[Verdict], Verdict]] = {
    "drift": drift_verdicts.decide, "score": score_verdicts.decide, "ablation": ablation_verdicts.decide,
}  # fmt: skip
"""Who makes a verdict from its numbers, by their kind; the other kinds are of rates."""


def family(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts of one study, each decided by p-values adjusted over all tests of the study (Holm 1979).

    Tests for a change and tests for sameness are adjusted apart: of each kind, the chance of any false claim in the whole
    study is at most α. A second measure or a second null, which can only stop a claim, is not counted.
    """
    return decided(verdicts, lambda verdict: DECIDE.get(verdict.numbers["kind"], rate_verdicts.decide)(verdict))
