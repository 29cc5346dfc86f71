"""What of a study's long measurements goes into its record: enough to draw and to judge, not every matrix."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from deltalab.deltas.select import leaf
from deltalab.measure.drift import DriftProbe
from deltalab.safety.bins import Bins
from deltalab.safety.group import Group
from deltalab.safety.groups import top
from deltalab.safety.nulls import Nulls
from deltalab.safety.overlap import Overlap
from deltalab.safety.score_files import Scores
from deltalab.safety.units import Units
from deltalab.studies.parts import GroupsSpec

BINS = 40
JUDGED = ("l2_per_sqrt", "cosine_distance")
"""Measures of drift that a verdict compares with the random groups, draw by draw."""
SHOWN = "l2_per_sqrt"


def described(group: Group, label: str) -> dict[str, Any]:
    """A group for the record: its size, how it was made, and its share of each kind of matrix and of each matrix."""
    sizes: dict[str, list[int]] = {}
    for path, count in group.counts.items():
        out, in_ = group.shapes[path]
        kind = sizes.setdefault(leaf(path), [0, 0])
        kind[0] += count
        kind[1] += out * in_
    per_matrix = {path: count / (group.shapes[path][0] * group.shapes[path][1]) for path, count in group.counts.items()}
    return {
        "label": label, "entries": group.count, "fraction": group.fraction, "info": group.info,
        "kinds": {kind: count / total for kind, (count, total) in sizes.items()}, "per_matrix": per_matrix,
    }  # fmt: skip


def one_like(group: Group, name: str, seed: int, match: Bins | None, units: Units | None) -> Group:
    """One random group like `group`, named."""
    drawn = Nulls(group, 1, seed, match, units).draw(0)
    drawn.name = name
    return drawn


def halved(scores: Scores, g: GroupsSpec, units: Units | None) -> tuple[Group, Group]:
    """The top of each half of the samples: what the ceiling of an overlap is taken from."""
    even, odd = (top(half, g.q, g.per, "half", units) for half in scores.halves)
    return even, odd


def overlapping(found: Overlap) -> dict[str, Any]:
    """An overlap for the record: overall, by layer and by kind of matrix."""
    rows = [row for row in found.table() if row["level"] != "matrix"]
    return {
        "a": found.a, "b": found.b, "jaccard": found.jaccard, "independent": found.floor,
        "ceilings": [rows[0]["ceiling_a"], rows[0]["ceiling_b"]], "table": rows[1:],
    }  # fmt: skip


def curve(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the drift curve without its matrices and single draws, which stay in the run's own file."""
    return {
        "step": row["step"],
        "groups": {name: group["overall"] for name, group in row["groups"].items()},
        "nulls": {kind: {"draws": null["draws"], "band": null["band"]} for kind, null in row["nulls"].items()},
    }


def final(row: dict[str, Any], focus: str) -> dict[str, Any]:
    """The end of a run, every random group drawn: the focus's measures, the draws', and both by layer.

    {"step", "values": {measure: …}, "nulls": {kind: {measure: [one a draw]}}, "layers": {kind: {layer: {value, low,
    high}}}}; the layers as multiples of the draws' mean.
    """
    group = row["groups"][focus]
    layers: dict[str, dict[str, Any]] = {}
    for kind, null in row["nulls"].items():
        layers[kind] = {}
        for layer, bands in null["layers"].items():
            band = bands[SHOWN]
            if band and band["mean"] > 0:
                value = group["layers"][layer][SHOWN]
                layers[kind][layer] = {key: v / band["mean"] for key, v in (("value", value), ("low", band["low"]), ("high", band["high"]))}  # fmt: skip
    nulls = {kind: {m: null["overall"][m] for m in JUDGED} for kind, null in row["nulls"].items()}
    return {"step": row["step"], "values": group["overall"], "nulls": nulls, "layers": layers}


def mean_curves(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Drift curves of several seeds as one: the mean of every measure at every step that all have."""
    rows = []
    for step in [row["step"] for row in curves[0] if all(any(r["step"] == row["step"] for r in c) for c in curves[1:])]:
        at = [next(row for row in curve if row["step"] == step) for curve in curves]
        rows.append(mean_values(at))
    return rows


def mean_values(values: Sequence[Any]) -> Any:
    """The mean of JSON values of one shape, leaf by leaf; what is None anywhere stays None, words and counts stay the first's."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: mean_values([value[key] for value in values]) for key in first}
    if any(value is None for value in values):
        return None
    return float(np.mean(values)) if isinstance(first, float) else first


def smoothed(losses: Sequence[float], points: int = 60) -> list[list[float]]:
    """The loss as the mean of at most `points` stretches of steps, each at its last step."""
    ends = np.unique(np.linspace(0, len(losses), min(points, len(losses)) + 1).round().astype(int))
    return [[int(b), float(np.mean(losses[a:b]))] for a, b in itertools.pairwise(ends)]


def distributions(probe: DriftProbe, model: nn.Module) -> dict[str, Any]:
    """Root-mean-square change by row: a histogram on a log axis and quantiles, of each group and of random groups together."""
    rows = probe.rows(model)
    values = {name: table["l2_per_sqrt"].numpy() for name, table in rows["groups"].items()}
    values["matched random"] = np.asarray(rows["nulls"]["magnitude"]["l2_per_sqrt"])
    moved = np.concatenate([v[v > 0] for v in values.values()])
    low, high = np.log10(np.quantile(moved, [0.001, 0.999])) if len(moved) else (-6.0, -1.0)
    edges = np.linspace(low, max(high, low + 0.1), BINS + 1)
    out = {}
    for name, v in values.items():
        counts = np.histogram(np.log10(v[v > 0]).clip(edges[0], edges[-1]), edges)[0]
        quantiles = {str(q): float(np.quantile(v, q)) if len(v) else 0.0 for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
        out[name] = {
            "rows": len(v), "zeros": int((v == 0).sum()), "edges": edges.tolist(), "counts": counts.tolist(), "quantiles": quantiles,
        }  # fmt: skip
    return out
