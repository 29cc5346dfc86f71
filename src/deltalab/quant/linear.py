"""A linear whose weight is kept as codes in groups, and what makes one; and the names of every way to quantise."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float, UInt8
from deltalab.quant import strips
from deltalab.quant.base import QuantisedLinear, Quantiser
from deltalab.quant.groups import default_group, dequantise, pack, quantise, require_group, times, unpack
from deltalab.quant.nf4_linear import NF4Quantiser

Quantisation = Literal["nf4", "int4-group", "int8"]
BITS = {"int4-group": 4, "int8": 8}
FEW = 8
"""Tokens up to which the product is one with the codes."""


class GroupKept(NamedTuple):
    """See `GroupLinear`."""

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    in_features: int

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Ŵ."""
        return dequantise(unpack(self.codes, self.bits, self.in_features), self.scale, self.offset).to(dtype)

    def strips(self, height: int, dtype: torch.dtype) -> Iterator[Float[Tensor, "rows in"]]:
        """Ŵ, so many rows at a time."""
        for start in range(0, len(self.codes), height):
            codes, scale, offset = (t[start : start + height] for t in (self.codes, self.scale, self.offset))
            yield GroupKept(codes, scale, offset, self.bits, self.in_features).weight(dtype)

    def product(self, x: Float[Tensor, "*lead in"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "*lead out"]:
        """Ŵ x + b: of up to `FEW` tokens without Ŵ, in the precision of the scales; else by strips."""
        even = self.bits == 8 or self.in_features // self.scale.shape[1] % 2 == 0
        if not even or x.numel() > FEW * self.in_features or torch.is_autocast_enabled("cpu"):
            return strips.product(x, self.strips(strips.height(x), x.dtype), bias)
        y = times(self.codes, self.bits, self.scale, self.offset, x)
        return (y if bias is None else y + bias).to(x.dtype)


class GroupLinear(QuantisedLinear):
    """y = Ŵ x + b with Ŵ group-quantised, see `deltalab.quant.groups`.

    codes: (out, in), or (out, in/2) two a byte. scale, offset: (out, in/group_size), in fp32 or wider whatever the
    module is cast to. bias: a parameter, or None. dtype: of `weight`, that of the model.
    """

    scales = ("scale", "offset")
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

    def kept(self) -> GroupKept:
        return GroupKept(self.codes, self.scale, self.offset, self.bits, self.in_features)

    def scale_dtype(self) -> torch.dtype:
        """fp32, or fp64 for an fp64 model."""
        return torch.promote_types(self.dtype, torch.float32)

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
    """`nf4`, whose group_size is its block size, nested as QLoRA has it; `int4-group` or `int8`.

    Raises: UserError for another name, or a block size that NF4 does not have.
    """
    if name == "nf4":
        return NF4Quantiser() if group_size is None else NF4Quantiser(group_size)
    if name not in BITS:
        raise UserError(f"'{name}' is no quantisation.", nearest=["nf4", *BITS])
    return GroupQuantiser(BITS[name], group_size)
