"""Linear maps of one input, each with a low-rank change or none, as one step of autograd.

    yᵢ = tᵢ ⊙ (Wᵢ x + sᵢ · Bᵢ Aᵢ dᵢ(x)) + bᵢ,     d dropout, t a stretch of the rows or 1

W and b are frozen. Kept for the backward are x, once for all maps, the rank-r products A d(x), and which entries were
dropped; with a stretch also what it stretches. An x that a norm has just made is not kept either: it is made again from what
the norm keeps (`Recipe`). Products of rank r are formed as (r, tokens) and against Bᵀ, which is up to four times as fast
as the other way round; everything adds into one output and one gradient of x.
The parameters' dtype may be wider than that of the computation: they are cast at use.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from deltalab.core.shapes import Float
from deltalab.kernels.dropout import Dropped, draw, dropout


class LowRank(NamedTuple):
    """The change of one linear map. stretch: (out,), m / ‖V‖ of DoRA. p: dropout of the change's input."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    s: float
    p: float = 0.0
    stretch: Float[Tensor, " out"] | None = None


class Map(NamedTuple):
    """One linear map. weight: W (out, in) in the dtype asked for; asked again in the backward, so codes stay codes."""

    weight: Callable[[torch.dtype], Tensor]
    bias: Float[Tensor, " out"] | None
    low: LowRank | None


