"""Bottleneck: an adapter, a small network with a narrow middle beside or after a whole sub-layer.

    sequential:  y = h + s · U σ(D h),  h = F(x)      (Houlsby et al. 2019, arXiv:1902.00751, §2.1)
    parallel:    y = F(x) + s · U σ(D x)              (He et al. 2021, arXiv:2110.04366, table 1)

F is a block's attention or MLP, x what it reads, y what the block adds to its hidden states. D (m, hidden) starts random, U
(hidden, m) and its bias at zero, so the adapted model starts as the base. σ depends on the input: there is no weight that
computes it, and it does not merge. After the MLP alone it is what Pfeiffer et al. 2020 (arXiv:2005.00247) found to suffice.
"""

from typing import Annotated, ClassVar, Literal, Self

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.base import Base, Delta
from deltalab.deltas.lowrank import kaiming
from deltalab.deltas.site import Kind, Site
from deltalab.deltas.spec import DeltaSpec
from deltalab.deltas.sublayers import select_sublayers

ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": nn.Identity(),
}
Activation = Literal["gelu", "relu", "silu", "tanh", "sigmoid", "identity"]
REDUCTION = 16.0


class Bottleneck(DeltaSpec):
    """Adapters after, or beside, the sub-layers of the blocks.

    targets: `attention`, `mlp`, or both, or sub-layers by name or pattern; linears by name too, for an adapter after one.
    placement: `sequential`, after the sub-layer, on its result; `parallel`, beside it, on its input.
    reduction: hidden size over the width m of the middle, rounded down. size: m itself, in its place.
    activation: σ. norm: a layer norm of its own before D. scale: s, or `learned`, one number a module that starts at 1.
    dropout: of the middle, in training only. bias: whether D and U have one.
    """

    method: Literal["bottleneck"] = "bottleneck"
    targets: str | list[str] = "attention,mlp"
    placement: Literal["sequential", "parallel"] = "sequential"
    reduction: Annotated[float, Field(ge=1, allow_inf_nan=False)] = REDUCTION
    size: Annotated[int, Field(ge=1)] | None = None
    activation: Activation = "gelu"
    norm: bool = False
    scale: Annotated[float, Field(allow_inf_nan=False)] | Literal["learned"] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: bool = True

    sits_on: ClassVar[frozenset[Kind]] = frozenset({"attention", "mlp", "linear"})

    @pydantic.model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.size is not None and self.reduction != REDUCTION:
            raise ValueError("size and reduction say the same thing: name one")
        if self.scale == 0:
            raise ValueError("scale 0 trains nothing")
        return self

    def chosen(self, model: nn.Module) -> list[str]:
        return select_sublayers(model, self.targets, self.layers)

    def build(self, site: Site) -> "BottleneckDelta":
        hidden = site.shape[0]
        if site.kind == "linear" and self.placement == "parallel":
            raise UserError(
                f"placement='parallel' does not go on '{site.path}', a linear.",
                found="a parallel adapter reads what a whole sub-layer reads, and no module of its own reads that here",
                next="placement='sequential', or targets whose sub-layers are modules of their own",
            )
        if self.size is None and hidden < self.reduction:
            raise UserError(
                f"reduction={self.reduction:g} leaves nothing of a hidden size of {hidden}.",
                next=f"reduction={hidden} or less, or size=1",
            )
        return BottleneckDelta(site, self)


class BottleneckDelta(Delta):
    """y = h + s · U σ(D LN(x)), with x = h after the sub-layer, or its input beside it."""

    D: Float[nn.Parameter, "m hidden"]
    U: Float[nn.Parameter, "hidden m"]
    D_bias: Float[nn.Parameter, " m"] | None
    U_bias: Float[nn.Parameter, " hidden"] | None
    s: Float[nn.Parameter, " 1"] | float

    def __init__(self, site: Site, spec: Bottleneck) -> None:
        super().__init__()
        hidden = site.shape[0]
        m = spec.size or int(hidden / spec.reduction)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=site.dtype, device=site.device))

        self.parallel = spec.placement == "parallel"
        self.activation = ACTIVATIONS[spec.activation]
        self.norm = nn.LayerNorm(hidden, dtype=site.dtype, device=site.device) if spec.norm else None
        self.D, self.U = empty(m, hidden), empty(hidden, m)
        self.D_bias, self.U_bias = (empty(m), empty(hidden)) if spec.bias else (None, None)
        self.s = empty(1) if spec.scale == "learned" else spec.scale
        self.drop = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()

    def init(self, generator: torch.Generator) -> None:
        """D uniform on ±1/√hidden, as a linear of torch; its bias and all of U zero."""
        with torch.no_grad():
            kaiming(self.D, generator)
        for parameter in (self.U, self.D_bias, self.U_bias):
            if parameter is not None:
                nn.init.zeros_(parameter)
        if isinstance(self.s, nn.Parameter):
            nn.init.ones_(self.s)
        if self.norm is not None:
            self.norm.reset_parameters()

    def measures(self) -> dict[str, float]:
        return {"scale": float(self.s.detach())} if isinstance(self.s, nn.Parameter) else {}

    def forward(self, x: Float[Tensor, "*lead in"], base: Base) -> Float[Tensor, "*lead hidden"]:
        h = base(x)
        return h + self.adapter(x if self.parallel else h).to(h.dtype)

    def adapter(self, h: Float[Tensor, "*lead hidden"]) -> Float[Tensor, "*lead hidden"]:
        """s · U σ(D LN(h)), in the dtype of h."""
        if self.norm is not None:
            h = F.layer_norm(h, self.norm.normalized_shape, self.norm.weight.to(h.dtype), self.norm.bias.to(h.dtype))
        middle = self.drop(self.activation(_linear(h, self.D, self.D_bias)))  # (*lead, m)
        up = _linear(middle, self.U, self.U_bias)
        return up * (self.s.to(up.dtype) if isinstance(self.s, Tensor) else self.s)

    def extra_repr(self) -> str:
        m, hidden = self.D.shape
        return f"{hidden} → {m} → {hidden}, {'parallel' if self.parallel else 'sequential'}"


def _linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias, in the dtype of x."""
    return F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))
