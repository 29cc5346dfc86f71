"""bitsandbytes as the live reference for the tests."""

import bitsandbytes as bnb
import bitsandbytes.functional
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from torch import Tensor

from deltalab.quant.nf4 import NF4

CODES = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")


def bits(tensor: Tensor) -> Tensor:
    """A float's bits: -0.0 is not 0.0."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, in shape and dtype too."""
    return a.dtype is b.dtype and torch.equal(bits(a), bits(b))


def quantised(W: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4:
    """What bitsandbytes makes of W, in the lab's names."""
    codes, state = bnb.functional.quantize_4bit(
        W, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    kept = NF4(codes, state.absmax, None, None, None, state.blocksize, tuple(state.shape))
    if not double_quant:
        return kept
    return kept._replace(nested_absmax=state.state2.absmax, nested_map=state.state2.code, offset=state.offset)


def dequantised(kept: NF4, dtype: torch.dtype) -> Tensor:
    """What bitsandbytes makes of the codes, in torch: its kernel for AVX-512 is wrong where a block goes over a row's end."""
    absmax = kept.absmax
    if kept.nested_absmax is not None:
        state = bitsandbytes.functional.QuantState(kept.nested_absmax, code=kept.nested_map, blocksize=256, dtype=torch.float32)  # fmt: skip
        absmax = bnb.functional.dequantize_blockwise(kept.absmax, state) + kept.offset
    return _dequantize_4bit_compute(kept.codes.reshape(-1), absmax, CODES, kept.blocksize, kept.shape, dtype)
