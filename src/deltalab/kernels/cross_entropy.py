"""Cross-entropy of a linear head's logits, a few rows at a time: the logits of all rows are never there at once.

    u = s · (W h + b),    z = cap · tanh(u / cap)  or u,    p = softmax(z)
    loss = log Σⱼ exp zⱼ − (1 − ε) z_target − ε · mean z
    ∂loss/∂z = p − (1 − ε) · 1[target] − ε / V

The gradients are made while a chunk's logits are there, in the forward, so a backward has nothing to compute again: it
multiplies them by the gradient that it is given. What is kept is one row of the hidden's width for each counted row, and
of a head that trains one gradient of its weight. Rows that are ignored never reach a product.
The products are in the dtype of the hidden states or of autocast, everything between them in fp32 (fp64 for fp64). On a
CPU that is done in blocks that stay in the cache, which is where the time against torch's own path is won.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from deltalab.core.shapes import Float, Int
from deltalab.kernels import triton
from deltalab.kernels.linear import computing

IGNORED = -100
ROWS = 512
"""Rows of a chunk at the least: fewer make the products slower."""
CHUNK = 64 * 2**20
"""Bytes of a chunk's logits, if that is more than `ROWS` rows."""
BLOCK = {"cpu": 2 * 2**20}
"""Bytes in fp32 of what is worked on at once between the products, by device; elsewhere a whole chunk."""

Reduction = Literal["sum", "mean", "none"]


class Options(NamedTuple):
    """What is done to W h + b, and by how many rows at a time."""

    softcap: float | None = None
    scale: float = 1.0
    label_smoothing: float = 0.0
    chunk: int | None = None


def linear_cross_entropy(
    hidden: Float[Tensor, "n d"], W: Float[Tensor, "v d"], targets: Int[Tensor, " n"],
    bias: Float[Tensor, " v"] | None = None, *, softcap: float | None = None, scale: float = 1.0,
    label_smoothing: float = 0.0, reduction: Reduction = "sum", ignore_index: int = IGNORED, chunk: int | None = None,
) -> Float[Tensor, "*n"]:  # fmt: skip
    """What `F.cross_entropy` says of the logits of `hidden`, in fp32 (fp64 for fp64); rows of `ignore_index` count nothing.

    Gradients of hidden, W and bias as far as they are wanted; W's is summed in fp32 or wider. reduction: `none` gives (n,)
    and, if W or bias train, computes the logits again in the backward. chunk: rows whose logits, (chunk, v), are there at
    a time; by default as many as `CHUNK` bytes hold, and `ROWS` at the least.
    """
    counted = targets != ignore_index
    rows = None if bool(counted.all()) else counted.nonzero().squeeze(1)
    options = Options(softcap, scale, label_smoothing, chunk)
    graded = torch.is_grad_enabled()  # inside a Function it never is
    return _LinearCrossEntropy.apply(hidden, W, bias, targets, rows, options, reduction, graded)  # type: ignore[no-untyped-call, no-any-return]


def plain_linear_cross_entropy(
    hidden: Float[Tensor, "n d"], W: Float[Tensor, "v d"], targets: Int[Tensor, " n"],
    bias: Float[Tensor, " v"] | None = None, *, softcap: float | None = None, scale: float = 1.0,
    label_smoothing: float = 0.0, reduction: Reduction = "sum", ignore_index: int = IGNORED,
) -> Float[Tensor, "*n"]:  # fmt: skip
    """The same by torch's own operations."""
    z = F.linear(hidden, W, bias)
    z = scale * z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(
        z, targets, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
    )  # fmt: skip


class Head(NamedTuple):
    """The tensors of a loss, all rows of them. rows: the indices of the counted ones, None for all."""

    hidden: Tensor
    W: Tensor
    bias: Tensor | None
    targets: Tensor
    rows: Tensor | None


class Gradients(NamedTuple):
    """Of the counted rows of the hidden states, of W and of the bias; None where not wanted."""

    hidden: Tensor | None
    W: Tensor | None
    bias: Tensor | None


Wanted = tuple[bool, bool, bool]
NOTHING: Wanted = (False, False, False)


def sweep(
    head: Head, options: Options, dtype: torch.dtype, wanted: Wanted, weights: Float[Tensor, " m"] | None = None
) -> tuple[Float[Tensor, " m"], Gradients]:
    """The losses of the m counted rows, and the gradients of their sum, or of their sum with `weights`.

    dtype: that of the products; the gradients of W and bias are summed over chunks in fp32 or wider.
    """
    hidden, W, rows = head.hidden, head.W.to(dtype), head.rows
    (n, d), wide = hidden.shape, torch.promote_types(dtype, torch.float32)
    n = n if rows is None else len(rows)
    losses = hidden.new_empty(n, dtype=wide)
    bias = None if head.bias is None else head.bias.to(dtype)
    dh = hidden.new_empty(n, d, dtype=dtype) if wanted[0] else None
    chunks = list(_chunks(n, W, options.chunk))
    # of a single chunk the product is all there is
    dW = torch.zeros_like(W, dtype=dtype if len(chunks) == 1 else wide) if wanted[1] else None
    db = torch.zeros_like(W[:, 0], dtype=wide) if wanted[2] else None
    for part in chunks:
        at = part if rows is None else rows[part]
        h, targets = hidden[at].to(dtype), head.targets[at]
        z = F.linear(h, W, bias)
        for block in _blocks(z):
            w = None if weights is None else weights[part][block]
            losses[part][block] = row_losses(z[block], targets[block], options, any(wanted), w)
        if dh is not None:
            torch.mm(z, W, out=dh[part])
        if dW is not None:
            _add_product(dW, z, h)
        if db is not None:
            db += z.sum(0, dtype=wide)
        del z  # before there is the next
    return losses, Gradients(dh, dW, db)


