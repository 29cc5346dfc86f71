"""A look inside a change: of every weight its size, its spectrum and its ranks, and what two changes have in common."""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.paths import kinds_of
from deltalab.deltas.base import Delta, Factors, WeightDelta, weight_of
from deltalab.deltas.select import layers_of, model_name
from deltalab.deltas.sites import linears, place
from deltalab.deltas.weights import adaptation, attached
from deltalab.measure.spectrum import (
    Spectrum,
    by_chance,
    effective_rank,
    energy_rank,
    intruders,
    of_factors,
    of_matrix,
    overlap,
    stable_rank,
)

EXACT, KEPT = 2048, 64
"""Up to which size a change without factors is decomposed whole; and of larger ones, so many singular values, to which ranks then
refer. The error says what they leave out."""


@dataclass(frozen=True)
class Inside:
    """Of the change of one weight. module: its kind, as `kinds_of` names it; layer: its block, None outside of them. rank: what it may have at most.

    norm: of ΔW; relative: to that of W. S: its singular values, or the first of them, error: the norm of the rest.
    effective, stable, energy: ranks, the last that of 90 % of Σσ². utilisation: the effective rank's share of `rank`.
    intruders: of the leading directions of W + ΔW those that are like none of W's; None where that was not asked for.
    part: of a delta that mixes several changes by its input, which; each is looked at as if it were the only one.
    """

    path: str
    module: str
    layer: int | None
    rank: int
    norm: float
    relative: float
    S: list[float]
    error: float
    effective: float
    stable: float
    energy: int
    utilisation: float
    intruders: int | None = None
    part: str = ""


@dataclass(frozen=True)
class OfParameter:
    """Of one parameter of a delta that has no change of a weight, such as a prefix: its moments. module, layer: as of `Inside`."""

    path: str
    module: str
    layer: int | None
    name: str
    shape: list[int]
    norm: float
    mean: float
    deviation: float
    largest: float


class Found(NamedTuple):
    """Of each weight that changed a line, and its spectrum by path (of a part: path, comma, part); parameters of other deltas."""

    lines: list[Inside]
    spectra: dict[str, Spectrum]
    parameters: list[OfParameter]


def inside_adapted(model: nn.Module, *, directions: int = 0, but: Collection[str] = ()) -> Found:
    """Of the deltas on a model, and of the weights of linears that train beside them or, in full tuning, alone.

    Changes of one matrix are looked at, of a mixture each expert's; of deltas that have none, as their effect depends on the
    input in another way, the parameters. directions: leading ones to look for intruders among; 0: none. but: names of parameters
    to pass over, such as those of a head that the base does not have. Raises: UserError if there is nothing of all this.
    """
    deltas, start = attached(model), adaptation(model).start
    own = {path: linear for path, linear in linears(model).items() if f"{path}.weight" in start.keys() - set(but)}
    look = _Look(model, [*deltas, *own], directions)
    for path, delta in deltas.items():
        if not isinstance(delta, WeightDelta) and not delta.parts():
            look.add_parameters(path, delta)
        elif (where := place(model, path)).kind in ("linear", "embedding"):
            look.add_delta(path, where.W.detach(), delta)
    for path, linear in own.items():
        after = weight_of(linear)
        look.add_pair(path, start[f"{path}.weight"].to(after.device), after)
    if not (look.lines or look.parameters):
        kinds = sorted({type(delta).__name__ for delta in deltas.values()})
        raise UserError("nothing in it is a change of a matrix.", found=", ".join(kinds) or "no delta")
    return look.found()


def inside_pair(base: nn.Module, tuned: nn.Module, *, directions: int = 0, k: int | None = None) -> Found:
    """Of every linear that a tuned model has otherwise than its base. k: singular values of each. Raises: UserError if the models differ, or nothing does."""
    ours, theirs = linears(base), linears(tuned)
    if {p: m.weight.shape for p, m in ours.items()} != {p: m.weight.shape for p, m in theirs.items()}:  # type: ignore[union-attr]
        raise UserError(f"{model_name(tuned)} is no tuned form of {model_name(base)}: their linears differ.")
    look = _Look(base, list(ours), directions)
    for path, linear in ours.items():
        look.add_pair(path, weight_of(linear).detach(), weight_of(theirs[path]), k)
    if not look.lines:
        raise UserError("the two models have the same linears, bit for bit.")
    return look.found()


