"""LoRA: a low-rank change of a linear map.

    y = W x + s · B (A x),   s = α / r      (Hu et al. 2021, arXiv:2106.09685, eq. 3)

A starts random, B at zero, so the adapted model starts as the base. With s = α / √r (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732) the change keeps its size as r grows. A and B are kept in fp32 under a 16-bit model and are cast
where they meet the input, so the input is never copied to fp32.
"""

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.base import Base, Dropout, Factors, Kind, Site, WeightDelta, through
from deltalab.deltas.lowrank import LowRankSpec, kaiming

STARTS = (True, False, "gaussian", "orthogonal", "eva", "mipam")
"""Values of peft's `init_lora_weights` that leave the base weight alone, so that a saved A and B say everything."""


class LoRA(LowRankSpec):
    """Low-rank adaptation of every selected weight."""

    method: Literal["lora"] = "lora"

    sits_on: ClassVar[frozenset[Kind]] = frozenset({"linear", "embedding", "experts"})

    def build(self, site: Site) -> "LoRADelta":
        return LoRADelta(site, self.r, self.scale, self.dropout)

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and not config.get("use_dora")

    @classmethod
    def from_peft(cls, config: dict[str, Any], paths: list[str]) -> Self:
        start = config.get("init_lora_weights", True)
        if start not in STARTS:
            raise UserError(
                f"init_lora_weights={start!r} moves part of the base weight into the adapter, which is not supported.",
                next="convert the adapter to plain LoRA with peft first",
            )
        return super().from_peft(config, paths)


class LoRADelta(WeightDelta):
    """ΔW = s · B A."""

    A: Float[nn.Parameter, "*e r in"]
    B: Float[nn.Parameter, "*e out r"]

    def __init__(self, site: Site, r: int, s: float, dropout: float) -> None:
        super().__init__()
        *experts, out, in_ = site.shape
        self.s = s
        self.A = nn.Parameter(torch.empty(*experts, r, in_, dtype=site.dtype, device=site.device))
        self.B = nn.Parameter(torch.empty(*experts, out, r, dtype=site.dtype, device=site.device))
        self.drop = Dropout(dropout) if dropout else nn.Identity()

    def init(self, generator: torch.Generator) -> None:
        kaiming(self.A, generator)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        y = base(x)
        low = through(self.drop(x), self.A)  # (*lead, r)
        return y + (self.s * F.linear(low, self.B.to(low.dtype))).to(y.dtype)

    def adapted(self, W: Float[Tensor, "*e out in"]) -> Float[Tensor, "*e out in"]:
        return W + self.change(W)

    def change(self, W: Tensor) -> Float[Tensor, "*e out in"]:
        return self.kept(self.s * self.B @ self.A)

    def factors(self) -> Factors:
        return Factors(self.A, self.B, self.s)

    def to_peft(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def extra_repr(self) -> str:
        return f"r={self.A.shape[-2]}, s={self.s:g}"
