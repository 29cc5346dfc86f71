"""Attention in blocks of queries that stay in the cache, as one step of autograd that keeps q, k, v and one number a query.

    S = s · q kᵀ + masks,   P = softmax(S),   y = P v
    dv = Pᵀ dy,   dS = P ⊙ (dP − Σ P ⊙ dP),  dP = dy vᵀ,   dq = s · dS k,   dk = s · dSᵀ q

P is formed again in the backward. In bf16 the scores are formed in fp32, as torch's own kernel has them, and each query's
largest is kept: less that, they lose nothing that matters when they are formed in bf16 the next time. The other products are
in bf16, which a CPU does at twice the rate or more. Of a causal attention only the keys up to the block's last query are
looked at, of a window only those from the first query's on. Query heads that share keys become rows of one product, so keys
and values are never repeated. Segments of near length are lined up as rows of one batch.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltalab.core.shapes import Float

AREA = 1 << 19
"""Scores that are formed at once: 2 MiB in fp32."""
QUERIES = 128
"""Queries of a block."""
WASTE = 1.3
"""The longest of segments that are lined up, over the shortest, at most."""


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
    q: Float[Tensor, "batch heads queries d"], k: Float[Tensor, "batch kv keys d"], v: Float[Tensor, "batch kv keys e"],
    scale: float, sight: Sight, segments: Sequence[int] | None = None,
) -> Float[Tensor, "batch queries heads e"]:  # fmt: skip
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
        ctx.save_for_backward(q, k, v, keys, mask, peak := _peaks(q, k))
        ctx.options = scale, causal, window, lengths
        q, sight = _grouped(q, k), Sight(causal, window, keys, mask)
        out = _by_token(q, v.shape[-1])
        with torch.autocast(q.device.type, enabled=False):
            for rows in _rows(q, lengths):
                asked, seen, values, y, top = (rows.read(t) for t in (q, k, v, out, peak))
                for part in _parts(asked, seen):
                    _forward(asked[part], seen[part], values[part], scale, sight.of(part[0]), y[part], top[part])
                rows.write(out, y)
                rows.write(peak, top)
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, keys, mask, peak = ctx.saved_tensors
        scale, causal, window, lengths = ctx.options
        q, sight = _grouped(q, k), Sight(causal, window, keys, mask)
        given = q, k, v, dy.unflatten(2, q.shape[1:3]).permute(0, 2, 3, 1, 4), peak
        grads = [_by_token(t, t.shape[-1]) for t in (q, k, v)]
        with torch.autocast(q.device.type, enabled=False):
            for rows in _rows(q, lengths):
                read, found = [rows.read(t) for t in given], [rows.read(t) for t in grads]
                for part in _parts(*read[:2]):
                    _backward([t[part] for t in read], scale, sight.of(part[0]), [t[part] for t in found])
                for grad, t in zip(grads, found, strict=True):
                    rows.write(grad, t)
        return grads[0].flatten(1, 2), grads[1], grads[2], *(None,) * 6


def _grouped(q: Float[Tensor, "batch heads queries d"], k: Tensor) -> Float[Tensor, "batch kv group queries d"]:
    return q.unflatten(1, (k.shape[1], q.shape[1] // max(1, k.shape[1])))


def _by_token(x: Float[Tensor, "batch *heads seq d"], width: int) -> Float[Tensor, "batch *heads seq e"]:
    """Room for a tensor that lies in memory as projections do: (batch, seq, heads, e)."""
    shape = x.movedim(-2, 1).shape[:-1]
    return x.new_empty(*shape, width).movedim(1, -2)


def _peaks(q: Tensor, k: Tensor) -> Float[Tensor, "batch kv group queries one"]:
    """Room for the largest score of each query, or none where it is not needed."""
    shape = _grouped(q, k).shape[:-1]
    return q.new_empty(*shape, 1 if torch.finfo(q.dtype).bits < 32 else 0, dtype=torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight, out: Tensor, peak: Tensor) -> None:
    """y into `out` and the largest scores into `peak`, both (rows, kv, group, queries, ·) like q; k, v (rows, kv, keys, ·)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    asked, seen, values = _own(q, wide).mul_(scale), _own(k, wide), _own(v, v.dtype)
    for at, to in _blocks(q.shape[3], k.shape[2], sight):
        shape = (*q.shape[:3], at.stop - at.start, to.stop - to.start)
        S = asked[:, :, at].flatten(1, 2) @ seen[:, to].mT
        blind = _hide_(S.view(shape), at, to, sight)
        if peak.shape[-1]:
            peak[:, :, :, at] = S.view(shape).amax(-1, keepdim=True)
        out[:, :, :, at] = (_softmax_(S, shape, blind).to(v.dtype) @ values[:, to]).view(*shape[:-1], -1)


