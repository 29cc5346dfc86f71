"""The norm of DoRA's rows by algebra against peft's way, a product with a unit matrix: time and error.

    .venv/bin/python benchmarks/dora_norm.py

One linear of 2048 × 2048, r 16, one thread, the two sides in turns; the median ratio of 15 rounds with quartiles, and
the relative error by norm against fp64. ‖W‖² is remembered, as in training.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import deltalab as dl
from deltalab.deltas.adapt import attached

SIZE, R, ROUNDS = 2048, 16, 15


def timed(work: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = dl.adapt(nn.Sequential(nn.Linear(SIZE, SIZE)), dl.DoRA(r=R, targets=["0"]))
    delta, W = attached(model)["0"], model[0].weight.detach()
    nn.init.normal_(delta.B, std=0.01)
    A, B, s = delta.A.detach(), delta.B.detach(), delta.s
    sides = {
        "algebra": lambda: delta.norm(W),
        "unit matrix": lambda: torch.linalg.norm(W + s * (torch.eye(SIZE) @ A.T @ B.T).T, dim=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 2):
        for name, work in sides.items():
            spent = timed(work)
            if turn >= 2:
                seconds[name].append(spent)
    ratios = [theirs / mine for mine, theirs in zip(seconds["algebra"], seconds["unit matrix"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    exact = (W.double() + s * B.double() @ A.double()).norm(dim=1)
    error = float((delta.norm(W).double() - exact).norm() / exact.norm())
    print(f"unit matrix / algebra: {middle:.0f} [{low:.0f}, {high:.0f}] times; error {error:.1g}")
