"""Attention on a CPU with torch's forward and a backward of ours, that keeps q, k and v.

    S = s · q kᵀ + masks,   P = softmax(S),   y = P v
    dv = Pᵀ dy,   dS = P ⊙ (dP − Σ P ⊙ dP),  dP = dy vᵀ,   dq = s · dS k,   dk = s · dSᵀ q

The forward is torch's flash kernel. The backward forms P again, in blocks of queries that stay in the cache; the scores in
fp32, the other products in the dtype of what is given, which a CPU does in bf16 at twice the rate of fp32 or more. Of a
causal attention only the keys up to the block's last query are looked at, of a window only those from the first query's on.
Query heads that share keys become rows of one product, so keys and values are never repeated.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltalab.core.shapes import Float

STEP = 1 << 20
"""Numbers that are worked on at once, which is a few MiB."""
QUERIES = 128
"""Queries of a block at most: in 16 bit. In fp32 half as many are faster, as more of what is not seen is left out."""


class Sight(NamedTuple):
    """Which keys a query sees, each term beside the others.

    causal: those up to itself. window: the last `window` of these. keys: (batch, keys), False where nothing is to be seen; it
    leaves some key to every query. mask: (batch or 1, 1, queries, keys), bool, or a number to add to the scores.
    """

    causal: bool = True
    window: int | None = None
    keys: Tensor | None = None
    mask: Tensor | None = None

    def of(self, rows: slice) -> "Sight":
        """Of some rows of the batch."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows]
        return self._replace(keys=None if self.keys is None else self.keys[rows], mask=mask)


def attend(
    q: Float[Tensor, "batch heads queries d"], k: Float[Tensor, "batch kv keys d"], v: Float[Tensor, "batch kv keys d"],
    scale: float, sight: Sight, segments: Sequence[int] | None = None,
) -> Float[Tensor, "batch queries heads d"]:  # fmt: skip
    """softmax(scale · q kᵀ + masks) v; a query that sees nothing gets zeros. heads is a multiple of kv.

    segments: lengths that sum to the tokens of a batch of one row, each of which attends to itself alone; then `sight` has no
    `keys` and no `mask`.
    """
    lengths = None if segments is None else tuple(segments)
    return _Attend.apply(q, k, v, sight.keys, sight.mask, scale, sight.causal, sight.window, lengths)  # type: ignore[no-untyped-call, no-any-return]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, mask: Tensor | None, scale: float,
                causal: bool, window: int | None, lengths: tuple[int, ...] | None) -> Tensor:  # fmt: skip
        sight = Sight(causal, window, keys, mask)
        with torch.autocast(q.device.type, enabled=False):
            if lengths is None:
                y = _forward(q, k, v, scale, sight)
            else:
                parts: Any = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
                y = torch.cat([_forward(a, b, c, scale, sight) for a, b, c in parts], 1)
        ctx.save_for_backward(q, k, v, keys, mask)
        ctx.options = scale, causal, window, lengths
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, keys, mask = ctx.saved_tensors
        scale, causal, window, lengths = ctx.options
        sight, groups = Sight(causal, window, keys, mask), (k.shape[1], q.shape[1] // max(1, k.shape[1]))
        given = q.unflatten(1, groups), k, v, dy.unflatten(2, groups).permute(0, 2, 3, 1, 4)
        grads = [_by_token(t) for t in given[:3]]
        with torch.autocast(q.device.type, enabled=False):
            for segment in _segments(lengths):
                alone, into = ([t[..., segment, :] for t in tensors] for tensors in (given, grads))
                for part in _parts(*alone[:2]):
                    _backward([t[part] for t in alone], scale, sight.of(part[0]), [t[part] for t in into])
        return grads[0].flatten(1, 2), grads[1], grads[2], *(None,) * 6


def _by_token(x: Float[Tensor, "batch *heads seq d"]) -> Float[Tensor, "batch *heads seq d"]:
    """Room for a tensor like x that lies in memory as projections do: (batch, seq, heads, d)."""
    return x.new_empty(x.movedim(-2, 1).shape).movedim(1, -2)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight) -> Float[Tensor, "batch queries heads d"]:
    """y by torch's kernel."""
    if not q.numel():
        return torch.empty_like(q.transpose(1, 2))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    mask = _added(sight, q.shape[2], k.shape[2], q)
    y, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, sight.causal and mask is None, attn_mask=mask, scale=scale
    )
    return y.transpose(1, 2)


def _added(sight: Sight, queries: int, keys: int, like: Tensor) -> Float[Tensor, "batch one queries keys"] | None:
    """The masks as one to add, or None where torch's kernel needs none."""
    window = sight.window if sight.causal and sight.window and sight.window < keys else None
    if sight.mask is None and sight.keys is None and window is None:
        return None
    shape = 1 if sight.mask is None else len(sight.mask), 1, 1, queries, keys
    if sight.keys is not None:
        shape = len(sight.keys), *shape[1:]
    added = like.new_zeros(shape)
    _hide_(added, slice(0, queries), slice(0, keys), sight)
    return added[:, 0]


