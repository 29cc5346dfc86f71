"""What every quantised linear and every way to make one has; a way's own file holds the final classes."""

import abc
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltalab.core.shapes import Float


class QuantisedLinear(nn.Module, abc.ABC):
    """y = Ŵ x + b, with the weight kept as codes: what a linear is to a delta, whose `weight` reads as Ŵ, made anew.

    codes: a buffer, what is kept in place of the weight. in_features, out_features: of Ŵ. bias: (out,), a parameter, or None. dtype: of `weight`, that of the model.
    group_size: inputs of a row that share a scale; None where the codes have no such groups.
    """

    codes: Tensor
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    dtype: torch.dtype
    group_size: int | None = None

    @property
    @abc.abstractmethod
    def weight(self) -> Float[Tensor, "out in"]:
        """Ŵ in `dtype`, made anew at each call."""

    @abc.abstractmethod
    def requantised(self, W: Float[Tensor, "out in"]) -> "QuantisedLinear":
        """A linear of the same kind and settings whose codes are those of W, with this one's bias."""

    def absorb(self, change: Float[Tensor, "out in"]) -> bool:
        """Add a change of the weight to what is kept, exactly. False, and nothing done, where that cannot be."""
        return False

    def plain(self, W: Float[Tensor, "out in"]) -> nn.Linear:
        """A linear with the weight W, in this one's dtype, and this one's bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(W.to(self.dtype).contiguous(), requires_grad=False)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)


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
