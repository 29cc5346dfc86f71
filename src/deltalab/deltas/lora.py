"""LoRA: a low-rank change of a linear map.

    y = W x + s · B (A x),   s = α / r      (Hu et al. 2021, arXiv:2106.09685, eq. 3)

A starts random, B at zero, so the adapted model starts as the base. With s = α / √r (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732) the change keeps its size as r grows. A and B are kept in fp32 under a 16-bit model and are cast
where they meet the input, so the input is never copied to fp32.

Starts of `deltalab.deltas.init` that are a part of W itself (PiSSA, OLoRA) train the residual model W − s B₀A₀ with the
change s B A. Here W stays where it is and the change is what that adds up to,

    ΔW = s · (B A − B₀ A₀),   zero at the start, of rank 2r,

so the base is the model that was loaded at every moment, frozen entries and own trained weights included, and the
adapter that is saved is plain LoRA of rank 2r for it. A base that is quantised at the same time is another matter: it is
W − s B₀A₀ that is quantised, which costs less than quantising W, and A₀ and B₀ are zero in ΔW.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.base import Base, Delta, Dropout, Factors, WeightDelta, acting
from deltalab.deltas.init import Pair
from deltalab.deltas.lowrank import LowRankSpec, in_one_matrix, kaiming, low_rank, of_experts
from deltalab.deltas.select import leaf
from deltalab.deltas.site import Kind, Site
from deltalab.deltas.spec import Start
from deltalab.deltas.starts import (
    LOOKING,
    PARTS,
    drawn,
    looked_for,
    require_same_again,
    require_used,
    shared_out,
    start_from_peft,
)
from deltalab.kernels.linear import LowRank

Init = Literal["kaiming", "gaussian", "orthogonal", "random", "pissa", "olora", "loftq", "eva"]


class LoRA(LowRankSpec):
    """Low-rank adaptation of every selected weight.

    init: where A and B start, see docs/methods/lora.md: `kaiming`, `gaussian`, `orthogonal` and `random` are drawn;
    `pissa` and `olora` are a part of W; `loftq` makes up for a base that is quantised while it is loaded; `eva` looks at
    activations (`calibration=` of `adapt`). svd_steps: of `pissa`, subspace iterations instead of the exact SVD.
    rho: of `eva`, up to how many times its rank a module may get of the others' (1: every module keeps its own).
    bias: own biases that train too, all or those of the adapted linears.
    lr_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354).
    """

    method: Literal["lora"] = "lora"
    init: Init = "kaiming"
    svd_steps: Annotated[int, Field(ge=0)] | None = None
    rho: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lr_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    peft_on: ClassVar[frozenset[Kind]] = frozenset({"linear", "embedding", "experts"})
    sits_on: ClassVar[frozenset[Kind]] = frozenset({"linear", "embedding", "experts"})
    peft_keys: ClassVar[frozenset[str]] = LowRankSpec.peft_keys | {"bias"}

    @pydantic.model_validator(mode="after")
    def _used(self) -> Self:
        require_used(self.init, self.svd_steps, self.rho)
        return self

    def build(self, site: Site) -> "LoRADelta":
        out, in_ = site.shape[-2:]
        if self.init in LOOKING and self.r > min(out, in_):
            raise UserError(
                f"init='{self.init}' has no rank {self.r} on '{site.path}', which is {out} × {in_}.",
                next=f"r={min(out, in_)} or less, or init='kaiming'",
            )
        if self.init == "orthogonal" and self.r % 2:
            raise UserError("init='orthogonal' needs an even rank.", found=f"r={self.r}", next=f"r={self.r + 1}")
        return LoRADelta(site, self)

    def trains(self, model: nn.Module, paths: Sequence[str]) -> list[str]:
        own = {f"{path}.bias" for path in paths}
        biases = [name for name, _ in model.named_parameters() if leaf(name) == "bias"] if self.bias != "none" else []
        return [name for name in biases if self.bias == "all" or name in own]

    @classmethod
    def factored(cls, ranks: Mapping[str, int]) -> Self:
        """α = r, so that s = 1."""
        r = max(ranks.values())
        own = {path: rank for path, rank in ranks.items() if rank != r}
        alphas = {path: float(rank) for path, rank in own.items()}
        fields = {"r": r, "alpha": r, "targets": list(ranks), "rank_pattern": own, "alpha_pattern": alphas}
        return cls.model_validate(fields)

    @property
    def calibrates(self) -> bool:
        return self.init == "eva"

    @property
    def filled(self) -> bool:
        return True  # a start that is a part of W is taken again from W (`begin_again`), or stands in the file

    @property
    def looks(self) -> bool:
        return self.init in LOOKING

    def settle(self, model: nn.Module, paths: list[str], start: Start) -> tuple[Self, list[str]]:
        """Ranks go where the inputs have the directions that say most; modules left without one are not adapted.

        s stays what it was in each module.
        """
        if self.init != "eva" or self.rho == 1:
            return self, paths
        specs = self.each(paths)
        ranks = shared_out(model, {path: spec.r for path, spec in specs.items()}, self.rho, start)
        power = 0.5 if self.rank_stabilised else 1.0
        alphas = {path: specs[path].scale * r**power for path, r in ranks.items()}
        return self.model_copy(update={"rho": 1.0, "rank_pattern": ranks, "alpha_pattern": alphas}), list(ranks)

    def begin(self, model: nn.Module, deltas: Mapping[str, Delta], start: Start) -> None:
        if self.bias != "none" and not self.trains(model, list(deltas)):
            raise UserError(f"bias='{self.bias}' trains nothing: there are no such biases.", next="bias='none'")
        if self.init in LOOKING:
            mine = {path: delta for path, delta in deltas.items() if isinstance(delta, LoRADelta)}
            held = {path: Factors(delta.A.detach(), delta.B.detach(), delta.s) for path, delta in mine.items()}
            for path, pair in looked_for(self.init, model, held, start, self.svd_steps):
                mine[path].start_at(pair, moved=start.quantising is not None and path in start.quantising)

    def begin_again(self, model: nn.Module, deltas: Mapping[str, Delta]) -> None:
        """The start of a file that peft saved unconverted: peft takes it from the weights again, and so it is here.

        Raises: UserError if peft would draw it anew, or compute something else.
        """
        if self.init in (*PARTS, "loftq"):
            require_same_again(self.init, model, deltas, self.svd_steps)
            self.begin(model, deltas, Start(0))

    def to_peft(self) -> dict[str, Any]:
        config = {**super().to_peft(), "bias": self.bias}
        if self.init in PARTS:  # of rank 2r for the base as loaded, s as it was
            config |= {"r": 2 * self.r, "lora_alpha": self.alpha * (math.sqrt(2) if self.rank_stabilised else 2)}
        return config

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and not config.get("use_dora")

    @classmethod
    def fields_from_peft(cls, config: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        fields = super().fields_from_peft(config, paths)
        return {**fields, **start_from_peft(config), "bias": config.get("bias", "none")}


class LoRADelta(WeightDelta):
    """ΔW = s · B A, or s · (B A − B₀ A₀) where it starts at a part of W."""

    A: Float[nn.Parameter, "*e r in"]
    B: Float[nn.Parameter, "*e out r"]
    A0: Float[Tensor, "*e r in"] | None
    B0: Float[Tensor, "*e out r"] | None

    def __init__(self, site: Site, spec: LoRA) -> None:
        super().__init__()
        self.s, self.start, self.kind = spec.scale, spec.init, site.kind
        self.lr_ratio = 1.0 if site.kind == "embedding" else spec.lr_ratio  # there it is B that starts at random
        *experts, out, in_ = site.shape
        A = torch.empty(*experts, spec.r, in_, dtype=site.dtype, device=site.device)
        B = torch.empty(*experts, out, spec.r, dtype=site.dtype, device=site.device)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        part = spec.init in PARTS
        self.register_buffer("A0", torch.zeros_like(A) if part else None)
        self.register_buffer("B0", torch.zeros_like(B) if part else None)
        if spec.dropout:
            self.drop = Dropout(spec.dropout)

    def init(self, generator: torch.Generator) -> None:
        if self.start == "kaiming" and self.kind != "embedding":  # nothing is drawn that is copied then
            kaiming(self.A, generator)
            self.B.detach().zero_()
            return
        self.start_at(drawn(self.start, self.A, self.B, generator, self.kind))

    def start_at(self, pair: Pair, *, moved: bool = False) -> None:
        """Set A and B; where they are a part of W, the change is counted from here, unless they moved out of the base."""
        with torch.no_grad():
            self.A.copy_(pair.A)
            self.B.copy_(pair.B)
            if self.A0 is not None and self.B0 is not None and not moved:
                self.A0.copy_(pair.A)
                self.B0.copy_(pair.B)

    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        y = base(x)
        change = low_rank(self.drop(x), self.A, self.B)
        if self.A0 is not None and self.B0 is not None:
            change = change - low_rank(x, self.A0, self.B0)
        return y + (self.s * change).to(y.dtype)

    def change(self, W: Tensor) -> Float[Tensor, "*e out in"]:
        change = self.B @ self.A
        if self.A0 is not None and self.B0 is not None:
            change = change - self.B0 @ self.A0
        return self.kept(change.mul_(self.s))

    def adapted(self, W: Float[Tensor, "*e out in"]) -> Float[Tensor, "*e out in"]:
        change = self.change(W)
        # in place where that gives W's own layout: a product with the transposed one may round otherwise
        here = not torch.is_grad_enabled() and change.dtype == torch.promote_types(change.dtype, W.dtype)
        return change.add_(W) if here and change.stride() == W.stride() else W + change

    def factors(self) -> Factors:
        if self.A0 is None or self.B0 is None:
            return Factors(self.A, self.B, self.s)
        return Factors(torch.cat([self.A, self.A0], -2), torch.cat([self.B, -self.B0], -1), self.s)

    def form(self, weight: Callable[[], Tensor]) -> LowRank | None:
        """None where the start is a part of W and anything is dropped: what is taken off is of the whole input."""
        p = acting(self.drop)
        if self.kind != "linear" or (p and self.A0 is not None):
            return None
        A, B, s = self.factors()
        return LowRank(A, B, s, p)

    def hold(self, factors: Factors) -> None:
        self.start_at(Pair(factors.A, factors.B * (factors.s / self.s)))

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": [self.A], "lr": lr}, {"params": [self.B], "lr": lr * self.lr_ratio}]

    def to_peft(self) -> dict[str, Tensor]:
        return self._named(*self.factors()[:2])

    def slots(self) -> dict[str, Tensor]:
        return self._named(self.A, self.B)

    def _named(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        if self.kind == "embedding":
            return {"lora_embedding_A": A, "lora_embedding_B": B}
        if self.kind == "experts":
            A, B = in_one_matrix(A, B)
        return {"lora_A.weight": A, "lora_B.weight": B}

    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        if self.kind != "experts":
            return super().from_peft(tensors)
        A, B = of_experts(tensors["lora_A.weight"], tensors["lora_B.weight"], len(self.A))
        with torch.no_grad():
            self.A.copy_(A)
            self.B.copy_(B)

    def extra_repr(self) -> str:
        return f"r={self.A.shape[-2]}, s={self.s:g}"
