"""Drift: how far the merged weights of a group of entries have moved since step 0.

For a group G of entries with start w = W₀[G] and change d = ΔW[G]:

    cosine distance   1 − ⟨w, w+d⟩ / (‖w‖ ‖w+d‖)          relative mean   mean |d| / (|w| + ε)
    L2                ‖d‖, and ‖d‖ / √|G|                 relative norm   ‖d‖ / ‖w‖

All come from four sums over the entries, ⟨w,w⟩, ⟨d,d⟩, ⟨w,d⟩ and Σ|d|/(|w|+ε), in fp64 from W₀ and ΔW, never from merged
weights in 16 bits. The distance is not 1 − (a number near 1): with v = w + d, Gram's determinant is the same for (w, v)
and (w, d), so

    ‖w‖²‖v‖² − ⟨w,v⟩² = ‖w‖²‖d‖² − ⟨w,d⟩²,   hence   1 − cos = (‖w‖²‖d‖² − ⟨w,d⟩²) / (‖w‖‖v‖ (‖w‖‖v‖ + ⟨w,v⟩)),

which has lost nothing however small d is (for ⟨w,v⟩ < 0 the plain difference loses nothing). Sums add up, so one pass
over the matrices gives every matrix, every layer and the whole.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.adapt import base_weight, delta_entries, delta_weight
from deltalab.deltas.base import weight_of
from deltalab.deltas.select import layer_of

Indices = Mapping[str, Tensor]
"""Module path → flat indices (row · in + column), ascending, of a group's entries in that matrix."""

MEASURES = ("cosine", "cosine_distance", "l2", "l2_per_sqrt", "relative_mean", "relative_norm")
EPSILON = 1e-8
DENSE_ABOVE = 0.05
"""Share of a matrix's entries, over all groups together, from which the dense ΔW is cheaper than gathering from A and B."""
CHUNK = 1 << 22
CACHED_BYTES = 1 << 30
BAND = (0.025, 0.975)


class Sums(NamedTuple):
    """What drift is computed from: entries, ⟨w,w⟩, ⟨d,d⟩, ⟨w,d⟩, Σ|d|/(|w|+ε). They add up over parts of a group."""

    entries: int
    ww: float
    dd: float
    wd: float
    relative: float

    def measures(self) -> dict[str, float | None]:
        """The measures by name; None where one is undefined (no entries, or all weights zero)."""
        n, ww, dd, wd, relative = self
        if n == 0:
            return {"entries": 0, **dict.fromkeys(MEASURES)}
        vv = max(ww + 2 * wd + dd, 0.0)
        lengths, wv = math.sqrt(ww) * math.sqrt(vv), ww + wd
        distance: float | None = None
        if lengths > 0:
            distance = 1 - wv / lengths if wv < 0 else max(ww * dd - wd * wd, 0.0) / (lengths * (lengths + wv))
        return {
            "entries": n, "cosine": None if distance is None else 1 - distance, "cosine_distance": distance, "l2": math.sqrt(dd),
            "l2_per_sqrt": math.sqrt(dd / n), "relative_mean": relative / n, "relative_norm": math.sqrt(dd / ww) if ww > 0 else None,
        }  # fmt: skip


def drift(w: Float[Tensor, " k"], d: Float[Tensor, " k"], epsilon: float = EPSILON) -> dict[str, float | None]:
    """The measures of one set of entries from their start `w` and change `d`."""
    terms = _terms(w.flatten(), d.flatten(), epsilon).sum(0).tolist()
    return Sums(w.numel(), *terms).measures()


