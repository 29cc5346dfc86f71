"""How alike two sets of representations of the same inputs are."""

import torch
from torch import Tensor

from deltalab.core.shapes import Float


def linear_cka(X: Float[Tensor, "n p"], Y: Float[Tensor, "n q"]) -> float:
    """Linear centred kernel alignment, in [0, 1] (Kornblith et al. 2019, arXiv:1905.00414, eq. 3).

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of columns centred over the n inputs, formed as n × n where that is smaller. NaN where one of them
    does not vary.
    """
    X, Y = (t.detach().double() - t.detach().double().mean(0) for t in (X, Y))
    if len(X) < max(X.shape[1], Y.shape[1]):
        K, L = X @ X.mT, Y @ Y.mT
        return float((K * L).sum() / (K.norm() * L.norm()))
    return float((Y.mT @ X).square().sum() / ((X.mT @ X).norm() * (Y.mT @ Y).norm()))


def mean_cosine(X: Float[Tensor, "n p"], Y: Float[Tensor, "n p"]) -> float:
    """The mean over inputs of the cosine between their two representations; a zero one counts as 0."""
    return float(torch.nn.functional.cosine_similarity(X.detach().double(), Y.detach().double(), dim=1).mean())
