"""A mixture of LoRA experts, two ways: every expert on every token with gates that are mostly zero, or each on its own tokens.

    .venv/bin/python benchmarks/mixture.py

Prints a step (forward and backward) of the delta alone, for a square linear: the median of each way's time and of their
ratio over rounds that take turns, with quartiles.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deltalab.deltas.lora_experts import mixture

CASES = [
    (512, 1024, 4, 2, 4),
    (512, 1024, 8, 2, 8),
    (512, 1024, 8, 2, 64),
    (512, 1024, 64, 2, 8),
    (512, 2048, 8, 2, 16),
]
"""Tokens, width, experts, top_k, r."""


def sorted_by_expert(x: Tensor, gates: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The same, each expert on the tokens that it was sent."""
    y = x.new_zeros(len(x), len(B))
    for e in range(len(A)):
        tokens = gates[:, e].detach().nonzero()[:, 0]
        low = x[tokens] @ A[e].T * gates[tokens, e, None]
        y = y.index_add(0, tokens, low @ B[:, e].T)
    return y


def step(way: Callable[..., Tensor], leaves: list[Tensor]) -> float:
    began = time.perf_counter()
    torch.autograd.grad(way(*leaves).sum(), leaves)
    return time.perf_counter() - began


def main(rounds: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for tokens, width, experts, k, r in CASES:
        x, A, B = torch.randn(tokens, width), torch.randn(experts, r, width), torch.randn(width, experts, r)
        top, chosen = torch.randn(tokens, experts).softmax(-1).topk(k)
        gates = torch.zeros(tokens, experts).scatter(1, chosen, top)
        leaves = [t.requires_grad_() for t in (x, gates, A, B)]
        got, want = mixture(*leaves), sorted_by_expert(*leaves)
        assert (got - want).norm() <= 1e-5 * want.norm()
        times = [[step(way, leaves) for way in (mixture, sorted_by_expert)] for _ in range(rounds)]
        gated, by_expert = (statistics.median(column) for column in zip(*times, strict=True))
        low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
        print(f"{tokens} tokens, width {width}, {k} of {experts} experts of rank {r}: gated {1000 * gated:.1f} ms, "
              f"sorted {1000 * by_expert:.1f} ms, ratio {middle:.2f} [{low:.2f}, {high:.2f}]")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
