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

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.adapt import base_weight, delta_entries, delta_weight
from deltalab.deltas.base import weight_of
from deltalab.deltas.select import layers_of
from deltalab.measure.entry_sums import Draws, Indices, Listed, Stream, Terms, terms_of

__all__ = ["MEASURES", "Draws", "DriftProbe", "Indices", "drift", "measured", "snapshot"]

MEASURES = ("cosine", "cosine_distance", "l2", "l2_per_sqrt", "relative_mean", "relative_norm")
ROW_MEASURES = ("cosine_distance", "l2_per_sqrt", "relative_mean", "relative_norm")
EPSILON = 1e-8
DENSE_ABOVE = 0.05
"""Share of a matrix's entries, over all groups together, from which the dense ΔW is cheaper than gathering from A and B."""
TERMS_BYTES = 1 << 30
"""The terms of a whole matrix are kept while it is measured if they are no larger; else they are formed draw by draw."""
ROW_DRAWS = 20
"""Draws of each null whose rows are pooled for distributions."""
BAND = (0.025, 0.975)


def measured(sums: Float[np.ndarray, "n five"]) -> dict[str, Float[np.ndarray, " n"]]:
    """The measures by name, from entries, ⟨w,w⟩, ⟨d,d⟩, ⟨w,d⟩, Σ|d|/(|w|+ε) of each of n sets; NaN where undefined.

    Undefined: everything of no entries, and what divides by the weights' norm where they are all zero.
    """
    n, ww, dd, wd, relative = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths, wv = np.sqrt(ww) * np.sqrt((ww + 2 * wd + dd).clip(0)), ww + wd
        small = (ww * dd - wd * wd).clip(0) / (lengths * (lengths + wv))
        distance = np.where(lengths > 0, np.where(wv < 0, 1 - wv / lengths, small), np.nan)
        return {
            "cosine": 1 - distance,
            "cosine_distance": distance,
            "l2": np.where(n > 0, np.sqrt(dd), np.nan),
            "l2_per_sqrt": np.sqrt(dd / n),
            "relative_mean": relative / n,
            "relative_norm": np.where(ww > 0, np.sqrt(dd / ww), np.nan),
        }


def drift(w: Float[Tensor, " k"], d: Float[Tensor, " k"], epsilon: float = EPSILON) -> dict[str, float | None]:
    """The measures of one set of entries from their start `w` and change `d`; None where undefined."""
    terms = terms_of(w.flatten(), d.flatten(), epsilon).sum(0).tolist()
    return _json(np.array([w.numel(), *terms]))


