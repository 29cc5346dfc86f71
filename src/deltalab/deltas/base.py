"""The two kinds of delta that sit on a weight, and the spec that builds them.

A `Delta` is a trained module round one linear: it sees the input and the linear's own forward. A `WeightDelta` is one
whose effect is a change of the weight, so it has an adapted weight and merges. Neither ever writes to the weight.
A class here is abstract; a method's own file holds the final ones.

Shapes are those of a linear, W (out, in) and x (..., in). An embedding is a linear on one-hot inputs: W (out, in) is its
table transposed, and x (...) holds the indices, see `through`. Experts are a stack: W and every parameter of the delta
have one leading dimension more, the expert; only `adapted` and `change` are asked there, so write them with `...`.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from deltalab.core.shapes import Bool, Float, Int
from deltalab.core.spec import Spec
from deltalab.quant.linear import GroupLinear, Quantising

LINEARS = (nn.Linear, Conv1D, GroupLinear)
"""What a delta can sit on. GPT-2's Conv1D is a linear whose weight is stored (in, out)."""

CHUNK = 1 << 20
"""Entries of ΔW gathered at a time: bounds the temporary to CHUNK × r values."""


Kind = Literal["linear", "embedding", "experts"]
"""Where a delta can sit: on a linear (Conv1D included), on an embedding, on experts held as one 3-D parameter."""


class Site(NamedTuple):
    """One weight that a delta is built for. shape: (out, in), or (experts, out, in). dtype: of the delta's parameters.

    group: inputs that share a scale where the weight is group-quantised.
    """

    path: str
    shape: tuple[int, ...]
    kind: Kind
    dtype: torch.dtype
    device: torch.device
    group: int | None = None


class Start(NamedTuple):
    """What a fresh adapter may start from.

    seed: of `adapt`. calibration: batches of model inputs (dicts), if given. quantising: what of the base is about to be
    quantised; a start may say from what, and the base is that from then on.
    """

    seed: int
    calibration: Sequence[Mapping[str, Tensor]] | None = None
    quantising: Quantising | None = None


class DeltaSpec(Spec, abc.ABC):
    """What every method's spec has: where it goes. The method's own fields come after.

    targets: a preset (`q,v`, `attention`, `mlp`, `all-linear`), or module names and patterns, see `select`.
    layers: block indices to adapt, negative ones from the end; None for all.

    The hooks that take `deltas` (module path -> delta) see every module that one spec built in a model: that is where
    modules share tensors, a budget, or a schedule.
    """

    method: str
    targets: str | list[str] = "q,v"
    layers: list[int] | None = None

    peft_type: ClassVar[str | None] = None
    """The `peft_type` of this method's adapter files; None if peft has no such method."""
    peft_keys: ClassVar[frozenset[str]] = frozenset()
    """The keys of peft's config that `from_peft` reads; any other that is set is refused by name."""
    peft_lacks: ClassVar[frozenset[str]] = frozenset()
    """What most configs of peft have and this method's has not: `bias`, `layers_to_transform`."""
    peft_on: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    """The kinds of weight that peft's form of the method can sit on."""
    peft_biases: ClassVar[str] = "lora_only"
    """The value of peft's `bias` by which the biases of the adapted linears train."""
    peft_fuses: ClassVar[bool] = False
    """Whether peft, loading a file, takes the linears that a mixture once had for the experts of today."""
    sits_on: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    """The kinds of weight that the method can sit on."""

    @pydantic.field_validator("targets")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("name at least one preset, module name or pattern")
        return value

    @abc.abstractmethod
    def build(self, site: Site) -> "Delta":
        """The module for one site; its parameters are set by `init` afterwards. On the meta device: shapes alone."""

    def each(self, paths: Sequence[str]) -> dict[str, Self]:
        """Module path -> the spec for that module alone, where a field says different things to different modules.

        Raises: UserError if a pattern in such a field matches none of them.
        """
        return dict.fromkeys(paths, self)

    def trains(self, model: nn.Module, paths: Sequence[str]) -> list[str]:
        """Names of the model's own parameters that train beside the deltas (`bias` of LoRA)."""
        return []

    def join(self, deltas: Mapping[str, "Delta"]) -> None:
        """All modules are built: let them share what they share."""

    @property
    def calibrates(self) -> bool:
        """Whether a fresh adapter needs batches of inputs to begin, `Start.calibration`."""
        return False

    def settle(self, model: nn.Module, paths: list[str], start: Start) -> tuple[Self, list[str]]:
        """What a fresh adapter's spec and modules come to once it has seen the base: where a start decides on ranks."""
        return self, paths

    def begin(self, model: nn.Module, deltas: Mapping[str, "Delta"], start: Start) -> None:
        """A fresh adapter begins, after every `init`, the deltas not yet on the model: a start that looks at weights or
        activations. The base is not written to: a start that takes part of a weight counts its change from there.
        """

    def begin_again(self, model: nn.Module, deltas: Mapping[str, "Delta"]) -> None:
        """Before `from_peft` of each: what peft's file leaves to be made again from the weights, as peft does on loading.

        Raises: UserError if that cannot be done.
        """

    def penalty(self, deltas: Mapping[str, "Delta"]) -> Float[Tensor, ""] | None:
        """What is added to the loss, differentiable; None for nothing."""
        return None

    def after_step(self, deltas: Mapping[str, "Delta"], t: int | None, total: int | None) -> None:
        """After optimizer step t (1 … total), while the gradients are still there: budgets and schedules.

        t None: the step after the last one, which a method with a schedule keeps among its deltas' buffers.
        """

    def require_ready(self, deltas: Mapping[str, "Delta"]) -> None:
        """Raises: UserError if what would be saved now is not the method (a schedule that never ran)."""

    def to_peft(self) -> dict[str, Any]:
        """The method's part of `adapter_config.json`. Raises: NotImplementedError if peft has no such method."""
        raise NotImplementedError

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]], deltas: Mapping[str, "Delta"]) -> dict[str, Any] | None:
        """One config for modules whose own are `parts` (path -> `to_peft`), or None if peft has no way to say it."""
        first, *rest = parts.values()
        return first if all(part == first for part in rest) else None

    @classmethod
    def whole_peft(cls, config: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        """The config of a file, its targets `paths` among it, in the words that peft has for this method."""
        return config

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        """Whether a peft config is of this method; its `peft_type` alone says so unless two methods share one."""
        return cls.peft_type is not None and config.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(cls, config: dict[str, Any], paths: list[str]) -> Self:
        """The spec of a peft config whose targets are `paths`. Raises: UserError naming what is not supported."""
        raise NotImplementedError

    def shared_to_peft(self, deltas: Mapping[str, "Delta"]) -> dict[str, Tensor]:
        """Tensors of the file that belong to no single module, by their key after `base_model.`."""
        return {}

    def shared_from_peft(self, deltas: Mapping[str, "Delta"], tensors: Mapping[str, Tensor]) -> None:
        """Take over what `shared_to_peft` gave, keys and shapes checked."""


class ParameterSpec(Spec, abc.ABC):
    """Which of the model's own parameters train: the third kind of delta, with no module of its own."""

    @abc.abstractmethod
    def parameters(self, model: nn.Module) -> list[str]:
        """Their names, in model order. Raises: UserError if there is none."""


class Base:
    """The linear under a delta, as it was loaded: called, its own forward. W: its weight, (out, in). bias: (out,) or None."""

    def __init__(self, forward: Callable[[Tensor], Tensor], linear: nn.Module) -> None:
        self.forward, self.linear = forward, linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    @property
    def W(self) -> Tensor:
        return weight_of(self.linear)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.linear, "bias", None)


