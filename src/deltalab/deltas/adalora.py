"""AdaLoRA: a low-rank change whose rank goes where it matters most.

    y = W x + s · B (Λ (A x)),   s = α / (init_r + 1e-5)      (Zhang et al. 2023, arXiv:2303.10512, eq. 3)

Λ is diagonal. Every module starts with init_r triplets (a row of A, an entry of Λ, a column of B); while training, the
least important ones of all modules together are taken away, by a budget that falls (`budget`). A penalty keeps A and B
near orthogonal: ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖, as in peft; the paper squares them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.shapes import Bool, Float, Int
from deltalab.core.spec import build
from deltalab.deltas import budget
from deltalab.deltas.base import Base, Delta, Dropout, Factors, WeightDelta, acting
from deltalab.deltas.budget import Schedule
from deltalab.deltas.lowrank import low_rank
from deltalab.deltas.site import Site
from deltalab.deltas.spec import DeltaSpec
from deltalab.kernels.linear import LowRank

Steps = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]
ASIDE = 1e-5
"""What peft adds to the rank that it divides by."""
SAME = {"alpha": "lora_alpha", "dropout": "lora_dropout", "delta_t": "deltaT",
        **{key: key for key in ("init_r", "target_r", "tinit", "tfinal", "beta1", "beta2", "orth_reg_weight", "total_step")}}  # fmt: skip
"""Field -> its key in peft's config."""


class AdaLoRA(DeltaSpec):
    """Low-rank adaptation with a budget of ranks, shared by all selected linears. It has a schedule: see `dl.step`.

    init_r: rank of every module at the start. target_r: mean rank at the end. alpha: s = alpha / (init_r + 1e-5).
    dropout: probability that an entry of the delta's input is dropped in training.
    tinit, tfinal: optimizer steps before the first and after the last pruning; below one, a fraction of all steps.
    delta_t: steps from one pruning to the next. beta1, beta2: of the moving averages of sensitivity and its variation.
    orth_reg_weight: weight of the penalty. total_step: all steps; None takes what the training loop knows.
    rank_pattern: path -> rank, of modules that a loaded file has pruned.
    """

    method: Literal["adalora"] = "adalora"
    init_r: int = Field(12, ge=1)
    target_r: int = Field(8, ge=1)
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    tinit: Steps = 0.1
    tfinal: Steps = 0.3
    delta_t: int = Field(1, ge=1)
    beta1: Decay = 0.85
    beta2: Decay = 0.85
    orth_reg_weight: float = Field(0.5, ge=0, allow_inf_nan=False)
    total_step: int | None = Field(None, ge=1)
    rank_pattern: dict[str, Annotated[int, Field(ge=0)]] = {}

    peft_type: ClassVar[str | None] = "ADALORA"
    peft_keys: ClassVar[frozenset[str]] = frozenset({*SAME.values(), "rank_pattern", "r", "init_lora_weights"})

    @pydantic.model_validator(mode="after")
    def _falls(self) -> Self:
        if self.target_r > self.init_r:
            raise ValueError(f"target_r {self.target_r} is more than init_r {self.init_r}: ranks only fall")
        if self.total_step is not None and Schedule.of(self.tinit, self.tfinal, self.total_step) is None:
            raise ValueError(f"tinit and tfinal leave none of {self.total_step} steps to prune in")
        return self

    def each(self, paths: Sequence[str]) -> dict[str, Self]:
        """Raises: UserError if rank_pattern names another module."""
        unknown = sorted(self.rank_pattern.keys() - set(paths))
        if unknown:
            raise UserError(f"rank_pattern names '{unknown[0]}', which is none of AdaLoRA's modules.", nearest=nearest(unknown[0], paths))  # fmt: skip
        return super().each(paths)

    def build(self, site: Site) -> "AdaLoRADelta":
        rank = self.rank_pattern.get(site.path, self.init_r)
        return AdaLoRADelta(site, rank, self.alpha / (self.init_r + ASIDE), self.dropout)

    def penalty(self, deltas: Mapping[str, Delta]) -> Float[Tensor, ""] | None:
        """orth_reg_weight · the mean over all A and B of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖."""
        if not self.orth_reg_weight:
            return None
        frames = [frame for delta in _own(deltas).values() for frame in (delta.A @ delta.A.mT, delta.B.mT @ delta.B)]
        norms = [torch.linalg.matrix_norm(f - torch.eye(len(f), dtype=f.dtype, device=f.device)) for f in frames]
        return self.orth_reg_weight * torch.stack([norm.to(norms[0].device) for norm in norms]).mean()

    def after_step(self, deltas: Mapping[str, Delta], t: int | None, total: int | None) -> None:
        """Observe the sensitivities, and prune where the schedule says so; from step total − tfinal on ranks are final.

        Raises: UserError if the number of steps is not known or does not fit, or the gradients are gone.
        """
        own = _own(deltas)
        known = int(_any(own).clock[2])
        schedule = budget.schedule(self.tinit, self.tfinal, self.total_step, total, known)
        budget.after_step(own, schedule, t, self.delta_t, (self.beta1, self.beta2), self.target_r)

    def require_ready(self, deltas: Mapping[str, Delta]) -> None:
        """Raises: UserError if it trained and its schedule did not end: that would be LoRA with a penalty."""
        budget.require_ended(_own(deltas), self.target_r)

    def to_peft(self) -> dict[str, Any]:
        part = {key: getattr(self, field) for field, key in SAME.items()}
        return {**part, "init_lora_weights": True}

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]], deltas: Mapping[str, Delta]) -> dict[str, Any] | None:
        """The fields have to be the same; the numbers of steps are those of the run, and what was pruned is listed."""
        config = super().common_peft(parts, deltas)
        if config is None:
            return None
        total = config["total_step"] or max(int(delta.clock[2]) for delta in _own(deltas).values()) or None
        config = {**config, "total_step": total, "rank_pattern": None}
        if total:
            config |= {key: budget.steps(config[key], total) for key in ("tinit", "tfinal")}
        kept = {path: delta.rows.tolist() for path, delta in _own(deltas).items()}
        if any(sum(rows) < config["init_r"] for rows in kept.values()):
            full = {path: rows + [False] * (config["init_r"] - len(rows)) for path, rows in kept.items()}
            config["rank_pattern"] = {f"{path}.lora_E": rows for path, rows in full.items()}
        return config

    @classmethod
    def from_peft(cls, config: dict[str, Any], paths: list[str]) -> Self:
        fields = {field: config[key] for field, key in SAME.items() if config.get(key) is not None}
        given = {"init_r": 12, "target_r": 8, "tinit": 0, "tfinal": 0, **fields}  # peft's defaults
        given["target_r"] = min(given["target_r"], given["init_r"])  # as there: it prunes nothing
        ranks = {}
        for name, rows in (config.get("rank_pattern") or {}).items():
            path = name.removesuffix(".default").removesuffix(".lora_E")
            if path not in paths:
                raise UserError(
                    f"the adapter's rank_pattern names '{path}', which is none of its modules on this model.",
                    next="load it on the model that it was trained with",
                )
            if not isinstance(rows, list) or len(rows) != given["init_r"]:
                raise UserError(
                    f"the adapter's rank_pattern for '{name}' does not fit.",
                    found=str(rows)[:60],
                    next=f"it should list {given['init_r']} times true or false",
                )
            ranks[path] = sum(rows)
        return build(cls, {**given, "targets": paths, "rank_pattern": ranks}, "the adapter's config")


