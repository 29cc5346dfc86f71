"""The weights of a model that a delta can sit on, each by its path and kind.

A linear and an embedding go by the path of their module, experts by the path of their parameter
(`model.layers.0.mlp.experts.down_proj`): one module holds several of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.deltas.base import LINEARS, Delta, as_stored, shape_of, weight_of, wide
from deltalab.deltas.spec import Kind, Site
from deltalab.quant.linear import GroupLinear


class ExpertDeltas(nn.ModuleDict):
    """The child `delta` of a module of experts: parameter's name -> its weight delta."""


class Place(NamedTuple):
    """Where a weight is kept: the module, the name of the parameter in it, and its kind."""

    module: nn.Module
    name: str
    kind: Kind

    @property
    def transposed(self) -> bool:
        """Whether experts are kept as (experts, in, out)."""
        return self.kind == "experts" and bool(getattr(self.module, "is_transposed", False))

    def oriented(self, W: Tensor) -> Tensor:
        """The weight as kept to (..., out, in), and back."""
        if self.kind == "experts":
            return W.mT if self.transposed else W
        return as_stored(self.module, W)

    @property
    def parameter(self) -> Tensor:
        """The weight as the module keeps it: a parameter, or the codes of a `GroupLinear`."""
        if isinstance(self.module, GroupLinear):
            return self.module.codes
        found = self.module._parameters.get(self.name)
        return getattr(self.module, self.name) if found is None else found

    @property
    def dtype(self) -> torch.dtype:
        """Of `W`."""
        return self.module.dtype if isinstance(self.module, GroupLinear) else self.parameter.dtype

    @property
    def W(self) -> Tensor:
        """The weight, (..., out, in); of a quantised linear as `weight_of` gives it."""
        return self.oriented(self.parameter) if self.kind == "experts" else weight_of(self.module)

    def site(self, path: str) -> Site:
        """What a delta for this place is built from."""
        W = self.parameter
        shape = tuple(self.W.shape) if self.kind == "experts" else shape_of(self.module)
        group = self.module.group_size if isinstance(self.module, GroupLinear) else None
        return Site(path, shape, self.kind, wide(self.dtype), W.device, group)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without the deltas and what is in them."""
    inside = None  # what is in a delta comes right after it
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, (Delta, ExpertDeltas)):
            inside = name + "."
        else:
            yield name, module


def base_parameters(model: nn.Module) -> dict[str, str]:
    """Every name of the model's own parameters -> the one that `named_parameters` gives it; tied ones have several."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(p), name) for name, p in named if ".delta." not in name}


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of the model, path -> module, in model order; a delta's own linears are not the model's."""
    return {name: module for name, module in base_modules(model) if isinstance(module, LINEARS)}


def is_quantised(linear: nn.Module) -> bool:
    """Whether a linear keeps codes in place of a weight that could train."""
    return isinstance(linear, GroupLinear) or not linear.weight.dtype.is_floating_point  # type: ignore[union-attr]


def places(model: nn.Module) -> dict[str, Place]:
    """Every weight that a delta can sit on, by path, in model order."""
    found: dict[str, Place] = {}
    for path, module in base_modules(model):
        if isinstance(module, LINEARS):
            found[path] = Place(module, "weight", "linear")
        elif isinstance(module, nn.Embedding):
            found[path] = Place(module, "weight", "embedding")
        else:
            for name in expert_weights(module):
                found[f"{path}.{name}"] = Place(module, name, "experts")
    return found


def place(model: nn.Module, path: str) -> Place:
    """The place at `path`. Raises: UserError if there is none."""
    parent, _, name = path.rpartition(".")
    for owner, parameter in ((path, "weight"), (parent, name)):
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue
        if isinstance(module, LINEARS):
            return Place(module, "weight", "linear")
        if isinstance(module, nn.Embedding):
            return Place(module, "weight", "embedding")
        if parameter in expert_weights(module):
            return Place(module, parameter, "experts")
    raise UserError(f"'{path}' is no weight that a delta can sit on.")


def looked_at(W: Tensor, method: str) -> Tensor:
    """W, for a method that has to know its values. Raises: UserError where only a quantiser's codes are there."""
    if not W.dtype.is_floating_point:
        raise UserError(
            f"{method} looks at the weight here, and it is quantised.",
            found=str(W.dtype),
            next="load the model without quantisation, or take a method that needs no weight: LoRA",
        )
    return W


def expert_weights(module: nn.Module) -> list[str]:
    """Names of the parameters of `module` that hold a weight for each expert, (experts, …, …), orientation known."""
    if not isinstance(getattr(module, "is_transposed", None), bool):  # transformers says it of its experts
        return []
    return [name for name, p in module._parameters.items() if isinstance(p, Tensor) and p.ndim == 3]


def stacked_parameters(model: nn.Module) -> dict[str, torch.Size]:
    """Every parameter that may hold several weight matrices, by name, whether its orientation is known or not.

    3-D, of a module that is no convolution, and no vector or depthwise kernel in a 3-D shape: (1, 1, n) and (n, 1, k).
    """
    return {
        f"{path}.{name}": p.shape
        for path, module in base_modules(model)
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, p in module._parameters.items()
        if isinstance(p, Tensor) and p.ndim == 3 and 1 not in p.shape[1:]
    }
