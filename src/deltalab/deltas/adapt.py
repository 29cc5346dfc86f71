"""Put deltas on a model, look at them, take them off.

`adapt` works in place and freezes every parameter that no spec names. Weights under a delta are never written to. The
model's own parameters that `Train` names do change, so `adapt` copies them to CPU memory first (as many bytes as they
take, in their dtype): `disabled`, `unload` and ΔW = W − W₀ are exact through that copy.
"""

import contextlib
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltalab.core.errors import UserError
from deltalab.deltas import METHODS
from deltalab.deltas.attach import attach, detach, let_checkpoints_backpropagate, stop_marking
from deltalab.deltas.base import DeltaSpec, ParameterSpec, WeightDelta, as_stored, shape_of, wide
from deltalab.deltas.peft_config import is_peft, peft_plan
from deltalab.deltas.select import leaf, model_name, select
from deltalab.deltas.weights import (
    STATE,
    Adaptation,
    adaptation,
    attached,
    base_state,
    base_weight,
    delta_entries,
    delta_weight,
    is_adapted,
    merged_weight,
)

__all__ = ["Trainable", "adapt", "adaptation", "attached", "base_state", "base_weight", "delta_entries", "delta_weight",
           "disabled", "is_adapted", "merged", "merged_weight", "param_groups", "start", "trainable", "unload"]  # fmt: skip


@dataclass(frozen=True)
class Trainable:
    """What trains. rows: (kind, module name, number of modules, parameters). total: parameters of the base model."""

    rows: tuple[tuple[str, str, int, int], ...]
    total: int

    @property
    def count(self) -> int:
        """Parameters that train."""
        return sum(row[3] for row in self.rows)

    @property
    def percent(self) -> float:
        """Per cent of the base model's number of parameters."""
        return 100 * self.count / max(self.total, 1)

    @property
    def factor(self) -> float:
        """How many times fewer than the base model has."""
        return self.total / self.count if self.count else float("inf")

    def __str__(self) -> str:
        lines = [
            f"  {kind:<10} {module:<24} {modules:>5} × {count // modules:>10,} = {count:>13,}"
            for kind, module, modules, count in self.rows
        ]
        return "\n".join(
            [
                *lines,
                f"  trains {self.count:,} of {self.total:,} parameters: {self.percent:.3g} %, {self.factor:,.0f} times fewer",
            ]
        )


def adapt(model: nn.Module, spec: Any, *, seed: int = 0) -> nn.Module:
    """Put a delta on `model`, in place; returns the model.

    spec: a method's spec, `Train`, a `peft.LoraConfig`, or a list of them. seed: of the start; what a module starts
    with depends on it and on the module's path alone.
    Raises: UserError if the model is adapted already, a target matches nothing, or two deltas want one linear. Then
    the model is as it was.
    """
    if is_adapted(model):
        raise UserError(
            f"{model_name(model)} is adapted already.",
            next="deltalab.unload(model) first, or give adapt a list of specs",
        )
    items = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    if not items:
        raise UserError("no delta is named.", next="for example deltalab.LoRA(r=8, targets='attention')")
    plan: dict[str, DeltaSpec] = {}
    masks: list[ParameterSpec] = []
    names: set[str] = set()
    for item in items:
        if isinstance(item, ParameterSpec):
            masks.append(item)
            names |= set(item.parameters(model))
            continue
        if isinstance(item, DeltaSpec):
            chosen = dict.fromkeys(select(model, item.targets, item.layers).names, item)
        elif is_peft(item):
            chosen = peft_plan(model, item.to_dict(), fresh=True)
        else:
            raise UserError(
                f"{item!r} is no delta.", nearest=[*METHODS, "Train"], next="for example deltalab.LoRA(r=8)"
            )
        twice = sorted(plan.keys() & chosen.keys())
        if twice:
            raise UserError(f"two deltas are meant for '{twice[0]}'; a linear holds one.", found=f"{len(twice)} linears are named twice",
                            next="make their targets or layers disjoint")  # fmt: skip
        plan |= chosen
    return start(model, plan, masks, names, seed)


