"""|W| of the scored linears, or |W − W_base|: the factor that every score but the random one has.

On an adapted model W is the module's own weight. Under a delta on a linear that is the base's; where the weights
themselves train, it is the tuned one.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.shapes import Float
from deltalab.core.spec import digest
from deltalab.deltas.base import weight_of, wide
from deltalab.deltas.select import scored_linears

Base = nn.Module | Mapping[str, Tensor]
"""What the difference is taken from: a model, or path → weight (out, in)."""


class Magnitudes(Mapping[str, Tensor]):
    """Module path → |W|, or |W − W_base| with a base: (out, in), in fp32 or the model's wider dtype, made when asked for.

    modules: path → linear; the scored linears of `model` if not given.
    Raises: UserError if a weight is shared by two modules, quantised or parametrised, or the base has none like it.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module] | None = None, base: Base | None = None
    ) -> None:
        self.modules = dict(scored_linears(model) if modules is None else modules)
        _check(self.modules)
        self.shapes = {path: list(weight_of(module).shape) for path, module in self.modules.items()}
        self.dtype = wide(next(iter(self.modules.values())).get_parameter("weight").dtype)
        self.base = _base_weights(base, self.shapes) if base is not None else None

    def __getitem__(self, path: str) -> Float[Tensor, "out in"]:
        W = weight_of(self.modules[path]).detach().to(self.dtype)
        if self.base is not None:
            W = W - self.base[path].detach().to(W.device, self.dtype)
        return W.abs().contiguous()  # of Conv1D, W is a transposed view

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def base_digest(self) -> str | None:
        """Twelve hex digits over the base's weights of the scored modules; None without a base."""
        return None if self.base is None else digest({path: tensor_digest(self.base[path]) for path in self.modules})

    def digests(self) -> dict[str, str]:
        """Twelve hex digits of each weight."""
        return {path: tensor_digest(weight_of(module)) for path, module in self.modules.items()}


def tensor_digest(tensor: Tensor) -> str:
    """Twelve hex digits of the SHA-256 of a tensor's dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]


def _check(modules: Mapping[str, nn.Module]) -> None:
    if not modules:
        raise UserError("no modules to score.")
    owner: dict[int, str] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None:
            raise UserError(f"'{path}' has no parameter 'weight' of its own.", found=f"it is a {type(module).__name__}",
                            next="remove its parametrisation, or leave it out of modules=")  # fmt: skip
        if not weight.is_floating_point():
            raise UserError(f"'{path}' holds {weight.dtype}, which has no gradient.", next="load the model unquantised to score it")  # fmt: skip
        if id(weight) in owner:
            raise UserError(f"'{path}' and '{owner[id(weight)]}' share a weight: it has one score.", next="name one of the two in modules=")  # fmt: skip
        owner[id(weight)] = path


def _base_weights(base: Base, shapes: Mapping[str, list[int]]) -> Mapping[str, Tensor]:
    """The base's weights of these paths, (out, in).

    Raises: UserError, naming the module, where it has none or one of another shape.
    """
    if isinstance(base, nn.Module):
        found = {path: weight_of(module) for path, module in base.named_modules() if path in shapes}
        base = {path: weight for path, weight in found.items() if isinstance(weight, Tensor)}
    for path, shape in shapes.items():
        if path not in base:
            raise UserError(f"the base model has no weight '{path}'.", nearest=nearest(path, list(base)), next="give the model that this one was tuned from")  # fmt: skip
        if list(base[path].shape) != shape:
            raise UserError(f"the base model's '{path}' has another shape.", found=f"{tuple(base[path].shape)} there, {tuple(shape)} here",
                            next="give the model that this one was tuned from")  # fmt: skip
    return base
