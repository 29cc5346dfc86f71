"""What peft's `adapter_config.json` asks for, checked: options that are not supported are refused by name.

An option that this version of deltalab does not know is refused too unless it is empty: ignoring one silently would
run another model than the one that was trained.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from deltalab.core.errors import UserError, nearest
from deltalab.deltas import methods
from deltalab.deltas.masks import Train
from deltalab.deltas.peft_own import own_keys, saved_names
from deltalab.deltas.select import layer_numbers, leaf, model_name, refuse_tied, select
from deltalab.deltas.sites import SUBLAYERS, Place, base_modules, base_parameters, endings, places
from deltalab.deltas.spec import DeltaSpec
from deltalab.deltas.weights import Group, Planned

ABOUT = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
         "megatron_core", "qalora_group_size", "runtime_config", "eva_config"}  # fmt: skip
"""Keys that say nothing about what is computed, or only beside another option that is refused."""
WHERE = {"target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
         "fan_in_fan_out", "modules_to_save", "bias"}  # fmt: skip
FUSED = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Linears that a mixture's experts were made of in transformers 4: LoRA's loader in peft takes these names for experts."""

UNMERGEABLE = {
    "use_qalora": "peft multiplies the mean over a group by the number of groups, and cannot merge the result"
}
"""Options that even peft cannot turn into weights, with what they mean."""


def is_peft(value: Any) -> bool:
    """Whether a value is one of peft's config objects, without importing peft."""
    return any(cls.__module__.startswith("peft.") for cls in type(value).__mro__) and hasattr(value, "to_dict")


def peft_plan(model: nn.Module, config: dict[str, Any], *, fresh: bool = False) -> Planned:
    """What peft would do to `model` by this config. fresh: the adapter is new, and no config of it was saved.

    Raises: UserError for an unknown type, an unsupported option, or targets that match nothing.
    """
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    method = method_of(config)
    check_options(config, method)
    if fresh and config.get("target_modules") is None and config.get("target_parameters"):
        raise UserError(
            "target_parameters alone leaves to peft which linears are adapted besides.",
            next="say target_modules too; target_modules=[] is none",
        )
    paths = peft_targets(model, config, method)
    own = list(dict.fromkeys(own_keys(model, config, paths).values()))
    return Planned([Group(method.from_peft(config, paths), paths)], [Train(own)] if own else [], set(own))


def method_of(config: dict[str, Any]) -> type[DeltaSpec]:
    """The spec class that reads this config. Raises: UserError, with the types that are supported."""
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    known = [cls for cls in methods().values() if cls.peft_type]
    found = [cls for cls in known if cls.reads({**config, "peft_type": kind})]
    if not found:
        raise UserError(
            f"adapters of peft_type {kind!r} are not supported.", nearest=sorted({str(c.peft_type) for c in known})
        )
    return found[0]


def check_options(config: dict[str, Any], method: type[DeltaSpec]) -> None:
    """Raises: UserError, naming every option that would change the model in a way that is not supported."""
    faults = []
    for key, value in sorted(config.items()):
        if key == "bias":
            refused = value not in ("none", None) and key in method.peft_lacks
        elif key in ABOUT | WHERE | method.peft_keys or value in (None, False, "", 0) or value == {} or value == []:
            refused = False
        else:
            refused = True
        if refused:
            faults.append(f"{key}={value!r}")
    why = [reason for key, reason in UNMERGEABLE.items() if config.get(key)]
    if why:
        raise UserError(f"the adapter uses {', '.join(faults)}, which is not supported.", found=why[0],
                        next="train one that merges: see deltalab methods")  # fmt: skip
    if faults:
        raise UserError(f"the adapter uses {', '.join(faults)}, which is not supported.",
                        next="merge it into its base model with peft, and load the result")  # fmt: skip


def peft_targets(model: nn.Module, config: dict[str, Any], method: type[DeltaSpec]) -> list[str]:
    """The weights that peft adapts under this config, in model order.

    Raises: UserError if nothing matches, one name of a list does not, or what matches is no place for a delta.
    """
    own = method.peft_paths(model, config)
    if own is not None:
        return own
    places_ = places(model)
    there = [path for path, where in places_.items() if where.kind != "experts"]
    wanted = config.get("target_modules")
    if wanted == "all-linear" and len(there) < len(places_):
        raise UserError(
            f"target_modules='all-linear' means experts and routers too in some mixtures, {model_name(model)} among them perhaps.",
            next="name the linears, and the experts in target_parameters",
        )
    stacked = _parameters(model, config, places_)
    if stacked and "experts" not in method.peft_on:
        known = sorted({str(cls.peft_type) for cls in methods().values() if "experts" in cls.peft_on})
        raise UserError(f"target_parameters of peft_type {method.peft_type!r} are not supported.", nearest=known)
    if wanted is None:
        wanted = [] if config.get("target_parameters") else select(model, method.model_fields["targets"].default).names
    elif wanted == "all-linear":
        output = getattr(model, "get_output_embeddings", lambda: None)()
        wanted = [p for p in there if places_[p].kind == "linear" and places_[p].module is not output]
    elif not isinstance(wanted, str):
        leaves = {leaf(path) for path in there}
        ends = leaves if leaves.issuperset(wanted) else endings(there)
        for name in sorted(wanted):
            if name not in ends:
                raise UserError(f"the adapter's target '{name}' matches no linear of {model_name(model)}.",
                                nearest=nearest(leaf(name), leaves), next="load it on the model that it was trained on")  # fmt: skip
    layers = config.get("layers_to_transform")
    if layers not in (None, []):
        layer_numbers(model, [layers] if isinstance(layers, int) else layers)  # refuses those that are not there
    chosen = {**config, "target_modules": wanted}
    takes = _taker(chosen)
    found = [path for path, where in places_.items() if path in stacked or (where.kind != "experts" and takes(path))]
    if not found:
        raise UserError(
            f"the adapter's targets match no linear of {model_name(model)}.",
            found=f"target_modules={config.get('target_modules')!r}, layers_to_transform={layers!r}",
        )
    refuse_tied(places_, set(found))
    return found


