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
from deltalab.deltas.select import meant
from deltalab.deltas.spec import DeltaSpec


class LowRankSpec(DeltaSpec, abc.ABC):
    """r: rank of the change. alpha: s = alpha / r (alpha / √r with `rank_stabilised`).

    dropout: probability that an entry of the delta's input is dropped in training.
    rank_pattern, alpha_pattern: another r or alpha for the modules that a name or pattern matches, the first that does;
    a whole path means that module alone.
    """

    r: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    rank_stabilised: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    peft_type: ClassVar[str | None] = "LORA"
    peft_fuses: ClassVar[bool] = True
    alike: ClassVar[bool] = True
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
        rank_of = _by_path(self.rank_pattern, paths, type(self).__name__)
        alpha_of = _by_path(self.alpha_pattern, paths, type(self).__name__)
        plain = self.model_copy(update={"rank_pattern": {}, "alpha_pattern": {}})
        own = {path: (rank_of.get(path, self.r), alpha_of.get(path, self.alpha)) for path in paths}
        specs = {(r, alpha): plain.model_copy(update={"r": r, "alpha": alpha}) for r, alpha in set(own.values())}
        return {path: specs[fields] for path, fields in own.items()}

    def to_peft(self) -> dict[str, Any]:
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout,
                "use_rslora": self.rank_stabilised, "init_lora_weights": True}  # fmt: skip

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]], deltas: Mapping[str, Delta]) -> dict[str, Any] | None:
        """Ranks and alphas may differ between modules: those that are not the first's go into peft's patterns.

        None also where such a pattern would take another module, whose path ends like the one that it is for.
        """
        common = {**next(iter(parts.values())), "rank_pattern": {}, "alpha_pattern": {}}
        each = {id(part): part for part in parts.values()}.values()
        if any(part[key] != common[key] for part in each for key in part.keys() - {"r", "lora_alpha"}):
            return None
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            own = {re.escape(path): part[key] for path, part in parts.items() if part[key] != common[key]}
            common[pattern] = dict(sorted(own.items()))  # as the file has them, and the first that matches counts
            if by_pattern(common[pattern], list(parts), common[key]) != {
                path: part[key] for path, part in parts.items()
            }:
                return None
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
        ranks = by_pattern(config.get("rank_pattern"), paths, r)
        alphas = by_pattern(config.get("alpha_pattern"), paths, alpha)
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
    A = A.detach()
    own = A if A.device.type == "cpu" and A.is_contiguous() else torch.empty(A.shape, dtype=A.dtype)
    own.uniform_(-1, 1, generator=generator).div_(math.sqrt(A.shape[-1]))
    if own is not A:
        A.copy_(own)


def in_one_matrix(A: Float[Tensor, "e r in"], B: Float[Tensor, "e out r"]) -> tuple[Tensor, Tensor]:
    """Experts' A and B as peft's files hold them: (e·r, in), one expert after the other, and (out, r·e), experts last."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def of_experts(A: Float[Tensor, "er in"], B: Float[Tensor, "out re"], experts: int) -> tuple[Tensor, Tensor]:
    """`in_one_matrix` undone: A (e, r, in) and B (e, out, r)."""
    r = len(A) // experts
    return A.view(experts, r, -1), B.view(-1, r, experts).permute(2, 0, 1)


def by_pattern(patterns: dict[str, Any] | None, paths: Sequence[str], default: Any) -> dict[str, Any]:
    """The value that peft's `rank_pattern` or `alpha_pattern` gives each module: the first key that ends its path."""
    keys = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in (patterns or {}).items()]
    return {path: next((value for key, value in keys if key.match(path)), default) for path in paths}


def _by_path(patterns: Mapping[str, Any], paths: Sequence[str], name: str) -> dict[str, Any]:
    """Path -> value of the first pattern that means it. Raises: UserError for a pattern that means none."""
    values: dict[str, Any] = {}
    there = set(paths)
    for pattern, value in patterns.items():
        found = [pattern] if pattern in there else meant(pattern, paths)
        if not found:
            raise UserError(
                f"the pattern '{pattern}' of {name} matches none of its modules.",
                found=f"{len(paths)} modules, the first is {paths[0]}",
            )
        for path in found:
            values.setdefault(path, value)
    return values