def row_losses(
    z: Float[Tensor, "m v"], targets: Int[Tensor, " m"], options: Options, graded: bool, weights: Tensor | None
) -> Float[Tensor, " m"]:
    """The losses of some rows whose products W h + b are given, in fp32 or wider.

    graded: put the gradients of the losses, times `weights`, in place of the products.
    """
    wide, cap, smoothing = torch.promote_types(z.dtype, torch.float32), options.softcap, options.label_smoothing
    if triton.available(z):
        from deltalab.kernels.triton.cross_entropy import row_losses as at_once

        return at_once(z, targets, weights, softcap=cap, scale=options.scale, smoothing=smoothing, graded=graded)
    u = z.to(wide)
    if options.scale != 1:
        u = u * options.scale
    if cap is not None:
        bent = torch.tanh(u / cap)
        u = bent * cap
    p, at = u.softmax(-1), targets[:, None]
    # the largest p is 1 / Σ exp(z − max z): a sum that needs no second pass of exp, and is never zero
    picked = u.gather(-1, at).squeeze(-1)
    losses = (u.amax(-1) - picked) - p.amax(-1).log()  # of large logits the difference is exact
    if smoothing:
        losses += smoothing * (picked - u.mean(-1))
    if not graded:
        return losses
    p.scatter_add_(-1, at, p.new_full(at.shape, smoothing - 1))
    if smoothing:
        p -= smoothing / z.shape[-1]
    if cap is not None:
        p *= 1 - bent.square()
    if options.scale != 1:
        p *= options.scale
    if weights is not None:
        p *= weights[:, None]
    z.copy_(p)
    return losses


def _chunks(n: int, W: Tensor, rows: int | None) -> Iterator[slice]:
    """The rows in chunks of nearly equal size."""
    most = rows or max(ROWS, CHUNK // (len(W) * W.element_size()))
    pieces = -(-n // most)
    for i in range(pieces):
        yield slice(n * i // pieces, n * (i + 1) // pieces)


def _blocks(z: Tensor) -> Iterator[slice]:
    n, v = z.shape
    size = max(1, BLOCK[z.device.type] // (4 * v)) if z.device.type in BLOCK else max(1, n)
    for start in range(0, n, size):
        yield slice(start, start + size)


def _add_product(total: Tensor, z: Tensor, h: Tensor) -> None:
    """total += zᵀ h. Of 16-bit products a band of rows at a time: they do not fit where the sum is kept."""
    if total.dtype == z.dtype:
        total.addmm_(z.mT, h)
        return
    size = max(1, CHUNK // (4 * h.shape[1]))
    for start in range(0, len(total), size):
        band = slice(start, start + size)
        total[band] += z[:, band].mT @ h


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None,
                options: Options, reduction: Reduction, graded: bool) -> Tensor:  # fmt: skip
        head, dtype = Head(hidden, W, bias, targets, rows), computing(hidden)
        wanted = ctx.needs_input_grad[:3] if graded else NOTHING
        # of a sum over rows that are weighed only later, the head's gradient has to wait
        again = reduction == "none" and any(wanted[1:])
        weights = mean_weights(head, dtype) if reduction == "mean" else None
        with torch.autocast(hidden.device.type, enabled=False):
            losses, gradients = sweep(head, options, dtype, NOTHING if again else wanted, weights)
        ctx.shape, ctx.dtypes = hidden.shape, (hidden.dtype, W.dtype, None if bias is None else bias.dtype)
        ctx.options, ctx.dtype, ctx.reduction, ctx.again = options, dtype, reduction, again
        ctx.save_for_backward(*(head if again else (*gradients, rows)))
        if reduction != "none":
            total = losses.sum()
            return total if reduction == "sum" else total / len(losses)
        return losses if rows is None else losses.new_zeros(len(hidden)).index_copy_(0, rows, losses)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, rows = ctx.saved_tensors
        if ctx.reduction == "none" and rows is not None:
            grad = grad[rows]
        if ctx.again:
            hidden, W, bias, targets = saved
            with torch.autocast(grad.device.type, enabled=False):
                _, gradients = sweep(
                    Head(hidden, W, bias, targets, rows), ctx.options, ctx.dtype, ctx.needs_input_grad[:3], grad
                )
            factor: Tensor | None = None
        else:
            gradients, factor = Gradients(*saved), grad
        dh, dW, db = (_scaled(t, factor, dtype) for t, dtype in zip(gradients, ctx.dtypes, strict=True))
        if dh is not None and rows is not None:
            dh = dh.new_zeros(ctx.shape).index_copy_(0, rows, dh)
        return dh, dW, db, None, None, None, None, None


def mean_weights(head: Head, dtype: torch.dtype) -> Float[Tensor, " m"]:
    """1 / m: part of the gradients before they are rounded, as in torch's own mean."""
    m = len(head.hidden) if head.rows is None else len(head.rows)
    return head.hidden.new_full((m,), 1 / max(m, 1), dtype=torch.promote_types(dtype, torch.float32))


def _scaled(t: Tensor | None, factor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """t times a number, or a number a row, in `dtype`: rounded once."""
    if t is None or dtype is None or factor is None:
        return t if t is None or dtype is None else t.to(dtype)
    wide = torch.promote_types(t.dtype, torch.float32)
    by = factor[:, None] if factor.dim() else factor.expand(len(t), *[1] * (t.dim() - 1))
    out = torch.empty_like(t, dtype=dtype)
    size = max(1, BLOCK.get(t.device.type, CHUNK) * len(t) // (4 * max(t.numel(), 1)))
    for start in range(0, len(t), size):  # in bands, for the sake of what is between
        band = slice(start, start + size)
        out[band] = t[band].to(wide) * by[band]
    return out