def peft_where(
    model: nn.Module, paths: list[str], method: type[DeltaSpec], part: dict[str, Any]
) -> dict[str, Any] | None:
    """The keys of a config by which peft adapts exactly these weights: short names where they do, else whole paths.

    part: what the config says already. None where there are no such keys.
    """
    if method.peft_on.intersection(SUBLAYERS):
        return method.peft_place(model, paths)
    there = places(model)
    stacked = {path for path in paths if there[path].kind == "experts"}
    plain = [path for path in paths if path not in stacked]
    mixture = any(where.kind == "experts" for where in there.values())
    if mixture and method.peft_fuses and FUSED & {leaf(path) for path in plain}:
        return None
    transposed = any(isinstance(there[path].module, Conv1D) for path in plain)
    modules = [path for path, _ in base_modules(model)]
    layers = sorted({number for path in plain if (number := _layer(path, None)) is not None})
    short = sorted({leaf(path) for path in plain})
    where: list[dict[str, Any]] = [{"target_modules": short}, {"target_modules": short, "layers_to_transform": layers},
             {"target_modules": plain}, {"target_modules": "|".join(map(re.escape, plain))}]  # fmt: skip
    said = (w for w in where if not w.keys() & method.peft_lacks)
    found = next((w for w in said if set(filter(_taker({**part, **w}), modules)) == set(plain)), None)
    ends = (sorted({leaf(path) for path in stacked}), sorted(stacked))
    names = base_parameters(model)
    parameters = next((e for e in ends if set(filter(_meaning(e), names)) == stacked), None)
    if found is None or parameters is None or (stacked and transposed):
        return None
    return {**found, "fan_in_fan_out": transposed} | ({"target_parameters": parameters} if stacked else {})


def _parameters(model: nn.Module, config: dict[str, Any], there: dict[str, Place]) -> set[str]:
    """The parameters that `target_parameters` names. Raises: UserError for one that is not there or holds no experts."""
    found: set[str] = set()
    names = base_parameters(model)
    for target in config.get("target_parameters") or []:
        matched = {name for name in names if _ends(name, target)}
        other = sorted(name for name in matched if name not in there)
        if other or not matched:
            raise UserError(
                f"target_parameters names '{target}', which is no parameter of {model_name(model)} that holds experts.",
                found=other[0] if other else "",
                nearest=[leaf(path) for path, where in there.items() if where.kind == "experts"][:2],
            )
        found |= matched
    return found


def _taker(config: dict[str, Any]) -> Callable[[str], bool]:
    """Whether peft adapts a module of a path: a string is a regular expression, a list holds endings of paths."""
    wanted, layers = config["target_modules"], config.get("layers_to_transform")
    meant, excluded = _meaning(wanted), _meaning(config.get("exclude_modules") or [])
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in saved_names(config)]

    def takes(path: str) -> bool:
        if not meant(path) or any(name.match(path) for name in saved) or excluded(path):
            return False
        if isinstance(wanted, str) or layers is None or layers == []:
            return True
        number = _layer(path, config.get("layers_pattern"))
        return number == layers if isinstance(layers, int) else number in layers

    return takes


def _meaning(names: str | Iterable[str]) -> Callable[[str], bool]:
    """Whether a path is meant by a regular expression, or by one of these ends of paths."""
    if isinstance(names, str):
        return functools.partial(_regex, names)
    ends = frozenset(names)
    if not any("." in name for name in ends):  # mostly they are last parts
        return lambda path: leaf(path) in ends

    def meant(path: str) -> bool:
        dot = "."
        while dot:
            if path in ends:
                return True
            _, dot, path = path.partition(".")
        return False

    return meant


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _regex(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise UserError(f"the adapter's pattern '{pattern}' is no regular expression.", found=str(error)) from None


def _layer(path: str, pattern: str | list[str] | None) -> int | None:
    """The block index in a path, as peft reads it: the first number after a name, or after one of the patterns."""
    names = [pattern] if isinstance(pattern, str) else pattern or []
    for start in [rf"(?:^|.*?\.){name}" for name in names if name] or [r".*?\.[^.]*"]:
        hit = re.match(rf"{start}\.(\d+)\.", path)
        if hit:
            return int(hit.group(1))
    return None