class Delta(nn.Module, abc.ABC):
    """A trained module round one linear: y = forward(x, base)."""

    enabled: bool = True
    keep: Bool[Tensor, "*e out in"] | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", None)

    @abc.abstractmethod
    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        """The adapted linear's output."""

    @abc.abstractmethod
    def init(self, generator: torch.Generator) -> None:
        """Set the parameters to a start at which the model computes what it computed before."""

    def constant(self, value: Tensor) -> Tensor:
        """A value that the backward takes for one by a method's paper; a hook, so that finite differences can as well."""
        return value.detach()

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
    """A delta that is a change of the weight: W' = adapted(W), shapes (out, in).

    `keep`, where set, is the mask of entries that may change: ΔW is zero where it is False, in `forward`, `adapted`
    and everything derived from them. The masked ΔW has full rank, so the forward pays for the dense product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drop: nn.Module = nn.Identity()

    @abc.abstractmethod
    def adapted(self, W: Float[Tensor, "*e out in"]) -> Float[Tensor, "*e out in"]:
        """The merged weight, in the wider of W's and the delta's precision; differentiable."""

    def change(self, W: Tensor) -> Float[Tensor, "*e out in"]:
        """ΔW. A method that knows it without W overrides this, for precision and for quantised weights.

        W: as `weight_of` gives it, so that a method that does not look at it may sit on a quantised linear.
        """
        return self.adapted(W) - W

    def adapted_bias(self, bias: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The merged linear's bias: `bias` itself, unless the method scales the output that it is part of."""
        return bias

    def factors(self) -> Factors | None:
        """The low-rank form of ΔW before `keep`, or None where it has none. Of experts: of each, stacked."""
        return None

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


class Dropout(nn.Dropout):
    """Dropout of a delta's input. Indices pass: a one-hot input has nothing to drop that peft would."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.is_floating_point() else x


def weight_of(linear: nn.Module) -> Tensor:
    """A linear's weight as (out, in): a transposed view for Conv1D and embeddings.

    Of a `GroupLinear` what its codes stand for, made anew; of other quantised linears the codes as they are kept.
    """
    return as_stored(linear, linear.weight)


def shape_of(linear: nn.Module) -> tuple[int, ...]:
    """(out, in), also of a linear that keeps its weight quantised in another shape. Of other modules the weight's."""
    if isinstance(linear, GroupLinear) or (isinstance(linear, nn.Linear) and not linear.weight.dtype.is_floating_point):
        return linear.out_features, linear.in_features
    return tuple(weight_of(linear).shape)


def as_stored(linear: nn.Module, W: Tensor) -> Tensor:
    """(out, in) as the linear keeps its weight, and back: transposed for Conv1D and embeddings, else the same tensor."""
    return W.mT if isinstance(linear, (Conv1D, nn.Embedding)) else W


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which changes of a weight of `dtype` are kept: fp32, or fp64 for an fp64 model."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32
