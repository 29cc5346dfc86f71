"""Several adapters of one base made into one: a low-rank change that comes close to what they add up to.

    linear     T = Σ w_i ΔW_i, kept as it is: A_i under each other, w_i s_i B_i side by side, of rank Σ r_i. (peft's `linear`
               adds up the A and the B by themselves, whose product is not the sum of the changes; its `cat` is this.)
    svd        the same T, and of all changes of rank r the nearest to it: QR of the B and of the Aᵀ side by side, the SVD
               of the small product between them; the dense T and its SVD where a change has no such factors
    ties       T of TIES (Yadav et al. 2023, arXiv:2306.01708): of each ΔW_i the share `density` of largest magnitude, for
               each entry the sign that Σ w_i ΔW_i has, and the mean over those that agree with it
    dare       T of DARE (Yu et al. 2023, arXiv:2311.03099): entries of each ΔW_i kept with probability `density` and divided
               by it, then Σ w_i
    dare-ties  DARE's entries in place of the largest in TIES

The last three are dense, so the truncated SVD follows, and it can cost much: what was lost is told for every module,
‖T − BA‖ / ‖T‖. Trimming is per matrix. One matrix at a time is made.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.shapes import Float
from deltalab.deltas.apart import Source, apart, twin
from deltalab.deltas.base import Delta, Factors, WeightDelta
from deltalab.deltas.factored import put_factors
from deltalab.deltas.select import leaf
from deltalab.deltas.sites import Place, place

How = Literal["linear", "svd", "ties", "dare", "dare-ties"]
SPARSE = ("ties", "dare", "dare-ties")


@dataclass(frozen=True)
class CombinedModule:
    """One module of the result. norm: ‖T‖, Frobenius. error: ‖T − ΔW‖ / ‖T‖."""

    path: str
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class CombineReport:
    """What was combined and what it cost; prints as a table by kind of module."""

    how: str
    adapters: tuple[tuple[str, float], ...]
    density: float | None
    seed: int | None
    modules: tuple[CombinedModule, ...]

    @property
    def error(self) -> float:
        """‖T − ΔW‖ / ‖T‖ over all modules together."""
        return _relative([(m.norm * m.error, m.norm) for m in self.modules])

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "adapters": dict(self.adapters), "error": self.error}

    def __str__(self) -> str:
        kinds: dict[str, list[CombinedModule]] = defaultdict(list)
        for module in self.modules:
            kinds[leaf(module.path)].append(module)
        lines = [f"  {'module':<20} {'count':>5}  {'rank':>9}  {'error':>8}  {'worst':>8}"]
        for kind, modules in kinds.items():
            low, high = min(m.rank for m in modules), max(m.rank for m in modules)
            rank = str(low) if low == high else f"{low}–{high}"
            error = _relative([(m.norm * m.error, m.norm) for m in modules])
            worst = max(m.error for m in modules)
            lines.append(f"  {kind:<20} {len(modules):>5}  {rank:>9}  {error:>8.2g}  {worst:>8.2g}")
        names = " + ".join(f"{weight:g} × {name}" for name, weight in self.adapters)
        return "\n".join(
            [f"{self.how}: {names}", *lines, f"  error of the whole: {self.error:.2g} of the target's norm"]
        )


class Combined(NamedTuple):
    """The model with the new adapter on it, and what it lost."""

    model: nn.Module
    report: CombineReport


@torch.no_grad()
def combine(
    model: nn.Module, adapters: Mapping[str, Source], weights: Sequence[float] | None = None, *, how: str = "linear",
    r: int | None = None, density: float | None = None, seed: int = 0, adapter: str = "default",
) -> Combined:  # fmt: skip
    """Make several adapters into one and put it on `model`, in place, trainable as after `adapt`.

    how: linear, svd, ties, dare or dare-ties, see above.
    adapters: name -> folder, a model that it is active on, or deltas by path; they may differ in method, rank and
    targets. weights: one for each, 1 if not given; negative ones subtract. r: rank of the result at each module, the
    largest there if not given; `linear` has the sum of all. density: of `ties` and `dare`. seed: of `dare`.
    Raises: UserError if the model is adapted, an adapter does not fit or has no change of a weight, `linear` meets one
    without factors, or an option is missing, out of range or not of `how`. Then the model is as it was.
    """
    require_options(how, r, density)
    given = _weighted(adapters, weights)
    base = twin(model)
    apiece = {name: apart(base, source, name) for name, source in adapters.items()}
    paths = dict.fromkeys(path for deltas in apiece.values() for path in deltas)
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Factors] = {}
    modules: list[CombinedModule] = []
    for path in paths:
        held = place(base, path)
        there = [
            _Given(name, given[name], _change_of(name, path, held, deltas[path]))
            for name, deltas in apiece.items()
            if path in deltas
        ]
        changes[path], norm, lost = _combined(there, held, path, how, r, density, generator)
        modules.append(CombinedModule(path, changes[path].A.shape[-2], norm, lost / norm if norm else 0.0))
    put_factors(model, changes, adapter=adapter)
    report = CombineReport(how, tuple(given.items()), density, seed if how.startswith("dare") else None, tuple(modules))
    return Combined(model, report)


class _Given(NamedTuple):
    name: str
    weight: float
    delta: WeightDelta


class _Best(NamedTuple):
    """Factors, ‖T‖ and ‖T − BA‖."""

    factors: Factors
    norm: float
    lost: float


def _combined(
    there: list[_Given], held: Place, path: str, how: str, r: int | None, density: float | None,
    generator: torch.Generator,
) -> _Best:  # fmt: skip
    """One module of the result."""
    factors = [g.delta.factors() if g.delta.keep is None else None for g in there]
    known = [f for f in factors if f is not None]
    if how == "linear" and len(known) < len(there):
        bare = there[factors.index(None)]
        raise UserError(
            f"the change of '{bare.name}' on '{path}' has no low rank, so no sum of factors holds it.",
            found=type(bare.delta).__name__.removesuffix("Delta") + ("" if bare.delta.keep is None else ", masked"),
            next="how='svd', r=…: the nearest change of that rank",
        )
    if r is None and len(known) < len(there):
        raise UserError(
            f"which rank shall the result have on '{path}'?",
            found="not every change there has a rank",
            next="r=16, for example",
        )
    rank = max(f.A.shape[-2] for f in known) if r is None else r
    if how in ("linear", "svd") and len(known) == len(there):
        A = torch.cat([f.A for f in known], -2)
        B = torch.cat([g.weight * f.s * f.B for g, f in zip(there, known, strict=True)], -1)
        return _best_of_factors(A, B, None if how == "linear" else rank)
    weights, W = [g.weight for g in there], held.W.detach()
    parts = (g.delta.change(W) for g in there)
    if how == "svd":
        return _best(_sum(parts, weights), rank)
    keep = _largest if how == "ties" else _drawn
    kept = [keep(part, float(density or 1), generator) for part in parts]
    return _best(_sum(kept, weights) if how == "dare" else _agreed(kept, weights), rank)


def _sum(parts: Iterable[Tensor], weights: list[float]) -> Float[Tensor, "*e out in"]:
    """Σ w_i ΔW_i."""
    total: Tensor = sum(weight * part for weight, part in zip(weights, parts, strict=True))  # type: ignore[assignment]
    return total


def _agreed(parts: list[Tensor], weights: list[float]) -> Float[Tensor, "*e out in"]:
    """The mean of the w_i ΔW_i that have the sign of their sum, entry by entry; zeros have none."""
    parts = [weight * part for weight, part in zip(weights, parts, strict=True)]
    sign = torch.stack(parts).sum(0).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for part in parts:
        agrees = (part.sign() == sign) & (sign != 0)
        total += part * agrees
        count += agrees
    return total / count.clamp_min(1)


def _largest(change: Float[Tensor, "*e out in"], density: float, generator: torch.Generator) -> Tensor:
    """The share of its entries that are largest in magnitude, of each matrix; zero elsewhere."""
    flat = change.flatten(-2)
    k = int(density * flat.shape[-1])
    top = flat.abs().topk(k, dim=-1).indices
    return torch.zeros_like(flat).scatter(-1, top, flat.gather(-1, top)).view_as(change)


def _drawn(change: Float[Tensor, "*e out in"], density: float, generator: torch.Generator) -> Tensor:
    """Each entry with probability `density`, divided by it; zero elsewhere."""
    keep = torch.rand(change.shape, generator=generator) < density  # on the CPU: the same on every device
    return change * keep.to(change.device) / density


def _best(T: Float[Tensor, "*e out in"], r: int) -> _Best:
    """The nearest change of rank r to T."""
    U, S, Vh = torch.linalg.svd(T, full_matrices=False)
    found = _split(U, S, Vh, r)
    return _Best(found, float(T.norm()), float((T - found.B @ found.A).norm()))


def _best_of_factors(A: Float[Tensor, "*e n in"], B: Float[Tensor, "*e out n"], r: int | None) -> _Best:
    """The nearest change of rank r to B A, which itself is never made; r None: B A as it is."""
    norm = float(_core(A, B)[2].norm())
    if r is None:
        return _Best(Factors(A, B, 1.0), norm, 0.0)
    Qa, Qb, core = _core(A, B)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    found = _split(Qb @ U, S, Vh @ Qa.mT, r)
    found = Factors(found.A.to(A.dtype), found.B.to(B.dtype), 1.0)
    lost = _core(torch.cat([A, found.A], -2), torch.cat([B, -found.B], -1))[2].norm()
    return _Best(found, norm, float(lost))


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Qa, Qb and C with B A = Qb C Qaᵀ, the Q of orthonormal columns; in fp64."""
    Qa, Ra = torch.linalg.qr(A.mT.double())
    Qb, Rb = torch.linalg.qr(B.double())
    return Qa, Qb, Rb @ Ra.mT