def _backward(given: Sequence[Tensor], scale: float, sight: Sight, grads: Sequence[Tensor]) -> None:
    """dq, dk, dv into `grads`, from q, k, v, dy and the largest scores."""
    (q, k, v, dy, peak), dtype = given, given[0].dtype
    queries, seen, values, g = (_own(t, dtype) for t in (q, k, v, dy))
    wide, less = torch.promote_types(dtype, torch.float32), bool(peak.shape[-1])
    dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (seen, values))
    for at, to in _blocks(q.shape[3], k.shape[2], sight):
        shape = (*q.shape[:3], at.stop - at.start, to.stop - to.start)
        asked, dy = queries[:, :, at].flatten(1, 2), g[:, :, at].flatten(1, 2)
        S = asked.new_empty(*asked.shape[:2], shape[-1])
        if less:
            S.view(shape).copy_(peak[:, :, :, at].neg().nan_to_num_(posinf=0.0))
        S.baddbmm_(asked, seen[:, to].mT, beta=float(less), alpha=scale)
        P = _softmax_(S, shape, _hide_(S.view(shape), at, to, sight))
        dv[:, to] += P.mT @ dy
        dP = dy @ values[:, to].mT
        dS = torch._softmax_backward_data(dP, P, -1, P.dtype, grad_input=dP)
        grads[0][:, :, :, at] = (dS @ seen[:, to]).mul_(scale).view(*shape[:-1], -1)
        dk[:, to].add_(dS.mT @ asked, alpha=scale)
    grads[1].copy_(dk.view(k.shape))
    grads[2].copy_(dv.view(v.shape))


def _parts(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and key-value heads that are done at once, of q (batch, kv, group, queries, d) and k (batch, kv, keys, d)."""
    batch, kv, group, queries, _ = q.shape
    at_once = max(1, AREA // max(1, group * min(queries, QUERIES) * k.shape[2]))
    rows, heads = max(1, at_once // max(1, kv)), min(kv, at_once)
    for row in range(0, batch, rows):
        for head in range(0, kv, heads):
            yield slice(row, min(row + rows, batch)), slice(head, min(head + heads, kv))


def _blocks(queries: int, keys: int, sight: Sight) -> Iterator[tuple[slice, slice]]:
    """Which queries, and which keys they can see at most."""
    for start in range(0, queries, QUERIES):
        stop = min(start + QUERIES, queries)
        first = max(0, start + 1 - sight.window) if sight.causal and sight.window else 0
        yield slice(start, stop), slice(first, stop if sight.causal else keys)


def _own(x: Float[Tensor, "rows heads *inner d"], dtype: torch.dtype) -> Float[Tensor, "n *inner d"]:
    """A part's tensor copied in order, rows and heads as one."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(0, 1)


def _hide_(S: Float[Tensor, "rows kv group queries keys"], at: slice, to: slice, sight: Sight) -> Tensor | None:
    """Adds the masks to scores of queries `at` and keys `to`; which queries see nothing, if any does."""
    if sight.causal:
        size = at.stop - at.start
        S[..., at.start - to.start :] += _below(QUERIES, S.dtype, S.device)[:size, :size]
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
def _below(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "size size"]:
    """0 up to the diagonal and −∞ above it."""
    with torch.inference_mode(False):
        return torch.full((size, size), -torch.inf, dtype=dtype, device=device).triu_(1)


class _Rows(NamedTuple):
    """Segments (start, length) of a batch of one row that are lined up as rows; () stands for a batch as it is."""

    segments: tuple[tuple[int, int], ...] = ()

    def read(self, x: Float[Tensor, "batch *heads all d"]) -> Tensor:
        """x, or segments of it as rows of a batch with zeros behind the shorter ones; a view where there is one alone."""
        if len(self.segments) < 2:
            return x.narrow(-2, *self.segments[0]) if self.segments else x
        rows = x.new_zeros(len(self.segments), *x.shape[1:-2], self.segments[-1][1], x.shape[-1])
        for row, (start, length) in zip(rows, self.segments, strict=True):
            row.narrow(-2, 0, length).copy_(x[0].narrow(-2, start, length))
        return rows

    def write(self, x: Tensor, rows: Tensor) -> None:
        """Rows that `read` gave back to their places in x."""
        for row, (start, length) in zip(rows, self.segments, strict=False) if len(self.segments) > 1 else ():
            x[0].narrow(-2, start, length).copy_(row.narrow(-2, 0, length))


def _rows(q: Tensor, lengths: Sequence[int] | None) -> list[_Rows]:
    if lengths is None:
        return [_Rows()]
    return [_Rows(tuple(group)) for group in lined_up(lengths)]


def lined_up(lengths: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Segments (start, length) in groups of near length, shorter ones first."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    groups: list[list[tuple[int, int]]] = []
    for start, length in sorted(zip(starts, lengths, strict=True), key=lambda pair: pair[1]):
        if groups and 0 < length <= min(QUERIES, WASTE * groups[-1][0][1]):
            groups[-1].append((start, length))
        elif length:
            groups.append([(start, length)])
    return groups
