"""What is looked at while a delta trains: its weights and spectra, what it tells of itself, and how far representations have moved.

    ProbeSpec(every=50)       in a spec: probe: {every: 50, samples: 16}

Each writes a curve, `curves/deltas.jsonl` and `curves/representations.jsonl`: at step 0, every so many steps, and at the last.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.data.chat import Encoded
from deltalab.data.collate import collate
from deltalab.deltas.adapt import disabled
from deltalab.deltas.base import WeightDelta
from deltalab.deltas.measures import gathered, measures
from deltalab.deltas.sites import place
from deltalab.deltas.weights import attached, grouped, is_adapted
from deltalab.measure.similarity import linear_cka, mean_cosine
from deltalab.measure.spectrum import effective_rank, of_factors, of_matrix
from deltalab.train.spec import ProbeSpec

TOKENS = 2048
"""Of the probe set at most, all samples together: a similarity needs no more."""


def probes_of(spec: ProbeSpec | None, model: nn.Module, pad_id: int, data: Sequence[Encoded]) -> list[Any]:
    """The probes that a spec asks for. data: the held-out samples, or else those to train on; the first of them are looked at."""
    if spec is None or not is_adapted(model):
        return []
    found: list[Any] = [DeltaProbe(spec.every)]
    few = list(_few(data, spec.samples))
    return [*found, RepresentationProbe(spec.every, pad_id, few)] if few else found


class DeltaProbe:
    """Of each weight's change: norm, mean and deviation, the norm beside W's, singular values, effective rank and r; of A and B norm, mean
    and deviation; and what a delta tells of itself (gates, the use of experts) in its last forwards."""

    name = "deltas"

    def __init__(self, every: int) -> None:
        self.every = every

    @torch.no_grad()
    def measure(self, model: nn.Module, step: int) -> dict[str, Any]:
        """`methods`: path -> method; `weights`: path -> values; `told`: path -> what the delta tells."""
        weights: dict[str, Any] = {}
        methods = {path: group.spec.method for group, deltas in grouped(model) for path in deltas}
        for path, delta in attached(model).items():
            where = place(model, path)
            if not isinstance(delta, WeightDelta) or where.kind not in ("linear", "embedding"):
                continue
            factors, W = delta.factors(), where.W
            if factors is not None:
                S = of_factors(*factors).S
                whole = _product_moments(*factors, float(S.norm()))
            else:
                change = delta.change(W)
                S, whole = of_matrix(change, min(32, *W.shape)).S, _moments(change)
            row: dict[str, Any] = {
                **whole, "relative": whole["norm"] / max(float(W.double().norm()), 1e-30),
                "rank": None if factors is None else len(factors.A), "singular": S[:32].tolist(), "effective_rank": effective_rank(S),
            }  # fmt: skip
            if factors is not None:
                row |= {name: _moments(t) for name, t in (("A", factors.A), ("B", factors.B))}
            weights[path] = row
        return {"methods": methods, "weights": weights, "told": measures(model)}


class RepresentationProbe:
    """How alike the hidden states behind each block are to those of the base, on the same samples: linear CKA and the mean cosine of
    tokens. Most deltas start as the base, so that is the distance from step 0.
    """

    name = "representations"

    def __init__(self, every: int, pad_id: int, samples: Sequence[Encoded]) -> None:
        self.every, self.pad_id, self.samples = every, pad_id, samples
        self.base: list[Tensor] | None = None

    @torch.no_grad()
    def measure(self, model: nn.Module, step: int) -> dict[str, Any]:
        """`cka` and `cosine`, a value for the embeddings and each block."""
        if self.base is None:
            with disabled(model):
                self.base = self._states(model)
        with gathered(model):
            now = self._states(model)
        pairs = list(zip(now, self.base, strict=True))
        return {"cka": [linear_cka(a, b) for a, b in pairs], "cosine": [mean_cosine(a, b) for a, b in pairs]}

    def _states(self, model: nn.Module) -> list[Tensor]:
        """Of each layer (tokens, hidden), padding left out."""
        batch = collate(self.samples, self.pad_id)
        device = next(model.parameters()).device
        tensors = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        states = model(**tensors, output_hidden_states=True).hidden_states
        kept = tensors["attention_mask"].bool()
        return [state[kept][:TOKENS].float() for state in states]


def _few(data: Sequence[Encoded], most: int) -> Iterator[Encoded]:
    """The first samples, as long as all together have few tokens."""
    tokens = 0
    for sample in data[:most]:
        tokens += len(sample.input_ids)
        if tokens > TOKENS and tokens > len(sample.input_ids):
            return
        yield sample


def _moments(t: Tensor) -> dict[str, float]:
    wide = t.double()
    return {"norm": float(wide.norm()), "mean": float(wide.mean()), "deviation": float(wide.std(correction=0))}


def _product_moments(A: Tensor, B: Tensor, s: float, norm: float) -> dict[str, float]:
    """The same of s · B A, whose norm is known, without forming it: its sum is s · (1ᵀB)(A1)."""
    n = len(B) * A.shape[1]
    mean = s * float(B.double().sum(0) @ A.double().sum(1)) / n
    return {"norm": norm, "mean": mean, "deviation": math.sqrt(max(norm**2 / n - mean**2, 0.0))}
