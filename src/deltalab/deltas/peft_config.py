"""What peft's `adapter_config.json` asks for, checked: options that are not supported are refused by name.

An option that this version of deltalab does not know is refused too unless it is empty: ignoring one silently would
run another model than the one that was trained.
"""

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from deltalab.core.errors import UserError, nearest
from deltalab.deltas import methods
from deltalab.deltas.base import DeltaSpec
from deltalab.deltas.select import layer_numbers, leaf, model_name, select
from deltalab.deltas.sites import linears
from deltalab.deltas.weights import Group, Planned

ABOUT = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
         "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config"}  # fmt: skip
"""Keys that say nothing about what is computed, or only beside another option that is refused."""
WHERE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"}


def is_peft(value: Any) -> bool:
    """Whether a value is one of peft's config objects, without importing peft."""
    return any(cls.__module__.startswith("peft.") for cls in type(value).__mro__) and hasattr(value, "to_dict")


def peft_plan(model: nn.Module, config: dict[str, Any], *, fresh: bool = False) -> Planned:
    """What peft would do to `model` by this config. fresh: the adapter is new, so its start counts too.

    Raises: UserError for an unknown type, an unsupported option, or targets that match nothing.
    """
    method = method_of(config)
    check_options(config, method)
    if fresh and config.get("init_lora_weights", True) is not True:
        raise UserError(
            f"init_lora_weights={config['init_lora_weights']!r} is not supported for a new adapter.", nearest=["True"]
        )
    paths = peft_targets(model, config)
    return Planned([Group(method.from_peft(config, paths), paths)], [], set())


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
            refused = value != "none"
        elif key in ABOUT | WHERE | method.peft_keys or value in (None, False, "", 0) or value == {} or value == []:
            refused = False
        else:
            refused = True
        if refused:
            faults.append(f"{key}={value!r}")
    if faults:
        raise UserError(f"the adapter uses {', '.join(faults)}, which is not supported.",
                        next="merge it into its base model with peft, and load the result")  # fmt: skip


def peft_targets(model: nn.Module, config: dict[str, Any]) -> list[str]:
    """The linears that peft adapts under this config: a string is a regular expression, a list holds path endings.

    Raises: UserError if nothing matches, or one name of a list does not.
    """
    there = linears(model)
    wanted, layers = config.get("target_modules"), config.get("layers_to_transform")
    if wanted is None:
        return select(model, "q,v").names
    if isinstance(wanted, str) and wanted != "all-linear":
        found = [path for path in there if _regex(wanted, path)]
    elif wanted == "all-linear":
        output = getattr(model, "get_output_embeddings", lambda: None)()
        found = [path for path, module in there.items() if module is not output]
    else:
        ends = {name: [p for p in there if p == name or p.endswith("." + name)] for name in sorted(wanted)}
        for name, paths in ends.items():
            if not paths:
                raise UserError(f"the adapter's target '{name}' matches no linear of {model_name(model)}.",
                                nearest=nearest(leaf(name), {leaf(p) for p in there}), next="load it on the model that it was trained on")  # fmt: skip
        found = [path for path in there if any(path in paths for paths in ends.values())]
    if layers not in (None, []):
        numbers = layer_numbers(model, [layers] if isinstance(layers, int) else layers) or set()
        found = [path for path in found if _layer(path, config.get("layers_pattern")) in numbers]
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str):
        found = [path for path in found if not _regex(excluded, path)]
    elif excluded:
        found = [path for path in found if not any(path == name or path.endswith("." + name) for name in excluded)]
    if not found:
        raise UserError(
            f"the adapter's targets match no linear of {model_name(model)}.",
            found=f"target_modules={wanted!r}, layers_to_transform={layers!r}",
        )
    select(model, found)  # refuses tied weights by name
    return found


def peft_where(model: nn.Module, paths: list[str]) -> dict[str, Any]:
    """`target_modules` and `layers_to_transform` that name exactly these linears: short names where they do, else paths."""
    kind: dict[str, Any] = {"fan_in_fan_out": any(isinstance(linears(model)[p], Conv1D) for p in paths)}
    short = sorted({leaf(path) for path in paths})
    layers = sorted({number for path in paths if (number := _layer(path, None)) is not None})
    for where in (
        {"target_modules": short, "layers_to_transform": None},
        {"target_modules": short, "layers_to_transform": layers},
    ):
        try:
            if set(peft_targets(model, where)) == set(paths):
                return {**where, **kind}
        except UserError:
            continue
    return {"target_modules": paths, "layers_to_transform": None, **kind}


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
