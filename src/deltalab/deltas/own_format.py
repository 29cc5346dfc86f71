"""What training changes, as one flat state; and the adapter files that hold it where peft has no words for an adapter.

The file has peft's form with `peft_type` DELTALAB, which peft refuses, and deltalab's own keys: the specs of the
deltas, the masks, and every tensor by its name in the model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.spec import build
from deltalab.deltas import methods
from deltalab.deltas.adapt import start
from deltalab.deltas.attach import attached_to
from deltalab.deltas.base import WeightDelta
from deltalab.deltas.masks import Train
from deltalab.deltas.peft_own import PREFIX, SHARED, other_vocabulary
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import place, places, sublayers
from deltalab.deltas.spec import ParameterSpec
from deltalab.deltas.switch import adapters, drop
from deltalab.deltas.weights import Group, Planned, adaptation, grouped, is_adapted, mark_of

OWN_TYPE = "DELTALAB"
FORMAT = 2
SAME = 1e-2
"""How far the same base may differ, relative: singular vectors, and so single codes, are not the same on every machine."""


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes: the deltas' parameters and masks, and the model's own parameters that train.

    The tensors are the model's, not copies. On a plain model: the parameters that require gradients.
    """
    if not is_adapted(model):
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    own = adaptation(model).start
    state = {
        f"{name}.{key}": t.detach() for _, name, delta in attached_to(model) for key, t in delta.state_dict().items()
    }
    return state | {name: p.detach() for name, p in model.named_parameters() if name in own}


def load_trained_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set what `trained_state` gave, in place; the model must be adapted in the same way.

    Raises: UserError, by name, for a tensor that is missing, not expected, or of another shape.
    """
    for path, name, delta in attached_to(model):
        mask = state.get(f"{name}.keep")
        if isinstance(delta, WeightDelta):
            where = place(model, path)
            shape = where.site(path).shape
            if mask is not None and tuple(mask.shape) != shape:
                raise UserError(f"'{name}.keep' has shape {tuple(mask.shape)}.", found=f"the weight is {shape}")
            delta.keep = None if mask is None else mask.to(where.parameter.device, torch.bool).clone()
    own = trained_state(model)
    check_tensors(state, {name: tuple(t.shape) for name, t in own.items()}, "the trained state")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def as_own(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an adapter that peft has no words for."""
    state = adaptation(model)
    names = {cls: name for name, cls in methods().items()}
    groups = [{"kind": names[type(g.spec)], "spec": g.spec.plain(), "paths": g.paths} for g in state.groups]
    config = {
        "peft_type": OWN_TYPE,
        "format": FORMAT,
        "deltas": groups,
        "train": [mask.plain() for mask in state.masks],
        "own": sorted(state.start),
        "base": state.prepared,
    }
    return config, {PREFIX + name: t for name, t in trained_state(model).items()} | _shared_by_group(model)


def load_own(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: str | Path, adapter: str
) -> nn.Module:
    """Put an adapter of this format on `model`, as `deltalab.load_adapter` does."""
    what = f"adapter '{folder}'"
    if config.get("format") != FORMAT:
        raise UserError(f"{what} has format {config.get('format')!r}.", found=f"this version reads {FORMAT}")
    known, there = methods(), {**places(model), **sublayers(model)}
    groups: list[Group] = []
    entries = config.get("deltas", [])
    if not isinstance(entries, list) or not all(isinstance(e, dict) and {"spec", "paths"} <= e.keys() for e in entries):
        raise UserError(f"the list of deltas of {what} is damaged.", found=str(entries)[:80], next="save it again")
    for entry in entries:
        if entry.get("kind") not in known:
            raise UserError(f"{what} has a delta of kind {entry.get('kind')!r}.", nearest=sorted(known))
        for path in entry["paths"]:
            if path not in there:
                raise UserError(
                    f"{what} adapts '{path}', which {model_name(model)} does not have.", nearest=nearest(path, there)
                )
        groups.append(Group(build(known[entry["kind"]], entry["spec"], what), entry["paths"]))
    own = dict(model.named_parameters())
    missing = [name for name in config.get("own", []) if name not in own]
    if missing:
        raise UserError(
            f"{what} trains '{missing[0]}', which {model_name(model)} does not have.", nearest=nearest(missing[0], own)
        )
    numbered = tuple(f"{SHARED}{i}." for i in range(len(groups)))
    wrong = [key for key in tensors if not key.startswith((PREFIX, *numbered))]
    if wrong:
        raise UserError(f"{what} has the key '{wrong[0]}'.", found=f"keys begin with '{PREFIX}'")
    trained = {name: tensors[PREFIX + name] for name in config.get("own", []) if PREFIX + name in tensors}
    other_vocabulary(model, trained, what)
    masks: list[ParameterSpec] = [build(Train, mask) for mask in config.get("train", [])]
    prepared = config.get("base", {})
    require_prepared(model, prepared, what)
    active = adapters(model)[:1]
    start(model, Planned(groups, masks, set(config.get("own", []))), adapter=adapter)
    try:
        load_trained_state(model, {key.removeprefix(PREFIX): t for key, t in tensors.items() if key.startswith(PREFIX)})
        shared = {key: t for key, t in tensors.items() if key.startswith(numbered)}
        check_tensors(shared, {key: tuple(t.shape) for key, t in _shared_by_group(model).items()}, what)
        for i, (group, deltas) in enumerate(grouped(model)):
            keys = group.spec.shared_to_peft(deltas)
            group.spec.shared_from_peft(deltas, {key: shared[f"{SHARED}{i}.{key}"] for key in keys})
    except BaseException:  # a mistake, out of memory, or interrupted
        drop(model, active)
        raise
    adaptation(model).prepared.update(prepared)
    return model


def require_prepared(model: nn.Module, marks: Mapping[str, float], what: str) -> None:
    """Raises: UserError unless the base weights that a start took part of are what it left."""
    for path, mark in marks.items():
        W = place(model, path).W.detach()
        if abs(mark_of(W) - mark) > SAME * float(W.norm()):
            raise UserError(
                f"{what} belongs to another base: its start took a part of '{path}' before the rest was quantised.",
                next="deltalab.load(name, quantize=..., adapt=the same spec, seed=the same), then deltalab.unload(model)",
            )


def _shared_by_group(model: nn.Module) -> dict[str, Tensor]:
    """What the modules of each group share, by its key in the own format."""
    return {
        f"{SHARED}{i}.{key}": t
        for i, (group, deltas) in enumerate(grouped(model))
        for key, t in group.spec.shared_to_peft(deltas).items()
    }


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises: UserError for the first kind of fault: keys missing and unexpected, or shapes."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        near = nearest(missing[0], extra) if missing and extra else []
        parts = [
            f"{len(keys)} {word}, the first '{keys[0]}'"
            for keys, word in ((missing, "missing"), (extra, "not expected"))
            if keys
        ]
        raise UserError(f"{what} does not fit: {'; '.join(parts)}.", found=f"{len(tensors)} tensors, {len(expected)} expected",
                        nearest=near[:1], next="load it on the model and with the targets that it was trained with")  # fmt: skip
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise UserError(f"{what} does not fit: '{key}' has shape {tuple(tensors[key].shape)}, expected {shape}.",
                            next="check the rank in the config, and that the base model is the right one")  # fmt: skip