def start(
    model: nn.Module, plan: dict[str, DeltaSpec], masks: list[ParameterSpec], names: set[str], seed: int = 0
) -> nn.Module:
    """Attach a plan: path -> spec, and the names of the own parameters that train. `adapt` without its choices."""
    parameters = dict(model.named_parameters())
    state = Adaptation(plan, masks, {name: p.requires_grad for name, p in parameters.items()})
    setattr(model, STATE, state)
    try:
        for name, parameter in parameters.items():
            if name in names:
                state.start[name] = parameter.detach().to("cpu", copy=True)
            parameter.requires_grad_(name in names)
        for path, spec in plan.items():
            linear = model.get_submodule(path)
            W, (out, in_) = linear.weight, shape_of(linear)
            delta = spec.build(out, in_, dtype=wide(W.dtype), device=W.device)
            delta.init(_generator(seed, path))
            attach(linear, delta)
            state.not_saved |= {f"{path}.delta.{key}" for key in [*delta.state_dict(), "keep"]}
    except BaseException:  # out of memory, or interrupted
        unload(model)
        raise
    if plan:
        let_checkpoints_backpropagate(model)
    ignored = getattr(model, "_keys_to_ignore_on_save", None)  # save_pretrained writes the base alone
    if ignored is not None:
        model._keys_to_ignore_on_save = set(ignored) | state.not_saved
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take every delta off, in place: bitwise the model that was loaded, trainable what was trainable then."""
    state = adaptation(model)
    for path in attached(model):
        detach(model.get_submodule(path))
    stop_marking(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state.start:
                parameter.copy_(state.start[name])
            parameter.requires_grad_(state.was_trainable.get(name, parameter.requires_grad))
            parameter.grad = None
    _forget(model, state)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, exactly, for the time of the block: deltas pass through, trained parameters show W₀."""
    state = adaptation(model)
    deltas = list(attached(model).values())
    before = [delta.enabled for delta in deltas]
    trained = {name: p for name, p in model.named_parameters() if name in state.start}
    values = {name: p.data for name, p in trained.items()}
    try:
        for delta in deltas:
            delta.enabled = False
        for name, parameter in trained.items():  # the tensors change places: nothing is rounded or copied back
            parameter.data = state.start[name].to(parameter.device)
        yield model
    finally:
        for delta, was in zip(deltas, before, strict=True):
            delta.enabled = was
        for name, parameter in trained.items():
            parameter.data = values[name]


def merged(model: nn.Module) -> nn.Module:
    """A plain model that computes what the adapted one does, apart from rounding each merged weight to its dtype.

    It shares the memory of every tensor that no delta touched; the adapted model stays as it is.
    Raises: UserError if a delta depends on the input and so has no adapted weight.
    """
    state = adaptation(model)
    deltas = attached(model)
    for path, delta in deltas.items():
        if not isinstance(delta, WeightDelta):
            raise UserError(f"the delta on '{path}' depends on the input, so it has no merged weight.", found=type(delta).__name__,
                            next="save it with deltalab.save_adapter")  # fmt: skip
    memo: dict[int, Any] = {id(delta): None for delta in deltas.values()} | {id(state): None}
    for name, parameter in model.named_parameters():
        if ".delta." not in name:
            value = parameter.detach()
            memo[id(parameter)] = nn.Parameter(
                value.clone() if name in state.start else value,
                requires_grad=state.was_trainable.get(name, parameter.requires_grad),
            )
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    plain = copy.deepcopy(model, memo)
    for path in deltas:
        linear = plain.get_submodule(path)
        detach(linear)
        value = as_stored(linear, merged_weight(model, path)).to(linear.weight.dtype)
        linear.weight = nn.Parameter(value.contiguous(), requires_grad=linear.weight.requires_grad)
    stop_marking(plain)
    _forget(plain, state)
    return plain


def trainable(model: nn.Module) -> Trainable:
    """What trains in `model`, by kind of delta (or `own` for the model's own parameters) and module name."""
    deltas = attached(model)
    kinds: Counter[tuple[str, str]] = Counter()
    modules: dict[tuple[str, str], set[str]] = {}
    total = 0
    for name, parameter in model.named_parameters():
        path = name.split(".delta.")[0]
        own = path == name or path not in deltas
        total += parameter.numel() if own else 0
        if parameter.requires_grad:
            path = name.rpartition(".")[0] if own else path
            key = ("own" if own else type(deltas[path]).__name__.removesuffix("Delta"), leaf(path))
            kinds[key] += parameter.numel()
            modules.setdefault(key, set()).add(path)
    return Trainable(tuple((*key, len(modules[key]), count) for key, count in kinds.items()), total)


def param_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: each delta's own, then the model's own parameters that train; each `lr` joined."""
    own = [p for name, p in model.named_parameters() if p.requires_grad and ".delta." not in name]
    groups: dict[float, list[nn.Parameter]] = {}
    for group in [*(g for d in attached(model).values() for g in d.param_groups(lr)), {"params": own, "lr": lr}]:
        groups.setdefault(group["lr"], []).extend(group["params"])
    return [{"params": params, "lr": rate} for rate, params in groups.items() if params]


def _forget(model: nn.Module, state: Adaptation) -> None:
    ignored = getattr(model, "_keys_to_ignore_on_save", None)
    if ignored is not None:
        model._keys_to_ignore_on_save = set(ignored) - state.not_saved
    if STATE in model.__dict__:
        delattr(model, STATE)


def _generator(seed: int, path: str) -> torch.Generator:
    """A generator of the module's own: the start does not depend on which other modules are adapted."""
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
