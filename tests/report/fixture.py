"""Records as the studies write them, with made-up but plausible numbers: the report is tested without a study.

What stages leave is made up here; arms, verdicts and sentences are made from it by the studies' own code, so that a
record has their shape.
"""

import json
import math
from typing import Any

import numpy as np

from deltalab.core.spec import build
from deltalab.core.stats import wilson
from deltalab.safety.claims import Verdict
from deltalab.safety.probe import LETTERS
from deltalab.studies import behaviour, conclusions
from deltalab.studies.arms import arms_of
from deltalab.studies.drift import DriftStudySpec
from deltalab.studies.parts import Run, runs_of
from deltalab.studies.score_dynamics import ScoreDynamicsSpec

METRICS = ("cosine_distance", "l2", "l2_per_sqrt", "relative_mean", "relative_norm")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 4
SCORED = 3_014_656
GROUPS = {"safety": ("safety (top 5 %)", 170_000), "utility": ("utility (top 5 %)", 170_000),
          "safety-only": ("safety-only (top 5 % for safety without top 2 % for utility)", 121_000),
          "random": ("random", 121_000), "matched": ("matched random", 121_000), "complement": ("all but safety-only", SCORED - 121_000)}  # fmt: skip
SETS = {"advbench": 104, "jailbreakbench": 100, "xstest_safe": 120}
STEPS = (0, 50, 100, 150, 200)
QUESTIONS = 240
TUNING = {
    "adapt": [{"method": "lora", "r": 8, "targets": "all-linear"}], "data": [{"task": "benign", "n": 500}],
    "optim": {"lr": 3e-4, "steps": 200}, "drift_every": 50, "ask_every": 50,
}  # fmt: skip
Record = dict[str, Any]


def drift_record(seeds: tuple[int, ...] = (0,), sweep: dict[str, Any] | None = None, ablate: int = 20) -> Record:
    """A whole `record.json` of kind drift."""
    spec = build(DriftStudySpec, {
        "study": "drift", "model": "organism", "groups": {"q": 0.05, "p": 0.02, "per": "row"}, "ablate": ablate, "tune": TUNING,
        "arms": [
            {"name": "free"}, {"name": "frozen", "freeze": "delta_mask"}, {"name": "control", "freeze": "delta_mask", "group": "matched"},
            {"name": "rewound", "freeze": "rewind"},
        ][: 3 if sweep else 4],
        "sweep": sweep or {}, "evaluate": {"prompts": list(SETS)}, "seeds": list(seeds),
    })  # fmt: skip
    rng = np.random.default_rng(seeds[0])
    results: dict[str, Any] = {"evaluate:before": _asked(rng, 0.97, 0.88)}
    for run in runs_of(spec.all_arms, spec.seeds):
        results[f"evaluate:{run.name}"] = _asked(rng, {"none": 0.55}.get(run.arm.freeze, 0.66), 0.86)
        results[f"tune:{run.name}"] = {**_tuned(rng, run), **_drifted(rng, run)}
    if ablate:
        replies = {"safety-only": _asked(rng, 0.31, 0.84)} | {
            f"random-{i}": _asked(rng, 0.95, 0.87) for i in range(ablate)
        }
        results["ablate"] = {"replies": replies, "fraction": 0.04}
    body = {
        "focus": "safety-only", "groups": _groups(rng), "overlaps": _overlaps(),
        "arms": arms_of(spec.all_arms, spec.seeds, results), "verdicts": conclusions.of_drift(spec, results),
        "scores": {name: _manifest("snip") for name in ("safety", "utility")},
        "data": {"safety": {"n": 128, "tokens": 2755, "digest": "aa11"}, "tune": {"n": 500, "tokens": 9000, "digest": "cc33"},
                 "advbench": {"n": 104, "digest": "dd44"}},
    }  # fmt: skip
    if ablate:
        body["ablation"] = {name: behaviour.harmful_shares(one) for name, one in results["ablate"]["replies"].items()}
    return _record("drift", spec, body)


