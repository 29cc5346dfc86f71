"""Sums over the heads of an attention: those of a prompt, and one with the other behind a gate."""

from typing import Any, cast

import torch
from torch import Tensor

from deltalab.core.shapes import Float


def softmax_over(
    query: Float[Tensor, "batch heads seq d"], keys: Float[Tensor, "1 kv k d"], values: Float[Tensor, "1 kv k v"],
    scaling: float | None, softcap: float | None = None,
) -> Float[Tensor, "batch heads seq v"]:  # fmt: skip
    """softmax(c·q Kᵀ) V, nothing masked, the softmax in fp32 or wider.

    A group of query heads shares a key-value head. scaling: c, 1/√d if None. softcap: s becomes cap·tanh(s / cap) before
    the softmax, as in the layer's own.
    """
    groups = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, 1).to(query.dtype) for t in (keys, values))
    scores = (query @ keys.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(query.dtype) @ values


def gated(y: Float[Tensor, "*lead d"], gate: Float[Tensor, "heads 1"], term: Float[Tensor, "*lead d"]) -> Tensor:
    """y + gate·term; where the gate is zero bitwise y, whatever the term is, with the gradient of the sum all the same."""
    return cast(Tensor, _Gated.apply(y, gate, term))


class _Gated(torch.autograd.Function):
    """-0 + 0 is 0, and 0·∞ is not a number: so y is passed on where the gate is zero, and not added to."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, term: Tensor) -> Tensor:
        ctx.save_for_backward(gate, term)
        return torch.where(gate == 0, y, y + gate * term)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, term = ctx.saved_tensors
        return grad, (grad * term).sum_to_size(gate.shape), grad * gate