def _split(U: Tensor, S: Tensor, Vh: Tensor, r: int) -> Factors:
    """The first r directions, each singular value shared out evenly."""
    root = S[..., :r].sqrt()
    return Factors(root.unsqueeze(-1) * Vh[..., :r, :], U[..., :r] * root.unsqueeze(-2), 1.0)


def _relative(parts: Sequence[tuple[float, float]]) -> float:
    lost, norm = (math.sqrt(sum(value**2 for value in side)) for side in zip(*parts, strict=True))
    return lost / norm if norm else 0.0


def _change_of(name: str, path: str, held: Place, delta: Delta) -> WeightDelta:
    """Raises: UserError unless all that the delta does is a change of the weight."""
    if not isinstance(delta, WeightDelta):
        raise UserError(
            f"adapter '{name}' depends on the input at '{path}', so it is no change of a weight.",
            found=type(delta).__name__.removesuffix("Delta"),
            next="deltalab.AdapterBank runs adapters side by side",
        )
    bias = getattr(held.module, "bias", None) if held.kind == "linear" else None
    if bias is not None and delta.adapted_bias(bias) is not bias:
        raise UserError(
            f"adapter '{name}' changes the bias of '{path}' too, which no low-rank change of the weight can hold.",
            found=type(delta).__name__.removesuffix("Delta"),
            next="deltalab.merged makes a model of it",
        )
    return delta