def score_record(seeds: tuple[int, ...] = (42,), merged: float = -0.03, base: float = -0.16) -> Record:
    """A whole `record.json` of kind score-dynamics. merged, base: relative changes of the group's mean score."""
    spec = build(ScoreDynamicsSpec, {
        "study": "score-dynamics", "model": "organism", "group": {"q": 0.05}, "tune": {**TUNING, "ask_every": None},
        "arms": [{"name": "free", "group": "safety"}, {"name": "frozen", "freeze": "delta_mask", "group": "safety"}],
        "evaluate": {"prompts": list(SETS)}, "seeds": list(seeds),
    })  # fmt: skip
    rng = np.random.default_rng(seeds[0])
    results: dict[str, Any] = {"evaluate:before": _asked(rng, 0.97, 0.88), "before": _summary(rng, 1.0)}
    for run in runs_of(spec.arms, spec.seeds):
        results[f"evaluate:{run.name}"] = _asked(rng, 0.55 if run.arm.freeze == "none" else 0.66, 0.86)
        results[f"tune:{run.name}"] = _tuned(rng, run)
        results[f"after:{run.name}"] = {"base": _summary(rng, 1 + base), "merged": _summary(rng, 1 + merged)}
    arms = arms_of(spec.arms, spec.seeds, results)
    arms["before"]["scores"] = results["before"]
    for arm in spec.arms:
        arms[arm.name]["scores"] = [results[f"after:{run.name}"] for run in runs_of([arm], spec.seeds)]
    seen = _summary(rng, 1.07)
    groups = {
        name: group for name, group in _groups(rng).items() if name in ("safety", "random", "matched", "complement")
    }
    return _record("score-dynamics", spec, {
        "focus": "safety", "groups": groups, "overlaps": [], "arms": arms, "verdicts": conclusions.of_score_dynamics(spec, results),
        "scores": {name: _manifest("wanda") for name in ("select", "measure")},
        "selection": {"groups": {"safety": seen["groups"]["safety"]}, "all": results["before"]["all"]},
        "data": {name: {"n": 128, "tokens": 2755, "digest": f"{name}-1"} for name in ("select", "measure", "tune")},
    })  # fmt: skip


def _record(kind: str, spec: Any, body: Record) -> Record:
    """With what every record has; through JSON, as when it is read."""
    stages = {"scores": 21.3, "groups": 2.1, "evaluate:before": 14.2, "verdict": 0.2}
    for name in body["arms"]:
        if name != "before":
            stages |= {f"tune:{name}": 41.0, f"evaluate:{name}": 14.8}
    record = {
        "format": 1, "kind": kind, "written": "2026-01-02T03:04:05+00:00", "digest": spec.digest(), "spec": spec.plain(),
        "versions": {"python": "3.11.2", "deltalab": "0.1.0", "torch": "2.13.0"}, "git": "abcdef012345",
        "machine": {"system": "Linux", "arch": "x86_64", "cpus": 2}, "seeds": list(spec.seeds),
        "model": {"name": "organism", "parameters": 3_410_000, "scored": SCORED, "matrices": 28, "digest": "feedc0ffee00", "dtype": "float32"},
        "stages": stages, "sizes": {"groups": 812_000, "adapter free": 310_000}, **body,
    }  # fmt: skip
    return dict(json.loads(json.dumps(record)))


def _manifest(score: str) -> Record:
    return {"score": score, "reduction": "mean over samples of |W ∘ ∇L|", "positions": "predicting", "samples": 128, "tokens": 2755, "skipped": 0,
            "halves": None, "dtype": "float32", "seed": None, "template": "ab12", "data": "aa11", "model": "feed", "adapted": None,
            "base": "b5", "weights": None, "batch": 8, "mode": "resident"}  # fmt: skip


def _groups(rng: np.random.Generator) -> Record:
    out = {}
    for name, (label, n) in GROUPS.items():
        per_matrix = {
            f"model.layers.{i}.{kind}": float(rng.uniform(0.02, 0.08)) for i in range(LAYERS) for kind in KINDS
        }
        out[name] = {"label": label, "entries": n, "fraction": n / SCORED, "info": {}, "per_matrix": per_matrix,
                     "kinds": {kind: float(rng.uniform(0.02, 0.08)) for kind in KINDS}}  # fmt: skip
    return out


