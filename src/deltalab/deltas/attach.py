"""How a delta sits on a weight: it becomes a child `delta` of the module that holds the weight, and that module's class
becomes a subclass that asks it.

A linear or an embedding hands its delta the input and its own forward. Experts, whose forward reads 3-D parameters as it
likes, are shown the adapted weights in place of them: that works with every implementation of the experts' forward, and
costs one adapted copy of each stack while the forward runs.

The module keeps its place, its parameters, their names and ties, so state-dict keys, hooks, deepcopy and
`save_pretrained` go on working, and taking the delta off again leaves no trace.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.deltas.base import Base, Delta, WeightDelta
from deltalab.deltas.select import stacks
from deltalab.deltas.sites import ExpertDeltas, Place


class Adapted(nn.Module):
    """Mixed in before the class of a linear or an embedding; `adapts` is that class."""

    adapts: ClassVar[type[nn.Module]]
    delta: Delta

    def forward(self, x: Tensor) -> Tensor:
        delta = self.delta
        if not delta.enabled:
            return super().forward(x)
        if isinstance(self, nn.Embedding):
            return _scaled(self, x, delta)
        base = Base(super().forward, self)
        return delta(x, base) if delta.keep is None else delta.masked(x, base)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made on the fly have no importable name: pickle and deepcopy make the class again instead."""
        return _blank, (type(self).adapts,), self.__getstate__()


class AdaptedExperts(nn.Module):
    """Mixed in before a class of experts; `delta` holds one weight delta a parameter, by the parameter's name."""

    adapts: ClassVar[type[nn.Module]]
    shows: ClassVar[tuple[str, ...]]
    delta: ExpertDeltas

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shown: dict[str, Tensor] = {}
        for name, delta in self.delta.items():
            delta = cast(WeightDelta, delta)
            if delta.enabled:
                held = Place(self, name, "experts")
                W = held.parameter
                shown[name] = held.oriented(delta.adapted(held.oriented(W)).to(W.dtype))
        self.__dict__["_shown"] = shown
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["_shown"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).adapts, self.shows), self.__getstate__()


@functools.cache
def adapted_class(cls: type[nn.Module], shows: tuple[str, ...] = ()) -> type[nn.Module]:
    """The subclass of a module's class that asks its delta; the same one each time. shows: the experts' parameters."""
    body: dict[str, Any] = {"adapts": cls, "__doc__": cls.__doc__}
    if not shows:
        return type(f"Adapted{cls.__name__}", (Adapted, cls), body)
    body |= {"shows": shows, **{name: property(functools.partial(_shown, name)) for name in shows}}
    return type(f"Adapted{cls.__name__}", (AdaptedExperts, cls), body)


def attach(place: Place, delta: Delta) -> None:
    """Put `delta` on a place. Raises: UserError for an embedding whose forward is not understood."""
    module = place.module
    delta.train(module.training)
    if place.kind == "experts":
        if not isinstance(module, AdaptedExperts):
            module.add_module("delta", ExpertDeltas())
        cast(ExpertDeltas, module.delta)[place.name] = delta
        cls = getattr(type(module), "adapts", type(module))
        module.__class__ = adapted_class(cls, tuple(module.delta))  # type: ignore[arg-type]
        return
    if place.kind == "embedding" and _embeds_its_own_way(module):
        raise UserError(
            f"{type(module).__name__} does more than look up a row, so no delta goes there.",
            next="leave the embeddings out, or train them themselves: Train('embed_tokens')",
        )
    module.add_module("delta", delta)
    module.__class__ = adapted_class(type(module))


def detach(module: nn.Module) -> None:
    """Take the delta off, of experts all of them."""
    module.__class__ = type(module).adapts  # type: ignore[attr-defined]
    del module._modules["delta"]


def attached_to(model: nn.Module) -> Iterator[tuple[str, str, Delta]]:
    """(path of the weight, name of the delta among the model's modules, delta), in model order."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, f"{name}.delta" if name else "delta", module.delta
        elif isinstance(module, AdaptedExperts):
            for key, delta in module.delta.items():
                yield f"{name}.{key}", f"{name}.delta.{key}", cast(Delta, delta)


def let_checkpoints_backpropagate(model: nn.Module) -> None:
    """Make re-entrant gradient checkpointing work over frozen embeddings.

    It drops the gradients of a block none of whose inputs needs any, which is the case of the first block when only
    deltas train. A hook marks the embeddings' output while checkpointing is on, and costs nothing otherwise.
    """
    embeddings = _embeddings(model)
    if embeddings is not None:
        blocks = next(iter(stacks(model).values()))
        embeddings.register_forward_hook(functools.partial(_mark, blocks))


def stop_marking(model: nn.Module) -> None:
    """Undo `let_checkpoints_backpropagate`."""
    embeddings = _embeddings(model)
    if embeddings is not None:
        hooks = embeddings._forward_hooks
        for key in [k for k, h in hooks.items() if isinstance(h, functools.partial) and h.func is _mark]:
            del hooks[key]


def _shown(name: str, experts: nn.Module) -> Tensor:
    """What a parameter of adapted experts reads as: the adapted weight inside their forward, itself outside."""
    shown: dict[str, Tensor] = experts.__dict__.get("_shown", {})
    return shown[name] if name in shown else cast(Tensor, experts._parameters[name])


def _embeds_its_own_way(embedding: nn.Module) -> bool:
    plain = type(embedding).forward is nn.Embedding.forward
    return not plain and getattr(embedding, "embed_scale", None) is None


def _scaled(embedding: nn.Embedding, ids: Tensor, delta: Delta) -> Tensor:
    """An embedding's adapted row, times the constant that some models (gemma) multiply it with."""
    base = Base(functools.partial(nn.Embedding.forward, embedding), embedding)
    rows = delta(ids, base) if delta.keep is None else delta.masked(ids, base)  # type: ignore[attr-defined]
    scale = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * torch.as_tensor(scale).to(embedding.weight.dtype)


def _mark(blocks: nn.ModuleList, _module: nn.Module, _args: Any, output: Tensor) -> None:
    block: Any = blocks[0]
    if (
        block.training
        and getattr(block, "gradient_checkpointing", False)
        and torch.is_grad_enabled()
        and output.is_leaf
    ):
        output.requires_grad_(True)


def _embeddings(model: nn.Module) -> nn.Module | None:
    get: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    try:
        return get() if get else None
    except NotImplementedError:
        return None


def _blank(cls: type[nn.Module], shows: tuple[str, ...] = ()) -> nn.Module:
    made = adapted_class(cls, shows)
    return made.__new__(made)
