"""Adapters on disk, in Hugging Face peft's format: `adapter_config.json` and `adapter_model.safetensors`.

What peft can say is written so that peft loads it. What it cannot (a delta with frozen entries, own parameters that are
no whole modules, two kinds of delta) is written with `peft_type` DELTALAB, which peft refuses: a loader that ignored
the mask would run another model. Reading is strict: every key has to be there, with its shape, and no other.
Nothing is unpickled.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import read_json, remove, replacing
from deltalab.core.modules import named_parameters
from deltalab.core.tensors import read_tensors, write_tensors
from deltalab.deltas.adapt import start
from deltalab.deltas.base import Delta
from deltalab.deltas.masks import Train
from deltalab.deltas.own_format import OWN_TYPE, as_own, check_tensors, load_own, load_trained_state, trained_state
from deltalab.deltas.peft_config import peft_plan, peft_where
from deltalab.deltas.peft_own import (
    PREFIX,
    SHARED,
    key_of,
    of_the_base,
    other_vocabulary,
    own_keys,
    own_to_peft,
    own_values,
    task_of,
)
from deltalab.deltas.schedule import require_ready
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import place
from deltalab.deltas.spec import DeltaSpec
from deltalab.deltas.switch import adapters, drop
from deltalab.deltas.weights import Group, Planned, adaptation, attached, grouped, is_adapted

__all__ = ["load_adapter", "load_trained_state", "save_adapter", "trained_by", "trained_state", "write_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter of `model` into `folder`, atomically; returns the folder.

    Raises: UserError if the model has none, it is of a method whose schedule did not run, or the folder cannot be written.
    """
    if not is_adapted(model):
        raise UserError(
            f"{model_name(model)} has no adapter to save.",
            next="deltalab.adapt(model, ...) first, or model.save_pretrained",
        )
    require_ready(model)
    return write_adapter(model, folder)


def write_adapter(model: nn.Module, folder: str | Path) -> Path:
    """`save_adapter` of an adapted model in the middle of its training: a method with a schedule may be on its way."""
    theirs = _as_peft(model)
    config, tensors = theirs or as_own(model)
    config.setdefault("task_type", task_of(model))
    config["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; an adapter is a folder.", next="choose another folder")
    text = json.dumps(config, indent=2, sort_keys=theirs is not None)  # of our patterns the first counts
    weights = _on_cpu(tensors)
    if folder.is_dir() and {p.name for p in folder.iterdir()} - {CONFIG, WEIGHTS}:
        remove(folder / CONFIG)  # others' files stay; without its config a half-written adapter is not taken for one
        with replacing(folder / WEIGHTS) as tmp:
            write_tensors(tmp, weights, {"format": "pt"})
        with replacing(folder / CONFIG) as tmp:
            tmp.write_bytes(text.encode())
    else:
        with replacing(folder) as tmp:
            tmp.mkdir()
            (tmp / CONFIG).write_bytes(text.encode())
            write_tensors(tmp / WEIGHTS, weights, {"format": "pt"})
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, adapter: str = "default") -> nn.Module:
    """Put the adapter in `folder` on `model`, in place, trainable as after `adapt`; returns the model.

    Raises: UserError if the model is adapted already, a file is missing or damaged, an option is not supported, or a
    tensor is missing, not expected, or of another shape, each by name. Then the model is as it was.
    """
    config, tensors = _read(Path(folder))
    if config.get("peft_type") == OWN_TYPE:
        return load_own(model, config, tensors, folder, adapter)
    what = f"adapter '{folder}'"
    plan = peft_plan(model, config)
    targets = [path for group in plan.groups for path in group.paths]
    tensors, own, beside = _own_of(model, config, tensors, plan)
    other_vocabulary(model, {name: tensors[key] for key, name in own.items() if key in tensors}, what)
    parameters = named_parameters(model) if own else {}
    expected = {key: tuple(parameters[name].shape) for key, name in own.items()}
    keys = {path: key_of(model, path, targets) for path in targets}
    for group in plan.groups:
        skeletons = _skeletons(model, group)
        for path, delta in skeletons.items():
            for key, t in delta.slots().items():
                expected[f"{keys[path]}.{key}"] = tuple(t.shape)
        expected |= {SHARED + key: tuple(t.shape) for key, t in group.spec.shared_to_peft(skeletons).items()}
    check_tensors(tensors, expected, what)
    values = own_values(tensors, own)
    if beside:
        names = plan.names | set(values)
        plan = plan._replace(names=names, masks=[Train([name for name in parameters if name in names])])
    active = adapters(model)[:1]
    start(model, plan, adapter=adapter)
    try:
        groups = grouped(model)
        for group, deltas in groups:
            group.spec.begin_again(model, deltas)
        for _, deltas in groups:
            for path, delta in deltas.items():
                delta.from_peft({key: tensors[f"{keys[path]}.{key}"] for key in delta.slots()})
        for group, deltas in groups:
            shared = group.spec.shared_to_peft(deltas)
            group.spec.shared_from_peft(deltas, {key: tensors[SHARED + key] for key in shared})
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
    except BaseException:  # a mistake, out of memory, or interrupted
        drop(model, active)
        raise
    return model


