"""Where a low-rank change may start: A and B from the weight or from what flows into it, as functions of tensors.

Each gives A (..., r, in) and B (..., out, r), of a W (..., out, in), for a change s · B A. Leading dimensions are
experts, each on its own. What a start means for the model is in `deltalab.deltas.lora`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deltalab.core.shapes import Float


class Pair(NamedTuple):
    """A (..., r, in) and B (..., out, r)."""

    A: Tensor
    B: Tensor


def gaussian(A: Tensor, B: Tensor, generator: torch.Generator) -> Pair:
    """A normal with deviation 1/r, B zero; shapes are those of the arguments."""
    return Pair(normal(A, generator) / A.shape[-2], torch.zeros_like(B))


def orthogonal(A: Tensor, B: Tensor, generator: torch.Generator) -> Pair:
    """Neither A nor B is zero, and BA is: B = X Q₁, A = Q₂ᵀ Y with X, Y normal / 10 and Q₁ Q₂ᵀ = 0.

    Q₁ and Q₂ are the halves of the rows of a random orthogonal r × r matrix, so r is even. A gradient reaches both
    factors from the first step. In floating point BA is zero up to rounding.
    """
    r = A.shape[-2]
    rows = torch.linalg.qr(normal(A.new_empty(*A.shape[:-2], r, r), generator)).Q
    X = normal(B.new_empty(*B.shape[:-1], r // 2), generator) / 10
    Y = normal(A.new_empty(*A.shape[:-2], r // 2, A.shape[-1]), generator) / 10
    return Pair(rows[..., 0::2, :].mT @ Y, X @ rows[..., 1::2, :])


def pissa(W: Float[Tensor, "*e out in"], r: int, s: float) -> Pair:
    """The principal part of W: s B A is its best approximation of rank r, W = U diag(σ) Vᵀ,

        B = U_r diag(√(σ_r / s)),   A = diag(√(σ_r / s)) V_rᵀ      (Meng et al. 2024, arXiv:2404.02948, eq. 2–3)
    """  # fmt: skip
    return _split(torch.linalg.svd(W, full_matrices=False), r, s)


def pissa_fast(W: Float[Tensor, "*e out in"], r: int, s: float, sketch: Float[Tensor, "*e r in"], steps: int) -> Pair:
    """`pissa` by subspace iteration (Halko et al. 2011, arXiv:0909.4061, alg. 4.4) that begins at a random `sketch`."""
    Q = torch.linalg.qr(W @ sketch.mT).Q
    for _ in range(steps):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, V = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return _split((Q @ U, S, V), r, s)


def olora(W: Float[Tensor, "*e out in"], r: int) -> Pair:
    """An orthonormal basis of the first r columns of W: W = Q R, B = Q_r, A = R_r.

    Büyükakyüz 2024, arXiv:2406.01775, alg. 1.
    """
    Q, R = torch.linalg.qr(W)
    return Pair(R[..., :r, :].contiguous(), Q[..., :, :r].contiguous())


def loftq(
    W: Float[Tensor, "*e out in"], r: int, s: float, round_trip: Callable[[Tensor], Tensor], steps: int = 1
) -> tuple[Pair, Float[Tensor, "*e out in"]]:
    """A and B that make up for quantising W, and the weight to quantise (Li et al. 2023, arXiv:2310.08659, alg. 1):

        Q = round_trip(W − s B A),   s B A = the best approximation of rank r of W − Q,   `steps` times from BA = 0

    round_trip: W -> what the quantiser makes of it. With one step the weight to quantise is W itself.
    """
    rest = W
    pair = Pair(W[..., :0, :], W[..., :, :0])
    for step in range(steps):
        rest = W - s * pair.B @ pair.A if step else W
        pair = pissa(W - round_trip(rest), r, s)
    return pair, rest


def eva(scatter: Float[Tensor, "in in"], r: int) -> Float[Tensor, "r in"]:
    """A: the r directions in which the inputs vary most, orthonormal, the first the largest; B is zero.

    They are the top right singular vectors of the centred inputs (Paischer et al. 2024, arXiv:2410.07170, eq. 3–4),
    here as the eigenvectors of their scatter.
    """
    return torch.linalg.eigh(scatter).eigenvectors[:, -r:].flip(-1).mT.contiguous()


def explained(scatter: Float[Tensor, "in in"]) -> Float[Tensor, " in"]:
    """The share of the inputs' variance in each of the directions of `eva`, the largest first."""
    variances = torch.linalg.eigvalsh(scatter).flip(0)
    return variances / variances.sum()


def _split(svd: tuple[Tensor, Tensor, Tensor], r: int, s: float) -> Pair:
    """The first r singular triples as s · B A, the singular values shared evenly."""
    U, S, V = svd
    root = (S[..., :r] / s).sqrt()
    return Pair(root.unsqueeze(-1) * V[..., :r, :], U[..., :, :r] * root.unsqueeze(-2))


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal, drawn on the CPU: the same on every device."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
