"""The arms of a study as its record has them: the seeds of an arm taken together, and each beside the others.

Rates over several seeds are means over seeds with intervals over seeds; of one seed, they are of its prompts (Wilson).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltalab.core.stats import share_interval
from deltalab.studies import behaviour
from deltalab.studies.parts import ArmSpec, Run, runs_of
from deltalab.studies.reduce import SHOWN, mean_curves, mean_values

Results = Mapping[str, Mapping[str, Any]]


def arms_of(arms: Sequence[ArmSpec], seeds: list[int], results: Results) -> dict[str, Any]:
    """Name → arm, `before` first; see `_arm`."""
    before = {"label": "before tuning", "cell": "", "runs": [], **behaviour.summary(results["evaluate:before"])}
    return {"before": before} | {arm.name: _arm(arm, runs_of([arm], seeds), results) for arm in arms}


def _arm(arm: ArmSpec, runs: Sequence[Run], results: Results) -> dict[str, Any]:
    """label, cell, replies and skills over all seeds, freezing, training, the drift curve, its end, rows, and every run."""
    tuned = [results[f"tune:{run.name}"] for run in runs]
    asked = [results[f"evaluate:{run.name}"] for run in runs]
    out = {
        "label": arm.label,
        "cell": arm.cell,
        **pooled(asked),
        "freeze": frozen_together([t["freeze"] for t in tuned]),
        "training": mean_values([t["training"] for t in tuned]) if len(tuned) > 1 else tuned[0]["training"],
        "asked": mean_asked([t["asked"] for t in tuned]),
        "runs": [_run(run, t, a) for run, t, a in zip(runs, tuned, asked, strict=True)],
    }
    if "curves" in tuned[0]:
        out["curves"] = mean_curves([t["curves"] for t in tuned])
        out["final"] = _final([t["final"] for t in tuned])
        out["distributions"] = tuned[0]["distributions"]
    return out


def pooled(asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Replies and skills of several seeds as `behaviour.summary` has those of one: counts added, rates over seeds."""
    if len(asked) == 1:
        return behaviour.summary(asked[0])
    first = behaviour.summary(asked[0])
    safety: dict[str, Any] = {}
    for name, one in first["safety"].items():
        letters = [a["safety"][name]["letters"] for a in asked]
        counts = {verdict: sum(text.count(letter) for text in letters) for verdict, letter in behaviour.LETTERS.items()}
        rates = {
            key: share_interval([[c == letter for c in text] for text in letters])._asdict()
            for key, letter in (("refusal", "R"), ("asr", "C"), ("brokenness", "B"))
        }
        odds = float(np.mean([a["safety"][name]["log_odds"] for a in asked]))
        safety[name] = {**one, **counts, **rates, "log_odds": odds, "log_odds_interval": None, "seeds": len(asked)}
    out: dict[str, Any] = {"safety": safety}
    if "skills" in first:
        rights = [a["skills"]["right"] for a in asked]
        families = mean_values([a["skills"]["families"] for a in asked])
        out["skills"] = {
            **first["skills"], **share_interval([[c == "1" for c in text] for text in rights])._asdict(),
            "correct": sum(text.count("1") for text in rights), "families": families, "seeds": len(asked),
        }  # fmt: skip
    return out


def frozen_together(proofs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The proofs of all seeds as one: held if all held, the largest change of any."""
    out = dict(proofs[0])
    if out["held"] is not None:
        out["held"] = all(proof["held"] for proof in proofs)
        for key in ("max_change", "max_change_before_rewind"):
            if out.get(key) is not None:
                out[key] = max(proof[key] for proof in proofs)
    return out


def mean_asked(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What was asked while training, as rows `{step, sets: {name: {refused, complied, broken, log_odds}}, skills}` of
    shares, means over seeds."""
    rows = [[_shares(row) for row in run] for run in runs]
    return [mean_values(list(at)) for at in zip(*rows, strict=False)] if all(rows) else []


def _shares(row: Mapping[str, Any]) -> dict[str, Any]:
    sets = {
        name: {**{verdict: one[verdict] / one["n"] for verdict in behaviour.LETTERS}, "log_odds": one["log_odds"], "n": one["n"]}
        for name, one in row["safety"].items()
    }  # fmt: skip
    out: dict[str, Any] = {"step": row["step"], "sets": sets}
    return out | ({"skills": row["skills"]["value"]} if row.get("skills") else {})


def _final(ends: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Kind of random group → `draws` and `values` (one a seed) as multiples of the draws' mean, and the layers' means.

    The draws of several seeds are ranked within their seed and averaged rank by rank, so that they are as many as of one.
    """
    out: dict[str, Any] = {}
    for kind, null in ends[0]["nulls"].items():
        means = [float(np.mean(end["nulls"][kind][SHOWN])) for end in ends]
        if not all(means):
            continue
        draws = np.mean(
            [np.sort(end["nulls"][kind][SHOWN]) / mean for end, mean in zip(ends, means, strict=True)], axis=0
        )
        values = [end["values"][SHOWN] / mean for end, mean in zip(ends, means, strict=True)]
        layers = mean_values([end["layers"][kind] for end in ends])
        out[kind] = {"n": len(null[SHOWN]), "draws": draws.tolist(), "values": values, "layers": layers}
    return out


def _run(run: Run, tuned: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """One seed of an arm, in the few numbers that are compared between seeds."""
    summary = behaviour.summary(asked)
    return {
        "seed": run.seed,
        "safety": {name: {key: one[key]["value"] for key in ("refusal", "asr", "brokenness")} for name, one in summary["safety"].items()},
        "skills": summary["skills"]["value"] if "skills" in summary else None,
        "freeze": tuned["freeze"],
        "loss": tuned["training"]["losses"][-1][1],
        "drift": tuned["curves"][-1]["groups"] if "curves" in tuned else None,
    }  # fmt: skip
