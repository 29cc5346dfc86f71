"""A linear whose weight is kept as NF4 codes, see `deltalab.quant.nf4`; to and from the tensors of bitsandbytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float, UInt8
from deltalab.quant.base import QuantisedLinear, Quantiser
from deltalab.quant.nf4 import CODES, NESTED_BLOCK, NF4, empty, quantise, require_blocksize

STATE = "weight.quant_state.bitsandbytes__nf4"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class NF4Linear(QuantisedLinear):
    """y = Ŵ x + b with Ŵ in NF4. The blocks that share a scale run over the whole weight, so it has no groups of inputs.

    codes: (out · in / 2, 1), two a byte. absmax: (blocks,), fp32, or nested 8-bit codes with nested_absmax, nested_map
    and offset, see `deltalab.quant.nf4.NF4`; fp32 whatever the module is cast to. bias: a parameter, or None.
    dtype: of `weight`, that of the model.
    """

    scales = ("absmax", "nested_absmax", "nested_map", "offset")
    absmax: Float[Tensor, " blocks"] | UInt8[Tensor, " blocks"]
    nested_absmax: Float[Tensor, " nested"] | None
    nested_map: Float[Tensor, "256"] | None
    offset: Float[Tensor, ""] | None

    def __init__(self, kept: NF4, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        """kept: from `quantise`; from `empty` on the meta device for tensors that are still to come."""
        super().__init__()
        self.out_features, self.in_features = kept.shape
        self.blocksize, self.dtype = kept.blocksize, dtype
        self.register_buffer("codes", kept.codes)
        self.register_buffer("absmax", kept.absmax)
        self.register_buffer("nested_absmax", kept.nested_absmax)
        self.register_buffer("nested_map", None if kept.nested_map is None else kept.nested_map.clone())
        self.register_buffer("offset", kept.offset)
        self.register_parameter("bias", bias)

    @property
    def double_quant(self) -> bool:
        """Whether absmax is nested."""
        return self.nested_absmax is not None

    def kept(self) -> NF4:
        shape = (self.out_features, self.in_features)
        return NF4(self.codes, self.absmax, self.nested_absmax, self.nested_map, self.offset, self.blocksize, shape)

    def requantised(self, W: Float[Tensor, "out in"]) -> "NF4Linear":
        return NF4Linear(quantise(W, self.blocksize, self.double_quant), self.bias, self.dtype)

    def to_bnb(self) -> dict[str, Tensor]:
        """What bitsandbytes keeps of it in a file, but for the bias: `weight`, the tensors of its `QuantState`, and the rest
        of that as JSON in bytes.
        """
        said: dict[str, Any] = {"quant_type": "nf4", "blocksize": self.blocksize}
        said["dtype"] = next((name for name, dtype in DTYPES.items() if dtype is self.dtype), "float32")
        said["shape"] = [self.out_features, self.in_features]
        tensors = {"weight": self.codes, "weight.absmax": self.absmax}
        tensors["weight.quant_map"] = torch.tensor(CODES, device=self.codes.device)
        if self.nested_absmax is not None and self.nested_map is not None and self.offset is not None:
            tensors |= {"weight.nested_absmax": self.nested_absmax, "weight.nested_quant_map": self.nested_map.clone()}
            said |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.offset.item()}
        return tensors | {STATE: torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)}

    @classmethod
    def from_bnb(
        cls, tensors: Mapping[str, Tensor], bias: nn.Parameter | None, dtype: torch.dtype | None = None
    ) -> "NF4Linear":
        """The linear of what `to_bnb` gives, or of what bitsandbytes wrote. dtype: None for the one that is written there.

        Raises: UserError if a tensor is missing or does not fit, or for codes other than NF4.
        """
        said = _state(tensors)
        nested = "nested_blocksize" in said
        names = ["weight", "weight.absmax", "weight.quant_map"]
        names += ["weight.nested_absmax", "weight.nested_quant_map"] if nested else []
        missing = [name for name in names if name not in tensors]
        if missing:
            raise UserError(f"'{missing[0]}' is missing of a weight in NF4.", found=", ".join(tensors))
        if not torch.equal(tensors["weight.quant_map"].float().cpu(), torch.tensor(CODES)):
            raise UserError("'weight.quant_map' is not the table of NF4.")
        if nested and said["nested_blocksize"] != NESTED_BLOCK:
            raise UserError(
                f"the scales are nested in blocks of {said['nested_blocksize']}.", nearest=[str(NESTED_BLOCK)]
            )
        codes = tensors["weight"].contiguous().view(torch.uint8).reshape(-1, 1)  # kept as another dtype for FSDP
        kept = NF4(codes, tensors["weight.absmax"], None, None, None, said["blocksize"], tuple(said["shape"]))
        if nested:
            kept = kept._replace(
                nested_absmax=tensors["weight.nested_absmax"],
                nested_map=tensors["weight.nested_quant_map"],
                offset=torch.tensor(said["nested_offset"], dtype=torch.float32, device=codes.device),
            )
        _require_fit(kept, nested)
        return cls(kept, bias, dtype or DTYPES[said["dtype"]])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize={self.blocksize}, double_quant={self.double_quant}"
        )


def _state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is written beside the tensors. Raises: UserError if it is not there or cannot be read."""
    if STATE not in tensors:
        raise UserError("these tensors are no weight in NF4.", found=", ".join(tensors), nearest=[STATE])
    wanted = {"quant_type", "blocksize", "dtype", "shape"}
    try:
        said = json.loads(bytes(tensors[STATE].cpu().tolist()))
        fits = (
            wanted <= said.keys()
            and said["quant_type"] == "nf4"
            and len(said["shape"]) == 2
            and said["dtype"] in DTYPES
        )
    except (ValueError, AttributeError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"'{STATE}' does not say what a weight in NF4 is.", next="load the model again from its source")
    return cast("dict[str, Any]", said)


def _require_fit(kept: NF4, nested: bool) -> None:
    """Raises: UserError unless the tensors are those of the shape."""
    wanted = empty(kept.shape, kept.blocksize, nested, torch.device("meta"))
    for name, want, got in zip(NF4._fields, wanted, kept, strict=True):
        if not isinstance(want, Tensor) or not isinstance(got, Tensor):
            continue
        if got.shape != want.shape or got.dtype is not want.dtype:
            raise UserError(
                f"the {name} of a weight in NF4 does not fit its shape {kept.shape}.",
                found=f"{tuple(got.shape)} {got.dtype}",
                nearest=[f"{tuple(want.shape)} {want.dtype}"],
            )


@dataclass(frozen=True)
class NF4Quantiser(Quantiser):
    """NF4 in blocks of `blocksize`; double_quant: the scales nested, .37 bits a weight less in blocks of 64."""

    blocksize: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        require_blocksize(self.blocksize)

    def round_trip(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return quantise(W, self.blocksize, self.double_quant).weight(torch.promote_types(W.dtype, torch.float32))

    def linear(self, W: Float[Tensor, "out in"], bias: nn.Parameter | None, dtype: torch.dtype) -> NF4Linear:
        return NF4Linear(quantise(W, self.blocksize, self.double_quant), bias, dtype)