class AdaLoRADelta(WeightDelta):
    """ΔW = s · B diag(E) A. E (r, 1) is the diagonal of Λ, as peft keeps it. Buffers: see `budget.register`."""

    A: Float[nn.Parameter, "r in"]
    B: Float[nn.Parameter, "out r"]
    E: Float[nn.Parameter, "r 1"]
    mask: Bool[Tensor, " r"]
    clock: Int[Tensor, "3"]
    start: Float[Tensor, "r 1"]

    def __init__(self, site: Site, r: int, s: float, dropout: float) -> None:
        super().__init__()
        out, in_ = site.shape
        self.s = s
        for name, shape in (("A", (r, in_)), ("E", (r, 1)), ("B", (out, r))):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=site.dtype, device=site.device)))
        budget.register(self)
        self.drop = Dropout(dropout) if dropout else nn.Identity()

    def init(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for frame in (self.A, self.B):
                frame.copy_(0.02 * torch.randn(frame.shape, generator=generator, dtype=frame.dtype))
            self.E.zero_()

    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        y = base(x)
        return y + (self.s * low_rank(self.drop(x), self.E * self.A, self.B)).to(y.dtype)

    def change(self, W: Tensor) -> Float[Tensor, "out in"]:
        return self.kept(self.s * self.B @ (self.E * self.A))

    def factors(self) -> Factors:
        return Factors(self.E * self.A, self.B, self.s)

    def form(self, weight: Callable[[], Tensor]) -> LowRank:
        A, B, s = self.factors()
        return LowRank(A, B, s, acting(self.drop))

    @property
    def rows(self) -> Bool[Tensor, " r"]:
        """The triplets that a file keeps: what the last pruning left, once it was the final one."""
        return self.mask if budget.ended(self) else torch.ones_like(self.mask)

    def to_peft(self) -> dict[str, Tensor]:
        if self.mask.is_meta or bool(self.rows.all()):
            return {"lora_A": self.A, "lora_B": self.B, "lora_E": self.E}
        return {"lora_A": self.A[self.rows], "lora_B": self.B[:, self.rows], "lora_E": self.E[self.rows]}

    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        super().from_peft(tensors)
        self.start.copy_(self.E.detach())

    def extra_repr(self) -> str:
        return f"r={len(self.E)}, s={self.s:g}"


def _own(deltas: Mapping[str, Delta]) -> Mapping[str, AdaLoRADelta]:
    return cast(Mapping[str, AdaLoRADelta], deltas)


def _any(own: Mapping[str, AdaLoRADelta]) -> AdaLoRADelta:
    """The clocks of one group go alike."""
    return next(iter(own.values()))
