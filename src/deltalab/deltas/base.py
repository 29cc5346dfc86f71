"""The two kinds of delta that sit round a linear, and the spec that builds them.

A `Delta` is a trained module round one linear: it sees the input and the linear's own forward. A `WeightDelta` is one
whose effect is a change of the weight, so it has an adapted weight and merges. Neither ever writes to the weight.
A class here is abstract; a method's own file holds the final ones.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from deltalab.core.shapes import Bool, Float, Int
from deltalab.core.spec import Spec

LINEARS = (nn.Linear, Conv1D)
"""What a delta can sit on. GPT-2's Conv1D is a linear whose weight is stored (in, out)."""

CHUNK = 1 << 20
"""Entries of ΔW gathered at a time: bounds the temporary to CHUNK × r values."""


class DeltaSpec(Spec, abc.ABC):
    """What every method's spec has: where it goes. The method's own fields come after.

    targets: a preset (`q,v`, `attention`, `mlp`, `all-linear`), or module names and patterns, see `select`.
    layers: block indices to adapt, negative ones from the end; None for all.
    """

    method: str
    targets: str | list[str] = "q,v"
    layers: list[int] | None = None

    peft_type: ClassVar[str | None] = None
    """The `peft_type` of this method's adapter files; None if peft has no such method."""

    @pydantic.field_validator("targets")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("name at least one preset, module name or pattern")
        return value

    @abc.abstractmethod
    def build(self, out: int, in_: int, *, dtype: torch.dtype, device: torch.device) -> "Delta":
        """The module for one linear of shape (out, in); its parameters are set by `init` afterwards."""

    def to_peft(self) -> dict[str, Any]:
        """The method's part of `adapter_config.json`. Raises: NotImplementedError if peft has no such method."""
        raise NotImplementedError

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """One config for modules whose own are `parts` (path -> `to_peft`), or None if peft has no way to say it."""
        first, *rest = parts.values()
        return first if all(part == first for part in rest) else None

    @classmethod
    def from_peft(cls, config: dict[str, Any], path: str) -> Self:
        """The spec of the module at `path` as a peft config has it. Raises: UserError naming what is not supported."""
        raise NotImplementedError


class ParameterSpec(Spec, abc.ABC):
    """Which of the model's own parameters train: the third kind of delta, with no module of its own."""

    @abc.abstractmethod
    def parameters(self, model: nn.Module) -> list[str]:
        """Their names, in model order. Raises: UserError if there is none."""


class Delta(nn.Module, abc.ABC):
    """A trained module round one linear: y = forward(x, base), where base(x) is the linear as it was loaded."""

    enabled: bool = True
    keep: Bool[Tensor, "out in"] | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", None)

    @abc.abstractmethod
    def forward(self, x: Float[Tensor, "*lead in"], base: Callable[[Tensor], Tensor]) -> Float[Tensor, "*lead out"]:
        """The adapted linear's output."""

    @abc.abstractmethod
    def init(self, generator: torch.Generator) -> None:
        """Set the parameters to a start at which the model computes what it computed before."""

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for a torch optimizer; a method with several learning rates splits them here."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def to_peft(self) -> dict[str, Tensor]:
        """Tensors by the key that peft gives them after the module's path."""
        raise NotImplementedError

    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors with the keys and shapes that `to_peft` gives."""
        with torch.no_grad():
            for key, own in self.to_peft().items():
                own.copy_(tensors[key])


class Factors(NamedTuple):
    """ΔW = s · B A, with A (r, in) and B (out, r)."""

    A: Tensor
    B: Tensor
    s: float


class WeightDelta(Delta):
    """A delta that is a change of the weight: W' = adapted(W), shapes (out, in).

    `keep`, where set, is the mask of entries that may change: ΔW is zero where it is False, in `forward`, `adapted`
    and everything derived from them. The masked ΔW has full rank, so the forward pays for the dense product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drop: nn.Module = nn.Identity()

    @abc.abstractmethod
    def adapted(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The merged weight, in the wider of W's and the delta's precision; differentiable."""

    def change(self, W: Tensor) -> Float[Tensor, "out in"]:
        """ΔW. A method that knows it without W overrides this, for precision and for quantised weights.

        W: as `weight_of` gives it, so that a method that does not look at it may sit on a quantised linear.
        """
        return self.adapted(W) - W

    def factors(self) -> Factors | None:
        """The low-rank form of ΔW before `keep`, or None where it has none."""
        return None

    def entries(self, index: Int[Tensor, " k"], W: Tensor) -> Float[Tensor, " k"]:
        """ΔW at flat positions row · in + column; O(k · r) where `factors` allow, else from the dense ΔW."""
        factors = self.factors()
        if factors is None:
            return self.change(W).flatten()[index]
        A, B, s = factors
        parts = []
        for part in index.split(CHUNK):
            rows, columns = part // A.shape[1], part % A.shape[1]
            parts.append(s * torch.einsum("kr,rk->k", B[rows], A[:, columns]))
        values = torch.cat(parts) if parts else A.new_zeros(0)
        return values if self.keep is None else values * self.keep.flatten()[index]

    def kept(self, change: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """`change` where `keep` allows, zero elsewhere."""
        return change if self.keep is None else change * self.keep

    def masked(
        self, x: Float[Tensor, "*lead in"], base: Callable[[Tensor], Tensor], W: Tensor
    ) -> Float[Tensor, "*lead out"]:
        """The forward when `keep` is set: W x + (ΔW ⊙ keep) drop(x)."""
        return base(x) + F.linear(self.drop(x), self.change(W).to(x.dtype))


def weight_of(linear: nn.Module) -> Tensor:
    """A linear's weight as (out, in): a transposed view for Conv1D. Of other modules, and quantised, as it is kept."""
    return as_stored(linear, linear.weight)


def shape_of(linear: nn.Module) -> tuple[int, ...]:
    """(out, in), also of a linear that keeps its weight quantised in another shape. Of other modules the weight's."""
    if isinstance(linear, nn.Linear) and not linear.weight.dtype.is_floating_point:
        return linear.out_features, linear.in_features
    return tuple(weight_of(linear).shape)


def as_stored(linear: nn.Module, W: Tensor) -> Tensor:
    """(out, in) as the linear keeps its weight, and back: transposed for Conv1D, the same tensor otherwise."""
    return W.T if isinstance(linear, Conv1D) else W


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which changes of a weight of `dtype` are kept: fp32, or fp64 for an fp64 model."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32
