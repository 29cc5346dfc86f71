"""Linears that bitsandbytes quantised, as transformers puts them into a model: what their codes stand for.

    4 bits   Ŵ = table[code] · absmax, NF4 or FP4, see `deltalab.quant.nf4`
    8 bits   Ŵ = code · absmax / 127, absmax one a row: LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339, eq. 1)

Nothing here imports bitsandbytes: where no one did, there is no such linear.
"""

import sys
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.modules import modules
from deltalab.core.shapes import Float
from deltalab.quant.nf4 import NF4, dequantise_plainly
from deltalab.quant.nf4_linear import NF4Linear

Kind = Literal["nf4", "fp4", "int8"]
LANES = 32
"""Rows that bitsandbytes lays side by side where it prepares codes for AVX-512."""


def kind(linear: nn.Module) -> Kind | None:
    """How bitsandbytes quantised a linear; None if it did not, or has not yet."""
    bnb: Any = sys.modules.get("bitsandbytes")
    if bnb is None or not isinstance(linear, nn.Linear):
        return None
    if isinstance(linear, bnb.nn.Linear4bit):
        state = _state(linear)
        return None if state is None else state.quant_type
    return "int8" if isinstance(linear, bnb.nn.Linear8bitLt) and linear.weight.dtype is torch.int8 else None


def dtype_of(linear: nn.Module) -> torch.dtype:
    """The dtype of `weight_of`: of 4 bits that of the weight before; of 8 bits fp32, since no other is kept."""
    if kind(linear) == "int8":
        return torch.float32
    state = _state(linear)
    dtype: torch.dtype = state.original_dtype if _is_packed(state) else state.dtype
    return dtype


def weight_of(linear: nn.Module) -> Float[Tensor, "out in"]:
    """Ŵ, made anew at each call, of a linear that `kind` knows."""
    what: Any = linear
    if kind(linear) == "int8":
        scale = what.state.SCB if what.weight.SCB is None else what.weight.SCB
        W8: Tensor = what.weight.data * scale.view(-1, 1) * 7.874015718698502e-3  # 1 / 127, as bitsandbytes rounds it
        return W8
    kept, dtype = _kept(linear), dtype_of(linear)
    if kind(linear) == "nf4":
        W = kept.weight(dtype)
    else:
        values = _state(linear).code
        W = dequantise_plainly(kept.codes, kept.scales(), kept.blocksize, kept.shape, dtype, values)
    return W if W.shape == (what.out_features, what.in_features) else W.mT


def require_read(model: nn.Module) -> None:
    """Raises: UserError if transformers quantised the model in a way that is not read here: its linears may look like any
    other, and their weights are not what they hold.
    """
    said = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(said, "quant_method", "bitsandbytes")
    method = getattr(method, "value", method)
    if method != "bitsandbytes":
        raise UserError(
            f"this {type(model).__name__} is quantised by {method}, whose weights are not read here.",
            next="load the model that it was made from, with deltalab.load(name, quantize='nf4') if it should be small",
        )


def hold(model: nn.Module) -> None:
    """Keep the codes of a model's 4-bit linears as they are while it computes.

    On a CPU that multiplies bf16, bitsandbytes lays them out anew in the first evaluation without gradients, rounds the
    scales to bf16 for good, and gives no gradient to what is below from then on. Where that has happened, the linears get
    their layout back, and keep the scales that they have.
    """
    for linear in modules(model):
        if kind(linear) not in ("nf4", "fp4"):
            continue
        what, state = cast(Any, linear), _state(linear)
        what.support_avx512bf16_for_cpu = False
        if _is_packed(state):
            kept = _kept(linear)
            what.weight.data, state.absmax, state.dtype = kept.codes, kept.absmax, state.original_dtype
            state.packing_format_for_cpu = False


def settle(model: nn.Module) -> None:
    """Tell a model, some of whose linears are plain again, which these are: what loads its saved form goes by its config."""
    what: Any = model
    said = getattr(getattr(model, "config", None), "quantization_config", None)
    if said is None or getattr(said, "quant_method", None) != "bitsandbytes":
        return
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = [path for path, linear in linears.items() if kind(linear) is None]
    if len(left) < len(linears):
        said.llm_int8_skip_modules = left
        return
    what.hf_quantizer.remove_quantization_config(model)
    what.is_loaded_in_4bit = what.is_loaded_in_8bit = False


def own(linear: nn.Module) -> NF4Linear:
    """The same codes, in a linear of the lab's own; it shares their memory.

    Raises: UserError for codes that the lab has no linear for.
    """
    what: Any = linear
    state = _state(linear) if kind(linear) == "nf4" else None
    if state is None or tuple(state.shape) != (what.out_features, what.in_features):
        raise UserError(
            f"a {type(linear).__name__} of bitsandbytes keeps codes that are read here, and not made.",
            found=str(kind(linear)),
            next="load the model that it was made from, with quantize='nf4'",
        )
    return NF4Linear(_kept(linear), what.bias, dtype_of(linear)).train(linear.training)


def _state(linear: Any) -> Any:
    """bitsandbytes' `QuantState` of a 4-bit linear; some tools that move parameters lose it from the weight."""
    state = getattr(linear.weight, "quant_state", None)
    return linear.quant_state if state is None else state


def _kept(linear: Any) -> NF4:
    """The tensors of a 4-bit linear, FP4's too."""
    state = _state(linear)
    if _is_packed(state):
        return NF4(_laid_back(linear.weight.data, state), state.absmax.mT.float().reshape(-1), None, None, None,
                   state.blocksize, tuple(state.shape))  # fmt: skip
    codes = linear.weight.data.contiguous().view(torch.uint8).reshape(-1, 1)
    kept = NF4(codes, state.absmax, None, None, None, state.blocksize, tuple(state.shape))
    if not state.nested:
        return kept
    return kept._replace(nested_absmax=state.state2.absmax, nested_map=state.state2.code, offset=state.offset)


def _is_packed(state: Any) -> bool:
    """Whether the codes are in the layout for AVX-512, and the scales in bf16."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def _laid_back(packed: Tensor, state: Any) -> Tensor:
    """The codes two a byte, of the layout for AVX-512: two inputs of 32 rows at a time, the halves of 32 bytes one after
    the other.
    """
    out, in_ = state.shape
    lanes = packed.reshape(-1, LANES)
    codes = torch.cat([lanes & 15, lanes >> 4], -1).view(out // LANES, in_ // 2, LANES, 2).transpose(1, 2)
    return (codes[..., 0] << 4 | codes[..., 1]).reshape(-1, 1)
