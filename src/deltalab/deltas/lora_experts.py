"""LoRA experts: several small LoRAs on one linear, and a router that sends each token to a few of them.

    y = W x + s · Σ_e g_e(x) B_e A_e x,   s = α / r          (MoLoRA: Zadouri et al. 2023, arXiv:2309.05444)

With p(x) = softmax(R x), R (experts, in), g_e(x) is p_e(x) for the k largest of them and 0 for the others; `renormalise`
divides them by their sum. Every B_e starts at zero, so the adapted model starts as the base. An expert that no token is sent to gets a gradient
of exactly zero. The effect depends on the input, so there is no adapted weight and nothing to merge.

Left alone, a router may send everything to few experts. The load-balance loss, which the training adds once a step, is

    L = E · Σ_e f_e P_e     f_e: share of the k·T assignments, P_e: mean of p_e over the T tokens

(Switch: Fedus et al. 2021, arXiv:2101.03961, eq. 4–6; for LoRA, MixLoRA: Li et al. 2024, arXiv:2404.15159). It is 1 for an
even router and at most E / k. f is a count, so L has a gradient through P alone, and only for the routers: the hidden states
that they read are taken as given. With c_e = E f_e / T it is Σ_t p_te (c_e − Σ_j c_j p_tj) x_t for row e of R, an
(experts, in) matrix. The forward computes that in place of keeping its input until the step's end, which would undo
what gradient checkpointing saves.

On the experts of a model that is a mixture itself, each of its n experts has a mixture of its own, A (n, E, r, in); the
router is one for the stack.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.shapes import Float, Int
from deltalab.deltas.base import Base, Delta, Dropout, Factors, through, wide
from deltalab.deltas.lowrank import kaiming
from deltalab.deltas.site import Kind, Site
from deltalab.deltas.spec import DeltaSpec


class LoRAExperts(DeltaSpec):
    """A mixture of LoRA experts on every selected linear.

    experts: how many. top_k: to how many of them a token goes; all of them is MoLoRA's soft mixture. renormalise: divide
    the chosen ones' gates by their sum. r, alpha, dropout: of each expert, as LoRA's. router_std: deviation of the
    router's start. balance: weight of the load-balance loss of each router in the training's loss.
    """

    method: Literal["lora_experts"] = "lora_experts"
    experts: int = Field(4, ge=1)
    top_k: int = Field(2, ge=1)
    renormalise: bool = True
    r: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    router_std: float = Field(0.02, ge=0, allow_inf_nan=False)
    balance: float = Field(0.01, ge=0, allow_inf_nan=False)

    sits_on: ClassVar[frozenset[Kind]] = frozenset({"linear", "experts"})

    @pydantic.model_validator(mode="after")
    def _routable(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} of {self.experts} experts; at most all of them")
        if self.top_k == 1 < self.experts and self.renormalise:
            raise ValueError("with top_k=1 a renormalised gate is always 1, and no router learns: renormalise=False")
        return self

    def build(self, site: Site) -> "LoRAExpertsDelta":
        return LoRAExpertsDelta(site, self)

    def penalty(self, deltas: Mapping[str, Delta]) -> Float[Tensor, ""] | None:
        """`balance` times the sum over the routers of L, of the last forward in training; None before there was one."""
        losses = [d.imbalance() for d in deltas.values() if isinstance(d, LoRAExpertsDelta)] if self.balance else []
        some = [loss for loss in losses if loss is not None]
        return self.balance * sum(some[1:], some[0]) if some else None


class Routed(NamedTuple):
    """What became of some tokens. assigned: to each expert; mass: Σ p over the tokens. Both (experts,)."""

    assigned: Float[Tensor, " e"]
    mass: Float[Tensor, " e"]
    tokens: int


class LoRAExpertsDelta(Delta):
    """y = W x + s · Σ_e g_e(x) B_e A_e x, with A_e = A[e] and B_e = B[:, e]; on a stack A and B lead with its experts."""

    router: Float[nn.Parameter, "e in"]
    A: Float[nn.Parameter, "*n e r in"]
    B: Float[nn.Parameter, "*n out e r"]

    def __init__(self, site: Site, spec: LoRAExperts) -> None:
        super().__init__()
        self.s, self.top_k, self.renormalise = spec.alpha / spec.r, spec.top_k, spec.renormalise
        self.router_std, self.balanced = spec.router_std, spec.balance > 0
        *stack, out, in_ = site.shape
        empty = functools.partial(torch.empty, dtype=site.dtype, device=site.device)
        self.router = nn.Parameter(empty(spec.experts, in_))
        self.A = nn.Parameter(empty(*stack, spec.experts, spec.r, in_))
        self.B = nn.Parameter(empty(*stack, out, spec.experts, spec.r))
        self.drop = Dropout(spec.dropout) if spec.dropout else nn.Identity()
        self.gathers = False
        self.routed: Routed | None = None
        self.pull: tuple[Tensor, Tensor] | None = None

    def init(self, generator: torch.Generator) -> None:
        kaiming(self.A, generator)
        draw = torch.randn(self.router.shape, generator=generator, dtype=self.router.dtype)
        with torch.no_grad():
            self.router.copy_(self.router_std * draw)
            self.B.zero_()

    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        y = base(x)
        gates, dropped = self.gates(x), self.drop(x)
        if base.rows is None:
            change = mixture(dropped, gates, self.A, self.B)
        else:  # tokens sorted by the stack's expert that they went to
            parts = zip(dropped.split(base.rows), gates.split(base.rows), self.A, self.B, strict=True)
            change = torch.cat([mixture(*part) for part in parts])
        return y + (self.s * change).to(y.dtype)

    def gates(self, x: Float[Tensor, "*lead in"]) -> Float[Tensor, "*lead e"]:
        """g(x), zero for the experts that a token does not go to; exactly k of a token's are not, whatever ties."""
        logits = through(x, self.router)
        logits = logits.to(wide(logits.dtype))
        p = logits.softmax(-1)
        highest, chosen = logits.topk(self.top_k)
        top = highest.softmax(-1) if self.renormalise else p.gather(-1, chosen)
        self.note(x.detach().flatten(0, -2), p.detach().flatten(0, -2), chosen.flatten(0, -2))
        return torch.zeros_like(p).scatter(-1, chosen, top)

    @torch.no_grad()
    def note(self, x: Float[Tensor, "t in"], p: Float[Tensor, "t e"], chosen: Int[Tensor, "t k"]) -> None:
        """Keep what `measures` tells; in training also L and its gradient."""
        tokens, experts = p.shape
        if not tokens:
            return
        assigned = torch.zeros_like(p).scatter(-1, chosen, 1.0).sum(0)
        new = Routed(assigned, p.sum(0), tokens)
        old = self.routed if self.gathers else None
        self.routed = new if old is None else Routed(*(a + b for a, b in zip(old, new, strict=True)))
        if self.training and self.balanced:
            c = experts * assigned / (self.top_k * tokens) / tokens
            towards = p * (c - (p @ c)[:, None])
            gradient = towards.to(x.dtype).T @ x
            self.pull = c @ new.mass, gradient.to(self.router.dtype)

    def imbalance(self) -> Float[Tensor, ""] | None:
        """L of the last forward in training, with its gradient for the router; None before there was one."""
        if self.pull is None:
            return None
        value, gradient = (t.to(self.router) for t in self.pull)
        return value + ((self.router - self.router.detach()) * gradient).sum()

    def gather(self, on: bool) -> None:
        self.gathers = on
        self.routed = None if on else self.routed

    def parts(self) -> dict[str, Factors]:
        """s · B_e A_e of each expert, what it adds where its gate is 1."""
        experts = range(self.A.shape[-3])
        return {f"expert {e}": Factors(self.A[..., e, :, :], self.B[..., e, :], self.s) for e in experts}

    def measures(self) -> dict[str, float]:
        """Of the last forward: the share of the assignments that each expert got and the smallest of these, and the
        entropy of the mean routing, 1 for an even one.
        """
        if self.routed is None:
            return {}
        shares = (self.routed.assigned / self.routed.assigned.sum()).tolist()
        mean = self.routed.mass / self.routed.tokens
        most = math.log(len(shares))
        entropy = float(torch.special.entr(mean).sum()) / most if most else 1.0
        return {"smallest_share": min(shares), "entropy": entropy} | {f"share_{e}": s for e, s in enumerate(shares)}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has had no forward of its own."""
        return {**self.__dict__, "routed": None, "pull": None}

    def extra_repr(self) -> str:
        experts, r = self.A.shape[-3:-1]
        return f"experts={experts}, top_k={self.top_k}, r={r}, s={self.s:g}"


def mixture(
    x: Float[Tensor, "*lead in"],
    gates: Float[Tensor, "*lead e"],
    A: Float[Tensor, "e r in"],
    B: Float[Tensor, "out e r"],
) -> Float[Tensor, "*lead out"]:
    """Σ_e g_e B_e A_e x, as one product of rank E·r whose middle is gated: exactly zero where a gate is.

    Up to a few hundred for E·r that is faster than to sort the tokens by expert and back: benchmarks/mixture.py.
    """
    low = through(x, A.flatten(0, 1)).unflatten(-1, A.shape[:2])
    gated = (low * gates.to(low.dtype)[..., None]).flatten(-2)
    return F.linear(gated, B.flatten(1).to(low.dtype))
