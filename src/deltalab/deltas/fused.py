"""What runs in place of a module's forward in a training pass, where `deltalab.deltas.fuse` found a kernel for it.

A norm becomes one that says how its output is made again (`Made`, an attribute of the output); a linear with a low-rank
change asks its input for that. Linears that sit beside each other and are given one and the same tensor are computed
together by the first that is asked; the others find their output at the tensor. A whole MLP is one call, if nothing
watches its parts. All of it goes by what is there in that pass: other inputs, hooks, weights that train, deltas without a
low-rank form, or a pass that does not train go the plain way.
"""

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from deltalab.deltas.base import Delta, WeightDelta, weight_of
from deltalab.kernels.linear import Map, Recipe, linears
from deltalab.kernels.mlp import Form, mlp
from deltalab.kernels.norm import norm

KERNELS = ("auto", "plain")

MADE = "_deltalab_made"
READY = "_deltalab_ready"


class Switch:
    """Whether the kernels of a model run; one for all its modules. used: how often each did. attention: whether its
    attentions go through our function.
    """

    def __init__(self) -> None:
        self.on, self.attention = True, False
        self.used: dict[str, int] = {}

    def runs(self, module: nn.Module) -> bool:
        """Whether this pass is one for kernels: of training, also without gradients, as reentrant checkpointing begins."""
        return self.on and module.training and not torch.compiler.is_compiling()

    def count(self, kernel: str) -> None:
        self.used[kernel] = self.used.get(kernel, 0) + 1


class Beside:
    """Linears that read one input. They are computed together as long as all of them are asked for it."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules, self.missed, self.together = modules, 0, True


def low_rank_linear(module: nn.Module, x: Tensor) -> Tensor | None:
    """The output of an adapted linear by the kernel; None where it does not apply."""
    switch: Switch | None = module.__dict__.get("_switch")
    if switch is None or not switch.runs(module) or not x.is_floating_point():
        return None
    ready, version = x.__dict__.get(READY, ({}, None))
    if id(module) in ready and version == x._version:
        beside: Beside = module.__dict__["_beside"]
        beside.missed -= 1
        return cast(Tensor, ready.pop(id(module)))
    own = map_of(module)
    if own is None:
        return None
    maps = {id(module): own, **_others(module)}
    outputs = dict(zip(maps, linears(x, list(maps.values()), made(x)), strict=True))
    switch.count("low-rank linear" if len(maps) == 1 else f"{len(maps)} low-rank linears of one input")
    y = outputs.pop(id(module))
    if outputs:
        module.__dict__["_beside"].missed = len(outputs)
        x.__dict__[READY] = outputs, x._version
    return y


def _others(module: nn.Module) -> dict[int, Map]:
    """The linears beside it that are computed at once."""
    beside: Beside | None = module.__dict__.get("_beside")
    if beside is None:
        return {}
    if beside.missed:  # the last time not all of them were asked for the same tensor
        beside.together = False
    if not beside.together:
        return {}
    found = {id(m): map_of(m) for m in beside.modules if m is not module}
    return {key: m for key, m in found.items() if m is not None}


def map_of(module: nn.Module) -> Map | None:
    """A linear for the kernels; None if its weight trains, or its delta has no low-rank form now."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if any(p is not None and p.requires_grad for p in (weight, bias)):
        return None
    delta: Delta | None = module._modules.get("delta")  # type: ignore[assignment]
    low = None
    if delta is not None and delta.enabled:
        if not isinstance(delta, WeightDelta) or delta.keep is not None or watched(delta):
            return None
        low = delta.form(lambda: weight_of(module))
        if low is None:
            return None
    return Map(lambda dtype: weight_of(module).to(dtype), bias, low)


def made(x: Tensor) -> Recipe | None:
    """How a norm made x, if it did and x is as it left it."""
    found = x.__dict__.get(MADE)
    return found[0] if found is not None and found[1] == x._version else None


def watched(module: nn.Module) -> bool:
    """Whether a hook would see or change a call of the module."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    everywhere = (
        torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks,
    )  # fmt: skip
    return any(own) or any(everywhere) or "forward" in module.__dict__


class Fused(nn.Module):
    """Mixed in before the class `fuses` of a norm or an MLP."""

    fuses: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).fuses, type(self).__mro__[1]), self.__getstate__()


class FusedNorm(Fused):
    """A norm; `_kind` says which."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        switch: Switch = self.__dict__["_switch"]
        weight = self._parameters.get("weight")
        mixed = weight is not None and weight.dtype is not x.dtype  # the module's own forward may widen x
        if args or kwargs or mixed or not switch.runs(self):
            return super().forward(x, *args, **kwargs)
        y, recipe = norm(x, weight, self._parameters.get("bias"), self.__dict__["_kind"])
        y.__dict__[MADE] = recipe, y._version
        switch.count("norm")
        return y


class Parts(NamedTuple):
    """Names of an MLP's linears, its activation as the kernel calls it, and how they go together."""

    first: tuple[str, ...]
    down: str
    act: str
    form: Form


class FusedMLP(Fused):
    """An MLP; `_parts` says how it is made."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        maps = None if args or kwargs else self._maps()
        if maps is None:
            return super().forward(x, *args, **kwargs)
        parts: Parts = self.__dict__["_parts"]
        self.__dict__["_switch"].count("MLP")
        return mlp(x, maps[:-1], maps[-1], parts.act, parts.form, made(x))

    def _maps(self) -> list[Map] | None:
        if not cast(Switch, self.__dict__["_switch"]).runs(self):
            return None
        if any(watched(m) or (isinstance(m, nn.Dropout) and m.p) for m in self.children()):
            return None
        parts: Parts = self.__dict__["_parts"]
        maps = [map_of(cast(nn.Module, self._modules[name])) for name in (*parts.first, parts.down)]
        return None if any(m is None for m in maps) else cast("list[Map]", maps)


_CLASSES: dict[tuple[type[nn.Module], type[Fused]], type[nn.Module]] = {}


def fused_class(cls: type[nn.Module], how: type[Fused]) -> type[nn.Module]:
    """The subclass of a module's class that asks the kernel; the same one each time."""
    key = (cls, how)
    if key not in _CLASSES:
        _CLASSES[key] = type(
            cls.__name__, (how, cls), {"fuses": cls, "__doc__": cls.__doc__, "__module__": cls.__module__}
        )
    return _CLASSES[key]


def _blank(cls: type[nn.Module], how: type[Fused]) -> nn.Module:
    found = fused_class(cls, how)
    return found.__new__(found)
