"""Group quantisation: a row's inputs in groups of g neighbours, each group's weights as codes between its ends.

    Ŵ = scale · code + offset,   code = 0 … 2^bits − 1,   scale = (max − min) / (2^bits − 1),   offset = min

scale and offset are one value a (row, group), in fp32 or wider, so an entry is at most scale / 2 away from its weight.
The offset is the zero factor β of QA-LoRA (Xu et al. 2023, arXiv:2309.14717): a change of the weight that is
constant within groups is added to it and to nothing else. A zero point counted in steps, scale · (code − zero), would
have to divide such a change by the scale, which may be tiny, or zero where a group is constant.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float, UInt8
from deltalab.quant import strips

GROUP = 32
"""The largest group that is taken where none is asked for: the group size of QA-LoRA's paper."""
LEAST = 8
"""The smallest one: below it scale and offset take more memory than the codes that they save."""


class Quantised(NamedTuple):
    """A weight as codes, one a byte."""

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    offset: Float[Tensor, "out groups"]


def quantise(W: Float[Tensor, "out in"], bits: int, group: int) -> Quantised:
    """The codes of W, on the meta device their shapes alone. Quantising what `dequantise` gives finds the same codes again.

    Raises: UserError if `group` does not divide the number of inputs, or an entry is not finite.
    """
    require_group(W.shape[1], group)
    parts = W.to(torch.promote_types(W.dtype, torch.float32)).unflatten(1, (-1, group))
    if not parts.is_meta and not bool(parts.isfinite().all()):
        raise UserError("a weight that is not finite cannot be quantised.", found=f"a matrix {tuple(W.shape)}")
    low, high = parts.aminmax(dim=-1)
    scale = (high - low) / (2**bits - 1)
    steps = torch.where(scale > 0, scale, 1)  # a constant group is its offset
    codes = ((parts - low[..., None]) / steps[..., None]).round().clamp(0, 2**bits - 1)
    return Quantised(codes.flatten(1).to(torch.uint8), scale, low)


def dequantise(
    codes: UInt8[Tensor, "out in"], scale: Float[Tensor, "out groups"], offset: Float[Tensor, "out groups"]
) -> Float[Tensor, "out in"]:
    """Ŵ, in the scale's dtype."""
    parts = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
    return parts.mul_(scale[..., None]).add_(offset[..., None]).flatten(1)


def times(
    packed: UInt8[Tensor, "out bytes"], bits: int, scale: Float[Tensor, "out groups"], offset: Float[Tensor, "out groups"],
    x: Float[Tensor, "*lead in"],
) -> Float[Tensor, "*lead out"]:  # fmt: skip
    """Ŵ x in the scale's dtype, without Ŵ, for codes of 8 bits, or of 4 in even groups; for a few tokens.

        y = Σ_g scale_g Σ_i (code_i − h) x_i + (offset_g + h · scale_g) Σ_i x_i,     h = 2^(bits − 1)

    sums over the groups g of a row and the inputs i of a group: codes round zero cancel least. Of two codes a byte those of
    even inputs and those of odd ones have a sum each, and nothing is put in order again.
    """
    rows = x.reshape(-1, x.shape[-1]).to(scale.dtype)
    out, groups = scale.shape
    middle = 1 << bits - 1
    sums = rows.unflatten(1, (groups, -1)).sum(-1)
    halves = [rows] if bits == 8 else [rows[:, ::2].contiguous(), rows[:, 1::2].contiguous()]
    parts = []
    high = strips.height(rows)
    for codes, scales, low in zip(packed.split(high), scale.split(high), offset.split(high), strict=True):
        part = F.linear(sums, low + middle * scales)
        for half, own in zip(halves, [codes] if bits == 8 else [codes & 15, codes >> 4], strict=True):
            signed = own.sub(middle).view(torch.int8).view(len(own), groups, -1)
            part += F.linear(half, signed.to(scales.dtype).mul_(scales[..., None]).flatten(1))
        parts.append(part)
    return torch.cat(parts, -1).view(*x.shape[:-1], out)


def pack(codes: UInt8[Tensor, "out in"], bits: int) -> UInt8[Tensor, "out bytes"]:
    """Codes as they are kept: of 4 bits two a byte, the first in the low half; an odd row ends with an empty half."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: UInt8[Tensor, "out bytes"], bits: int, in_features: int) -> UInt8[Tensor, "out in"]:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :in_features]


def default_group(in_features: int) -> int:
    """The largest group that divides the inputs, at most GROUP, of at least two groups a row.

    Raises: UserError if it would be below LEAST.
    """
    half = max(in_features // 2, 1)
    largest = max(g for g in range(1, min(GROUP, half) + 1) if in_features % g == 0)
    if largest < min(LEAST, half):
        raise UserError(
            f"{in_features} inputs fall into no equal groups of {LEAST} to {GROUP}.",
            found=f"the divisors of {in_features}: {_divisors(in_features)}",
            next="choose one of them as group_size",
        )
    return largest


def require_group(in_features: int, group: int) -> None:
    """Raises: UserError if groups of `group` do not fill the inputs."""
    if group < 1 or in_features % group:
        raise UserError(
            f"groups of {group} do not divide {in_features} inputs.",
            nearest=_divisors(in_features),
            next="choose a group_size that divides the inputs of every matrix",
        )


def _divisors(n: int) -> list[str]:
    return [str(g) for g in range(1, n + 1) if n % g == 0]
