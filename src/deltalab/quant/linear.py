"""A linear whose weight is kept as codes in groups, and what makes one; and the names of every way to quantise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float, UInt8
from deltalab.quant.base import QuantisedLinear, Quantiser
from deltalab.quant.groups import default_group, dequantise, pack, quantise, require_group, unpack

Quantisation = Literal["int4-group", "int8"]
BITS = {"int4-group": 4, "int8": 8}


class GroupLinear(QuantisedLinear):
    """y = Ŵ x + b with Ŵ group-quantised, see `deltalab.quant.groups`. Ŵ is made anew in each pass, backward included,
    and never kept.

    codes: (out, in), or (out, in/2) two a byte. scale, offset: (out, in/group_size), in fp32 or wider whatever the
    module is cast to. bias: a parameter, or None. dtype: of `weight`, that of the model.
    """

    codes: UInt8[Tensor, "out bytes"]
    group_size: int
    scale: Float[Tensor, "out groups"]
    offset: Float[Tensor, "out groups"]

    def __init__(
        self, W: Float[Tensor, "out in"], bias: nn.Parameter | None, bits: int, group_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.bits, self.group_size, self.dtype = bits, group_size, dtype
        made = quantise(W.detach(), bits, group_size)
        self.register_buffer("codes", pack(made.codes, bits))
        self.register_buffer("scale", made.scale)
        self.register_buffer("offset", made.offset)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Ŵ, made anew at each call."""
        return self._kept().weight(self.dtype)

    def forward(self, x: Float[Tensor, "*lead in"]) -> Float[Tensor, "*lead out"]:
        y: Tensor = _Product.apply(x, self.bias, *self._kept())  # type: ignore[no-untyped-call]
        return y

    def absorb(self, change: Float[Tensor, "out in"]) -> bool:
        """Add a change of the weight that is constant within groups to the offsets: Ŵ + ΔW, codes and scales as they are.

        False, and nothing done, for any other change.
        """
        parts = change.detach().unflatten(1, (-1, self.group_size))
        if not torch.equal(parts, parts[..., :1].expand_as(parts)):
            return False
        self.offset = self.offset + parts[..., 0].to(self.offset.dtype)
        return True

    def requantised(self, W: Float[Tensor, "out in"]) -> "GroupLinear":
        return GroupLinear(W, self.bias, self.bits, self.group_size, self.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}"
        )

    def _kept(self) -> "_Kept":
        return _Kept(self.codes, self.scale, self.offset, self.bits, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to` and its like: the dtype follows, scale and offset are never narrower than fp32."""
        before = self.scale, self.offset
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before[0].device)).dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.scale.dtype is not wide:
            self.scale, self.offset = (t.to(self.scale.device, wide) for t in before)
        return self


class _Kept(NamedTuple):
    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    in_features: int

    def weight(self, dtype: torch.dtype) -> Tensor:
        return dequantise(unpack(self.codes, self.bits, self.in_features), self.scale, self.offset).to(dtype)


class _Product(torch.autograd.Function):
    """Ŵ x + b, keeping for the backward pass the codes in place of Ŵ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, *kept: Any) -> Tensor:
        return F.linear(x, _Kept(*kept).weight(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, codes, scale, offset, *rest = inputs
        ctx.save_for_backward(codes, scale, offset)
        ctx.rest, ctx.dtype, ctx.bias = rest, x.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            W = _Kept(*ctx.saved_tensors, *ctx.rest).weight(grad.dtype)
            grad_x = (grad @ W).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias) if grad.ndim > 1 else grad.to(ctx.bias)
        return grad_x, grad_bias, None, None, None, None, None


@dataclass(frozen=True)
class GroupQuantiser(Quantiser):
    """Groups of `group_size` inputs; None for the largest at most 32 that makes two equal groups or more of a row."""

    bits: int
    group_size: int | None = None

    def group(self, in_features: int) -> int:
        if self.group_size is None:
            return default_group(in_features)
        require_group(in_features, self.group_size)
        return self.group_size

    def round_trip(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return dequantise(*quantise(W, self.bits, self.group(W.shape[1])))

    def linear(self, W: Float[Tensor, "out in"], bias: nn.Parameter | None, dtype: torch.dtype) -> GroupLinear:
        return GroupLinear(W, bias, self.bits, self.group(W.shape[1]), dtype)


def quantiser(name: str, group_size: int | None = None) -> Quantiser:
    """`int4-group` or `int8`. Raises: UserError for another name."""
    if name not in BITS:
        raise UserError(f"'{name}' is no quantisation.", nearest=list(BITS))
    return GroupQuantiser(BITS[name], group_size)
