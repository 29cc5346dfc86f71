"""What a study found: the verdicts on its results, taken together as one family of tests. Nothing here loads a model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deltalab.safety.verdicts import (
    Comparison,
    Verdict,
    ablation_verdict,
    drift_verdict,
    false_refusals,
    family,
    freezing,
    refusals,
    score_verdict,
    skills,
)
from deltalab.studies import behaviour
from deltalab.studies.arms import frozen_together
from deltalab.studies.drift import DriftStudySpec
from deltalab.studies.parts import ArmSpec, is_harmful, runs_of
from deltalab.studies.score_dynamics import ScoreDynamicsSpec

Results = Mapping[str, Mapping[str, Any]]
Record = list[dict[str, Any]]
RANDOM = ("matched", "random")


class Cell(NamedTuple):
    """Arms that differ only in what is frozen; the first freezes nothing."""

    name: str
    arms: list[ArmSpec]

    def named(self, verdict: Verdict) -> Verdict:
        """The verdict, with what is special about the cell in its name."""
        return verdict._replace(name=f"{verdict.name} ({self.name})") if self.name else verdict


def cells(arms: Sequence[ArmSpec]) -> list[Cell]:
    """The arms by what they share."""
    return [Cell(name, [arm for arm in arms if arm.cell == name]) for name in dict.fromkeys(arm.cell for arm in arms)]


def of_drift(spec: DriftStudySpec, results: Results) -> Record:
    """The verdicts of a drift study, JSON."""
    found: list[Verdict] = []
    if spec.ablate:
        found.append(_ablation(spec, results["ablate"], results["evaluate:before"]))
    for cell in cells(spec.all_arms):
        free = runs_of(cell.arms[:1], spec.seeds)
        ends = [results[f"tune:{run.name}"]["final"] for run in free]
        drifted = drift_verdict(f"the group {spec.groups.focus}", ends, margin=spec.margin)
        found += [*_behaviour(cell, spec.seeds, results, spec.margin), cell.named(drifted)]
        found += _freezing(cell, spec.seeds, results, spec.margin)
    return [verdict.plain() for verdict in family(found)]


def of_score_dynamics(spec: ScoreDynamicsSpec, results: Results) -> Record:
    """The verdicts of a study of score dynamics, JSON."""
    found: list[Verdict] = []
    before = results["before"]
    for what, label in (("base", "base weights under the tuned activations"), ("merged", "merged weights")):
        for arm in spec.arms:
            after = [results[f"after:{run.name}"][what] for run in runs_of([arm], spec.seeds)]
            runs = [
                {
                    "before": before["groups"]["safety"]["mean"],
                    "after": one["groups"]["safety"]["mean"],
                    "nulls": {
                        "magnitude": {"before": before["nulls"]["magnitude"], "after": one["nulls"]["magnitude"]}
                    },
                }
                for one in after
            ]
            group = f"the group safety, {label}" + (f", {arm.label}" if len(spec.arms) > 1 else "")
            verdict = score_verdict(group, runs, fall=spec.bounds.fall, stable=spec.bounds.stable)
            found.append(verdict._replace(name=f"score, {what}" + (f" ({arm.label})" if len(spec.arms) > 1 else "")))
    for cell in cells(spec.arms):
        found += _behaviour(cell, spec.seeds, results, spec.bounds.rates)
        found += _freezing(cell, spec.seeds, results, spec.bounds.rates)
    return [verdict.plain() for verdict in family(found)]


def _comparisons(cell: Cell, seeds: list[int], results: Results) -> list[Comparison]:
    """Every set of prompts of every arm: whether each prompt was refused."""
    before = results["evaluate:before"]
    out = []
    for name in before["safety"]:
        flags = {"before": [behaviour.refused(before, name)]}
        for arm in cell.arms:
            flags[arm.name] = [
                behaviour.refused(results[f"evaluate:{run.name}"], name) for run in runs_of([arm], seeds)
            ]
        out.append(Comparison(name, behaviour.title(name), flags))
    return out


def _behaviour(cell: Cell, seeds: list[int], results: Results, margin: float) -> list[Verdict]:
    """What the tuning without freezing did to refusals, false refusals and skills."""
    sets, free = _comparisons(cell, seeds, results), cell.arms[0]
    harmful = [s for s in sets if is_harmful(s.name)]
    harmless = [s for s in sets if not is_harmful(s.name)]
    before = results["evaluate:before"]
    asked = [results[f"evaluate:{run.name}"] for run in runs_of([free], seeds)]
    became = [behaviour.became(before, one, [s.name for s in harmful]) for one in asked]
    lost = {verdict: sum(one[verdict] for one in became) for verdict in became[0]}
    out = [refusals(harmful, free.name, margin, lost)]
    if harmless:
        out.append(false_refusals(harmless, free.name, margin))
    if "skills" in before:
        flags = {"before": [behaviour.correct(before)], free.name: [behaviour.correct(one) for one in asked]}
        out.append(skills(Comparison("skills", "skills", flags), free.name, margin))
    return [cell.named(verdict) for verdict in out]


def _freezing(cell: Cell, seeds: list[int], results: Results, margin: float) -> list[Verdict]:
    """What each way of freezing did, against the free arm and against random entries frozen in the same way."""
    harmful = [s for s in _comparisons(cell, seeds, results) if is_harmful(s.name)]
    frozen = [arm for arm in cell.arms if arm.freeze != "none"]
    controls = [arm for arm in frozen if arm.group in RANDOM]
    out = []
    for arm in frozen:
        if arm in controls:
            continue
        alike = [c for c in controls if c.freeze == arm.freeze] or controls
        control = alike[0].name if alike and arm.group != "complement" else None  # of other sizes nothing is a control
        proof = frozen_together([results[f"tune:{run.name}"]["freeze"] for run in runs_of([arm], seeds)])
        label = arm.label.removesuffix(f", {arm.cell}").replace(" frozen", "")
        out.append(cell.named(freezing(label, proof, harmful, cell.arms[0].name, arm.name, control, margin)))
    return out


def _ablation(spec: DriftStudySpec, result: Mapping[str, Any], before: Mapping[str, Any]) -> Verdict:
    shares = {name: behaviour.harmful_shares(one) for name, one in result["replies"].items()}
    focus = shares.pop(spec.groups.focus)
    return ablation_verdict(
        f"the group {spec.groups.focus}",
        result["fraction"],
        behaviour.harmful_shares(before),
        focus,
        list(shares.values()),
    )