class _Look:
    """What is found, weight by weight. paths: of all that are looked at."""

    def __init__(self, model: nn.Module, paths: list[str], directions: int) -> None:
        self.layers, self.directions = layers_of(model, paths), directions
        self.kinds = kinds_of([*linears(model), *paths])  # of all, so that a module has one name in every change
        self.lines: list[Inside] = []
        self.spectra: dict[str, Spectrum] = {}
        self.parameters: list[OfParameter] = []

    def found(self) -> Found:
        return Found(self.lines, self.spectra, self.parameters)

    def add_parameters(self, path: str, delta: Delta) -> None:
        for name, parameter in delta.named_parameters():
            t = parameter.detach().double()
            moments = float(t.norm()), float(t.mean()), float(t.std(correction=0)), float(t.abs().max())
            self.parameters.append(
                OfParameter(path, self.kinds[path], self.layers.get(path), name, list(t.shape), *moments)
            )

    def add_delta(self, path: str, W: Tensor, delta: Delta) -> None:
        """A mixture's parts one by one."""
        for name, part in delta.parts().items():
            self.add_part(path, name, W, part)
        if not isinstance(delta, WeightDelta):
            return
        with torch.no_grad():
            factors = delta.factors()
            change = None if factors is not None and not self.directions else delta.change(W)
        if factors is not None:
            self._add(path, W, of_factors(*factors), min(factors.A.shape[0], *W.shape), change)
        else:
            assert change is not None
            self._add(path, W, of_matrix(change, kept_of(W)), min(W.shape), change)

    def add_part(self, path: str, name: str, W: Tensor, factors: Factors) -> None:
        """One of several changes that a delta mixes, as if it were the only one."""
        A, B, s = factors
        with torch.no_grad():
            change = s * (B @ A) if self.directions else None
        self._add(path, W, of_factors(A, B, s), min(A.shape[0], *W.shape), change, name)

    def add_pair(self, path: str, W: Tensor, tuned: Tensor, k: int | None = None) -> None:
        """Nothing where the two are the same."""
        change = tuned.detach().double() - W.double()
        if bool((change != 0).any()):
            self._add(path, W, of_matrix(change, k or kept_of(W)), min(W.shape), change)

    def _add(self, path: str, W: Tensor, spectrum: Spectrum, rank: int, change: Tensor | None, part: str = "") -> None:
        S = spectrum.S
        norm = float((S.square().sum() + spectrum.error**2).sqrt())
        size = float(W.double().norm())
        effective = effective_rank(S)
        self.spectra[f"{path}, {part}" if part else path] = spectrum
        self.lines.append(Inside(
            path, self.kinds[path], self.layers.get(path), rank, norm, norm / size if size else float("inf"), S.tolist(),
            spectrum.error, effective, stable_rank(S), energy_rank(S), effective / max(rank, 1),
            intruders(W, change, self.directions)[0] if self.directions and change is not None else None, part,
        ))  # fmt: skip


def shared_by_parts(found: Found) -> tuple[float, float] | None:
    """As `shared`, the mean over the pairs of parts of one delta, such as a mixture's experts; None where there are none."""
    lines, spectra, _ = found
    names = dict.fromkeys(line.part for line in lines if line.part)
    of = [{line.path: spectra[f"{line.path}, {name}"] for line in lines if line.part == name} for name in names]
    pairs = [pair for a, b in itertools.combinations(of, 2) for pair in shared(a, b).values()]
    return (sum(p[0] for p in pairs) / len(pairs), sum(p[1] for p in pairs) / len(pairs)) if pairs else None


def kept_of(W: Tensor) -> int | None:
    """How many singular values of a change without factors are computed; None for all."""
    return None if min(W.shape) <= EXACT else KEPT


def shared(first: Mapping[str, Spectrum], second: Mapping[str, Spectrum]) -> dict[str, tuple[float, float]]:
    """Path -> how much the leading left directions of two changes have in common, those of 90 % of each one's Σσ², and what random
    ones would; of the paths that both have."""
    found = {}
    for path in first:
        if path in second:
            a, b = (s.U[:, : max(1, energy_rank(s.S))] for s in (first[path], second[path]))
            found[path] = overlap(a, b), by_chance(a.shape[0], a.shape[1], b.shape[1])
    return found
