"""Spectra against dense SVDs, ranks by hand, representations against the kernels' definition."""

import math

import pytest
import torch

from deltalab.measure import spectrum
from deltalab.measure.similarity import linear_cka, mean_cosine
from tests.helpers import assert_close_by_norm


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("out", "in_", "r"), [(30, 20, 4), (20, 30, 1), (16, 16, 16), (5, 40, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_small_matrix_has_the_spectrum_of_the_large_one(out, in_, r, dtype):
    A, B, s = random(r, in_, dtype=dtype), random(out, r, dtype=dtype, seed=1), -1.7
    found = spectrum.of_factors(A, B, s)
    change = s * B.double() @ A.double()
    n = min(out, in_, r)
    assert_close_by_norm(found.S[:n], torch.linalg.svdvals(change)[:n], 1e-12)
    assert_close_by_norm(found.U @ torch.diag(found.S) @ found.V.mT, change, 1e-12)
    assert_close_by_norm(found.U.mT @ found.U, torch.eye(found.U.shape[1], dtype=torch.float64), 1e-12)


def test_a_rank_that_is_not_used():
    A, B = random(4, 20), random(30, 4, seed=1)
    B[:, 2:] = 0
    found = spectrum.of_factors(A, B)
    assert (found.S[2:] < 1e-12 * found.S[0]).all()
    assert spectrum.effective_rank(found.S) <= 2 + 1e-9
    assert spectrum.energy_rank(found.S, 1.0) == 2


def decaying(out, in_, decay):
    U, V = torch.linalg.qr(random(out, in_)).Q, torch.linalg.qr(random(in_, in_, seed=1)).Q
    S = torch.arange(1, in_ + 1, dtype=torch.float64) ** -decay
    return U @ torch.diag(S) @ V.mT, S


@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
def test_a_full_change_and_its_error(decay):
    W, S = decaying(120, 80, decay)
    found = spectrum.of_matrix(W, 8)
    assert found.error == pytest.approx(float(S[8:].norm()), rel=1e-3)
    assert ((S[:8] - found.S) >= -1e-12).all()
    assert ((S[:8] - found.S) <= found.error).all()
    assert_close_by_norm(found.S, S[:8], 1e-5 if decay >= 1 else 2e-2)
    assert_close_by_norm(W - found.U @ torch.diag(found.S) @ found.V.mT, W - spectrum.of_matrix(W, None).U[:, :8] @ torch.diag(S[:8]) @ spectrum.of_matrix(W, None).V[:, :8].mT, 1e-3 if decay >= 1 else 0.2)  # fmt: skip
    again = spectrum.of_matrix(W, 8)
    assert torch.equal(found.S, again.S)


def test_all_of_it_is_exact():
    W, S = decaying(40, 30, 1.0)
    assert_close_by_norm(spectrum.of_matrix(W).S, S, 1e-12)
    assert spectrum.of_matrix(W).error == 0
    few = spectrum.of_matrix(W, 25)
    assert_close_by_norm(few.S, S[:25], 1e-12)
    assert few.error == pytest.approx(float(S[25:].norm()))


@pytest.mark.parametrize(
    ("S", "effective", "stable", "energy"),
    [
        ([1, 1, 1, 1], 4, 4, 4),
        ([5], 1, 1, 1),
        ([3, 0, 0], 1, 1, 1),
        ([3, 1], math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), 10 / 9, 1),
        ([2, 1, 1], math.exp(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))), 6 / 4, 3),
        ([0, 0], 0, 0, 0),
    ],
)
def test_ranks_by_hand(S, effective, stable, energy):
    S = torch.tensor(S, dtype=torch.float64)
    assert spectrum.effective_rank(S) == pytest.approx(effective)
    assert spectrum.stable_rank(S) == pytest.approx(stable)
    assert spectrum.energy_rank(S) == energy


def test_overlap_of_subspaces():
    U = torch.linalg.qr(random(50, 50)).Q
    assert spectrum.overlap(U[:, :4], U[:, :8]) == pytest.approx(1)
    assert spectrum.overlap(U[:, :4], U[:, 4:8]) == pytest.approx(0, abs=1e-12)
    assert spectrum.overlap(U[:, :4], U[:, 2:6]) == pytest.approx(0.5)
    mixed = U[:, :4] @ torch.linalg.qr(random(4, 4, seed=2)).Q
    assert spectrum.overlap(U[:, :4], mixed) == pytest.approx(1)
    drawn = [spectrum.overlap(U[:, :3], torch.linalg.qr(random(50, 7, seed=i)).Q) for i in range(300)]
    assert sum(drawn) / 300 == pytest.approx(spectrum.by_chance(50, 3, 7), rel=0.05)


def test_intruders_are_directions_that_were_not_there():
    W, S = decaying(60, 40, 0.5)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    assert spectrum.intruders(W, 0.1 * W)[0] == 0
    new = torch.linalg.qr(torch.cat([U, random(60, 1, seed=5)], 1)).Q[:, -1:]  # at right angles to all of W's
    loud = 3 * S[0] * new @ Vh[-1:]
    count, cosines = spectrum.intruders(W, loud)
    assert count == 1
    assert float(cosines[0]) < 0.2
    assert float(cosines[1:].min()) > 0.9
    assert spectrum.intruders(W, loud / 1000)[0] == 0


def hsic_cka(X, Y):
    """By the definition: centred Gram matrices and their inner product."""
    n = len(X)
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    K, L = H @ X @ X.mT @ H, H @ Y @ Y.mT @ H
    return float(torch.trace(K @ L) / (torch.trace(K @ K) * torch.trace(L @ L)).sqrt())


@pytest.mark.parametrize(("n", "p", "q"), [(50, 8, 12), (10, 30, 20), (20, 5, 40)])
def test_cka_is_its_definition(n, p, q):
    X, Y = random(n, p), random(n, q, seed=1)
    Y[:, : min(p, q)] += X[:, : min(p, q)]
    assert linear_cka(X, Y) == pytest.approx(hsic_cka(X, Y), rel=1e-10)
    assert linear_cka(X, X) == pytest.approx(1)
    rotated = 3 * X @ torch.linalg.qr(random(p, p, seed=2)).Q + 5
    assert linear_cka(X, rotated) == pytest.approx(1)  # neither turning nor scaling nor moving counts
    assert math.isnan(linear_cka(X, torch.ones(n, q)))


def test_cosine_is_the_mean_over_inputs():
    X = torch.tensor([[1.0, 0], [0, 2], [0, 0]])
    Y = torch.tensor([[3.0, 0], [1, 1], [1, 0]])
    assert mean_cosine(X, Y) == pytest.approx((1 + 2**-0.5 + 0) / 3)
