"""Score dynamics: how the scores of groups of weights lie, before a tuning and after it.

Two different quantities are called 'the score after tuning': that of the base weights W₀ under the tuned activations, and
that of the merged weights W₀ + ΔW. Whoever measures names which. And a group chosen by a score must be measured on
samples that did not choose it: on the same ones its mean is too high by selection alone, and falls on any others.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from deltalab.core.shapes import Float
from deltalab.safety.group import layer_in
from deltalab.safety.topk import kth_largest

BINS = 48
LEAST = 1e-12
"""Scores below this are counted as zero in histograms, whose axis is logarithmic."""

Indices = Mapping[str, Tensor]


class Draws(Protocol):
    """Random groups of which each matrix's entries come one group after the other."""

    def __len__(self) -> int: ...
    def indices(self, path: str) -> Iterator[Tensor]: ...


def summary(
    scores: Mapping[str, Float[Tensor, "out in"]], groups: Mapping[str, Indices], nulls: Mapping[str, Draws],
    edges: Sequence[float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How scores lie in groups, in all entries, and in random groups; each matrix is read a few times, one at a time.

    edges: log10 of the histogram's bin edges, those of an earlier summary to be compared with; None: chosen here.
    Returns JSON: {"edges", "groups": {name: {n, mean, sd, quartiles, counts, zeros, layers: {layer: mean}}}, "all": the
    same of every entry, "nulls": {kind: [mean of each draw]}}.
    """
    everything = dict.fromkeys(scores)
    edges = list(edges) if edges is not None else _edges(scores)
    return {
        "edges": edges,
        "groups": {name: _one(scores, group, edges) for name, group in groups.items()},
        "all": _one(scores, everything, edges),
        "nulls": {kind: _means(scores, draws) for kind, draws in nulls.items()},
    }


def _one(scores: Mapping[str, Tensor], group: Mapping[str, Tensor | None], edges: Sequence[float]) -> dict[str, Any]:
    """The summary of one set of entries (None: the whole matrix). Sums in fp64; quartiles are exact."""
    n, total, squares, zeros = 0, 0.0, 0.0, 0
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    layers: dict[str, list[float]] = {}
    parts = _Parts(scores, group)
    for path in parts:
        values = parts[path].flatten().double()
        n, sum_ = n + len(values), float(values.sum())
        total, squares = total + sum_, squares + float((values * values).sum())
        positive = values[values > LEAST].log10().clamp(edges[0], edges[-1])
        zeros += len(values) - len(positive)
        counts += np.histogram(positive.cpu().numpy(), edges)[0]
        layer = layers.setdefault(layer_in(path), [0.0, 0.0])
        layer[0], layer[1] = layer[0] + sum_, layer[1] + len(values)
    if not n:
        return {
            "n": 0,
            "mean": None,
            "sd": None,
            "quartiles": None,
            "counts": counts.tolist(),
            "zeros": 0,
            "layers": {},
        }
    mean = total / n
    return {
        "n": n, "mean": mean, "sd": max(squares / n - mean * mean, 0.0) ** 0.5, "quartiles": [_quantile(parts, n, share) for share in (0.25, 0.5, 0.75)],
        "counts": counts.tolist(), "zeros": zeros, "layers": {layer: s / k for layer, (s, k) in layers.items() if k},
    }  # fmt: skip


def _quantile(parts: Mapping[str, Tensor], n: int, share: float) -> float:
    """The value that `share` of `n` values lie below, one of them. Scores are fp32 and not negative, so their bits are the
    keys that they are found by."""
    key = kth_largest(parts, n - int(share * (n - 1))).key
    return float(np.int32(key).view(np.float32))


class _Parts(Mapping[str, Tensor]):
    """Path → the scores of a group's entries there, (1, entries), read when asked for."""

    def __init__(self, scores: Mapping[str, Tensor], group: Mapping[str, Tensor | None]) -> None:
        self.scores, self.group = scores, group

    def __getitem__(self, path: str) -> Tensor:
        score, index = self.scores[path].flatten().float(), self.group[path]
        return (score if index is None else score[index.to(score.device)]).view(1, -1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


def _means(scores: Mapping[str, Tensor], draws: Draws) -> list[float]:
    """The mean score of every draw."""
    sums, sizes = np.zeros(len(draws)), np.zeros(len(draws))
    for path in scores:
        flat = scores[path].flatten().double()
        for i, index in enumerate(draws.indices(path)):
            sums[i] += float(flat[index.to(flat.device)].sum())
            sizes[i] += len(index)
    return [float(value) for value in sums / np.maximum(sizes, 1)]


def _edges(scores: Mapping[str, Tensor]) -> list[float]:
    """Bin edges, log10: from the least of the scores that are not next to nothing to the largest, with room above it."""
    low, high = np.inf, LEAST
    for path in scores:
        positive = scores[path][scores[path] > LEAST]
        if len(positive):
            least = positive.flatten().kthvalue(1 + len(positive) // 1000).values
            low, high = min(low, float(least)), max(high, float(positive.max()))
    low = min(low, high / 10)
    return [float(edge) for edge in np.linspace(np.log10(low), np.log10(high) + 0.2, BINS + 1)]
