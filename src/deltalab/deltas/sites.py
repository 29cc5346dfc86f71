"""The places of a model that a delta can sit on, each by its path and kind: weights, and the sub-layers of the blocks.

A linear and an embedding go by the path of their module, experts by the path of their parameter
(`model.layers.0.mlp.experts.down_proj`): one module holds several of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.deltas.base import LINEARS, Delta, as_stored, shape_of, weight_of, wide
from deltalab.deltas.site import Kind, Site
from deltalab.quant.base import QuantisedLinear


class ExpertDeltas(nn.ModuleDict):
    """The child `delta` of a module of experts: parameter's name -> its weight delta."""


ATTENTIONS = {"self_attn", "attn", "attention", "self_attention", "SelfAttention"}
MLPS = {"mlp", "feed_forward", "ffn", "DenseReluDense", "block_sparse_moe"}
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
            return next(self.module.parameters())
        if isinstance(self.module, QuantisedLinear):
            return self.module.codes
        found = self.module._parameters.get(self.name)
        return getattr(self.module, self.name) if found is None else found

    @property
    def dtype(self) -> torch.dtype:
        """Of `W`."""
        return self.module.dtype if isinstance(self.module, QuantisedLinear) else self.parameter.dtype

    @property
    def W(self) -> Tensor:
        """The weight, (..., out, in); of a quantised linear as `weight_of` gives it."""
        return self.oriented(self.parameter) if self.kind == "experts" else weight_of(self.module)

    def site(self, path: str) -> Site:
        """What a delta for this place is built from."""
        W = self.parameter
        if self.kind in SUBLAYERS:
            floats = (p.dtype for p in self.module.parameters() if p.dtype.is_floating_point)
            dtype = wide(next(floats, torch.float32))
            return Site(path, (self.width, self.width), self.kind, dtype, W.device, None, self.module)
        shape = tuple(self.W.shape) if self.kind == "experts" else shape_of(self.module)
        group = self.module.group_size if isinstance(self.module, QuantisedLinear) else None
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
    return isinstance(linear, QuantisedLinear) or not linear.weight.dtype.is_floating_point  # type: ignore[union-attr]


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
    """Every attention and MLP of the blocks whose result is added to the residual as it is, by path, in model order.

    One that adds the residual itself (BERT's attention) is none, and so is what has no module of its own.
    """
    found: dict[str, Place] = {}
    for path, module in base_modules(model):
        if not any(path.startswith(outer + ".") for outer in found):
            kind = _sublayer_kind(path, module)
            if kind is not None:
                found[path] = Place(module, "", kind, width_of(model))
    return found


def width_of(model: nn.Module) -> int:
    """The size of the hidden states."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config  # type: ignore[union-attr, operator]
    return int(config.hidden_size)  # type: ignore[union-attr]


def _sublayer_kind(path: str, module: nn.Module) -> Kind | None:
    name = path.rpartition(".")[2]
    if hasattr(module, "output") and not isinstance(module, LINEARS):  # BERT's: its own residual and norm
        return None
    return "attention" if name in ATTENTIONS else "mlp" if name in MLPS else None


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
    try:
        module = model.get_submodule(path)
        kind = _sublayer_kind(path, module)
    except AttributeError:
        kind = None
    if kind is not None:
        return Place(module, "", kind, width_of(model))
    raise UserError(f"'{path}' is no place that a delta can sit on.")


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