def _weighted(adapters: Mapping[str, Source], weights: Sequence[float] | None) -> dict[str, float]:
    if not adapters:
        raise UserError("no adapter is named.", next="deltalab.combine(model, {'fr': 'out/fr', 'sql': 'out/sql'})")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise UserError(f"{len(adapters)} adapters and the weights {weights}.", next="one finite number for each adapter, in their order")  # fmt: skip
    return dict(zip(adapters, map(float, weights), strict=True))


def require_options(how: str, r: int | None, density: float | None) -> None:
    """Raises: UserError for the first that is wrong."""
    wrong = None
    if how not in get_args(How):
        wrong = UserError(f"how='{how}' is no way to combine.", nearest=nearest(how, get_args(How)) or get_args(How))
    elif how == "linear" and r is not None:
        wrong = UserError("how='linear' keeps every rank, so r says nothing.", next="leave it out, or how='svd'")
    elif r is not None and r < 1:
        wrong = UserError(f"r={r} is no rank.", next="1 or more")
    elif how not in SPARSE and density is not None:
        wrong = UserError(f"density is of {', '.join(SPARSE)}.", found=f"how='{how}'", next="leave it out")
    elif how in SPARSE and density is None:
        wrong = UserError(f"how='{how}' needs a density: the share of each change that is kept.", next="density=0.2")
    elif density is not None and not 0 < density <= 1:
        wrong = UserError(f"density={density} is no share.", next="above 0, at most 1")
    if wrong is not None:
        raise wrong