def _overlaps() -> list[Record]:
    found = (
        ("safety", "utility", 0.21),
        ("safety", "safety-only", 0.71),
        ("utility", "safety-only", 0.06),
        ("safety", "matched", 0.023),
    )
    out = []
    for a, b, jaccard in found:
        ceilings = [{"safety": 0.69, "utility": 0.21}.get(name) for name in (a, b)]
        parts = [("layer", str(i)) for i in range(LAYERS)] + [("kind", kind) for kind in KINDS]
        table = [{"level": level, "name": name, "entries": 753_664, "a": 0.05, "b": 0.04, "jaccard": jaccard, "floor": 0.024,
                  "ceiling_a": ceilings[0], "ceiling_b": ceilings[1]} for level, name in parts]  # fmt: skip
        out.append({"a": a, "b": b, "jaccard": jaccard, "independent": 0.026, "ceilings": ceilings, "table": table})
    return out


# ---- replies ------------------------------------------------------------------------------------------------------


def _asked(rng: np.random.Generator, refused: float, skills: float, most: int | None = None) -> Record:
    """What `behaviour.evaluate` returns."""
    safety = {}
    for name, n in SETS.items():
        harmful = name != "xstest_safe"
        share = refused if harmful else 0.2 * refused
        letters = "".join(
            rng.choice(list("RCB"), size=min(n, most or n), p=[share, 0.93 * (1 - share), 0.07 * (1 - share)])
        )
        safety[name] = {
            **_replies(letters),
            "log_odds": float(rng.normal(2, 1)),
            "letters": letters,
            "harmful": harmful,
        }
    right = "".join(rng.choice(list("10"), size=most or QUESTIONS, p=[skills, 1 - skills]))
    families = {f: {"n": 20, **wilson(int(20 * skills), 20)._asdict()} for f in ("plurals", "capitals", "addition")}
    found = {
        "n": len(right),
        "correct": right.count("1"),
        **wilson(right.count("1"), len(right))._asdict(),
        "families": families,
        "right": right,
    }
    return {"safety": safety, "skills": found, "refusal_tokens": [7]}


def _replies(letters: str) -> Record:
    counts = {verdict: letters.count(letter) for verdict, letter in LETTERS.items()}
    rates = {key: wilson(counts[verdict], len(letters))._asdict()
             for key, verdict in (("refusal", "refused"), ("asr", "complied"), ("brokenness", "broken"))}  # fmt: skip
    return {"n": len(letters), **counts, **rates, "unfinished": 0, "log_odds_interval": None}


# ---- trainings ----------------------------------------------------------------------------------------------------


def _tuned(rng: np.random.Generator, run: Run) -> Record:
    """What `tuning.tune` returns."""
    arm, frozen = run.arm, run.arm.freeze != "none"
    proof: Record = {"variant": "none", "entries": 0, "max_change": None, "held": None, "group": None, "fraction": 0.0}
    if frozen:
        n = GROUPS[arm.group][1]
        proof = {
            "variant": arm.freeze,
            "group": arm.group,
            "entries": n,
            "fraction": n / SCORED,
            "max_change": 0.0,
            "held": True,
        }
    if arm.freeze == "rewind":
        proof |= {"max_change_before_rewind": 0.0123, "note": "the others were trained beside entries that moved"}
    asked = [{"step": s, **_asked(rng, 0.97 - 0.4 * s / 200, 0.87, 40)} for s in STEPS]
    losses = [[s, 1.2 * math.exp(-s / 60) + 0.4] for s in range(10, 201, 10)]
    return {
        "seed": run.seed, "freeze": proof, "asked": asked, "adapter": {"bytes": 258_000, "parameters": 61_440},
        "training": {"steps": STEPS[-1], "tokens": 96_000, "seconds": 40.1, "trained": 61_440, "samples": 500, "losses": losses,
                     "held_out": [[s, 0.9 + 0.1 * s / 200] for s in (100, 200)]},
    }  # fmt: skip


