"""Muon in fp32: momentum whose matrix is replaced by (nearly) the orthogonal one closest to it.

    M ← μ M + G        W ← W − η · 0.2 √max(m, n) · NS₅(G + μ M)        (Jordan et al. 2024)

NS₅ is five Newton–Schulz steps X ← a X + (b A + c A²) X, A = X Xᵀ. The factor 0.2 √max(m, n) gives updates the
size that AdamW's have, so both share one rate (Liu et al. 2025, arXiv:2502.16982). `torch.optim.Muon` iterates in
bf16, which is slow on a CPU; matrices of one shape are stacked here.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

CHUNK = 4
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(g: Tensor, steps: int = 5) -> Tensor:
    """[k, m, n] stacked matrices, each near its closest (semi-)orthogonal one."""
    a, b, c = COEFFICIENTS
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """For matrices alone; embeddings and norms belong to AdamW."""

    def __init__(self, params, lr: float = 2e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pool = ThreadPoolExecutor(2)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                shapes[p.shape].append(p)
            chunks = [stack[i : i + CHUNK] for stack in shapes.values() for i in range(0, len(stack), CHUNK)]
            list(self.pool.map(partial(self._update, group), chunks))

    @torch.no_grad()
    def _update(self, group: dict, stacked: list[Tensor]) -> None:
        momenta = [self.state[p]["momentum"].mul_(group["momentum"]).add_(p.grad) for p in stacked]
        ahead = torch.stack([p.grad + group["momentum"] * m for p, m in zip(stacked, momenta, strict=True)])
        size = group["lr"] * 0.2 * max(stacked[0].shape) ** 0.5
        for p, update in zip(stacked, orthogonalised(ahead), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)
