"""Adapters on disk, in Hugging Face peft's format: `adapter_config.json` and `adapter_model.safetensors`.

What peft can say is written so that peft loads it. What it cannot (a delta with frozen entries, own parameters that are
no whole modules, two kinds of delta) is written with `peft_type` DELTALAB, which peft refuses: a loader that ignored
the mask would run another model. Reading is strict: every key has to be there, with its shape, and no other.
Nothing is unpickled.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import read_json, remove, replacing
from deltalab.core.spec import build
from deltalab.deltas import methods
from deltalab.deltas.adapt import start
from deltalab.deltas.attach import attached_to
from deltalab.deltas.base import ParameterSpec, WeightDelta
from deltalab.deltas.masks import Train
from deltalab.deltas.peft_config import peft_plan, peft_where
from deltalab.deltas.peft_own import embeddings, other_vocabulary, own_keys, own_to_peft, own_values, wrapped
from deltalab.deltas.schedule import require_ready
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import expert_weights, place, places
from deltalab.deltas.switch import adapters, drop
from deltalab.deltas.weights import Group, Planned, adaptation, attached, grouped, is_adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SHARED = "base_model."
"""Before the keys of tensors that modules share; in the own format a group's number follows, for there are several."""
OWN_TYPE = "DELTALAB"
FORMAT = 2
AGAIN = re.compile(r"\.(original_module|modules_to_save)\.[^.]*bias$")
"""Keys of biases that peft writes a second time."""


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
    config, tensors = _as_peft(model) or _as_own(model)
    config["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; an adapter is a folder.", next="choose another folder")
    files = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS: save(_on_cpu(tensors), {"format": "pt"}),
    }
    if folder.is_dir() and {p.name for p in folder.iterdir()} - files.keys():
        remove(folder / CONFIG)  # others' files stay; without its config a half-written adapter is not taken for one
        for name in (WEIGHTS, CONFIG):
            with replacing(folder / name) as tmp:
                tmp.write_bytes(files[name])
    else:
        with replacing(folder) as tmp:
            tmp.mkdir()
            for name, content in files.items():
                (tmp / name).write_bytes(content)
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, adapter: str = "default") -> nn.Module:
    """Put the adapter in `folder` on `model`, in place, trainable as after `adapt`; returns the model.

    Raises: UserError if the model is adapted already, a file is missing or damaged, an option is not supported, or a
    tensor is missing, not expected, or of another shape, each by name. Then the model is as it was.
    """
    config, tensors = _read(Path(folder))
    if config.get("peft_type") == OWN_TYPE:
        return _load_own(model, config, tensors, folder, adapter)
    what = f"adapter '{folder}'"
    plan = peft_plan(model, config)
    targets = [path for group in plan.groups for path in group.paths]
    own = {PREFIX + key: name for key, name in own_keys(model, config, targets).items()}
    tensors, beside = _of_the_base(model, tensors, own, targets)
    own |= beside
    other_vocabulary(model, {name: tensors[key] for key, name in own.items() if key in tensors}, what)
    parameters = dict(model.named_parameters())
    expected = {key: tuple(parameters[name].shape) for key, name in own.items()}
    for group in plan.groups:
        skeletons = {
            path: spec.build(place(model, path).site(path)._replace(device=torch.device("meta")))
            for path, spec in group.spec.each(group.paths).items()
        }
        group.spec.join(skeletons)
        slots = {path: delta.slots() for path, delta in skeletons.items()}
        expected |= {
            f"{_key(model, path, targets)}.{key}": tuple(t.shape)
            for path, keys in slots.items()
            for key, t in keys.items()
        }
        expected |= {SHARED + key: tuple(t.shape) for key, t in group.spec.shared_to_peft(skeletons).items()}
    _check(tensors, expected, what)
    values = own_values(tensors, own)
    if beside:
        names = plan.names | set(values)
        plan = plan._replace(names=names, masks=[Train([name for name in parameters if name in names])])
    active = adapters(model)[:1]
    start(model, plan, adapter=adapter)
    try:
        for group, deltas in grouped(model):
            group.spec.begin_again(model, deltas)
    except UserError:
        drop(model, active)
        raise
    for path, delta in attached(model).items():
        delta.from_peft({key: tensors[f"{_key(model, path, targets)}.{key}"] for key in delta.slots()})
    for group, deltas in grouped(model):
        group.spec.shared_from_peft(deltas, {key: tensors[SHARED + key] for key in group.spec.shared_to_peft(deltas)})
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return model


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
    _check(state, {name: tuple(t.shape) for name, t in own.items()}, "the trained state")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _as_peft(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Config and tensors as peft writes them; None if peft's format cannot say what the model does."""
    state, deltas = adaptation(model), attached(model)
    plan = state.plan
    kinds = {type(spec) for spec in plan.values()}
    if len(kinds) != 1 or any(delta.keep is not None for delta in deltas.values()):
        return None
    kind = kinds.pop()
    if kind.peft_type is None or any(place(model, path).kind not in kind.peft_on for path in plan):
        return None
    common = kind.common_peft({path: spec.to_peft() for path, spec in plan.items()}, deltas)
    own = own_to_peft(model, set(state.start), list(plan), kind)
    where = None if own is None else peft_where(model, list(plan), kind, own)
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
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {
        PREFIX + key: parameters[name] for key, name in own_keys(model, config, list(plan)).items()
    }
    for path, delta in deltas.items():
        tensors |= {f"{_key(model, path, list(plan))}.{key}": t for key, t in delta.to_peft().items()}
    tensors |= {SHARED + key: t for key, t in state.groups[0].spec.shared_to_peft(deltas).items()}
    return {key: value for key, value in config.items() if key not in kind.peft_lacks}, tensors


def _key(model: nn.Module, path: str, targets: Collection[str]) -> str:
    """What the keys of the delta at `path` begin with in peft's file."""
    where = place(model, path)
    if where.kind != "experts":
        return PREFIX + path
    module = path.rpartition(".")[0]
    around = [name for name in expert_weights(where.module) if f"{module}.{name}" in targets]
    return PREFIX + module + ".base_layer" * (len(around) - 1 - around.index(where.name))  # the last one is outermost


def _of_the_base(
    model: nn.Module, tensors: dict[str, Tensor], own: Mapping[str, str], targets: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without what only repeats the base, and key -> name of the embeddings that differ from the base's.

    peft writes the embeddings as well when a delta sits on one, or when tokens were added; and with `bias="all"` both
    the original and the trained bias of each module that it saves.
    """
    kept = {key: t for key, t in tensors.items() if key in own or not AGAIN.search(key)}
    beside: dict[str, str] = {}
    parameters = dict(model.named_parameters())
    for user, name in embeddings(model).items():
        key = PREFIX + wrapped(model, user, targets)
        if key in own or key not in kept:
            continue
        here, there = parameters[name].detach().cpu(), kept[key]
        if here.shape == there.shape and torch.equal(here.to(there.dtype), there.to(here.dtype).to(there.dtype)):
            del kept[key]
        else:
            beside[key] = name
    return kept, beside


def _as_own(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    }
    return config, {PREFIX + name: t for name, t in trained_state(model).items()} | _shared_by_group(model)


def _load_own(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: str | Path, adapter: str
) -> nn.Module:
    what = f"adapter '{folder}'"
    if config.get("format") != FORMAT:
        raise UserError(f"{what} has format {config.get('format')!r}.", found=f"this version reads {FORMAT}")
    known, there = methods(), places(model)
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
    active = adapters(model)[:1]
    start(model, Planned(groups, masks, set(config.get("own", []))), adapter=adapter)
    try:
        load_trained_state(model, {key.removeprefix(PREFIX): t for key, t in tensors.items() if key.startswith(PREFIX)})
        shared = {key: t for key, t in tensors.items() if key.startswith(numbered)}
        _check(shared, {key: tuple(t.shape) for key, t in _shared_by_group(model).items()}, what)
        for i, (group, deltas) in enumerate(grouped(model)):
            keys = group.spec.shared_to_peft(deltas)
            group.spec.shared_from_peft(deltas, {key: shared[f"{SHARED}{i}.{key}"] for key in keys})
    except UserError:
        drop(model, active)
        raise
    return model


def _shared_by_group(model: nn.Module) -> dict[str, Tensor]:
    """What the modules of each group share, by its key in the own format."""
    return {
        f"{SHARED}{i}.{key}": t
        for i, (group, deltas) in enumerate(grouped(model))
        for key, t in group.spec.shared_to_peft(deltas).items()
    }


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter folder."""
    if not folder.is_dir():
        near = (
            nearest(folder.name, [p.name for p in folder.parent.iterdir() if p.is_dir()])
            if folder.parent.is_dir()
            else []
        )
        raise UserError(f"adapter folder '{folder}' does not exist.", nearest=near)
    there = sorted(p.name for p in folder.iterdir())
    missing = [name for name in (CONFIG, WEIGHTS) if name not in there]
    if missing:
        pickled = "adapter_model.bin" in there and WEIGHTS in missing
        raise UserError(f"adapter folder '{folder}' has no {' and no '.join(missing)}.", found=", ".join(there) or "an empty folder",
                        next="adapter_model.bin is pickled and not read: save it again with safe_serialization=True" if pickled
                        else "save it again with deltalab.save_adapter or peft")  # fmt: skip
    config = read_json(folder / CONFIG, "adapter config")
    if not isinstance(config, dict):
        raise UserError(f"adapter config '{folder / CONFIG}' is no mapping.", found=type(config).__name__)
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except safetensors.SafetensorError as error:
        raise UserError(
            f"adapter file '{folder / WEIGHTS}' is damaged.", found=str(error), next="copy or save it again"
        ) from None


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
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


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    here = {key: t.detach().to("cpu").contiguous() for key, t in tensors.items()}
    first = {t.data_ptr(): key for key, t in reversed(here.items())}
    return {
        key: t if first[t.data_ptr()] == key else t.clone() for key, t in here.items()
    }  # a tied one is written twice
