"""How a delta sits on a linear: it becomes the linear's child `delta`, and the linear's class becomes a subclass whose
forward hands the input and the original forward to it.

The linear keeps its place, its parameters, their names and ties, so state-dict keys, hooks, deepcopy and
`save_pretrained` go on working, and taking the delta off again leaves no trace.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltalab.deltas.base import Delta, weight_of
from deltalab.deltas.select import decoder_blocks


class Adapted(nn.Module):
    """Mixed in before the linear's own class; `adapts` is that class."""

    adapts: ClassVar[type[nn.Module]]
    delta: Delta

    def forward(self, x: Tensor) -> Tensor:
        base, delta = super().forward, self.delta
        if not delta.enabled:
            return base(x)
        if delta.keep is not None:
            return delta.masked(x, base, weight_of(self))
        return delta(x, base)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made on the fly have no importable name: pickle and deepcopy make the class again instead."""
        return _blank, (type(self).adapts,), self.__getstate__()


@functools.cache
def adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a linear's class that asks its delta; the same one each time."""
    return type(f"Adapted{cls.__name__}", (Adapted, cls), {"adapts": cls, "__doc__": cls.__doc__})


def attach(linear: nn.Module, delta: Delta) -> None:
    """Put `delta` on `linear`."""
    linear.add_module("delta", delta.train(linear.training))
    linear.__class__ = adapted_class(type(linear))


def detach(linear: nn.Module) -> None:
    """Take the delta off."""
    linear.__class__ = type(linear).adapts  # type: ignore[attr-defined]
    del linear._modules["delta"]


def let_checkpoints_backpropagate(model: nn.Module) -> None:
    """Make re-entrant gradient checkpointing work over frozen embeddings.

    It drops the gradients of a block none of whose inputs needs any, which is the case of the first block when only
    deltas train. A hook marks the embeddings' output while checkpointing is on, and costs nothing otherwise.
    """
    embeddings = _embeddings(model)
    if embeddings is not None:
        embeddings.register_forward_hook(functools.partial(_mark, decoder_blocks(model)[1]))


def stop_marking(model: nn.Module) -> None:
    """Undo `let_checkpoints_backpropagate`."""
    embeddings = _embeddings(model)
    if embeddings is not None:
        hooks = embeddings._forward_hooks
        for key in [k for k, h in hooks.items() if isinstance(h, functools.partial) and h.func is _mark]:
            del hooks[key]


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


def _blank(cls: type[nn.Module]) -> nn.Module:
    made = adapted_class(cls)
    return made.__new__(made)
