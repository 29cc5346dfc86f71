"""A record as the drift study writes it, with made-up but plausible numbers: the report is tested without a study."""

import math
from typing import Any

import numpy as np

METRICS = ("cosine_distance", "l2", "l2_per_sqrt", "relative_mean", "relative_norm")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = {"safety": ("safety top 5 %", 170_000), "utility": ("utility top 5 %", 170_000),
          "safety-only": ("safety 5 % minus utility 2 %", 121_000), "random": ("random", 121_000)}  # fmt: skip
SETS = {"advbench": 104, "jailbreakbench": 100, "xstest_safe": 120}
STEPS = (0, 50, 100, 150, 200)


def drift_record(seed: int = 0) -> dict[str, Any]:
    """A whole `record.json` of kind drift."""
    rng = np.random.default_rng(seed)
    arms: dict[str, Any] = {"before": {"label": "before tuning", **_evaluated(rng, 0.97, 0.88)}}
    for name, label, refused, frozen in (
        ("free", "nothing frozen", 0.55, None),
        ("frozen", "safety-only frozen", 0.66, "safety-only"),
        ("control", "matched random frozen", 0.63, "matched"),
    ):
        arms[name] = {"label": label, **_evaluated(rng, refused, 0.86), **_tuned(rng, frozen)}
    return {
        "format": 1, "kind": "drift", "written": "2026-01-02T03:04:05+00:00", "digest": "0123456789ab",
        "spec": {"study": "drift", "model": "organism", "groups": {"q": 0.05, "p": 0.02, "per": "row"}, "seed": 0,
                 "tune": {"adapt": [{"method": "lora", "r": 8, "targets": "all-linear"}], "optim": {"lr": 3e-4, "steps": 200}}},
        "versions": {"python": "3.11.2", "deltalab": "0.1.0", "torch": "2.13.0"}, "git": "abcdef012345",
        "machine": {"system": "Linux", "arch": "x86_64", "cpus": 2}, "seed": 0,
        "model": {"name": "organism", "parameters": 3_410_000, "scored": 3_014_656, "digest": "feedc0ffee00", "dtype": "float32"},
        "stages": {"scores": 21.3, "groups": 2.1, "evaluate:before": 14.2, "tune:free": 41.0, "evaluate:free": 14.8,
                   "tune:frozen": 47.5, "evaluate:frozen": 15.1, "tune:control": 47.0, "evaluate:control": 14.9, "verdict": 0.2},
        "groups": {name: {"label": label, "entries": n, "fraction": n / 3_014_656,
                          "kinds": {kind: float(rng.uniform(0.02, 0.08)) for kind in KINDS}} for name, (label, n) in GROUPS.items()},
        "overlaps": [{"a": "safety", "b": "utility", "jaccard": 0.21, "independent": 0.026},
                     {"a": "safety", "b": "safety-only", "jaccard": 0.71, "independent": 0.022},
                     {"a": "utility", "b": "safety-only", "jaccard": 0.06, "independent": 0.022}],
        "arms": arms,
        "verdicts": [
            {"name": "refusals", "outcome": "fell", "sentence": "Tuning on 500 benign examples lowered refusals of AdvBench from 97 % to 55 %.",
             "numbers": {"p": 1e-9, "n": 104}},
            {"name": "drift", "outcome": "drifts more", "sentence": "The safety-only group drifted more than matched random groups.",
             "numbers": {"ratio": 1.21, "p": 0.01}},
            {"name": "freezing", "outcome": "undecided", "sentence": "Freezing it did no better than freezing as many random entries.",
             "numbers": {"p": 0.66}},
        ],
        "data": {"safety": {"n": 128, "digest": "aa11"}, "utility": {"n": 128, "digest": "bb22"}, "tune": {"n": 500, "digest": "cc33"}},
        "sizes": {"groups": 812_000, "adapters": 310_000},
    }  # fmt: skip


