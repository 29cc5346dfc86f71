"""The places of a model that a delta can sit on, each by its path and kind: weights, and the sub-layers of the blocks.

A linear and an embedding go by the path of their module, experts by the path of their parameter
(`model.layers.0.mlp.experts.down_proj`): one module holds several of them.
"""

import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.deltas.base import LINEARS, Delta, as_stored, shape_of, weight_of, wide
from deltalab.deltas.site import Kind, Site
from deltalab.quant import foreign
from deltalab.quant.base import QuantisedLinear


class ExpertDeltas(nn.ModuleDict):
    """The child `delta` of a module of experts: parameter's name -> its weight delta."""


ATTENTIONS = {
    *("self_attn", "attn", "attention", "self_attention", "SelfAttention"),
    *("encoder_attn", "cross_attn", "cross_attention", "crossattention", "EncDecAttention"),
    *("LocalSelfAttention", "TransientGlobalSelfAttention"),
}
MLPS = {"mlp", "mlp_block", "feed_forward", "ffn", "shared_mlp", "block_sparse_moe", "DenseReluDense"}
"""Names that models give to the sub-layers of their blocks: hidden states in, what is added to the residual out."""
SUBLAYERS = ("attention", "mlp")


class Place(NamedTuple):
    """Where a weight is kept: the module, the name of the parameter in it, and its kind.

    A sub-layer is a module with no one weight: name is empty, width the size of its hidden states.
    """

    module: nn.Module
    name: str
    kind: Kind
    width: int = 0

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
        """The weight as the module keeps it: a parameter, or the codes of a `QuantisedLinear`. Of a sub-layer any in it."""
        if self.kind in SUBLAYERS:
            return next(itertools.chain(self.module.parameters(), self.module.buffers()))
        if isinstance(self.module, QuantisedLinear):
            return self.module.codes
        found = self.module._parameters.get(self.name)
        return getattr(self.module, self.name) if found is None else found

    @property
    def dtype(self) -> torch.dtype:
        """Of `W`."""
        if foreign.kind(self.module) is not None:
            return foreign.dtype_of(self.module)
        return self.module.dtype if isinstance(self.module, QuantisedLinear) else self.parameter.dtype

    @property
    def W(self) -> Tensor:
        """The weight, (..., out, in); of a quantised linear as `weight_of` gives it."""
        return self.oriented(self.parameter) if self.kind == "experts" else weight_of(self.module)

    def site(self, path: str) -> Site:
        """What a delta for this place is built from."""
        W = self.parameter
        if self.kind in SUBLAYERS:
            weights = (Place(m, "weight", "linear").dtype for m in self.module.modules() if isinstance(m, LINEARS))
            floats = (p.dtype for p in self.module.parameters() if p.dtype.is_floating_point)
            dtype = wide(next(itertools.chain(weights, floats), torch.float32))
            return Site(path, (self.width, self.width), self.kind, dtype, W.device, None, self.module)
        shape = tuple(self.W.shape) if self.kind == "experts" else shape_of(self.module)
        group = self.module.group_size if isinstance(self.module, QuantisedLinear) else None
        codes = self.kind == "linear" and is_quantised(self.module)
        return Site(path, shape, self.kind, wide(self.dtype), W.device, group, quantised=codes)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without the deltas and what is in them; by a stack, see `deltalab.core.modules`."""
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen or _of_delta(type(module)):  # type: ignore[arg-type]
            continue
        seen.add(module)
        yield name, module
        if module._modules:
            before = name + "." if name else ""
            stack += [(before + key, child) for key, child in reversed(module._modules.items()) if child is not None]


@functools.cache
def _of_delta(cls: type[nn.Module]) -> bool:
    """Whether a module of this class is a delta, or holds those of experts."""
    return issubclass(cls, (Delta, ExpertDeltas))


def base_parameters(model: nn.Module) -> dict[str, str]:
    """Every name of the model's own parameters -> the one that `named_parameters` gives it; tied ones have several."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    stack = [("", model)]
    while stack:  # every path of a module that has several: each of its parameters has as many names
        before, module = stack.pop()
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names[before + key] = first.setdefault(id(parameter), before + key)
        stack += [
            (f"{before}{key}.", child)
            for key, child in reversed(module._modules.items())
            if child is not None and not (key == "delta" and before)
        ]
    return names


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of the model, path -> module, in model order; a delta's own linears are not the model's."""
    return {name: module for name, module in base_modules(model) if isinstance(module, LINEARS)}


def is_quantised(linear: nn.Module) -> bool:
    """Whether a linear keeps codes in place of a weight that could train."""
    return (
        isinstance(linear, QuantisedLinear)
        or not linear.weight.dtype.is_floating_point  # type: ignore[union-attr]
        or foreign.kind(linear) is not None
    )


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


def sublayers(model: nn.Module) -> dict[str, Place]:
    """Every attention and MLP that is a module of its own, from hidden states to what the block adds to them, by path,
    in model order.

    One that adds them itself (BERT's and BLOOM's) is none. Outermost modules only: the attention in GPT-Neo's is not another.
    """
    found: dict[str, Place] = {}
    inside = None  # what is in a sub-layer comes right after it
    for path, module in base_modules(model):
        if inside is None or not path.startswith(inside):
            there = _sublayer(model, path, module)
            if there is not None:
                found[path], inside = there, path + "."
    return found


def _sublayer(model: nn.Module, path: str, module: nn.Module) -> Place | None:
    kind = sublayer_kind(path, module)
    width = None if kind is None or adds_residual(module) else width_of(model, path)
    return None if kind is None or width is None else Place(module, "", kind, width)


def width_of(model: nn.Module, path: str = "") -> int | None:
    """The size of the hidden states at `path`, by the config nearest to it; None where none tells."""
    while True:
        config: Any = getattr(model.get_submodule(path), "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(config, "hidden_size", None)
        if isinstance(width, int) or not path:
            return width if isinstance(width, int) else None
        path = path.rpartition(".")[0]


def sublayer_kind(path: str, module: nn.Module) -> Kind | None:
    """Which sub-layer of a block a module is, by the name that its model gives it."""
    name = path.rpartition(".")[2]
    if isinstance(module, (*LINEARS, nn.Embedding, nn.ModuleList)):
        return None
    return "attention" if name in ATTENTIONS else "mlp" if name in MLPS else None


def adds_residual(sublayer: nn.Module) -> bool:
    """Whether an attention or MLP adds the residual itself: it has BERT's part for it or ALBERT's norm, or is given it."""
    names = inspect.signature(getattr(type(sublayer), "adapts", type(sublayer)).forward).parameters
    return (
        hasattr(sublayer, "output") or hasattr(sublayer, "LayerNorm") or bool({"residual", "input_tensor"} & set(names))
    )


def _round(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the one at `path` lies in, the model itself left out."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path, model.get_submodule(path)


def place(model: nn.Module, path: str) -> Place:
    """The place at `path`. Raises: UserError if there is none."""
    parent, _, name = path.rpartition(".")
    for owner, parameter in ((path, "weight"), (parent, name)):
        module = module_at(model, owner)
        if module is None:
            continue
        if isinstance(module, LINEARS):
            return Place(module, "weight", "linear")
        if isinstance(module, nn.Embedding):
            return Place(module, "weight", "embedding")
        if parameter in expert_weights(module):
            return Place(module, parameter, "experts")
        found = _sublayer(model, path, module) if owner == path else None
        if found is not None and not any(_sublayer(model, outer, m) for outer, m in _round(model, path)):
            return found
    raise UserError(f"'{path}' is no place that a delta can sit on.")


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """`get_submodule`, or None where there is none; mostly without asking each module for an attribute."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    if module is not None:
        return module
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def endings(paths: Iterable[str]) -> dict[str, list[str]]:
    """Every end of these paths, from a whole part on -> the paths that end so."""
    found: dict[str, list[str]] = {}
    for path in paths:
        end, dot = path, "."
        while dot:
            found.setdefault(end, []).append(path)
            _, dot, end = end.partition(".")
    return found


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
