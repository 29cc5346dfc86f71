"""The norm of DoRA's rows by algebra against peft's way, a product with a unit matrix: time and error.

    .venv/bin/python -m benchmarks dora_norm

One linear of 2048 × 2048, r 16; the error by norm against fp64. ‖W‖² is remembered, as in training.
"""

from collections.abc import Iterator

import torch
from torch import nn

import deltalab as dl
from benchmarks.harness import Asked, Check, Row, apart, compared, timed
from deltalab.deltas.adapt import attached

SIZE, R, ROUNDS = 2048, 16, 15


def rows(asked: Asked) -> Iterator[Row]:
    torch.manual_seed(0)
    size = 256 if asked.quick else SIZE
    model = dl.adapt(nn.Sequential(nn.Linear(size, size)), dl.DoRA(r=R, targets=["0"]))
    delta, W = attached(model)["0"], model[0].weight.detach()
    nn.init.normal_(delta.B, std=0.01)
    A, B, s = delta.A.detach(), delta.B.detach(), delta.s
    sides = {
        "algebra": lambda: delta.norm(W),
        "unit matrix": lambda: torch.linalg.norm(W + s * (torch.eye(size) @ A.T @ B.T).T, dim=1),
    }
    exact = (W.double() + s * B.double() @ A.double()).norm(dim=1)
    checks = [Check(name, apart(work(), exact), 1e-6) for name, work in sides.items()]
    seconds = timed(sides, asked.turns(ROUNDS))
    yield compared("DoRA's norm", f"{size} × {size}, r {R}, fp32", seconds, "unit matrix", "algebra", checks=checks)