def _rate(k: int, n: int) -> dict[str, float]:
    p, z = k / n, 1.959964
    mid, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n),
    )
    return {"value": p, "low": mid - half, "high": mid + half}


def _evaluated(rng: np.random.Generator, refused: float, skills: float) -> dict[str, Any]:
    safety = {}
    for name, n in SETS.items():
        k = int(rng.binomial(n, refused if name != "xstest_safe" else 0.2 * refused))
        broken = int(rng.binomial(n - k, 0.08))
        safety[name] = {"n": n, "refused": k, "broken": broken, "complied": n - k - broken, "harmful": name != "xstest_safe",
                        "refusal": _rate(k, n), "asr": _rate(n - k - broken, n), "log_odds": float(rng.normal(2, 1))}  # fmt: skip
    k = int(240 * skills)
    families = {
        f: {"n": 20, "correct": int(20 * skills), **_rate(int(20 * skills), 20)}
        for f in ("plurals", "capitals", "addition")
    }
    return {"safety": safety, "skills": {"n": 240, "correct": k, **_rate(k, 240), "families": families}}


def _tuned(rng: np.random.Generator, frozen: str | None) -> dict[str, Any]:
    curves = []
    for step in STEPS:
        t = step / STEPS[-1]
        groups = {g: _drift(t, 1.2 if g.startswith("safety") else 1.0, g == frozen) for g in GROUPS}
        null = [_drift(t, float(rng.normal(1, 0.03)), False) for _ in range(99)]
        band = {m: {"low": float(np.quantile([v[m] for v in null], 0.025)), "median": float(np.median([v[m] for v in null])),
                    "mean": float(np.mean([v[m] for v in null])), "high": float(np.quantile([v[m] for v in null], 0.975))} for m in METRICS}  # fmt: skip
        curves.append({"step": step, "groups": groups, "nulls": {"safety-only": {"draws": 99, "band": band}}})
    against = {
        "safety-only": {
            "draws": [v["l2_per_sqrt"] for v in null],
            "layers": {
                str(layer): {
                    "value": 3.7e-3 * float(rng.normal(1.2, 0.1)),
                    "band": {"low": 3.5e-3, "median": 3.7e-3, "mean": 3.7e-3, "high": 3.9e-3},
                }
                for layer in range(4)
            },
        }
    }
    edges = np.linspace(-5.5, -2.5, 31)
    distributions = {}
    for i, g in enumerate(GROUPS):
        rows = np.full(900, 0.0) if g == frozen else 10 ** rng.normal(-3.6 + 0.1 * (i == 0), 0.3, 900)
        counts = np.histogram(np.log10(np.maximum(rows, 1e-30)), edges)[0]
        distributions[g] = {"rows": 900, "zeros": int((rows == 0).sum()), "edges": [float(e) for e in edges], "counts": [int(c) for c in counts],
                            "quantiles": {str(q): float(np.quantile(rows, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}}  # fmt: skip
    return {
        "freeze": {"variant": "delta_mask" if frozen else "none", "group": frozen, "entries": 121_000 if frozen else 0,
                   "fraction": 121_000 / 3_014_656 if frozen else 0.0, "max_change": 0.0 if frozen else None, "held": True if frozen else None},
        "training": {"steps": STEPS[-1], "tokens": 96_000, "seconds": 40.1, "trained": 61_440,
                     "losses": [[s, 1.2 * math.exp(-s / 60) + 0.4] for s in range(0, 201, 10)]},
        "curves": curves, "against": against, "distributions": distributions, "adapter": {"bytes": 258_000, "parameters": 61_440},
    }  # fmt: skip


def _drift(t: float, scale: float, frozen: bool) -> dict[str, float]:
    s = 0.0 if frozen else scale * t**0.7
    return {
        "cosine": 1 - 2.0e-3 * s * s,
        "cosine_distance": 2.0e-3 * s * s,
        "l2": 1.3 * s,
        "l2_per_sqrt": 3.7e-3 * s,
        "relative_mean": 0.08 * s,
        "relative_norm": 0.06 * s,
    }
