"""What deltas make of a model's weights: W₀, ΔW and W + ΔW of any module, from the state that `adapt` leaves.

Nothing here writes to a model. Changes are given in fp32 or wider: a 16-bit weight cannot hold them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.shapes import Float, Int
from deltalab.deltas.attach import Adapted
from deltalab.deltas.base import Delta, DeltaSpec, ParameterSpec, WeightDelta, as_stored, shape_of, weight_of, wide
from deltalab.deltas.select import base_modules, model_name

STATE = "_deltalab"
"""Attribute of an adapted model that holds its `Adaptation`; deepcopied with the model."""


@dataclass
class Adaptation:
    """What `adapt` did. was_trainable: requires_grad before. start: CPU copies of the own parameters that train."""

    plan: dict[str, DeltaSpec]
    masks: list[ParameterSpec]
    was_trainable: dict[str, bool]
    start: dict[str, Tensor] = field(default_factory=dict)
    not_saved: set[str] = field(default_factory=set)


def is_adapted(model: nn.Module) -> bool:
    """Whether `adapt` or `load_adapter` was here."""
    return getattr(model, STATE, None) is not None


def adaptation(model: nn.Module) -> Adaptation:
    """What was done to the model. On a plain model: nothing was."""
    return getattr(model, STATE, None) or Adaptation({}, [], {})


def attached(model: nn.Module) -> dict[str, Delta]:
    """Module path -> delta, in model order."""
    return {name: module.delta for name, module in model.named_modules() if isinstance(module, Adapted)}


def base_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter and saved buffer of the base model, as it was loaded."""
    start = adaptation(model).start
    for name, tensor in model.state_dict().items():
        if ".delta." not in name:
            yield name, start.get(name, tensor)


def delta_weight(model: nn.Module, path: str) -> Float[Tensor, "..."]:
    """ΔW of the module at `path`, (out, in), in fp32 or wider; W − W₀ where W itself trains; zeros where neither."""
    module, start = _module(model, path), _start(model, path)
    W = weight_of(module).detach()
    total = (
        torch.zeros(shape_of(module), dtype=wide(W.dtype), device=W.device)
        if start is None
        else W.to(wide(W.dtype)) - start
    )
    delta = _weight_delta(module, path)
    if delta is not None:
        with torch.no_grad():
            total = total + delta.change(W)
    return total


def merged_weight(model: nn.Module, path: str) -> Float[Tensor, "..."]:
    """W + ΔW of the module at `path`, (out, in), in fp32 or wider: never rounded to a 16-bit dtype."""
    module = _module(model, path)
    W = weight_of(module).detach()
    W = W.to(wide(W.dtype))
    delta = _weight_delta(module, path)
    with torch.no_grad():
        return W.clone() if delta is None else delta.adapted(W)


def base_weight(model: nn.Module, path: str) -> Float[Tensor, "..."]:
    """W₀ of the module at `path`, (out, in), in its own dtype: the weight that was loaded."""
    start = _start(model, path)
    W = weight_of(_module(model, path)).detach()
    return W if start is None else start.to(W.dtype)


def delta_entries(model: nn.Module, path: str, index: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """ΔW at flat positions row · in + column, in fp32 or wider; without the dense ΔW where the method allows it.

    Raises: UserError for a position outside the matrix.
    """
    module, start = _module(model, path), _start(model, path)
    W = weight_of(module).detach()
    index = index.to(W.device)
    low, high = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
    shape = shape_of(module)
    if low < 0 or high >= math.prod(shape):
        raise UserError(
            f"entry {low if low < 0 else high} is not in '{path}'.",
            found=f"{math.prod(shape)} entries, shape {shape}",
        )
    values = torch.zeros(index.shape, dtype=wide(W.dtype), device=W.device)
    if start is not None:
        values = W.reshape(-1)[index].to(values.dtype) - start.reshape(-1)[index].to(values.dtype)
    delta = _weight_delta(module, path)
    if delta is not None:
        with torch.no_grad():
            values = values + delta.entries(index, W)
    return values


def _module(model: nn.Module, path: str) -> nn.Module:
    modules = {name: m for name, m in base_modules(model) if isinstance(getattr(m, "weight", None), Tensor)}
    name = path.removesuffix(".weight")
    if name not in modules:
        raise UserError(f"'{path}' is no module with a weight in {model_name(model)}.", nearest=nearest(name, modules),
                        next=f"see every name: deltalab targets {model_name(model)}")  # fmt: skip
    return modules[name]


def _start(model: nn.Module, path: str) -> Tensor | None:
    """W₀ as (out, in) on the weight's device, if W itself trains."""
    starts = adaptation(model).start
    if not starts:
        return None
    module = _module(model, path)
    name = next((n for n, p in model.named_parameters() if p is module.weight), "")  # a tied weight has one name
    if name not in starts:
        return None
    return as_stored(module, starts[name].to(weight_of(module).device))


def _weight_delta(module: nn.Module, path: str) -> WeightDelta | None:
    if not isinstance(module, Adapted):
        return None
    if not isinstance(module.delta, WeightDelta):
        raise UserError(
            f"the delta on '{path}' depends on the input, so it is no change of the weight.",
            found=type(module.delta).__name__,
        )
    return module.delta
