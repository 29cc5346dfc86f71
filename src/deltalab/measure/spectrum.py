"""What a change of a weight looks like inside: its singular values, how many of them matter, and which directions are new.

    ΔW = s · B A = Q_B (s · R_B R_Aᵀ) Q_Aᵀ,     B = Q_B R_B,   Aᵀ = Q_A R_A

has at most r singular values, which are those of the r × r matrix in the middle, so nothing of the size of W is formed. A change
without factors (a fully tuned weight) goes by a randomised SVD with the error that it leaves.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deltalab.core.shapes import Float


class Spectrum(NamedTuple):
    """U S Vᵀ, largest first; error: the Frobenius norm of what is not in it, 0 for all of it."""

    U: Float[Tensor, "out k"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "in k"]
    error: float = 0.0


def of_factors(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], s: float = 1.0) -> Spectrum:
    """The singular value decomposition of s · B A, in fp64, without forming it."""
    Q_B, R_B = torch.linalg.qr(B.detach().double())
    Q_A, R_A = torch.linalg.qr(A.detach().double().mT)
    U, S, Vh = torch.linalg.svd(s * R_B @ R_A.mT, full_matrices=False)
    return Spectrum(Q_B @ U, S, Q_A @ Vh.mT)


def of_matrix(change: Float[Tensor, "out in"], k: int | None = None, *, steps: int = 4, seed: int = 0) -> Spectrum:
    """The k largest singular values and their vectors, in fp64; all of them, exactly, without k.

    By a randomised range finder (Halko, Martinsson & Tropp 2011, alg. 4.4, k + 10 columns, `steps` power iterations). Every singular
    value is at most `error` too small: ‖W − Q Qᵀ W‖² = ‖W‖² − ‖Qᵀ W‖², by which the range that was found falls short.
    """
    W = change.detach().double()
    least = min(W.shape)
    if k is None or k + 10 >= least:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        left = S[k:] if k is not None else S[:0]
        n = len(S) if k is None else k
        return Spectrum(U[:, :n], S[:n], Vh[:n].mT, float(left.norm()))
    generator = torch.Generator(W.device).manual_seed(seed)
    Q, _ = torch.linalg.qr(W @ torch.randn(W.shape[1], k + 10, dtype=W.dtype, device=W.device, generator=generator))
    for _ in range(steps):
        Q, _ = torch.linalg.qr(W.mT @ Q)
        Q, _ = torch.linalg.qr(W @ Q)
    small = Q.mT @ W
    U, S, Vh = torch.linalg.svd(small, full_matrices=False)
    missed = max(0.0, float(W.square().sum() - S[:k].square().sum()))
    return Spectrum(Q @ U[:, :k], S[:k], Vh[:k].mT, math.sqrt(missed))


def effective_rank(S: Float[Tensor, " k"]) -> float:
    """exp of the entropy of σᵢ / Σσ (Roy & Vetterli 2007): k for k equal values, 1 for one; 0 for none."""
    total = float(S.sum())
    if not total:
        return 0.0
    p = S.double() / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def stable_rank(S: Float[Tensor, " k"]) -> float:
    """Σσ² / σ₁², at most the rank; 0 for none."""
    return float(S.double().square().sum() / S[0].double().square()) if len(S) and float(S[0]) else 0.0


def energy_rank(S: Float[Tensor, " k"], share: float = 0.9) -> int:
    """The least number of singular values with this share of Σσ²."""
    energy = S.double().square().cumsum(0)
    if not len(S) or not float(energy[-1]):
        return 0
    return int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1


def overlap(first: Float[Tensor, "n i"], second: Float[Tensor, "n j"]) -> float:
    """φ = ‖U₁ᵀ U₂‖² / min(i, j) of two orthonormal bases, in [0, 1] (Hu et al. 2021, arXiv:2106.09685, eq. 4)."""
    return float((first.double().mT @ second.double()).square().sum() / min(first.shape[1], second.shape[1]))


def by_chance(n: int, i: int, j: int) -> float:
    """What `overlap` is on average for random subspaces of n dimensions: max(i, j) / n."""
    return max(i, j) / n


def intruders(
    W: Float[Tensor, "out in"], change: Float[Tensor, "out in"], k: int = 10, below: float = 0.5
) -> tuple[int, Float[Tensor, " k"]]:
    """Of the k leading left singular vectors of W + ΔW those that are like none of W's: cosine below a bound with every one
    (intruder dimensions, Shuttleworth et al. 2024, arXiv:2410.21228); and each one's largest cosine.
    """
    before, _, _ = torch.linalg.svd(W.detach().double(), full_matrices=False)
    after = of_matrix(W.detach().double() + change.detach().double(), min(k, *W.shape))
    nearest = (before.mT @ after.U).abs().amax(0)
    return int((nearest < below).sum()), nearest
