"""A look inside a change: of every weight its size, its spectrum and its ranks, and what two changes have in common."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.deltas.base import Delta, WeightDelta, weight_of
from deltalab.deltas.select import layers_of, leaf, model_name
from deltalab.deltas.sites import linears, place
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
    """Of the change of one weight. module: its last name; layer: its block, None outside of them. rank: what it may have at most.

    norm: of ΔW; relative: to that of W. S: its singular values, or the first of them, error: the norm of the rest.
    effective, stable, energy: ranks, the last that of 90 % of Σσ². utilisation: the effective rank's share of `rank`.
    intruders: of the leading directions of W + ΔW those that are like none of W's; None where that was not asked for.
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


def inside_deltas(
    base: nn.Module, deltas: Mapping[str, Delta], *, directions: int = 0
) -> tuple[list[Inside], dict[str, Spectrum]]:
    """Of the deltas of an adapter, by path, and their spectra. directions: leading ones to look for intruders among; 0: none.

    Only changes of one matrix are looked at. Raises: UserError if there is none.
    """
    found: list[Inside] = []
    spectra: dict[str, Spectrum] = {}
    layers = layers_of(base, list(deltas))
    for path, delta in deltas.items():
        where = place(base, path)
        if not isinstance(delta, WeightDelta) or where.kind not in ("linear", "embedding"):
            continue
        W = where.W.detach()
        with torch.no_grad():
            factors = delta.factors()
            change = None if factors is not None and not directions else delta.change(W)
        if factors is not None:
            spectrum, rank = of_factors(*factors), min(factors.A.shape[0], *W.shape)
        else:
            assert change is not None
            spectrum, rank = of_matrix(change, kept_of(W)), min(W.shape)
        spectra[path] = spectrum
        found.append(_inside(path, layers.get(path), W, spectrum, rank, change, directions))
    if not found:
        kinds = sorted({type(delta).__name__ for delta in deltas.values()})
        raise UserError("nothing in it is a change of a weight.", found=", ".join(kinds) or "no delta", next="adapters that depend on the input have no ΔW: compare their runs")  # fmt: skip
    return found, spectra


def inside_pair(
    base: nn.Module, tuned: nn.Module, *, directions: int = 0, k: int | None = None
) -> tuple[list[Inside], dict[str, Spectrum]]:
    """Of every linear that a tuned model has otherwise than its base. k: singular values of each. Raises: UserError if the models differ, or nothing does."""
    ours, theirs = linears(base), linears(tuned)
    if {p: m.weight.shape for p, m in ours.items()} != {p: m.weight.shape for p, m in theirs.items()}:  # type: ignore[union-attr]
        raise UserError(f"{model_name(tuned)} is no tuned form of {model_name(base)}: their linears differ.")
    found: list[Inside] = []
    spectra: dict[str, Spectrum] = {}
    layers = layers_of(base, list(ours))
    for path, linear in ours.items():
        W = weight_of(linear).detach()
        change = weight_of(theirs[path]).detach().double() - W.double()
        if bool((change != 0).any()):
            spectra[path] = of_matrix(change, k or kept_of(W))
            found.append(_inside(path, layers.get(path), W, spectra[path], min(W.shape), change, directions))
    if not found:
        raise UserError("the two models have the same linears, bit for bit.")
    return found, spectra


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


def _inside(
    path: str, layer: int | None, W: Tensor, spectrum: Spectrum, rank: int, change: Tensor | None, directions: int
) -> Inside:
    S = spectrum.S
    norm = float((S.square().sum() + spectrum.error**2).sqrt())
    size = float(W.double().norm())
    effective = effective_rank(S)
    return Inside(
        path, leaf(path), layer, rank, norm, norm / size if size else float("inf"), S.tolist(), spectrum.error, effective,
        stable_rank(S), energy_rank(S), effective / max(rank, 1),
        intruders(W, change, directions)[0] if directions and change is not None else None,
    )  # fmt: skip