def snapshot(model: nn.Module, paths: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the weights as they are now, path → (out, in): the W₀ of a model that trains without `adapt`."""
    return {path: weight_of(model.get_submodule(path)).detach().clone() for path in paths}


class DriftProbe:
    """Measures the drift of groups, and of null groups for the band, every `every` steps of a training.

    groups: name → group (module path → flat indices). nulls: name → groups drawn at random, 20 at the least for a band
    and 39 for a two-sided test at .05. W0: path → weight at step 0; None for what the model was loaded with, which
    `adapt` knows. epsilon: of the relative mean. dense_above: density from which ΔW is formed whole.
    Raises: UserError if a null of another size than its fellows is given, or no group.
    """

    def __init__(
        self, groups: Mapping[str, Indices], nulls: Mapping[str, Sequence[Indices]] | None = None, W0: Mapping[str, Tensor] | None = None,
        every: int = 100, *, epsilon: float = EPSILON, dense_above: float = DENSE_ABOVE, name: str = "drift",
    ) -> None:  # fmt: skip
        if not groups:
            raise UserError("no group to measure the drift of.", next="make one with deltalab.safety.groups.top")
        self.name, self.every, self.epsilon, self.dense_above, self.W0 = name, every, epsilon, dense_above, W0
        self.groups, self.nulls = dict(groups), {key: list(draws) for key, draws in (nulls or {}).items()}
        self._sets: list[Indices] = [*self.groups.values(), *(draw for draws in self.nulls.values() for draw in draws)]
        self.paths = list(dict.fromkeys(path for group in self._sets for path in group))
        self._cache: dict[str, list[tuple[Tensor, list[int]]]] = {}
        self._cached = 0

    def measure(self, model: nn.Module, step: int) -> dict[str, Any]:
        """Drift now, as JSON.

        {"groups": {name: {"overall", "layers": {layer: …}, "matrices": {path: …}}},
         "nulls": {name: {"draws", "overall": {measure: [one a draw]}, "band": {measure: {low, median, mean, high}},
                          "layers": {layer: {measure: {low, median, mean, high}}}}}}, bands from the 2.5 to the 97.5 % quantile.
        """
        parts = {path: self._matrix(model, path) for path in self.paths}
        layers = {path: layer_of(model, path) for path in self.paths}
        out: dict[str, Any] = {"groups": {}, "nulls": {}}
        for number, name in enumerate(self.groups):
            sums = {path: parts[path][number] for path in self.paths}
            out["groups"][name] = {"overall": _total(sums.values()).measures(),
                                   "layers": {layer: total.measures() for layer, total in _by_layer(sums, layers).items()},
                                   "matrices": {path: part.measures() for path, part in sums.items() if part.entries}}  # fmt: skip
        first = len(self.groups)
        for name, draws in self.nulls.items():
            rows = [{path: parts[path][number] for path in self.paths} for number in range(first, first + len(draws))]
            first += len(draws)
            overall = _columns([_total(row.values()).measures() for row in rows])
            per_layer = [_by_layer(row, layers) for row in rows]
            out["nulls"][name] = {
                "draws": len(draws), "overall": overall, "band": _bands(overall),
                "layers": {layer: _bands(_columns([row[layer].measures() for row in per_layer])) for layer in (per_layer[0] if rows else ())},
            }  # fmt: skip
        return out

    def distributions(self, model: nn.Module) -> dict[str, Any]:
        """How the drift is spread over the rows (output units) that a group has entries in, as JSON.

        {"groups" | "nulls": {name: {measure: {"rows", "mean", "sd", "quantiles": 101 values from 0 to 100 %}}}}; the rows
        of all draws of a null are pooled.
        """
        values = self.rows(model)
        return {
            kind: {name: {measure: _summary(v) for measure, v in table.items()} for name, table in tables.items()}
            for kind, tables in values.items()
        }

    def rows(self, model: nn.Module) -> dict[str, dict[str, dict[str, Float[Tensor, " rows"]]]]:
        """The measures of every row that a group has entries in, matrices one after the other; see `distributions`."""
        owners = [("groups", name) for name in self.groups] + [
            ("nulls", name) for name, draws in self.nulls.items() for _ in draws
        ]
        found: dict[str, dict[str, list[Tensor]]] = {"groups": defaultdict(list), "nulls": defaultdict(list)}
        for path in self.paths:
            width = weight_of(model.get_submodule(path)).shape[1]
            number = 0
            for index, counts, terms in self._gathered(model, path):
                for at, part in zip(index.split(counts), terms.split(counts), strict=True):
                    kind, name = owners[number]
                    number += 1
                    rows, which = torch.unique(at.long() // width, return_inverse=True)
                    table = torch.zeros(len(rows), 5, dtype=torch.float64)
                    table.index_add_(
                        0, which.cpu(), torch.cat([torch.ones(len(part), 1, dtype=torch.float64), part.cpu()], 1)
                    )
                    found[kind][name].append(table)
        return {
            kind: {name: _row_measures(torch.cat(tables)) for name, tables in by_name.items()}
            for kind, by_name in found.items()
        }

    def _matrix(self, model: nn.Module, path: str) -> list[Sums]:
        """The sums of every set of entries in one matrix."""
        sums: list[Sums] = []
        for _, counts, terms in self._gathered(model, path):
            lengths = torch.tensor(counts, device=terms.device)
            totals = torch.segment_reduce(terms, "sum", lengths=lengths, axis=0, initial=0.0).tolist()
            sums += [Sums(count, *total) for count, total in zip(counts, totals, strict=True)]
        return sums

    def _gathered(self, model: nn.Module, path: str) -> Iterator[tuple[Tensor, list[int], Float[Tensor, "k four"]]]:
        """Indices, counts of the sets they belong to, and the four terms of each entry, some sets at a time.

        ΔW is formed whole if the sets together hold more than `dense_above` of the matrix, else gathered.
        """
        W0 = self._start(model, path)
        shift = None if self.W0 is None else base_weight(model, path).double() - W0.double()
        chunks = self._chunks(path)
        entries = sum(len(index) for index, _ in chunks)
        whole = delta_weight(model, path).flatten() if entries > self.dense_above * W0.numel() else None
        flat = W0.flatten()
        for stored, counts in chunks:
            index = stored.to(flat.device)
            change = delta_entries(model, path, index.long()) if whole is None else whole.index_select(0, index)
            change = change.double()
            if shift is not None:
                change = change + shift.flatten().index_select(0, index)
            yield index, counts, _terms(flat.index_select(0, index), change, self.epsilon)

    def _start(self, model: nn.Module, path: str) -> Tensor:
        if self.W0 is None:
            return base_weight(model, path)
        now, start = weight_of(model.get_submodule(path)), self.W0[path]
        if now.requires_grad and now.data_ptr() == start.data_ptr():
            raise UserError(
                f"the W0 of '{path}' is the weight itself, which trains.",
                next="take it with deltalab.measure.drift.snapshot",
            )
        return start.to(now.device)

    def _chunks(self, path: str) -> list[tuple[Tensor, list[int]]]:
        """The sets' indices in one matrix, joined until they are large, with their counts; kept while they are small."""
        if path in self._cache:
            return self._cache[path]
        chunks = self._join(path)
        size = sum(index.numel() * index.element_size() for index, _ in chunks)
        if self._cached + size <= CACHED_BYTES:
            self._cached += size
            self._cache[path] = chunks
        return chunks

    def _join(self, path: str) -> list[tuple[Tensor, list[int]]]:
        chunks: list[tuple[list[Tensor], list[int]]] = [([], [])]
        for group in self._sets:
            index = group[path] if path in group else torch.zeros(0, dtype=torch.int64)
            if sum(chunks[-1][1]) + len(index) > CHUNK and chunks[-1][1]:
                chunks.append(([], []))
            small = index.to(torch.int32) if not len(index) or int(index[-1]) < 2**31 else index  # ascending
            chunks[-1][0].append(small)
            chunks[-1][1].append(len(index))
        return [(torch.cat(indices), counts) for indices, counts in chunks]


def _terms(w: Tensor, d: Tensor, epsilon: float) -> Float[Tensor, "k four"]:
    """w², d², w·d and |d|/(|w|+ε) of each entry, in fp64."""
    w, d = w.double(), d.double()
    return torch.stack([w * w, d * d, w * d, d.abs() / (w.abs() + epsilon)], dim=1)


def _total(parts: Any) -> Sums:
    return Sums(*(sum(column) for column in zip(*parts, strict=True)))


def _by_layer(sums: Mapping[str, Sums], layers: Mapping[str, int | None]) -> dict[str, Sums]:
    groups: dict[str, list[Sums]] = defaultdict(list)
    for path, part in sums.items():
        groups["other" if layers[path] is None else str(layers[path])].append(part)
    return {layer: _total(parts) for layer, parts in groups.items()}


def _columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    return {measure: [row[measure] for row in rows] for measure in MEASURES}


def _bands(columns: Mapping[str, Sequence[float | None]]) -> dict[str, dict[str, float] | None]:
    """Quantiles of the draws in which a measure is defined."""
    bands: dict[str, dict[str, float] | None] = {}
    for measure, column in columns.items():
        values = np.array([value for value in column if value is not None])
        low, median, high = np.quantile(values, [BAND[0], 0.5, BAND[1]]).tolist() if len(values) else (0.0, 0.0, 0.0)
        bands[measure] = (
            {"low": low, "median": median, "mean": float(values.mean()), "high": high} if len(values) else None
        )
    return bands


def _row_measures(table: Float[Tensor, "rows five"]) -> dict[str, Float[Tensor, " rows"]]:
    """`Sums.measures` of many rows at once; NaN where undefined."""
    n, ww, dd, wd, relative = table.unbind(1)
    lengths, wv = (ww * (ww + 2 * wd + dd).clamp_min(0)).sqrt(), ww + wd
    distance = torch.where(wv < 0, 1 - wv / lengths, (ww * dd - wd * wd).clamp_min(0) / (lengths * (lengths + wv)))
    return {
        "cosine_distance": distance,
        "l2_per_sqrt": (dd / n).sqrt(),
        "relative_mean": relative / n,
        "relative_norm": (dd / ww).sqrt(),
    }


def _summary(values: Float[Tensor, " rows"]) -> dict[str, Any]:
    kept = values[values.isfinite()].numpy()
    if not len(kept):
        return {"rows": 0, "mean": None, "sd": None, "quantiles": []}
    return {
        "rows": len(kept),
        "mean": float(kept.mean()),
        "sd": float(kept.std()),
        "quantiles": np.quantile(kept, np.linspace(0, 1, 101)).tolist(),
    }
