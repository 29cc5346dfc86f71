"""The two kinds of delta that sit on a weight, and what they read of the module that holds it.

A `Delta` is a trained module round one linear or sub-layer: it sees the input and the module's own forward. A `WeightDelta` is one
whose effect is a change of the weight, so it has an adapted weight and merges. Neither ever writes to the weight.
A class here is abstract; a method's own file holds the final ones.

Shapes are those of a linear, W (out, in) and x (..., in). An embedding is a linear on one-hot inputs: W (out, in) is its
table transposed, and x (...) holds the indices, see `through`. Experts are a stack: W and every parameter of the delta
have one leading dimension more, the expert; only `change` is asked there, so write it with `...`.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from deltalab.core.shapes import Bool, Float, Int
from deltalab.kernels.dropout import dropout
from deltalab.kernels.linear import LowRank
from deltalab.quant import foreign
from deltalab.quant.base import QuantisedLinear

LINEARS = (nn.Linear, Conv1D, QuantisedLinear)
"""What a delta can sit on. GPT-2's Conv1D is a linear whose weight is stored (in, out)."""

PLAIN = (bool, int, float, str)

CHUNK = 1 << 20
"""Entries of ΔW gathered at a time: bounds the temporary to CHUNK × r values."""


class Base:
    """The module under a delta, as it was loaded: called, its own forward.

    Of a linear W is the weight, (out, in), and bias (out,) or None. Of a sub-layer x and the result are its hidden states,
    (batch, seq, hidden); the other arguments stay what they are, other results are passed on. Of a stack of experts x holds
    the tokens sorted by expert, (tokens, in), and rows says how many went to each; None elsewhere.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], linear: nn.Module, rows: Sequence[int] | None = None
    ) -> None:
        self.forward, self.linear, self.rows = forward, linear, rows

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    @property
    def W(self) -> Tensor:
        return weight_of(self.linear)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.linear, "bias", None)


class Delta(nn.Module, abc.ABC):
    """A trained module round one linear or sub-layer: y = forward(x, base)."""

    enabled: bool = True
    keep: Bool[Tensor, "*e out in"] | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", None)

    def __setattr__(self, name: str, value: Any) -> None:
        """A plain value needs no look at the tables of tensors and modules."""
        if type(value) in PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @abc.abstractmethod
    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        """The adapted module's output."""

    @abc.abstractmethod
    def init(self, generator: torch.Generator) -> None:
        """Set the parameters to a start at which the model computes what it computed before."""

    def within(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A sub-layer's own forward as `base` runs it: itself, unless the method changes what happens inside."""
        return forward

    def constant(self, value: Tensor) -> Tensor:
        """A value that the backward takes for one by a method's paper; a hook, so that finite differences can as well."""
        return value.detach()

    def measures(self) -> dict[str, float]:
        """What can be told of the delta as it is, by name: gates, the use of experts, what its last forward did."""
        return {}

    def parts(self) -> dict[str, "Factors"]:
        """The changes of the weight that the delta mixes by its input, by name; none where it is of another kind."""
        return {}

    def gather(self, on: bool) -> None:
        """From now on `measures` tells of all forwards together (on), or again of the last one alone."""

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for a torch optimizer; a method with several learning rates splits them here."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def to_peft(self) -> dict[str, Tensor]:
        """Tensors by the key that peft gives them after the module's path."""
        raise NotImplementedError

    def slots(self) -> dict[str, Tensor]:
        """What `from_peft` sets, by the same keys: `to_peft`, unless that is computed."""
        return self.to_peft()

    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors with the keys and shapes of `slots`."""
        with torch.no_grad():
            for key, own in self.slots().items():
                own.copy_(tensors[key])


class Factors(NamedTuple):
    """ΔW = s · B A, with A (r, in) and B (out, r)."""

    A: Tensor
    B: Tensor
    s: float


class WeightDelta(Delta):
    """A delta that is a change of the weight: W' = W + ΔW, shapes (out, in).

    `keep`, where set, is the mask of entries that may change: `change` is zero where it is False, and so is what
    is derived from it; `masked` takes the place of `forward`. The masked ΔW has full rank, so it pays for the dense product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drop: Callable[[Tensor], Tensor] = whole

    @abc.abstractmethod
    def change(self, W: Tensor) -> Float[Tensor, "*e out in"]:
        """ΔW, in the wider of W's and the delta's precision; differentiable.

        W: as `weight_of` gives it, so that a method that does not look at it may sit on a quantised linear.
        """

    def adapted(self, W: Float[Tensor, "*e out in"]) -> Float[Tensor, "*e out in"]:
        """The merged weight, W + ΔW."""
        return W + self.change(W)

    def adapted_bias(self, bias: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The merged linear's bias: `bias` itself, unless the method scales the output that it is part of."""
        return bias

    def factors(self) -> Factors | None:
        """The low-rank form of ΔW before `keep`, or None where it has none. Of experts: of each, stacked."""
        return None

    def form(self, weight: Callable[[], Tensor]) -> LowRank | None:
        """What the forward adds to W x in the form that the kernels compute, differentiable; None where it has none.

        weight: W, if the form depends on it.
        """
        return None

    def hold(self, factors: Factors) -> None:
        """Become the change s · B A that is given; of a method whose spec says `factored`."""
        raise NotImplementedError

    def entries(self, index: Int[Tensor, " k"], W: Tensor) -> Float[Tensor, " k"]:
        """ΔW at flat positions row · in + column (plus expert · out · in); O(k · r) where `factors` allow."""
        factors = self.factors()
        if factors is None:
            return self.change(W).flatten()[index]
        A, B, s = factors
        out, in_ = B.shape[-2], A.shape[-1]
        A, B = A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:])  # one expert where there are none
        parts = []
        for part in index.split(CHUNK):
            expert, rows, columns = part // (out * in_), part // in_ % out, part % in_
            parts.append(s * (B[expert, rows] * A[expert, :, columns]).sum(-1))
        values = torch.cat(parts) if parts else A.new_zeros(0)
        return values if self.keep is None else values * self.keep.flatten()[index]

    def kept(self, change: Float[Tensor, "*e out in"]) -> Float[Tensor, "*e out in"]:
        """`change` where `keep` allows, zero elsewhere."""
        return change if self.keep is None else change * self.keep

    def masked(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        """The forward when `keep` is set: W x + (ΔW ⊙ keep) drop(x)."""
        y = base(x)
        return y + through(self.drop(x), self.change(base.W)).to(y.dtype)


def through(x: Float[Tensor, "*lead in"] | Int[Tensor, "*lead"], A: Float[Tensor, "r in"]) -> Float[Tensor, "*lead r"]:
    """A x; where x holds indices, the inputs are the one-hot vectors of an embedding, and A's columns are looked up."""
    if x.is_floating_point():
        return F.linear(x, A.to(x.dtype))
    return F.embedding(x, A.mT)


def whole(x: Tensor) -> Tensor:
    """The input of a delta that drops nothing of it."""
    return x


class Dropout(nn.Dropout):
    """Dropout of a delta's input, drawn as the kernels do: a pass with them and one without drop the same entries.

    Indices pass: a one-hot input has nothing to drop that peft would.
    """

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and x.is_floating_point() else x


def acting(drop: Callable[[Tensor], Tensor]) -> float:
    """The probability with which a delta's `drop` drops an entry now."""
    return float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0


def weight_of(linear: nn.Module) -> Tensor:
    """A linear's weight as (out, in): a transposed view for Conv1D and embeddings.

    Of a linear that keeps codes what they stand for, made anew: of a `QuantisedLinear` and of bitsandbytes' linears. Of a
    kind that is not read here the codes.
    """
    return as_stored(linear, linear.weight) if foreign.kind(linear) is None else foreign.weight_of(linear)


def shape_of(linear: nn.Module) -> tuple[int, ...]:
    """(out, in), also of a linear that keeps its weight quantised in another shape. Of other modules the weight's."""
    if isinstance(linear, (nn.Linear, QuantisedLinear)):
        return linear.out_features, linear.in_features
    return tuple(weight_of(linear).shape)


def as_stored(linear: nn.Module, W: Tensor) -> Tensor:
    """(out, in) as the linear keeps its weight, and back: transposed for Conv1D and embeddings, else the same tensor."""
    return W.mT if isinstance(linear, (Conv1D, nn.Embedding)) else W


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which changes of a weight of `dtype` are kept: fp32, or fp64 for an fp64 model."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32
