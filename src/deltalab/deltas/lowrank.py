"""What the low-rank methods share: their fields, how peft's config says them, the product with x, and the start of A.

A spec here is abstract; the methods' own files hold the final ones.
"""

import abc
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float, Int
from deltalab.core.spec import build
from deltalab.deltas.base import Delta, through
from deltalab.deltas.select import pattern_matches
from deltalab.deltas.spec import DeltaSpec


class LowRankSpec(DeltaSpec, abc.ABC):
    """r: rank of the change. alpha: s = alpha / r (alpha / √r with `rank_stabilised`).

    dropout: probability that an entry of the delta's input is dropped in training.
    rank_pattern, alpha_pattern: another r or alpha for the modules that a name or pattern matches, the first that does.
    """

    r: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    rank_stabilised: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    peft_type: ClassVar[str | None] = "LORA"
    peft_fuses: ClassVar[bool] = True
    peft_keys: ClassVar[frozenset[str]] = frozenset(
        {"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern",
         "ensure_weight_tying"}
    )  # fmt: skip

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)

    def each(self, paths: Sequence[str]) -> dict[str, Self]:
        """Ranks and alphas by their patterns. Raises: UserError if a pattern matches none of the modules."""
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            if not any(pattern_matches(pattern, path) for path in paths):
                raise UserError(
                    f"the pattern '{pattern}' of {type(self).__name__} matches none of its modules.",
                    found=f"{len(paths)} modules, the first is {paths[0]}",
                )
        found: dict[str, Self] = {}
        for path in paths:
            r = _first(self.rank_pattern, path, self.r)
            alpha = _first(self.alpha_pattern, path, self.alpha)
            found[path] = self.model_copy(update={"r": r, "alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}})
        return found

    def to_peft(self) -> dict[str, Any]:
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout,
                "use_rslora": self.rank_stabilised, "init_lora_weights": True}  # fmt: skip

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]], deltas: Mapping[str, Delta]) -> dict[str, Any] | None:
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
    def fields_from_peft(cls, config: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        """The fields that the low-rank methods share, of a peft config whose targets are `paths`."""
        missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), (int, float))]
        if missing:
            raise UserError(
                f"the adapter's config says no {' and no '.join(missing)}.",
                found=f"keys: {', '.join(sorted(config)) or 'none'}",
            )
        r, alpha = config["r"], config["lora_alpha"]
        ranks = {path: by_pattern(config.get("rank_pattern"), path, r) for path in paths}
        alphas = {path: by_pattern(config.get("alpha_pattern"), path, alpha) for path in paths}
        return {
            "targets": paths, "r": r, "alpha": alpha, "dropout": config.get("lora_dropout", 0.0),
            "rank_stabilised": config.get("use_rslora", False),
            "rank_pattern": {path: value for path, value in ranks.items() if value != r},
            "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        }  # fmt: skip

    @classmethod
    def from_peft(cls, config: dict[str, Any], paths: list[str]) -> Self:
        return build(cls, cls.fields_from_peft(config, paths), "the adapter's config")


def low_rank(
    x: Float[Tensor, "*lead in"] | Int[Tensor, "*lead"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]
) -> Float[Tensor, "*lead out"]:
    """B (A x), in the precision of x; where x holds indices, in that of A."""
    low = through(x, A)
    return F.linear(low, B.to(low.dtype))


def kaiming(A: Tensor, generator: torch.Generator) -> None:
    """A (..., r, in) uniform on ±1/√in: Kaiming's with a = √5. Drawn on the CPU: the same on every device."""
    draw = torch.rand(A.shape, generator=generator, dtype=A.dtype)
    with torch.no_grad():
        A.copy_((2 * draw - 1) / math.sqrt(A.shape[-1]))


def in_one_matrix(A: Float[Tensor, "e r in"], B: Float[Tensor, "e out r"]) -> tuple[Tensor, Tensor]:
    """Experts' A and B as peft's files hold them: (e·r, in), one expert after the other, and (out, r·e), experts last."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def of_experts(A: Float[Tensor, "er in"], B: Float[Tensor, "out re"], experts: int) -> tuple[Tensor, Tensor]:
    """`in_one_matrix` undone: A (e, r, in) and B (e, out, r)."""
    r = len(A) // experts
    return A.view(experts, r, -1), B.view(-1, r, experts).permute(2, 0, 1)


def by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value that peft's `rank_pattern` or `alpha_pattern` gives a module: the first key that ends its path."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _first(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, path)), default)