class Recipe(Protocol):
    """How an input is made again from tensors that something else keeps anyway."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What is to be saved."""

    def again(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The input, from these tensors, in the dtype that it had."""


def linears(x: Float[Tensor, "*lead in"], maps: Sequence[Map], recipe: Recipe | None = None) -> tuple[Tensor, ...]:
    """The outputs of `maps`, each (..., out), in x's dtype or that of autocast. recipe: of x."""
    tensors = [t for m in maps for t in tensors_of(m)]
    static = [(m.weight, None if m.low is None else (m.low.s, m.low.p)) for m in maps]
    return _Linears.apply(x, static, recipe, *tensors)  # type: ignore[no-untyped-call, no-any-return]


def plain_linears(x: Float[Tensor, "*lead in"], maps: Sequence[Map]) -> tuple[Tensor, ...]:
    """The same by torch's own operations."""
    outputs = []
    for m in maps:
        y = F.linear(x, m.weight(x.dtype))
        if m.low is not None:
            A, B = m.low.A.to(x.dtype), m.low.B.to(x.dtype)
            y = y + m.low.s * F.linear(F.linear(dropout(x, m.low.p), A), B)
            if m.low.stretch is not None:
                y = y + (m.low.stretch - 1).to(y.dtype) * y
        outputs.append(y if m.bias is None else y + m.bias.to(y.dtype))
    return tuple(outputs)


class Kept(NamedTuple):
    """Of one map between forward and backward. low: (r, tokens). z: what is stretched."""

    low: Tensor | None = None
    z: Tensor | None = None
    dropped: Tensor | None = None


FIELDS = 4
"""Tensors of a map, see `tensors_of`."""


def tensors_of(m: Map) -> tuple[Tensor | None, ...]:
    return (m.bias, None, None, None) if m.low is None else (m.bias, m.low.A, m.low.B, m.low.stretch)


def maps_of(static: Sequence[Any], tensors: Sequence[Tensor | None]) -> list[Map]:
    """`Map`s again from what a Function was given."""
    found = []
    for i, (weight, numbers) in enumerate(static):
        bias, A, B, stretch = tensors[FIELDS * i : FIELDS * (i + 1)]
        low = None if numbers is None else LowRank(A, B, numbers[0], numbers[1], stretch)  # type: ignore[arg-type]
        found.append(Map(weight, bias, low))
    return found


def ahead(m: Map, x: Float[Tensor, "tokens in"]) -> tuple[Float[Tensor, "tokens out"], Kept]:
    """y of one map."""
    bias = None if m.bias is None else m.bias.to(x.dtype)
    W = m.weight(x.dtype)
    if m.low is None:
        return F.linear(x, W, bias), Kept()
    low, stretch = m.low, m.low.stretch
    dropped = draw(x, low.p) if low.p else None
    y = F.linear(x, W, bias if stretch is None else None)
    down = low.A.to(x.dtype) @ (x if dropped is None else dropped.zeroed(x)).mT
    y.addmm_(down.mT, _up(low, x.dtype), alpha=low.s / (1 - low.p))
    at = None if dropped is None else dropped.at
    if stretch is None:
        return y, Kept(down, None, at)
    stretched = torch.addcmul(y, y, (stretch - 1).to(x.dtype))
    return stretched if bias is None else stretched.add_(bias), Kept(down, y, at)


class Gradients(NamedTuple):
    """Of one map: of x, what was there before included, and of A, B and the stretch."""

    x: Tensor | None
    A: Tensor | None = None
    B: Tensor | None = None
    stretch: Tensor | None = None


def back(
    m: Map, kept: Kept, x: Float[Tensor, "tokens in"], dy: Float[Tensor, "tokens out"], dx: Tensor | None, wanted: bool
) -> Gradients:
    """dx: of the maps before, which this one adds to in place. wanted: whether there is to be one."""
    low = m.low
    if low is None or kept.low is None:
        return Gradients(_product(dy, m, dx) if wanted else None)
    d_stretch = None
    if low.stretch is not None and kept.z is not None:
        d_stretch = (dy * kept.z).sum(0, dtype=low.stretch.dtype)
        dy = torch.addcmul(dy, dy, (low.stretch - 1).to(dy.dtype))
    dropped, s = None if kept.dropped is None else Dropped(kept.dropped), low.s / (1 - low.p)
    d_low = (_up(low, dy.dtype) @ dy.mT).mul_(s)  # (r, tokens)
    dB = ((kept.low @ dy).to(low.B.dtype) * s).mT
    dA = (d_low @ (x if dropped is None else dropped.zeroed(x))).to(low.A.dtype)
    if wanted:
        dx, A = _product(dy, m, dx), low.A.to(dy.dtype)
        dx = dx.addmm_(d_low.mT, A) if dropped is None else dx.add_(dropped.zero_(d_low.mT @ A))
    return Gradients(dx, dA, dB, d_stretch)


def _product(dy: Tensor, m: Map, dx: Tensor | None) -> Tensor:
    """dy W, added to dx where there is one."""
    W = m.weight(dy.dtype)
    return dy @ W if dx is None else dx.addmm_(dy, W)


def _up(low: LowRank, dtype: torch.dtype) -> Float[Tensor, "r out"]:
    """Bᵀ, contiguous."""
    return low.B.mT.to(dtype, memory_format=torch.contiguous_format)


def computing(x: Tensor) -> torch.dtype:
    """The dtype of the computation: autocast's where it is on."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


class Saved:
    """What a Function saves: an input by its recipe or itself, the maps' tensors and what was kept of them."""

    @staticmethod
    def of(ctx: Any, x: Tensor, recipe: Recipe | None, tensors: Sequence[Tensor | None], kept: Sequence[Kept],
           *more: Tensor) -> None:  # fmt: skip
        made = (x,) if recipe is None else recipe.tensors
        ctx.recipe, ctx.counts = recipe, (len(made), len(tensors), len(kept))
        ctx.save_for_backward(*made, *tensors, *(t for k in kept for t in k), *more)

    @staticmethod
    def back(ctx: Any) -> tuple[Tensor, list[Tensor | None], list[Kept], list[Tensor]]:
        made, tensors, kept = ctx.counts
        saved = list(ctx.saved_tensors)
        x = saved[0] if ctx.recipe is None else ctx.recipe.again(saved[:made]).flatten(0, -2).to(ctx.dtype)
        rest, width = saved[made + tensors :], len(Kept._fields)
        ks = [Kept(*rest[width * i : width * (i + 1)]) for i in range(kept)]
        return x, saved[made : made + tensors], ks, rest[width * kept :]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, static: list[Any], recipe: Recipe | None, *tensors: Tensor | None) -> Any:
        dtype = computing(x)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            outputs, kept = zip(*(ahead(m, flat) for m in maps_of(static, tensors)), strict=True)
        ctx.static, ctx.shape, ctx.dtype, ctx.given = static, x.shape, dtype, x.dtype
        ctx.set_materialize_grads(False)
        Saved.of(ctx, flat, recipe, tensors, kept)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, tensors, kept, _ = Saved.back(ctx)
        dx: Tensor | None = None
        found: list[Tensor | None] = []
        with torch.autocast(x.device.type, enabled=False):
            for m, k, dy in zip(maps_of(ctx.static, tensors), kept, grads, strict=True):
                if dy is None:
                    found += [None] * FIELDS
                    continue
                dx, *of_low = back(m, k, x, dy.reshape(-1, dy.shape[-1]).to(ctx.dtype), dx, ctx.needs_input_grad[0])
                found += [None, *of_low]
        return None if dx is None else dx.view(ctx.shape).to(ctx.given), None, None, *found
