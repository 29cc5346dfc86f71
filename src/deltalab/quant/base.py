"""What every quantised linear and every way to make one has; a way's own file holds the final classes."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from deltalab.core.shapes import Float
from deltalab.quant import strips


class Kept(Protocol):
    """What is kept in place of a weight: a NamedTuple of tensors and plain values, and how they read."""

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Ŵ."""

    def product(self, x: Float[Tensor, "*lead in"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "*lead out"]:
        """Ŵ x + b for few tokens, without a gradient."""


class QuantisedLinear(nn.Module, abc.ABC):
    """y = Ŵ x + b, with the weight kept as codes: what a linear is to a delta, whose `weight` reads as Ŵ, made anew in
    each pass, backward included, and never kept; for few tokens without a gradient a strip at a time, see
    `deltalab.quant.strips`.

    codes: a buffer, what is kept in place of the weight. in_features, out_features: of Ŵ. bias: (out,), a parameter, or None. dtype: of `weight`, that of the model.
    group_size: inputs of a row that share a scale; None where the codes have no such groups.
    scales: names of the buffers that keep their precision, whatever the module is cast to.
    """

    scales: ClassVar[tuple[str, ...]]

    codes: Tensor
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    dtype: torch.dtype
    group_size: int | None = None

    @abc.abstractmethod
    def kept(self) -> Kept:
        """What Ŵ is made of."""

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Ŵ in `dtype`, made anew at each call."""
        return self.kept().weight(self.dtype)

    def forward(self, x: Float[Tensor, "*lead in"]) -> Float[Tensor, "*lead out"]:
        kept: Any = self.kept()
        if strips.applies(x):
            return cast(Tensor, kept.product(x, self.bias))
        y: Tensor = _Product.apply(x, self.bias, type(kept), *kept)  # type: ignore[no-untyped-call]
        return y

    def scale_dtype(self) -> torch.dtype:
        """The precision of `scales`."""
        return torch.float32

    @abc.abstractmethod
    def requantised(self, W: Float[Tensor, "out in"]) -> "QuantisedLinear":
        """A linear of the same kind and settings whose codes are those of W, with this one's bias."""

    def absorb(self, change: Float[Tensor, "out in"]) -> bool:
        """Add a change of the weight to what is kept, exactly. False, and nothing done, where that cannot be."""
        return False

    def plain(self, W: Float[Tensor, "out in"]) -> nn.Linear:
        """A linear with the weight W, in this one's dtype, and this one's bias."""
        return plain_linear(self, W, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to` and its like: the dtype follows, the scales move alone."""
        before = {name: getattr(self, name) for name in self.scales}
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        for name, scale in before.items():
            moved = scale is not None and scale.is_floating_point()  # nested scales are codes
            if moved and getattr(self, name).dtype is not self.scale_dtype():
                setattr(self, name, scale.to(self.codes.device, self.scale_dtype()))
        return self


def plain_linear(linear: nn.Module, W: Float[Tensor, "out in"], dtype: torch.dtype) -> nn.Linear:
    """What takes a linear's place with the weight W, in `dtype`, and the same bias."""
    out, in_ = W.shape
    made = nn.Linear(in_, out, bias=False, device="meta")
    made.weight = nn.Parameter(W.to(dtype).contiguous(), requires_grad=False)
    made.bias = linear.bias  # type: ignore[assignment]
    return made.train(linear.training)


class _Product(torch.autograd.Function):
    """Ŵ x + b, keeping for the backward pass what Ŵ is made of in place of Ŵ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, kind: type[Any], *kept: Any) -> Tensor:
        return F.linear(x, kind(*kept).weight(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, ctx.kind, *kept = inputs
        ctx.tensors = [i for i, value in enumerate(kept) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(kept[i] for i in ctx.tensors))
        ctx.kept = [None if isinstance(value, Tensor) else value for value in kept]
        ctx.dtype, ctx.bias = x.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            kept = list(ctx.kept)
            for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                kept[i] = tensor
            grad_x = (grad @ ctx.kind(*kept).weight(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias) if grad.ndim > 1 else grad.to(ctx.bias)
        return grad_x, grad_bias, None, *(None for _ in ctx.kept)


class Quantiser(abc.ABC):
    """How linears are quantised."""

    def group(self, in_features: int) -> int | None:
        """The group size for so many inputs, see `QuantisedLinear`. Raises: UserError if there is none that fits."""
        return None

    @abc.abstractmethod
    def round_trip(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Ŵ, in fp32 or wider."""

    @abc.abstractmethod
    def linear(self, W: Float[Tensor, "out in"], bias: nn.Parameter | None, dtype: torch.dtype) -> QuantisedLinear:
        """The linear that takes the place of one with this weight and bias."""


class Quantising:
    """Linears that are about to be quantised, by path. A start of a delta may say from what, see `quantise`."""

    def __init__(self, quantiser: Quantiser, linears: Mapping[str, nn.Module]) -> None:
        self.quantiser, self.linears = quantiser, linears
        self._made: dict[str, QuantisedLinear] = {}

    def __contains__(self, path: str) -> bool:
        return path in self.linears

    def group(self, path: str) -> int | None:
        """The group size at `path`, None where nothing is quantised. Raises: UserError if there is none that fits."""
        return self.quantiser.group(self._weight(path).shape[1]) if path in self else None

    @property
    def told(self) -> list[str]:
        """The paths that are quantised from what a start said."""
        return list(self._made)

    def quantise(self, path: str, W: Float[Tensor, "out in"]) -> None:
        """Quantise W in place of the weight that was loaded: what a start moved out of it is in its delta."""
        linear = self.linears[path]
        self._made[path] = self.quantiser.linear(W, linear.bias, linear.weight.dtype)  # type: ignore[arg-type]

    def pop(self, path: str) -> QuantisedLinear:
        """What takes the linear's place."""
        if path not in self._made:
            self.quantise(path, self._weight(path))
        return self._made.pop(path).train(self.linears[path].training)

    def _weight(self, path: str) -> Tensor:
        linear = self.linears[path]
        W: Tensor = linear.weight  # type: ignore[assignment]
        return W.mT if isinstance(linear, Conv1D) else W
