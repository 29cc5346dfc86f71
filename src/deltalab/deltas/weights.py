"""What deltas make of a model's weights: W₀, ΔW and W + ΔW of any module, from the state that `adapt` leaves.

Nothing here writes to a model. Changes are given in fp32 or wider: a 16-bit weight cannot hold them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.shapes import Float, Int
from deltalab.deltas.attach import attached_to, delta_on
from deltalab.deltas.base import Delta, WeightDelta, shape_of, wide
from deltalab.deltas.fused import Switch
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import SUBLAYERS, Place, base_modules, place, places
from deltalab.deltas.spec import DeltaSpec, ParameterSpec

STATE = "_deltalab"
"""Attribute of an adapted model that holds its `Adaptation`; deepcopied with the model."""


@dataclass(frozen=True)
class Group:
    """One spec and the weights that it adapts, by path."""

    spec: DeltaSpec
    paths: list[str]


class Planned(NamedTuple):
    """What a spec or a file means for one model. names: of the own parameters that train."""

    groups: list[Group]
    masks: list[ParameterSpec]
    names: set[str]


@dataclass
class Adaptation:
    """What `adapt` did, and the adapters that are not active.

    prepared: `mark_of` the base weights that a start had quantised from something else than what was loaded, by path: the
    adapter belongs to these. name: of the active adapter. was_trainable: requires_grad before. start: CPU copies of the
    own parameters that train.
    kernels: what was asked for; switch: of those that run, None for none. parked: the others, by name.
    """

    groups: list[Group]
    masks: list[ParameterSpec]
    was_trainable: dict[str, bool]
    start: dict[str, Tensor] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)
    not_saved: set[str] = field(default_factory=set)
    name: str = "default"
    kernels: str = "auto"
    switch: Switch | None = None
    parked: dict[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> dict[str, DeltaSpec]:
        """Path -> the spec of that weight alone."""
        return {path: spec for group in self.groups for path, spec in group.spec.each(group.paths).items()}


def mark_of(W: Float[Tensor, "out in"]) -> float:
    """u·Wv for fixed random u and v: of two weights it differs by about ‖W − W′‖."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, generator=generator, dtype=torch.float64) for n in W.shape)
    return float(u @ W.detach().double().cpu() @ v)


def is_adapted(model: nn.Module) -> bool:
    """Whether `adapt` or `load_adapter` was here."""
    return getattr(model, STATE, None) is not None


def adaptation(model: nn.Module) -> Adaptation:
    """What was done to the model. On a plain model: nothing was."""
    return getattr(model, STATE, None) or Adaptation([], [], {})


def attached(model: nn.Module) -> dict[str, Delta]:
    """Module path -> delta, in model order."""
    return {path: delta for path, _, delta in attached_to(model)}


def grouped(model: nn.Module) -> list[tuple[Group, dict[str, Delta]]]:
    """Each group with its deltas, as the joint hooks of its spec want them."""
    deltas = attached(model)
    return [(group, {path: deltas[path] for path in group.paths}) for group in adaptation(model).groups]


