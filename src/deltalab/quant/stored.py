"""Quantised linears as they stand in a file: tensors by their key after the linear's path.

Of a linear quantised in groups:

    weight                          the codes, (n, 1)
    weight.scale, weight.offset     (out, groups)

The codes go by the weight's name in a shape that no weight has: a loader that does not know them stops, where without
that name it would find no weight and draw a new one. Of a linear in NF4 bitsandbytes' tensors, `NF4Linear.to_bnb`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.quant.base import QuantisedLinear
from deltalab.quant.linear import BITS, GroupLinear
from deltalab.quant.nf4_linear import STATE, NF4Linear

GROUP_KEYS = ("weight", "weight.scale", "weight.offset")
NF4_KEYS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", STATE)
KEYS = tuple(dict.fromkeys(GROUP_KEYS + NF4_KEYS))
"""Every key that a quantised linear may have in a file, but its bias."""


def kind(linear: QuantisedLinear) -> str:
    """How a linear is quantised, by the name that a user gives it."""
    if isinstance(linear, NF4Linear):
        return "nf4"
    if isinstance(linear, GroupLinear):
        return next(name for name, bits in BITS.items() if bits == linear.bits)
    raise NotImplementedError(type(linear).__name__)


def stored(linear: QuantisedLinear) -> dict[str, Tensor]:
    """What a file holds of a linear, but its bias: for the most part views of what it keeps."""
    if isinstance(linear, NF4Linear):
        return linear.to_bnb()
    if isinstance(linear, GroupLinear):
        return dict(zip(GROUP_KEYS, (linear.codes.reshape(-1, 1), linear.scale, linear.offset), strict=True))
    raise NotImplementedError(type(linear).__name__)


def restored(
    name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: nn.Parameter | None, dtype: torch.dtype
) -> QuantisedLinear:
    """The linear that `stored` gave these tensors of, bitwise; name: its `kind`, shape: (out, in).

    Raises: UserError if tensors are missing, or are those of another shape.
    """
    if name == "nf4":
        linear: QuantisedLinear = NF4Linear.from_bnb(tensors, bias, dtype)
    elif name in BITS:
        linear = _grouped(BITS[name], tensors, shape, bias, dtype)
    else:
        raise UserError(f"'{name}' is no quantisation.", nearest=["nf4", *BITS])
    if (linear.out_features, linear.in_features) != shape:
        raise _unfit("codes", shape, found=f"{linear.out_features} × {linear.in_features}")
    return linear


def _grouped(
    bits: int, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: nn.Parameter | None, dtype: torch.dtype
) -> GroupLinear:
    if tensors.keys() != set(GROUP_KEYS):
        raise UserError("a linear quantised in groups is not whole.", found=f"its file has {', '.join(tensors)}",
                        next="copy or download the model again")  # fmt: skip
    codes, scale, offset = (tensors[key] for key in GROUP_KEYS)
    groups = scale.shape[-1]
    if groups == 0 or shape[1] % groups:
        raise _unfit("scale", shape, found=f"{groups} groups a row")
    linear = GroupLinear(torch.empty(shape, dtype=dtype, device="meta"), bias, bits, shape[1] // groups, dtype)
    for key, tensor in (("codes", codes), ("scale", scale), ("offset", offset)):
        blank = getattr(linear, key)
        if tensor.numel() != blank.numel():
            raise _unfit(key, shape, found=f"{tensor.numel()} values in place of {blank.numel()}")
        setattr(linear, key, tensor.reshape(blank.shape).to(blank.dtype))
    return linear


def _unfit(key: str, shape: tuple[int, int], found: str) -> UserError:
    return UserError(
        f"the {key} of a quantised linear is not of a matrix {shape[0]} × {shape[1]}.",
        found=found,
        next="check config.json, or load the model that the weights belong to",
    )
