"""RMS norm and layer norm that keep their input and one or two numbers a row.

    y = w ⊙ (x − μ) / √(mean (x − μ)² + ε) + b,     μ the mean of the row, or 0 in an RMS norm

torch and transformers keep several copies in fp32. What comes out can be made again from what is kept (`Made`), so that a
linear map behind the norm need not keep its input either. Statistics are in fp32, or fp64 for fp64.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltalab.core.shapes import Float
from deltalab.kernels import triton


class Norm(NamedTuple):
    """eps: ε. centred: a layer norm. plus: what is added to w, 1 in the models of gemma."""

    eps: float
    centred: bool = False
    plus: float = 0.0


def norm(
    x: Float[Tensor, "*lead n"], w: Float[Tensor, " n"] | None, b: Float[Tensor, " n"] | None, kind: Norm
) -> tuple[Float[Tensor, "*lead n"], "Made"]:
    """y in x's dtype, and how it is made again."""
    y, mean, scale = _Norm.apply(x, w, b, kind)  # type: ignore[no-untyped-call]
    detached = [None if t is None else t.detach() for t in (x, mean, scale, w, b)]
    return y, Made(kind, tuple(detached))


def plain_norm(
    x: Float[Tensor, "*lead n"], w: Float[Tensor, " n"] | None, b: Float[Tensor, " n"] | None, kind: Norm
) -> Float[Tensor, "*lead n"]:
    """The same by torch's own operations."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True) if kind.centred else wide
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + kind.eps)
    if w is not None:
        y = y * (w.to(y.dtype) + kind.plus)
    return (y if b is None else y + b.to(y.dtype)).to(x.dtype)


class Made(NamedTuple):
    """The output of a norm, as a `Recipe`: x, its rows' means and scales, w and b."""

    kind: Norm
    tensors: tuple[Tensor | None, ...]

    def again(self, tensors: Sequence[Tensor | None]) -> Tensor:
        x, mean, scale, w, b = tensors
        return _applied(cast(Tensor, x), mean, cast(Tensor, scale), w, b, self.kind)


def _statistics(x: Tensor, kind: Norm) -> tuple[Tensor | None, Tensor]:
    """μ, None where it is 0, and 1 / √(… + ε): (..., 1) each."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if kind.centred:
        variance, mean = torch.var_mean(x.to(wide), -1, correction=0, keepdim=True)
        return mean, torch.rsqrt(variance + kind.eps)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
    return None, square.div_(max(x.shape[-1], 1)).add_(kind.eps).rsqrt_()


def _applied(x: Tensor, mean: Tensor | None, scale: Tensor, w: Tensor | None, b: Tensor | None, kind: Norm) -> Tensor:
    """y, of the dtype of x."""
    if b is None and _at_once(x, kind):
        from deltalab.kernels.triton.rms_norm import rms_norm_again

        return rms_norm_again(triton.rows(x), w, triton.rows(scale), kind.plus).view(x.shape)
    y = _straight(x, mean, scale)
    if w is not None:
        y.mul_(_weight(w, kind, y.dtype))
    if b is not None:
        y.add_(b.to(y.dtype))
    return y.to(x.dtype)


def _at_once(x: Tensor, kind: Norm) -> bool:
    """Whether Triton's kernels norm these rows."""
    return not kind.centred and x.shape[-1] <= triton.ROW and triton.available(x)


def _straight(x: Tensor, mean: Tensor | None, scale: Tensor) -> Tensor:
    """(x − μ) · scale, in the wider dtype of the statistics; a new tensor."""
    return x * scale if mean is None else torch.sub(x, mean).mul_(scale)


def _weight(w: Tensor, kind: Norm, dtype: torch.dtype) -> Tensor:
    return w.to(dtype) + kind.plus if kind.plus else w.to(dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, kind: Norm) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            if b is None and _at_once(x, kind):
                from deltalab.kernels.triton.rms_norm import rms_norm

                y, scale = rms_norm(triton.rows(x), w, kind.eps, kind.plus)
                mean, y, scale = None, y.view(x.shape), scale.view(*x.shape[:-1], 1)
            else:
                mean, scale = _statistics(x, kind)
                y = _applied(x, mean, scale, w, b, kind)
        ctx.kind = kind
        ctx.save_for_backward(x, mean, scale, w)
        ctx.mark_non_differentiable(*(t for t in (mean, scale) if t is not None))
        ctx.set_materialize_grads(False)
        return y, mean, scale

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        x, mean, scale, w = ctx.saved_tensors
        dx = dw = db = None
        if not ctx.needs_input_grad[2] and _at_once(x, ctx.kind):
            from deltalab.kernels.triton.rms_norm import rms_norm_back

            trained = ctx.needs_input_grad[1]
            flat = (triton.rows(dy), triton.rows(x), w, triton.rows(scale))
            dx, dw = rms_norm_back(*flat, ctx.kind.plus, trained)
            return dx.view(x.shape), None if dw is None else dw.to(w.dtype), None, None
        with torch.autocast(x.device.type, enabled=False):
            straight = _straight(x, mean, scale)
            if ctx.needs_input_grad[1]:
                dw = (dy * straight).flatten(0, -2).sum(0).to(w.dtype)
            if ctx.needs_input_grad[2]:
                db = dy.flatten(0, -2).sum(0, dtype=straight.dtype)
            if ctx.needs_input_grad[0]:
                grad = dy.to(straight.dtype) if w is None else dy * _weight(w, ctx.kind, straight.dtype)
                along = torch.linalg.vecdot(grad, straight).unsqueeze(-1) / max(x.shape[-1], 1)
                dx = torch.addcmul(grad, straight, along, value=-1)
                if ctx.kind.centred:
                    dx.sub_(grad.mean(-1, keepdim=True))
                dx = dx.mul_(scale).to(x.dtype)
        return dx, dw, db, None