def base_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter and saved buffer of the base model, as it was loaded."""
    originals = adaptation(model).start
    for name, tensor in model.state_dict().items():
        if ".delta." not in name:
            yield name, originals.get(name, tensor)


def delta_weight(model: nn.Module, path: str) -> Float[Tensor, "..."]:
    """ΔW of the weight at `path`, (out, in), of experts (experts, out, in), in fp32 or wider; zeros where none.

    W − W₀ where W itself trains.
    """
    W, original, delta = _look(model, path)
    if original is None:
        total = torch.zeros(_shape(model, path), dtype=wide(W.dtype), device=W.device)
    else:
        total = W.to(wide(W.dtype)) - original
    if delta is not None:
        with torch.no_grad():
            total = total + delta.change(W)
    return total


def merged_weight(model: nn.Module, path: str) -> Float[Tensor, "..."]:
    """W + ΔW of the weight at `path`, shaped as `delta_weight`, in fp32 or wider: never rounded to a 16-bit dtype.

    Raises: UserError for a weight that is quantised in another way than by groups.
    """
    W, _, delta = _look(model, path)
    if not W.dtype.is_floating_point:
        raise UserError(
            f"'{path}' is kept as codes that are not read as a weight here, so there is no merged weight.",
            found=type(_place(model, path).module).__name__,
            next="merge on the full-precision model: deltalab.load_adapter on deltalab.load(name), then deltalab.merged",
        )
    W = W.to(wide(W.dtype))
    with torch.no_grad():
        return W.clone() if delta is None else delta.adapted(W)


def base_weight(model: nn.Module, path: str) -> Float[Tensor, "..."]:
    """W₀ of the weight at `path`, shaped as `delta_weight`, in its own dtype: the weight that was loaded."""
    W, original, _ = _look(model, path)
    return W if original is None else original.to(W.dtype)


def delta_entries(model: nn.Module, path: str, index: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """ΔW at flat positions of `delta_weight`, in fp32 or wider; without the dense ΔW where the method allows it.

    Raises: UserError for a position outside the matrix.
    """
    W, original, delta = _look(model, path)
    index = index.to(W.device)
    low, high = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
    shape = _shape(model, path)
    if low < 0 or high >= math.prod(shape):
        raise UserError(
            f"entry {low if low < 0 else high} is not in '{path}'.",
            found=f"{math.prod(shape)} entries, shape {shape}",
        )
    values = torch.zeros(index.shape, dtype=wide(W.dtype), device=W.device)
    if original is not None:
        values = W.reshape(-1)[index].to(values.dtype) - original.reshape(-1)[index].to(values.dtype)
    if delta is not None:
        with torch.no_grad():
            values = values + delta.entries(index, W)
    return values


def _place(model: nn.Module, path: str) -> Place:
    """The weight at `path`, whether a delta can sit on it or not."""
    name = path.removesuffix(".weight")
    try:
        held = place(model, name)
    except UserError:
        held = None
    if held is not None and held.kind not in SUBLAYERS:
        return held
    if held is not None and delta_on(held) is not None:
        raise _no_change(path, delta_on(held))
    modules = {name: m for name, m in base_modules(model) if isinstance(getattr(m, "weight", None), Tensor)}
    if name not in modules:
        raise UserError(f"'{path}' is no module with a weight in {model_name(model)}.", nearest=nearest(name, [*modules, *places(model)]),
                        next=f"see every name: deltalab targets {model_name(model)}")  # fmt: skip
    return Place(modules[name], "weight", "linear")


def _shape(model: nn.Module, path: str) -> tuple[int, ...]:
    held = _place(model, path)
    return tuple(held.W.shape) if held.kind == "experts" else shape_of(held.module)


def _look(model: nn.Module, path: str) -> tuple[Tensor, Tensor | None, WeightDelta | None]:
    """(W, W₀ on its device if W is not what was loaded, the delta on it if any) of the weight at `path`."""
    held = _place(model, path)
    W, original = held.W.detach(), None
    originals, name = adaptation(model).start, path.removesuffix(".weight")
    own = held.parameter
    names = [n for n in (f"{name}.weight", name) if n in originals]
    names = names or [n for n, t in originals.items() if t.shape == own.shape]  # a tied weight goes by another name
    found = next((n for n in names if model.get_parameter(n) is own), None)
    if found is not None:
        original = held.oriented(originals[found].to(W.device))
    delta = delta_on(held)
    if delta is not None and not isinstance(delta, WeightDelta):
        raise _no_change(path, delta)
    return W, original, delta


def _no_change(path: str, delta: Delta | None) -> UserError:
    return UserError(
        f"the delta on '{path}' depends on the input, so it is no change of the weight.", found=type(delta).__name__
    )
