"""NF4 beside bitsandbytes and beside plain linears: quantising, dequantising, and a linear's forward and backward.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/nf4.py
    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/nf4.py

On the CPU, blocks of 64, scales nested. The sides of a row take turns in one process; of each the median time, and the median of the
ratios to the first side within a round, with quartiles. `torch alone` is what runs where bitsandbytes is not installed.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from deltalab.quant import nf4
from deltalab.quant.nf4_linear import NF4Linear

ROUNDS, WARM_UP, TOKENS = 11, 2, 1024
SHAPES = ((4096, 4096), (1024, 4096))
DTYPES = (torch.float32, torch.bfloat16)
Sides = dict[str, Callable[[], Any]]


def alone(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same without bitsandbytes' kernel."""

    def run() -> Any:
        with mock.patch.object(nf4, "_kernel", return_value=None):
            return work()

    return run


def quantising(shape: tuple[int, int], dtype: torch.dtype) -> Sides:
    W = torch.randn(shape).to(dtype)
    return {
        "deltalab": lambda: nf4.quantise(W),
        "bitsandbytes": lambda: bnb.functional.quantize_4bit(W, compress_statistics=True, quant_type="nf4"),
    }


def dequantising(shape: tuple[int, int], dtype: torch.dtype) -> Sides:
    W = torch.randn(shape).to(dtype)
    kept = nf4.quantise(W)
    codes, state = bnb.functional.quantize_4bit(W, compress_statistics=True, quant_type="nf4")
    return {
        "deltalab": lambda: kept.weight(dtype),
        "torch alone": alone(lambda: kept.weight(dtype)),
        "bitsandbytes": lambda: bnb.functional.dequantize_4bit(codes, state),
        "copying it": W.clone,
    }


def steps(shape: tuple[int, int], dtype: torch.dtype, tokens: int = TOKENS) -> Sides:
    """Forward and backward to the input, which is all that a frozen linear does in a training step."""
    out, in_ = shape
    dense = nn.Linear(in_, out, bias=False, dtype=dtype).requires_grad_(False)
    four = bnb.nn.Linear4bit(in_, out, bias=False, quant_type="nf4", compute_dtype=dtype)
    four.load_state_dict(dense.state_dict())
    own = NF4Linear(nf4.quantise(dense.weight), None, dtype)
    x, g = torch.randn(tokens, in_, dtype=dtype, requires_grad=True), torch.randn(tokens, out, dtype=dtype)

    def step(linear: nn.Module) -> Tensor:
        return torch.autograd.grad(linear(x), x, g)[0]

    theirs = four.to("cpu").train()
    return {
        "deltalab": lambda: step(own),
        "torch alone": alone(lambda: step(own)),
        "bitsandbytes": lambda: step(theirs),
        "a dense linear": lambda: step(dense),
    }


def decoding(shape: tuple[int, int], dtype: torch.dtype) -> Sides:
    """The forward of one token; bitsandbytes' kernel for it computes in bf16, whatever the dtype."""
    out, in_ = shape
    dense = nn.Linear(in_, out, bias=False, dtype=dtype).requires_grad_(False)
    four = bnb.nn.Linear4bit(in_, out, bias=False, quant_type="nf4", compute_dtype=dtype)
    four.load_state_dict(dense.state_dict())
    own, theirs = NF4Linear(nf4.quantise(dense.weight), None, dtype), four.to("cpu").eval()
    x = torch.randn(1, in_, dtype=dtype)
    return {
        "deltalab": lambda: own(x),
        "torch alone": alone(lambda: own(x)),
        "bitsandbytes": lambda: theirs(x),
        "a dense linear": lambda: dense(x),
    }


def rows() -> Iterator[tuple[str, Sides]]:
    for name, make in (("quantise", quantising), ("dequantise", dequantising), ("one token", decoding)):
        for shape in SHAPES:
            for dtype in DTYPES:
                yield f"{name}, {shape[0]} × {shape[1]}, {str(dtype)[6:]}", make(shape, dtype)
    for dtype in DTYPES:
        yield f"{TOKENS} tokens forward and backward, 4096 × 4096, {str(dtype)[6:]}", steps(SHAPES[0], dtype)


def measured(sides: Sides) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + WARM_UP):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads")
    for row, sides in rows():
        print(row)
        found = measured(sides)
        first = next(iter(found.values()))
        for name, times in found.items():
            ratios = [theirs / ours for theirs, ours in zip(times, first, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"  {name:<16} {1e3 * statistics.median(times):8.1f} ms   {middle:6.2f} [{low:.2f}, {high:.2f}] times"
            )
