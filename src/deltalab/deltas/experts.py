"""The forward of a stack of experts, one expert after the other, with deltas in it that see the tokens.

For experts as transformers has them (`transformers.integrations.moe`): up, perhaps with a gate, an activation, down,
weighted by the model's own router. The sums are those of the model's eager implementation, in its order, so a delta
that adds zero leaves every bit as it was there; the other implementations differ from that one by rounding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float, Int
from deltalab.deltas.base import Base, Delta

STACKS = ("gate_up_proj", "up_proj", "down_proj")
FLAGS = ("has_gate", "has_bias", "is_transposed")


def require_usual(experts: nn.Module, name: str) -> None:
    """Raises: UserError for a parameter, or a module of experts, of another build."""
    if name not in STACKS or not all(isinstance(getattr(experts, flag, None), bool) for flag in FLAGS):
        raise UserError(
            f"a {type(experts).__name__} is not built as transformers builds experts, so no delta sees the tokens of its '{name}'.",
            found=f"such experts have {', '.join(STACKS)} and say {', '.join(FLAGS)}",
            next="leave the experts out of the targets, or take a method that changes weights: LoRA",
        )


def one_by_one(
    experts: Any, deltas: Mapping[str, Delta], hidden_states: Float[Tensor, "t hidden"], top_k_index: Int[Tensor, "t k"],
    top_k_weights: Float[Tensor, "t k"],
) -> Float[Tensor, "t hidden"]:  # fmt: skip
    """What the experts' forward computes, with `deltas` (parameter's name -> delta) round their linears.

    top_k_index, top_k_weights: of each token the experts that it goes to, and how much each counts. An index beyond the
    last expert is one of another process.
    """
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    count = len(experts.down_proj)
    chosen = top_k_index.T.flatten()  # of each expert first the tokens whose first choice it is
    rows = torch.bincount(chosen, minlength=count)[:count].tolist()
    order = chosen.argsort(stable=True)[: sum(rows)]
    choice, token = order // len(top_k_index), order % len(top_k_index)
    h = _linear(experts, up, deltas.get(up), hidden_states[token], rows)
    h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    h = _linear(experts, "down_proj", deltas.get("down_proj"), h, rows)
    if getattr(experts, "has_post_expert_norm", False):
        h = experts.post_expert_norm(h)
    h = h * top_k_weights[token, choice, None]
    y = torch.zeros_like(hidden_states)
    for part, where in zip(h.split(rows), token.split(rows), strict=True):  # a token comes once to an expert
        y.index_add_(0, where, part.to(y.dtype))
    return y


def _linear(
    experts: Any, name: str, delta: Delta | None, x: Float[Tensor, "s in"], rows: list[int]
) -> Float[Tensor, "s out"]:
    """One of the experts' two linears, on tokens that are sorted by expert, `rows` of them for each."""
    W, bias = getattr(experts, name), getattr(experts, f"{name}_bias") if experts.has_bias else None

    def base(x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for e, part in enumerate(x.split(rows)):
            if len(part) or not (parts or any(rows[e:])):  # of no tokens at all still one empty part
                y = part @ W[e] if experts.is_transposed else F.linear(part, W[e])
                parts.append(y if bias is None else y + bias[e])
        return torch.cat(parts)

    return base(x) if delta is None else delta(x, Base(base, experts, rows))
