"""What of a study's long measurements goes into its record: enough to draw and to judge, not every matrix."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from deltalab.deltas.select import leaf
from deltalab.measure.drift import DriftProbe
from deltalab.safety.groups import Group
from deltalab.studies.drift import DriftStudySpec

BINS = 40


def label(name: str, spec: DriftStudySpec) -> str:
    """A group in words, with its shares."""
    g = spec.groups
    return {"safety": f"safety (top {100 * g.q:g} %)", "utility": f"utility (top {100 * g.q:g} %)", "random": "random", "matched": "matched random",
            "safety-only": f"safety-only (top {100 * g.q:g} % for safety without top {100 * g.p:g} % for utility)"}[name]  # fmt: skip


def described(name: str, group: Group, spec: DriftStudySpec) -> dict[str, Any]:
    """A group for the record: its size, how it was made, and its share of each kind of matrix and of each matrix."""
    sizes: dict[str, list[int]] = {}
    for path, count in group.counts.items():
        out, in_ = group.shapes[path]
        kind = sizes.setdefault(leaf(path), [0, 0])
        kind[0] += count
        kind[1] += out * in_
    return {"label": label(name, spec), "entries": group.count, "fraction": group.fraction, "info": group.info,
            "kinds": {kind: count / total for kind, (count, total) in sizes.items()},
            "per_matrix": {path: count / (group.shapes[path][0] * group.shapes[path][1]) for path, count in group.counts.items()}}  # fmt: skip


def independent(a: Group, b: Group) -> float:
    """The Jaccard index of two groups of these sizes if they were drawn independently."""
    x, y = a.fraction, b.fraction
    return x * y / (x + y - x * y)


def curve(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the drift curve without its matrices and single draws, which stay in the stage's own file."""
    groups = {name: group["overall"] for name, group in row["groups"].items()}
    return {
        "step": row["step"],
        "groups": groups,
        "nulls": {name: {"draws": null["draws"], "band": null["band"]} for name, null in row["nulls"].items()},
    }


def against(row: dict[str, Any], measure: str = "l2_per_sqrt") -> dict[str, Any]:
    """The last step in more detail, of each group that has nulls: every draw, and group and band by layer."""
    return {name: {"draws": null["overall"][measure],
                   "layers": {layer: {"value": row["groups"][name]["layers"][layer][measure], "band": bands[measure]} for layer, bands in null["layers"].items()}}
            for name, null in row["nulls"].items()}  # fmt: skip


def smoothed(losses: Sequence[float], points: int = 60) -> list[list[float]]:
    """The loss as the mean of at most `points` stretches of steps, each at its last step."""
    ends = np.unique(np.linspace(0, len(losses), min(points, len(losses)) + 1).round().astype(int))
    return [[int(b), float(np.mean(losses[a:b]))] for a, b in itertools.pairwise(ends)]


def distributions(probe: DriftProbe, model: nn.Module) -> dict[str, Any]:
    """Root-mean-square change by row: a histogram on a log axis and quantiles, of each group and of the nulls together."""
    rows = probe.rows(model)
    values = {name: table["l2_per_sqrt"].numpy() for name, table in rows["groups"].items()}
    values["matched random"] = np.concatenate([table["l2_per_sqrt"].numpy() for table in rows["nulls"].values()])
    moved = np.concatenate([v[v > 0] for v in values.values()])
    low, high = np.log10(np.quantile(moved, [0.001, 0.999])) if len(moved) else (-6.0, -1.0)
    edges = np.linspace(low, max(high, low + 0.1), BINS + 1)
    out = {}
    for name, v in values.items():
        counts = np.histogram(np.log10(v[v > 0]).clip(edges[0], edges[-1]), edges)[0]
        out[name] = {"rows": len(v), "zeros": int((v == 0).sum()), "edges": edges.tolist(), "counts": counts.tolist(),
                     "quantiles": {str(q): float(np.quantile(v, q)) if len(v) else 0.0 for q in (0.05, 0.25, 0.5, 0.75, 0.95)}}  # fmt: skip
    return out
