"""LoRA: a low-rank change of a linear map.

    y = W x + s · B (A x),   s = α / r      (Hu et al. 2021, arXiv:2106.09685, eq. 3)

A starts random, B at zero, so the adapted model starts as the base. With s = α / √r (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732) the change keeps its size as r grows. A and B are kept in fp32 under a 16-bit model and are cast
where they meet the input, so the input is never copied to fp32.
"""

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.core.spec import build
from deltalab.deltas.base import DeltaSpec, Factors, WeightDelta

STARTS = (True, False, "gaussian", "orthogonal", "eva", "mipam")
"""Values of peft's `init_lora_weights` that leave the base weight alone, so that a saved A and B say everything."""


class LoRA(DeltaSpec):
    """Low-rank adaptation of every selected linear.

    r: rank of the change. alpha: s = alpha / r (alpha / √r with `rank_stabilised`).
    dropout: probability that an entry of the delta's input is dropped in training.
    """

    method: Literal["lora"] = "lora"
    r: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    rank_stabilised: bool = False

    peft_type: ClassVar[str | None] = "LORA"

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)

    def build(self, out: int, in_: int, *, dtype: torch.dtype, device: torch.device) -> "LoRADelta":
        return LoRADelta(out, in_, self.r, self.scale, self.dropout, dtype=dtype, device=device)

    def to_peft(self) -> dict[str, Any]:
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout,
                "use_rslora": self.rank_stabilised, "init_lora_weights": True}  # fmt: skip

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """Ranks and alphas may differ between modules: those that are not the first's go into peft's patterns."""
        common = {**next(iter(parts.values())), "rank_pattern": {}, "alpha_pattern": {}}
        for path, part in parts.items():
            if any(part[key] != common[key] for key in part.keys() - {"r", "lora_alpha"}):
                return None
            for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
                if part[key] != common[key]:
                    common[pattern][re.escape(path)] = part[key]
        return common

    @classmethod
    def from_peft(cls, config: dict[str, Any], path: str) -> Self:
        start = config.get("init_lora_weights", True)
        if start not in STARTS:
            raise UserError(
                f"init_lora_weights={start!r} moves part of the base weight into the adapter, which is not supported.",
                next="convert the adapter to plain LoRA with peft first",
            )
        return build(cls, {
            "targets": [path], "dropout": config.get("lora_dropout", 0.0), "rank_stabilised": config.get("use_rslora", False),
            "r": by_pattern(config.get("rank_pattern"), path, config["r"]),
            "alpha": by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]),
        }, "the adapter's config")  # fmt: skip


class LoRADelta(WeightDelta):
    """ΔW = s · B A."""

    A: Float[nn.Parameter, "r in"]
    B: Float[nn.Parameter, "out r"]

    def __init__(
        self, out: int, in_: int, r: int, s: float, dropout: float, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.s = s
        self.A = nn.Parameter(torch.empty(r, in_, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(out, r, dtype=dtype, device=device))
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def init(self, generator: torch.Generator) -> None:
        """A uniform on ±1/√in (Kaiming with a = √5), B zero. Drawn on the CPU: the same on every device."""
        bound = 1 / math.sqrt(self.A.shape[1])
        draw = torch.rand(self.A.shape, generator=generator, dtype=self.A.dtype)
        with torch.no_grad():
            self.A.copy_((2 * draw - 1) * bound)
            self.B.zero_()

    def forward(self, x: Float[Tensor, "*lead in"], base: Callable[[Tensor], Tensor]) -> Float[Tensor, "*lead out"]:
        low = F.linear(self.drop(x), self.A.to(x.dtype))  # (*lead, r)
        return base(x) + self.s * F.linear(low, self.B.to(x.dtype))

    def adapted(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return W + self.change(W)

    def change(self, W: Tensor) -> Float[Tensor, "out in"]:
        return self.kept(self.s * self.B @ self.A)

    def factors(self) -> Factors:
        return Factors(self.A, self.B, self.s)

    def to_peft(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def extra_repr(self) -> str:
        return f"r={self.A.shape[0]}, s={self.s:g}"


def by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value that peft's `rank_pattern` or `alpha_pattern` gives a module: the first key that ends its path."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
