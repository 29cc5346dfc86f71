"""Put deltas on a model, look at them, take them off.

`adapt` works in place and freezes every parameter that no spec names. Weights under a delta are never written to. The
model's own parameters that `Train` names do change, so `adapt` copies them to CPU memory first (as many bytes as they
take, in their dtype): `disabled`, `unload` and ΔW = W − W₀ are exact through that copy.
"""

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.modules import named_parameters
from deltalab.deltas import METHODS
from deltalab.deltas.attach import attach
from deltalab.deltas.base import Delta, WeightDelta, shape_of
from deltalab.deltas.fuse import pause
from deltalab.deltas.fused import KERNELS
from deltalab.deltas.peft_config import is_peft, peft_plan
from deltalab.deltas.select import leaf, model_name
from deltalab.deltas.sites import Place, base_parameters, linears, place
from deltalab.deltas.spec import DeltaSpec, ParameterSpec, Start
from deltalab.deltas.switch import adapters, drop, ignore_on_save, park, set_active, set_kernels, unload
from deltalab.deltas.weights import (
    STATE,
    Adaptation,
    Group,
    Planned,
    adaptation,
    attached,
    base_state,
    base_weight,
    delta_entries,
    delta_weight,
    is_adapted,
    merged_weight,
)
from deltalab.quant import foreign

__all__ = ["Trainable", "adapt", "adaptation", "adapters", "attached", "base_state", "base_weight", "delta_entries", "delta_weight",
           "disabled", "is_adapted", "merged_weight", "param_groups", "planned", "set_active", "start", "trainable", "unload"]  # fmt: skip


Batches = Sequence[Mapping[str, Tensor]]
KINDS = {"linear": "a linear", "embedding": "an embedding", "experts": "a stack of experts", "attention": "an attention", "mlp": "an MLP"}  # fmt: skip


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


def adapt(
    model: nn.Module, spec: Any, *, seed: int = 0, adapter: str = "default", calibration: Batches | None = None,
    kernels: str = "auto",
) -> nn.Module:  # fmt: skip
    """Put a delta on `model`, in place; returns the model.

    spec: a method's spec, `Train`, a config object of peft, or a list of them. seed: of the start; what a module starts
    with depends on it and on the module's path alone. adapter: a name; a model holds several adapters, one is active.
    calibration: batches of inputs of the model, for a start that looks at activations.
    kernels: `auto`: training passes go through those of `deltalab.kernels` wherever they apply; `plain`, through torch's
    own operations. The results are the same but for rounding.
    Raises: UserError if the model has that adapter already, a target matches nothing, a method cannot sit on what one
    matches, or two deltas want one weight. Then the model is as it was.
    """
    _refuse_taken(model, adapter)
    if kernels not in KERNELS:
        raise UserError(f"there are no kernels {kernels!r}.", nearest=list(KERNELS))
    return start(model, planned(model, spec), adapter=adapter, fresh=Start(seed, calibration), kernels=kernels)


def planned(model: nn.Module, spec: Any) -> Planned:
    """What `spec` means for `model`.

    Raises: UserError as `adapt`.
    """
    items = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    if not items:
        raise UserError("no delta is named.", next="for example deltalab.LoRA(r=8, targets='attention')")
    groups: list[Group] = []
    masks: list[ParameterSpec] = []
    names: set[str] = set()
    taken: set[str] = set()
    for item in items:
        if isinstance(item, ParameterSpec):
            masks.append(item)
            names |= set(item.parameters(model))
            continue
        if isinstance(item, DeltaSpec):
            chosen = [Group(item, item.chosen(model))]
        elif is_peft(item):
            theirs = peft_plan(model, item.to_dict(), fresh=True)
            chosen = theirs.groups
            masks += theirs.masks
            names |= theirs.names
        else:
            raise UserError(
                f"{item!r} is no delta.", nearest=[*METHODS, "Train"], next="for example deltalab.LoRA(r=8)"
            )
        for group in chosen:
            twice = sorted(taken & set(group.paths))
            if twice:
                raise UserError(f"two deltas are meant for '{twice[0]}'; a linear holds one.", found=f"{len(twice)} linears are named twice",
                                next="make their targets or layers disjoint")  # fmt: skip
            taken |= set(group.paths)
            groups.append(group)
    return Planned(groups, masks, names)


def start(
    model: nn.Module, plan: Planned, *, adapter: str = "default", fresh: Start | None = None, kernels: str = "auto"
) -> nn.Module:
    """Attach what was planned; with `fresh`, starts that look at the model run, else the tensors are still to come."""
    before = adaptation(model)
    _refuse_taken(model, adapter)
    foreign.hold(model)
    active = adapters(model)[:1]
    if active:
        park(model)
    groups, masks, names = plan
    parameters = named_parameters(model)
    was_trainable = before.was_trainable or {name: p.requires_grad for name, p in parameters.items()}
    state = Adaptation(groups, masks, was_trainable, name=adapter, kernels=kernels, parked=before.parked)
    setattr(model, STATE, state)
    try:
        if fresh is not None:
            state.groups = groups = [Group(*g.spec.settle(model, g.paths, fresh)) for g in groups]
        for group in groups:
            names = names | set(group.spec.trains(model, group.paths))
        for name, parameter in parameters.items():
            if name in names:
                state.start[name] = parameter.detach().to("cpu", copy=True)
            parameter.requires_grad_(name in names)
        for group in groups:
            _put(model, state, group, fresh)
        set_kernels(model)
    except BaseException:  # a mistake, out of memory, or interrupted
        drop(model, active)
        raise
    ignore_on_save(model)
    return model


