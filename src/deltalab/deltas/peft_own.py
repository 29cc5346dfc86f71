"""The model's own parameters in peft's words: `modules_to_save`, `bias`, and the heads that belong to a task.

peft trains a copy of each module that it saves, so there the users of a tied weight part. Here they stay together: a
tied weight is written for every one of its users, and read where the file holds the same values for all of them.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from deltalab.core.errors import UserError, nearest
from deltalab.core.modules import named_parameters
from deltalab.deltas.select import leaf, model_name
from deltalab.deltas.sites import base_modules, base_parameters, expert_weights, place
from deltalab.deltas.spec import DeltaSpec

PREFIX = "base_model.model."
SHARED = "base_model."
"""Before the keys of tensors that modules share; in the own format a group's number follows, for there are several."""
AGAIN = re.compile(r"\.(original_module|modules_to_save)\.[^.]*$")
"""Keys of tensors that peft writes a second time."""
TASKS: dict[str, Mapping[str, Any]] = {
    "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
}
"""peft's task -> the classes of transformers that it is the task of."""
HEADS: dict[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What peft saves whole for a task, whether the config names it or not; a name that the model lacks is passed over."""


def task_of(model: nn.Module) -> str | None:
    """peft's word for what the model's class is for; None where it has none."""
    name = type(model).__name__
    for task, classes in TASKS.items():
        if any(name == found or (isinstance(found, tuple) and name in found) for found in classes.values()):
            return task
    return None


def saved_names(config: Mapping[str, Any]) -> list[str]:
    """The names of modules that peft saves whole under this config, the heads of its task among them."""
    task = getattr(config.get("task_type"), "value", config.get("task_type"))
    return [*(config.get("modules_to_save") or []), *HEADS.get(task, ())]


def own_keys(model: nn.Module, config: Mapping[str, Any], targets: Collection[str]) -> dict[str, str]:
    """The model's own tensors in a peft file: key after `base_model.model.` -> name of the parameter.

    targets: the paths that have a delta. Raises: UserError for a module that is not there or has buffers, or if a
    weight of it is tied to one that is not saved.
    """
    names = base_parameters(model)
    keys: dict[str, str] = {}
    for path, module in _saved(model, config).items():
        for key in _state_keys(module):
            if f"{path}.{key}" not in names:
                raise UserError(
                    f"modules_to_save takes '{path}', which has a buffer, '{key}': it is no parameter.",
                    next="name modules without buffers",
                )
            keys[f"{path}.{key}"] = names[f"{path}.{key}"]
    saved = set(keys.values())
    for user, name in names.items() if saved else ():
        if name in saved and user not in keys:
            raise UserError(
                f"the adapter trains a copy of '{name}' for one of its users alone, and it is tied to '{user}'.",
                found=f"modules_to_save: {', '.join(saved_names(config))}",
                next="name every user of the weight in modules_to_save, or untie the weights of the base model first",
            )
    for name in _biases(model, str(config.get("bias") or "none"), targets):
        if name not in keys:
            keys[wrapped(model, name, targets)] = names[name]
    return keys


def own_to_peft(
    model: nn.Module, own: set[str], targets: Collection[str], method: type[DeltaSpec]
) -> dict[str, Any] | None:
    """The part of a peft config by which exactly the parameters `own` train; None where peft has no words for it."""
    task = task_of(model)
    heads = [path for path in _modules(model) if path.endswith(HEADS[task])] if task in HEADS else []
    if any(not _parameters(model, head) <= own for head in heads):
        task, heads = None, []  # with its task, peft would look for the head in the file
    for bias in ("none",) if "bias" in method.peft_lacks else ("none", method.peft_biases, "all"):
        names = base_parameters(model)
        rest = own - {names[name] for name in _biases(model, bias, targets)}
        users = [user for user, name in names.items() if name in rest]
        modules = _owners(model, users, heads)
        for short in (sorted({leaf(path) for path in modules}), modules):
            part = {"task_type": task, "bias": bias, "modules_to_save": short or None}
            try:
                if set(own_keys(model, part, targets).values()) == own:
                    tie = _ties_the_embeddings(model, modules) and "ensure_weight_tying" in method.peft_keys
                    return part | {"ensure_weight_tying": True} if tie else part
            except UserError:
                continue
    return None


def own_values(tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Name of the parameter -> its value in the file; keys: key in the file -> name.

    Raises: UserError if the users of a tied weight have different values.
    """
    values: dict[str, Tensor] = {}
    for key, name in keys.items():
        if not torch.equal(values.setdefault(name, tensors[key]), tensors[key]):
            raise UserError(
                f"the adapter holds two values of '{name}', which is one tied weight in this model.",
                found=f"the second is '{key}'",
                next="untie the weights of the base model before loading",
            )
    return values


def wrapped(model: nn.Module, name: str, targets: Collection[str]) -> str:
    """The path or name of something in a model as peft has it there: a module under a delta is a `base_layer`.

    Of experts, each parameter that has a delta is one layer more, the first of them the innermost.
    """
    found: list[str] = []
    parts = name.split(".")
    for i, part in enumerate(parts):
        found.append(part)
        path = ".".join(parts[: i + 1])
        inside = [target for target in targets if target.rpartition(".")[0] == path]
        if path != name and path in targets:
            found.append("base_layer")
        elif path != name and inside and name not in targets:
            found += ["base_layer"] * sum(place(model, target).kind == "experts" for target in inside)
    return ".".join(found)


def other_vocabulary(model: nn.Module, values: Mapping[str, Tensor], what: str) -> None:
    """Raises: UserError if an embedding or output layer of the file has another number of rows, as new tokens give it."""
    if not values:
        return
    own, vocabulary = named_parameters(model), set(embeddings(model).values())
    for name, value in values.items():
        here = own[name]
        if name in vocabulary and value.shape[0] != here.shape[0] and value.shape[1:] == here.shape[1:]:
            raise UserError(
                f"{what} has {value.shape[0]} tokens in '{name}', and {model_name(model)} has {here.shape[0]}.",
                next=f"model.resize_token_embeddings({value.shape[0]}) before loading",
            )


def key_of(model: nn.Module, path: str, targets: Collection[str]) -> str:
    """What the keys of the delta at `path` begin with in peft's file."""
    where = place(model, path)
    if where.kind != "experts":
        return PREFIX + path
    module = path.rpartition(".")[0]
    around = [name for name in expert_weights(where.module) if f"{module}.{name}" in targets]
    return PREFIX + module + ".base_layer" * (len(around) - 1 - around.index(where.name))  # the last one is outermost


def of_the_base(
    model: nn.Module, tensors: dict[str, Tensor], own: Mapping[str, str], targets: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without what only repeats the base, and key -> name of the embeddings that differ from the base's.

    peft writes the embeddings as well when a delta sits on one, or when tokens were added; then, and with `bias="all"`,
    also the original and the trained tensors of a module that it saves anyway.
    """
    kept = {key: t for key, t in tensors.items() if key in own or not AGAIN.search(key)}
    beside: dict[str, str] = {}
    parameters = named_parameters(model)
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


def embeddings(model: nn.Module) -> dict[str, str]:
    """The weights of the input embeddings and of the output layer: each user's name -> name of the parameter."""
    names, paths = base_parameters(model), {id(module): path for path, module in base_modules(model)}
    found: dict[str, str] = {}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        path = paths.get(id(module))
        if path is not None and f"{path}.weight" in names:
            found[f"{path}.weight"] = names[f"{path}.weight"]
    return found


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by each of its paths, those of deltas aside."""
    found = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in found if path and ".delta." not in f"{path}."}


def _state_keys(module: nn.Module) -> list[str]:
    return [key for key in module.state_dict() if ".delta." not in f".{key}"]


def _parameters(model: nn.Module, path: str) -> set[str]:
    """Names of the parameters in the module at `path`."""
    return {name for user, name in base_parameters(model).items() if user.startswith(path + ".")}


def _saved(model: nn.Module, config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules that peft saves whole; of one inside another, the outer. Raises: UserError for a name without one."""
    names = saved_names(config)
    if not names:
        return {}
    there = _modules(model)
    for name in config.get("modules_to_save") or []:
        if name not in saved_names({"task_type": config.get("task_type")}) and not any(p.endswith(name) for p in there):
            raise UserError(
                f"modules_to_save names '{name}', which {model_name(model)} does not have.",
                nearest=nearest(leaf(name), {leaf(path) for path in there}),
            )
    found = [path for path in there if path.endswith(tuple(names))]
    if config.get("ensure_weight_tying"):
        tied = {name for path in found for name in _parameters(model, path)} & set(embeddings(model).values())
        found += [user.rpartition(".")[0] for user, name in base_parameters(model).items() if name in tied]
    return {p: there[p] for p in dict.fromkeys(found) if not any(p.startswith(other + ".") for other in found)}


def _owners(model: nn.Module, users: list[str], heads: list[str]) -> list[str]:
    """The modules that hold these parameters, a head in place of its parts; of one inside another, the outer."""
    found = {user.rpartition(".")[0] for user in users}
    found = {next((head for head in heads if f"{path}.".startswith(head + ".")), path) for path in found}
    return sorted(path for path in found if not any(path.startswith(other + ".") for other in found))


def _biases(model: nn.Module, bias: str, targets: Collection[str]) -> list[str]:
    """Names of the biases that peft trains by this word."""
    if bias != "all" and not bias.endswith("_only"):
        return []
    names = [name for name in base_parameters(model) if leaf(name) == "bias"]
    if bias == "all":
        return names
    inside = set(targets)
    return [name for name in names if name.rpartition(".")[0] in inside]


def _ties_the_embeddings(model: nn.Module, modules: Collection[str]) -> bool:
    """Whether the modules are the input embeddings and a tied output layer without a bias: what peft can keep tied."""
    if not modules:
        return False
    tied = embeddings(model)
    bare = all(getattr(model.get_submodule(user.rpartition(".")[0]), "bias", None) is None for user in tied)
    users = [user for user, name in base_parameters(model).items() if name in tied.values()]
    return (
        bare
        and len(set(tied.values())) < len(tied) == len(users)
        and set(modules) >= {u.rpartition(".")[0] for u in users}
    )