def _skeletons(model: nn.Module, group: Group) -> dict[str, Delta]:
    """A group's deltas without memory, for the shapes of their tensors.

    One stands for all that are alike, where the spec joins nothing.
    """
    alone = group.spec.alike and type(group.spec).join is DeltaSpec.join
    built: dict[Any, Delta] = {}
    skeletons: dict[str, Delta] = {}
    for path, spec in group.spec.each(group.paths).items():
        site = place(model, path).site(path)
        alike = (id(spec), site[1:]) if alone else path
        if alike not in built:
            built[alike] = spec.build(site._replace(device=torch.device("meta")))
        skeletons[path] = built[alike]
    if not alone:
        group.spec.join(skeletons)
    return skeletons


def trained_by(model: nn.Module, folder: str | Path) -> list[str]:
    """Names of the model's own parameters that the adapter in `folder` trains beside its deltas; `model` is only read.

    Raises: UserError as `load_adapter`, for a file that cannot be read or does not fit.
    """
    config, tensors = _read(Path(folder))
    if config.get("peft_type") == OWN_TYPE:
        return list(config.get("own", []))
    plan = peft_plan(model, config)
    return sorted({*plan.names, *_own_of(model, config, tensors, plan)[1].values()})


def _own_of(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], plan: Planned
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """The file's tensors without those of the base, the model's own among them (key -> name), and those beside the plan."""
    targets = [path for group in plan.groups for path in group.paths]
    own = {PREFIX + key: name for key, name in own_keys(model, config, targets).items()}
    tensors, beside = of_the_base(model, tensors, own, targets)
    return tensors, own | beside, beside


def _as_peft(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Config and tensors as peft writes them; None if peft's format cannot say what the model does."""
    state, deltas = adaptation(model), attached(model)
    plan = state.plan
    kinds = {type(spec) for spec in plan.values()}
    if state.prepared or len(kinds) != 1 or any(delta.keep is not None for delta in deltas.values()):
        return None
    kind = kinds.pop()
    if state.start and "modules_to_save" in kind.peft_lacks:
        return None
    if kind.peft_type is None or any(place(model, path).kind not in kind.peft_on for path in plan):
        return None
    specs = {id(spec): spec for spec in plan.values()}  # most modules have one and the same
    said = {key: spec.to_peft() for key, spec in specs.items()}
    common = kind.common_peft({path: said[id(spec)] for path, spec in plan.items()}, deltas)
    own, paths = own_to_peft(model, set(state.start), list(plan), kind), list(plan)
    where = None if own is None or common is None else peft_where(model, paths, kind, own)
    if common is None or own is None or where is None:
        return None
    config = {
        "peft_type": kind.peft_type,
        "inference_mode": True,
        "layers_to_transform": None,
        **common,
        **own,
        **where,
    }
    parameters = named_parameters(model)
    tensors: dict[str, Tensor] = {
        PREFIX + key: parameters[name] for key, name in own_keys(model, config, paths).items()
    }
    for path, delta in deltas.items():
        before = key_of(model, path, paths)
        for key, t in delta.to_peft().items():
            tensors[f"{before}.{key}"] = t
    tensors |= {SHARED + key: t for key, t in state.groups[0].spec.shared_to_peft(deltas).items()}
    config = kind.whole_peft(config, paths)
    return {key: value for key, value in config.items() if key not in kind.peft_lacks}, tensors


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter folder."""
    if not folder.is_dir():
        near = (
            nearest(folder.name, [p.name for p in folder.parent.iterdir() if p.is_dir()])
            if folder.parent.is_dir()
            else []
        )
        raise UserError(
            f"adapter folder '{folder}' does not exist.", nearest=[str(folder.parent / name) for name in near],
            next="give the folder that deltalab.save_adapter or a run wrote, for example runs/first/adapter",
        )  # fmt: skip
    there = sorted(p.name for p in folder.iterdir())
    missing = [name for name in (CONFIG, WEIGHTS) if name not in there]
    if missing:
        pickled = "adapter_model.bin" in there and WEIGHTS in missing
        inside = (folder / "adapter" / CONFIG).is_file()  # the folder of a run
        raise UserError(f"adapter folder '{folder}' has no {' and no '.join(missing)}.", found=", ".join(there) or "an empty folder",
                        next="adapter_model.bin is pickled and not read: save it again with safe_serialization=True" if pickled
                        else f"the adapter of this run is in '{folder / 'adapter'}'" if inside
                        else "save it again with deltalab.save_adapter or peft")  # fmt: skip
    config = read_json(folder / CONFIG, "adapter config")
    if not isinstance(config, dict):
        raise UserError(f"adapter config '{folder / CONFIG}' is no mapping.", found=type(config).__name__)
    try:
        return config, read_tensors(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise UserError(
            f"adapter file '{folder / WEIGHTS}' is damaged.", found=str(error), next="copy or save it again"
        ) from None


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    here = {key: t.detach().to("cpu").contiguous() for key, t in tensors.items()}
    first = {t.data_ptr(): key for key, t in reversed(here.items())}
    return {
        key: t if first[t.data_ptr()] == key else t.clone() for key, t in here.items()
    }  # a tied one is written twice