def _refuse_taken(model: nn.Module, adapter: str) -> None:
    foreign.require_read(model)
    if adapter in adapters(model):
        raise UserError(
            f"{model_name(model)} is adapted already.",
            found=f"adapters: {', '.join(adapters(model))}",
            next="deltalab.unload(model) first, give adapt a list of specs, or name another adapter: adapter='second'",
        )
    others = {} if is_adapted(model) else attached(model)
    if others:
        raise UserError(
            f"{model_name(model)} is in use: something sits on its modules already.",
            found=f"{type(next(iter(others.values()))).__name__} on {len(others)} modules",
            next="close the bank that is on it: bank.close()",
        )


def _put(model: nn.Module, state: Adaptation, group: Group, fresh: Start | None) -> None:
    """Build the deltas of one spec, let them begin, and attach them."""
    deltas: dict[str, Delta] = {}
    there: dict[str, Place] = {}
    draws = fresh is not None or not group.spec.filled
    for path, spec in group.spec.each(group.paths).items():
        where = there[path] = place(model, path)
        if where.kind not in spec.sits_on:
            raise UserError(
                f"{type(spec).__name__} does not go on '{path}', which is {KINDS[where.kind]}.",
                found=f"it goes on: {', '.join(sorted(spec.sits_on))}",
                next="name other targets, or another method for this one",
            )
        site = where.site(path)
        if fresh is not None and fresh.quantising is not None and path in fresh.quantising:
            site = site._replace(group=fresh.quantising.group(path), quantised=True)
        deltas[path] = spec.build(site)
        if where.kind == "experts" and isinstance(deltas[path], WeightDelta):
            _refuse_dropout(path, deltas[path])
        if draws:
            deltas[path].init(_generator(fresh.seed if fresh else 0, path))
    group.spec.join(deltas)
    if fresh is not None:
        group.spec.begin(model, deltas, fresh)
    for path, delta in deltas.items():
        attach(there[path], delta)


def _refuse_dropout(path: str, delta: Delta) -> None:
    """Experts are shown adapted weights, so such a delta sees no input."""
    for module in delta.modules():
        if isinstance(module, nn.Dropout) and module.p:
            raise UserError(
                f"dropout={module.p:g} cannot act on '{path}', experts whose inputs no delta sees.",
                next="dropout=0, or leave the experts out of the targets",
            )


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, exactly, for the time of the block: deltas pass through, trained parameters show W₀."""
    state = adaptation(model)
    deltas = list(attached(model).values())
    before, ran = [delta.enabled for delta in deltas], state.switch is not None and state.switch.on
    originals = state.start
    trained = {name: p for name, p in named_parameters(model).items() if name in originals}
    values = {name: p.data for name, p in trained.items()}
    try:
        for delta in deltas:
            delta.enabled = False
        pause(model, state.switch, on=False)
        for name, parameter in trained.items():  # the tensors change places: nothing is rounded or copied back
            parameter.data = originals[name].to(parameter.device)
        yield model
    finally:
        for delta, was in zip(deltas, before, strict=True):
            delta.enabled = was
        pause(model, state.switch, on=ran)
        for name, parameter in trained.items():
            parameter.data = values[name]


def trainable(model: nn.Module) -> Trainable:
    """What trains in `model`, by kind of delta (or `own` for the model's own parameters) and module name.

    A tied weight goes by the names of all that use it: `embed_tokens = lm_head`.
    """
    owners = {id(p): (path, delta) for path, delta in attached(model).items() for p in delta.parameters()}
    kinds: Counter[tuple[str, str]] = Counter()
    modules: dict[tuple[str, str], set[str]] = {}
    users: dict[str, list[str]] = {}
    for user, name in base_parameters(model).items():
        users.setdefault(name, []).append(leaf(user.rpartition(".")[0]))
    total = 0
    for name, parameter in named_parameters(model).items():
        found = owners.get(id(parameter))
        total += parameter.numel() if found is None else 0
        if parameter.requires_grad:
            path = name.rpartition(".")[0] if found is None else found[0]
            kind = "own" if found is None else type(found[1]).__name__.removesuffix("Delta")
            key = (kind, leaf(path) if found else " = ".join(dict.fromkeys(users[name])))  # a tied one by all its users
            kinds[key] += parameter.numel()
            modules.setdefault(key, set()).add(path)
    for linear in linears(model).values():  # of a quantised one the entries, not the bytes of its codes
        kept = linear._parameters.get("weight")
        total += math.prod(shape_of(linear)) - (0 if kept is None else kept.numel())
    return Trainable(tuple((*key, len(modules[key]), count) for key, count in kinds.items()), total)


def param_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: each delta's own, then the model's own parameters that train; each `lr` joined."""
    own = [p for name, p in named_parameters(model).items() if p.requires_grad and ".delta." not in name]
    groups: dict[float, list[nn.Parameter]] = {}
    for group in [*(g for d in attached(model).values() for g in d.param_groups(lr)), {"params": own, "lr": lr}]:
        groups.setdefault(group["lr"], []).extend(group["params"])
    return [{"params": params, "lr": rate} for rate, params in groups.items() if params]


def _generator(seed: int, path: str) -> torch.Generator:
    """A generator of the module's own: the start does not depend on which other modules are adapted."""
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