def snapshot(model: nn.Module, paths: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the weights as they are now, path → (out, in): the W₀ of a model that trains without `adapt`."""
    return {path: weight_of(model.get_submodule(path)).detach().clone() for path in paths}


class DriftProbe:
    """Measures the drift of groups, and of null groups for the band, every `every` steps of a training.

    groups: name → group (module path → flat indices). nulls: name → groups drawn at random, as a list or as `Draws`
    that are never all held: 20 at the least for a band, 39 for a two-sided test at .05, 999 for one corrected for many.
    few: how many draws of each null a measurement takes if it is not told; None for all. W0: path → weight at step 0;
    None for what the model was loaded with, which `adapt` knows. epsilon: of the relative mean. dense_above: density
    from which ΔW is formed whole.
    Raises: UserError for no group.
    """

    def __init__(
        self, groups: Mapping[str, Indices], nulls: Mapping[str, Sequence[Indices] | Draws] | None = None,
        W0: Mapping[str, Tensor] | None = None, every: int = 100, *, few: int | None = None,
        epsilon: float = EPSILON, dense_above: float = DENSE_ABOVE, name: str = "drift",
    ) -> None:  # fmt: skip
        if not groups:
            raise UserError("no group to measure the drift of.", next="make one with deltalab.safety.groups.top")
        self.name, self.every, self.few, self.W0 = name, every, few, W0
        self.epsilon, self.dense_above = epsilon, dense_above
        self.groups = dict(groups)
        self.nulls: dict[str, Draws] = {
            key: Listed(draws) if isinstance(draws, Sequence) else draws for key, draws in (nulls or {}).items()
        }
        in_nulls = (path for null in self.nulls.values() for path in null.paths)
        self.paths = list(dict.fromkeys([*(path for group in self.groups.values() for path in group), *in_nulls]))

    @property
    def most(self) -> int:
        """Draws of the null that has the most: `measure(model, step, probe.most)` takes all."""
        return max((len(null) for null in self.nulls.values()), default=0)

    def measure(self, model: nn.Module, step: int, draws: int | None = None) -> dict[str, Any]:
        """Drift now, as JSON. draws: of each null, the first so many; `few` of them if not given.

        {"groups": {name: {"overall", "layers": {layer: …}, "matrices": {path: …}}},
         "nulls": {name: {"draws", "overall": {measure: [one a draw]}, "band": {measure: {low, median, mean, high}},
                          "layers": {layer: {measure: {low, median, mean, high}}}}}}, bands from the 2.5 to the 97.5 % quantile.
        """
        most = draws or self.few or self.most
        sets = [(Listed([group]), 1) for group in self.groups.values()]
        sets += [(null, min(len(null), most)) for null in self.nulls.values()]  # type: ignore[misc]
        tables = [np.empty((len(self.paths), n, 5)) for _, n in sets]
        for row, path in enumerate(self.paths):
            streams = [Stream(of.indices(path), n) for of, n in sets]
            terms = self._terms(model, path, sum(stream.expected for stream in streams))
            for table, stream in zip(tables, streams, strict=True):
                table[row] = stream.sums(terms)
        layers: dict[str, list[int]] = defaultdict(list)
        for row, layer in enumerate(layers_of(model, self.paths).values()):
            layers["other" if layer is None else str(layer)].append(row)
        groups, nulls = tables[: len(self.groups)], tables[len(self.groups) :]
        return {
            "groups": {
                name: {
                    "overall": _json(table.sum(0)[0]),
                    "layers": {layer: _json(table[rows].sum(0)[0]) for layer, rows in layers.items()},
                    "matrices": {path: _json(table[i, 0]) for i, path in enumerate(self.paths) if table[i, 0, 0]},
                }
                for name, table in zip(self.groups, groups, strict=True)
            },
            "nulls": {
                name: {
                    "draws": table.shape[1],
                    "overall": {key: _plain(values) for key, values in measured(table.sum(0)).items()},
                    "band": _bands(table.sum(0)),
                    "layers": {layer: _bands(table[rows].sum(0)) for layer, rows in layers.items() if table.shape[1]},
                }
                for name, table in zip(self.nulls, nulls, strict=True)
            },
        }

    def distributions(self, model: nn.Module) -> dict[str, Any]:
        """How the drift is spread over the rows (output units) that a group has entries in, as JSON.

        {"groups" | "nulls": {name: {measure: {"rows", "mean", "sd", "quantiles": 101 values from 0 to 100 %}}}}; the rows
        of a null's first draws are pooled.
        """
        values = self.rows(model)
        return {
            kind: {name: {measure: _summary(v) for measure, v in table.items()} for name, table in tables.items()}
            for kind, tables in values.items()
        }

    def rows(self, model: nn.Module, draws: int = ROW_DRAWS) -> dict[str, dict[str, dict[str, Float[Tensor, " rows"]]]]:
        """The measures of every row that a group has entries in, matrices one after the other; see `distributions`.

        draws: of each null, whose rows are pooled.
        """
        groups: dict[str, Draws] = {name: Listed([group]) for name, group in self.groups.items()}
        return {
            kind: {name: self._rows(model, of, draws) for name, of in sets.items()}
            for kind, sets in (("groups", groups), ("nulls", self.nulls))
        }

    def _rows(self, model: nn.Module, of: Draws, draws: int) -> dict[str, Float[Tensor, " rows"]]:
        tables = [torch.zeros(0, 5, dtype=torch.float64)]
        for path in self.paths:
            width = weight_of(model.get_submodule(path)).shape[1]
            stream = Stream(of.indices(path), min(len(of), draws))
            terms = self._terms(model, path, stream.expected)
            for index in stream:
                rows, which = torch.unique(index.long() // width, return_inverse=True)
                values = torch.cat([torch.ones(len(index), 1, dtype=torch.float64), terms.at(index).cpu()], 1)
                tables.append(torch.zeros(len(rows), 5, dtype=torch.float64).index_add_(0, which, values))
        found = measured(torch.cat(tables).numpy())
        return {measure: torch.from_numpy(found[measure]) for measure in ROW_MEASURES}

    def _terms(self, model: nn.Module, path: str, entries: int) -> Terms:
        """What tells the four terms of any entries of one matrix, of which about `entries` will be asked for."""
        W0 = self._start(model, path)
        shift = None if self.W0 is None else (base_weight(model, path).double() - W0.double()).flatten()
        W0 = W0.flatten()
        if entries > self.dense_above * W0.numel():
            whole = delta_weight(model, path).flatten()
            whole = whole if shift is None else whole.double() + shift
            if entries > W0.numel() and 32 * W0.numel() <= TERMS_BYTES:
                every = terms_of(W0, whole, self.epsilon)
                return Terms(lambda index: every.index_select(0, index), W0.device, every)
            return Terms(
                lambda index: terms_of(W0.index_select(0, index), whole.index_select(0, index), self.epsilon), W0.device
            )

        def gathered(index: Tensor) -> Tensor:
            change = delta_entries(model, path, index.long()).double()
            if shift is not None:
                change = change + shift.index_select(0, index)
            return terms_of(W0.index_select(0, index), change, self.epsilon)

        return Terms(gathered, W0.device)

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


def _json(sums: Float[np.ndarray, " five"]) -> dict[str, float | None]:
    """One set's entries and measures, None where undefined."""
    return {"entries": int(sums[0]), **{key: _plain(values)[0] for key, values in measured(sums[None]).items()}}


def _plain(values: Float[np.ndarray, " n"]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _bands(sums: Float[np.ndarray, "draws five"]) -> dict[str, dict[str, float] | None]:
    """Quantiles of the draws in which a measure is defined."""
    bands: dict[str, dict[str, float] | None] = {}
    for measure, column in measured(sums).items():
        values = column[~np.isnan(column)]
        if not len(values):
            bands[measure] = None
            continue
        low, median, high = np.quantile(values, [BAND[0], 0.5, BAND[1]]).tolist()
        bands[measure] = {"low": low, "median": median, "mean": float(values.mean()), "high": high}
    return bands


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
