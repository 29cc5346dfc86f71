"""Adapters apart from the model that they belong to: deltas by path, built on a twin that shares the base's memory.

What looks at several adapters of one base, or changes them while it runs, cannot put each on the model to read it.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.deltas.base import Delta, WeightDelta
from deltalab.deltas.copying import copied
from deltalab.deltas.own_format import require_prepared
from deltalab.deltas.peft_format import load_adapter, trained_by
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import places, sublayers
from deltalab.deltas.switch import unload
from deltalab.deltas.weights import adaptation, attached, is_adapted

Source = str | Path | nn.Module | Mapping[str, Delta]
"""An adapter: its folder, a model that it is active on, or its deltas by path."""


def twin(model: nn.Module) -> nn.Module:
    """A second model of the same tensors. Adapters come and go on it, and the first one is not touched.

    Raises: UserError if the model is adapted.
    """
    if is_adapted(model) or attached(model):
        raise UserError(
            f"{model_name(model)} is adapted; the base that several adapters share is not.",
            next="deltalab.unload(model), or close the bank that is on it",
        )
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():  # of the tensors of other libraries the object itself, which holds more
        own = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if own else parameter
    twin: nn.Module = copied(model, memo)
    return twin


def apart(base: nn.Module, source: Source, name: str) -> dict[str, Delta]:
    """The deltas of an adapter by path, in eval mode, nobody else's. base: a `twin`, as plain after as before.

    Raises: UserError if the adapter cannot be read, does not fit, or trains the model's own parameters.
    """
    if isinstance(source, (str, Path)):
        _require_no_own(trained_by(base, source), name)
        deltas = attached(load_adapter(base, source))
        unload(base)
    else:
        deltas = copy.deepcopy(dict(_of_model(base, source, name) if isinstance(source, nn.Module) else source))
        _require_fit(base, deltas, name)
    for delta in deltas.values():
        delta.eval().requires_grad_(False)
    return deltas


def _of_model(base: nn.Module, model: nn.Module, name: str) -> dict[str, Delta]:
    if not is_adapted(model):
        raise UserError(
            f"the model given for '{name}' has no adapter.", next="deltalab.adapt or load_adapter, or give a folder"
        )
    state = adaptation(model)
    _require_no_own(list(state.start), name)
    require_prepared(base, state.prepared, f"adapter '{name}'")
    return attached(model)


def _require_no_own(names: list[str], name: str) -> None:
    if names:
        raise UserError(
            f"adapter '{name}' trains the model's own '{names[0]}', and the base is shared.",
            found=f"{len(names)} own parameters train: modules_to_save, biases, or Train",
            next="use it alone: deltalab.load_adapter, deltalab.merged",
        )


def _require_fit(base: nn.Module, deltas: Mapping[str, Delta], name: str) -> None:
    """Raises: UserError for a path that the base does not have, or a change of another shape."""
    there = {**places(base), **sublayers(base)}
    for path, delta in deltas.items():
        if path not in there:
            raise UserError(
                f"adapter '{name}' adapts '{path}', which {model_name(base)} does not have.",
                nearest=nearest(path, there),
            )
        factors = delta.factors() if isinstance(delta, WeightDelta) else None
        shape = there[path].site(path).shape
        if factors is not None and (*factors.B.shape[:-1], factors.A.shape[-1]) != shape:
            raise UserError(
                f"adapter '{name}' does not fit '{path}', which is {' × '.join(map(str, shape))}.",
                found=f"a change of {' × '.join(map(str, (*factors.B.shape[:-1], factors.A.shape[-1])))}",
            )


def tensors_of(delta: Delta) -> list[Tensor]:
    """Parameters and buffers."""
    return [*delta.parameters(), *delta.buffers()]


def nbytes(tensors: list[Tensor]) -> int:
    """Bytes that they take, shared ones once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