def _backward(given: Sequence[Tensor], scale: float, sight: Sight, grads: Sequence[Tensor]) -> None:
    """dq, dk, dv into `grads`; given: q (rows, kv, group, queries, d), k, v (rows, kv, keys, d), dy like q."""
    (q, k, v, dy), dtype = given, given[0].dtype
    queries, seen, values, g = (_own(t, dtype) for t in (q, k, v, dy))
    wide = torch.promote_types(dtype, torch.float32)
    scaled, wide_k = queries.to(wide, copy=True).mul_(scale), seen.to(wide)
    blocks = list(_blocks(q.shape[3], k.shape[2], sight, _queries(dtype)))
    sums = [_Sum(t, alone=len(blocks) < 2) for t in (seen, values)]
    for at, to in blocks:
        shape = (*q.shape[:3], at.stop - at.start, to.stop - to.start)
        asked, dy = queries[:, :, at].flatten(1, 2), g[:, :, at].flatten(1, 2)
        S = scaled[:, :, at].flatten(1, 2) @ wide_k[:, to].mT
        P = _softmax_(S, shape, _hide_(S.view(shape), at, to, sight)).to(dtype)
        sums[1].add(to, P.mT @ dy)
        dP = dy @ values[:, to].mT
        dS = torch._softmax_backward_data(dP, P, -1, P.dtype, grad_input=dP)
        torch.mul((dS @ seen[:, to]).view(*shape[:-1], -1), scale, out=grads[0][:, :, :, at])
        sums[0].add(to, (dS.mT @ asked).mul_(scale))
    for grad, found in zip(grads[1:], sums, strict=True):
        grad.copy_(found.total.view(grad.shape))


class _Sum:
    """What blocks add to the gradient of keys or values x, (n, keys, d), in fp32 if there are several."""

    def __init__(self, x: Tensor, alone: bool) -> None:
        self.alone = alone
        self.total = torch.zeros(
            0 if alone else x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
        )

    def add(self, to: slice, part: Tensor) -> None:
        if self.alone:
            self.total = part
        else:
            self.total[:, to].add_(part)  # += would copy it once more


def _segments(lengths: Sequence[int] | None) -> list[slice]:
    """Which queries and keys see each other; all, unless there are segments."""
    if lengths is None:
        return [slice(None)]
    stops = list(accumulate(lengths))
    return [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True) if length]


def _parts(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and key-value heads that are done at once, of q (batch, kv, group, queries, d) and k (batch, kv, keys, d)."""
    batch, kv, group, queries, d = q.shape
    each = group * (min(queries, _queries(q.dtype)) * k.shape[2] + queries * d) + 2 * k.shape[2] * d
    at_once = max(1, STEP // max(1, each))
    rows, heads = max(1, at_once // max(1, kv)), min(kv, at_once)
    for row in range(0, batch, rows):
        for head in range(0, kv, heads):
            yield slice(row, min(row + rows, batch)), slice(head, min(head + heads, kv))


def _queries(dtype: torch.dtype) -> int:
    """Queries of a block."""
    return max(1, 2 * QUERIES // dtype.itemsize)


def _blocks(queries: int, keys: int, sight: Sight, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Which queries, and which keys they can see at most."""
    for start in range(0, queries, at_once):
        stop = min(start + at_once, queries)
        first = max(0, start + 1 - sight.window) if sight.causal and sight.window else 0
        yield slice(start, stop), slice(first, stop if sight.causal else keys)


def _own(x: Float[Tensor, "rows heads *inner d"], dtype: torch.dtype) -> Float[Tensor, "n *inner d"]:
    """A part's tensor copied in order, rows and heads as one."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(0, 1)


def _hide_(S: Float[Tensor, "rows kv group queries keys"], at: slice, to: slice, sight: Sight) -> Tensor | None:
    """Adds the masks to scores of queries `at` and keys `to`; which queries see nothing, if any does."""
    if sight.causal:
        size = at.stop - at.start
        later = _later if size <= QUERIES else _later.__wrapped__  # long ones are not kept
        S[..., at.start - to.start :].add_(later(max(size, QUERIES), S.dtype, S.device)[:size, :size])
        if sight.window and at.stop - to.start > sight.window:
            late = torch.arange(at.start, at.stop, device=S.device)[:, None] - sight.window
            S.masked_fill_(torch.arange(to.start, to.stop, device=S.device) <= late, -torch.inf)
    if sight.keys is not None:
        S.masked_fill_(~sight.keys[:, None, None, None, to], -torch.inf)
    if sight.mask is None:
        return None
    mask = sight.mask[:, :, None, at, to]
    if mask.dtype is not torch.bool:
        S += mask
        return None
    S.masked_fill_(~mask, -torch.inf)
    blind = ~mask.any(-1, keepdim=True)
    return blind if blind.any() else None


def _softmax_(S: Float[Tensor, "n rows keys"], shape: tuple[int, ...], blind: Tensor | None) -> Tensor:
    torch.softmax(S, -1, out=S)
    if blind is not None:
        S.view(shape).masked_fill_(blind, 0)
    return S


@lru_cache(maxsize=8)
def _later(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "size size"]:
    """0 up to the diagonal and −∞ above it."""
    with torch.inference_mode(False):
        return torch.full((size, size), -torch.inf, dtype=dtype, device=device).triu_(1)