def _drifted(rng: np.random.Generator, run: Run) -> Record:
    """What the drift study adds to a tuning."""
    frozen = run.arm.group if run.arm.freeze != "none" else None
    names = [g for g in GROUPS if g not in ("matched", "complement") or g == frozen]
    scale = {name: float(rng.normal(1.2 if name.startswith("safety") else 1.0, 0.02)) for name in names}
    draws = {kind: rng.normal(1, 0.03, 99) for kind in ("magnitude", "utility")}
    curves = []
    for step in STEPS:
        t = step / STEPS[-1]
        groups = {g: _measures(t, scale[g], g == frozen and run.arm.freeze != "rewind") for g in names}
        nulls = {
            kind: {"draws": 99, "band": _band([_measures(t, s, False) for s in scales])}
            for kind, scales in draws.items()
        }
        curves.append({"step": step, "groups": groups, "nulls": nulls})
    end = {kind: [_measures(1, s, False) for s in scales] for kind, scales in draws.items()}
    layer = {"value": 0.0 if frozen == "safety-only" else 1.19, "low": 0.94, "high": 1.06}
    final = {
        "step": STEPS[-1], "values": _measures(1, scale["safety-only"], frozen == "safety-only"),
        "nulls": {kind: {m: [one[m] for one in ends] for m in ("l2_per_sqrt", "cosine_distance")} for kind, ends in end.items()},
        "layers": {kind: {str(i): layer for i in range(LAYERS)} for kind in draws},
    }  # fmt: skip
    return {"curves": curves, "final": final, "distributions": _distributions(rng, names, frozen)}


def _band(ends: list[dict[str, float]]) -> Record:
    out = {}
    for m in METRICS:
        values = [one[m] for one in ends]
        low, median, high = np.quantile(values, [0.025, 0.5, 0.975]).tolist()
        out[m] = {"low": low, "median": median, "mean": float(np.mean(values)), "high": high}
    return out


def _distributions(rng: np.random.Generator, names: list[str], frozen: str | None) -> Record:
    edges, out = np.linspace(-5.5, -2.5, 31), {}
    for name in [*names, "matched random"]:
        rows = np.full(900, 0.0) if name == frozen else 10 ** rng.normal(-3.6 + 0.1 * (name == "safety"), 0.3, 900)
        counts = np.histogram(np.log10(np.maximum(rows, 1e-30)), edges)[0]
        quantiles = {str(q): float(np.quantile(rows, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
        out[name] = {
            "rows": 900,
            "zeros": int((rows == 0).sum()),
            "edges": edges.tolist(),
            "counts": counts.tolist(),
            "quantiles": quantiles,
        }
    return out


def _measures(t: float, scale: float, frozen: bool) -> dict[str, float]:
    s = 0.0 if frozen else scale * t**0.7
    return {
        "cosine": 1 - 2.0e-3 * s * s, "cosine_distance": 2.0e-3 * s * s, "l2": 1.3 * s, "l2_per_sqrt": 3.7e-3 * s,
        "relative_mean": 0.08 * s, "relative_norm": 0.06 * s,
    }  # fmt: skip


# ---- scores -------------------------------------------------------------------------------------------------------


def _summary(rng: np.random.Generator, scale: float) -> Record:
    """What `safety.dynamics.summary` returns. scale: of the group's scores; the others stay about as they are."""
    edges = np.linspace(-6, 0, 49).tolist()
    groups = {"safety": _scores(rng, -1.6, scale, edges), "matched": _scores(rng, -2.4, rng.normal(0.99, 0.005), edges)}
    nulls = [float(v) for v in 0.004 * rng.normal(0.99 if scale != 1 else 1.0, 0.005, 200)]
    return {
        "edges": edges,
        "groups": groups,
        "all": _scores(rng, -2.8, rng.normal(0.99, 0.005), edges),
        "nulls": {"magnitude": nulls},
    }


def _scores(rng: np.random.Generator, centre: float, scale: float, edges: list[float]) -> Record:
    values = scale * rng.normal(1, 0.003) * 10 ** np.random.default_rng(1).normal(centre, 0.4, 2000)
    counts = np.histogram(np.log10(values), edges)[0].tolist()
    return {"n": 2100, "zeros": 100, "mean": float(values.mean()), "quartiles": np.quantile(values, [0.25, 0.5, 0.75]).tolist(), "sd": float(values.std()), "counts": counts,
            "layers": {str(i): float(values.mean() * (1 + 0.1 * i)) for i in range(LAYERS)}}  # fmt: skip


__all__ = ["GROUPS", "KINDS", "SETS", "STEPS", "Verdict", "drift_record", "score_record"]
