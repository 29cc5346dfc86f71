"""Dropout that draws the gaps between dropped entries in place of one number for every entry.

    gap = 1 + ⌊log u / log(1 − p)⌋,   u uniform on (0, 1]

is geometric, the number of steps to the next success of probability p; positions that far apart are dropped independently
with probability p each. On a CPU that takes p numbers an entry, and p positions are kept for the backward in place of a
mask. A GPU draws a mask at once.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLACK = 6
"""Standard deviations beyond the mean number of dropped entries that are drawn at once; hardly ever is a second draw needed."""


class Dropped(NamedTuple):
    """The entries of a tensor that are dropped: flat positions, or a mask that is True there."""

    at: Tensor

    def zeroed(self, x: Tensor) -> Tensor:
        """A copy of x with zeros there."""
        return self.zero_(x.clone(memory_format=torch.contiguous_format))

    def zero_(self, x: Tensor) -> Tensor:
        """Zeros there in x, which is contiguous."""
        if self.at.dtype is torch.bool:
            return x.masked_fill_(self.at.view(x.shape), 0)
        x.view(-1).index_fill_(0, self.at.long(), 0)
        return x


def draw(x: Tensor, p: float) -> Dropped:
    """Entries of x, each with probability p, from torch's generator of its device."""
    n = x.numel()
    if x.device.type != "cpu":
        return Dropped(torch.empty(n, dtype=torch.bool, device=x.device).bernoulli_(p))
    dtype = torch.int32 if n < 1 << 30 else torch.int64
    least = int(n * p + SLACK * math.sqrt(n * p * (1 - p))) + SLACK
    at = _positions(least, p, dtype)
    while n and at[-1] < n:
        at = torch.cat([at, _positions(least, p, dtype) + at[-1] + 1])
    return Dropped(at[: torch.searchsorted(at, n)].clone())


def _positions(count: int, p: float, dtype: torch.dtype) -> Tensor:
    """The first dropped positions, growing; a gap longer than fits in the dtype ends them as well as any."""
    gaps = torch.rand(count).neg_().add_(1).log_().mul_(1 / math.log1p(-p))
    return gaps.clamp_(max=float(1 << 30)).long().add_(1).cumsum(0).sub_(1).clamp_(max=torch.iinfo(dtype).max).to(dtype)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with entries dropped and the others divided by 1 − p, as torch's; p in [0, 1)."""
    return x if p == 0 else _Dropout.apply(x, p)  # type: ignore[no-untyped-call, no-any-return]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = draw(x, p)
        ctx.save_for_backward(dropped.at)
        ctx.p = p
        return dropped.zeroed(x).div_(1 - p)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Dropped(*ctx.saved_tensors).zeroed(grad).div_(1 - ctx.p), None
