"""The losses of rows of logits, and their gradients in the logits' place: two readings and one writing of a row.

    u = s · z,  cap · tanh(u / cap) where there is a cap
    m ← max(m, max uₜ),  d ← d · exp(m_old − m) + Σ exp(uₜ − m)      over tiles t of the vocabulary
    loss = m + log d − (1 − ε) u_target − ε · mean u

The sum that runs along with the maximum is Milakov and Gimelshein's (2018, arXiv:1805.02867).
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltalab.core.shapes import Float, Int
from deltalab.kernels.triton import on, tile

MOST = 4096
"""Logits of a tile."""


@triton.jit
@no_type_check
def _logits(z, i, V, scale, cap, CAPPED: tl.constexpr):
    """The logits at i in fp32, −∞ beyond the last."""
    u = tl.load(z + i, mask=i < V, other=0.0).to(tl.float32) * scale
    if CAPPED:
        u = cap * (2 * tl.sigmoid(2 * u / cap) - 1)  # cap · tanh(u / cap)
    return tl.where(i < V, u, float("-inf"))


@triton.jit
@no_type_check
def _rows(
    z, targets, weights, losses, stride, V, scale, cap, smoothing,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, GRADED: tl.constexpr, WEIGHED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    target = tl.load(targets + row)
    most, total, plain, at = float("-inf"), 0.0, 0.0, 0.0
    for start in range(0, V, TILE):
        i = start + tl.arange(0, TILE)
        u = _logits(z, i, V, scale, cap, CAPPED)
        higher = tl.maximum(most, tl.max(u, 0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(u - higher), 0)
        most = higher
        if SMOOTHED:
            plain += tl.sum(tl.where(i < V, u, 0.0), 0)
        at += tl.sum(tl.where(i == target, u, 0.0), 0)
    loss = tl.log(total) + (most - at)  # in this order: of large logits the difference is exact
    if SMOOTHED:
        loss += smoothing * (at - plain / V)
    tl.store(losses + row, loss)
    if GRADED:
        factor = scale
        if WEIGHED:
            factor *= tl.load(weights + row).to(tl.float32)
        for start in range(0, V, TILE):
            i = start + tl.arange(0, TILE)
            u = _logits(z, i, V, scale, cap, CAPPED)
            grad = tl.exp(u - most) / total - smoothing / V - tl.where(i == target, 1 - smoothing, 0.0)
            if CAPPED:
                grad *= 1 - (u / cap) * (u / cap)
            tl.store(z + i, (grad * factor).to(z.dtype.element_ty), mask=i < V)


def row_losses(
    z: Float[Tensor, "m v"], targets: Int[Tensor, " m"], weights: Float[Tensor, " m"] | None = None, *,
    softcap: float | None = None, scale: float = 1.0, smoothing: float = 0.0, graded: bool = False,
) -> Float[Tensor, " m"]:  # fmt: skip
    """The losses in fp32. graded: the gradients of the losses, times `weights`, are put in the place of z, whose rows
    lie one behind the other or apart, each without gaps.
    """
    m, v = z.shape
    losses = torch.empty(m, dtype=torch.float32, device=z.device)
    given = losses if weights is None else weights.contiguous()
    if m:
        size = tile(v, MOST)
        with on(z):
            _rows[(m,)](
                z, targets.contiguous(), given, losses, z.stride(0), v, float(scale), float(softcap or 1), float(smoothing),
                CAPPED=softcap is not None, SMOOTHED=smoothing != 0, GRADED=graded, WEIGHED=weights is not None,
                TILE=size, num_warps=8 if size > 1024 else 4,
            )  # fmt: skip
    return losses
