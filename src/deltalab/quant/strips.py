"""Ŵ x without all of Ŵ: a strip of its rows at a time, small enough to stay in the cache between making and using it.

    y = (Ŵ₁ x, Ŵ₂ x, …),   Ŵ = (Ŵ₁; Ŵ₂; …)

Each strip is what that part of Ŵ is, so this is the product with Ŵ up to the order of sums. For few tokens the time is that
of making Ŵ, and most of it went into memory that was new at each call.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from deltalab.core.shapes import Float

BYTES = 2 << 20
"""Of a strip."""
MOST = 256
"""Tokens up to which strips are faster than the whole."""


def applies(x: Tensor) -> bool:
    """Whether a product with x goes by strips: on a CPU, for few tokens, and where no gradient is asked for."""
    return not torch.is_grad_enabled() and x.device.type == "cpu" and x.numel() <= MOST * x.shape[-1]


def height(x: Float[Tensor, "*lead in"]) -> int:
    """Rows of a strip of x's dtype."""
    return max(1, BYTES // (max(1, x.shape[-1]) * x.element_size()))


def product(
    x: Float[Tensor, "*lead in"], strips: Iterable[Float[Tensor, "rows in"]], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*lead out"]:
    """Ŵ x + b. strips: those of Ŵ, from the first row on."""
    parts: list[Tensor] = []
    done = 0
    for W in strips:
        parts.append(F.linear(x, W, None if bias is None else bias[done : done + len(W)]))
        done += len(W)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
