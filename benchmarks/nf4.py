"""NF4 beside bitsandbytes and beside plain linears: quantising, dequantising, and a linear's forward and backward.

    .venv/bin/python -m benchmarks nf4

On the CPU, blocks of 64, scales nested. Ratios are each side's time over ours. `torch alone` is what runs where bitsandbytes is not installed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from benchmarks.harness import Asked, Check, Row, apart, compared, timed
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
    """The forward of one token, without a gradient; bitsandbytes' kernel for it computes in bf16, whatever the dtype."""
    out, in_ = shape
    dense = nn.Linear(in_, out, bias=False, dtype=dtype).requires_grad_(False)
    four = bnb.nn.Linear4bit(in_, out, bias=False, quant_type="nf4", compute_dtype=dtype)
    four.load_state_dict(dense.state_dict())
    own, theirs = NF4Linear(nf4.quantise(dense.weight), None, dtype), four.to("cpu").eval()
    x = torch.randn(1, in_, dtype=dtype)
    return {
        "deltalab": torch.no_grad()(lambda: own(x)),
        "torch alone": torch.no_grad()(alone(lambda: own(x))),
        "bitsandbytes": torch.no_grad()(lambda: theirs(x)),
        "a dense linear": torch.no_grad()(lambda: dense(x)),
    }


def cases(quick: bool) -> Iterator[tuple[str, str, Callable[[], Sides]]]:
    """What, setting, and what makes the sides."""
    for name, make in (("quantise", quantising), ("dequantise", dequantising), ("one token", decoding)):
        for shape in SHAPES[1:] if quick else SHAPES:
            for dtype in DTYPES:
                yield f"NF4 {name}", f"{shape[0]} × {shape[1]}, {str(dtype)[6:]}", partial(make, shape, dtype)
    for dtype in DTYPES:
        shape, tokens = (SHAPES[1], 64) if quick else (SHAPES[0], TOKENS)
        setting = f"{tokens} tokens, {shape[0]} × {shape[1]}, {str(dtype)[6:]}"
        yield "NF4 linear, forward and backward", setting, partial(steps, shape, dtype, tokens)


def checked(what: str, sides: Sides) -> Callable[[str], list[Check]]:
    """How far a side's result is from ours: codes bit for bit, weights and products within the dtype's rounding."""
    results = {name: work() for name, work in sides.items()}

    def check(name: str) -> list[Check]:
        ours, theirs = results["deltalab"], results[name]
        if what == "NF4 quantise":
            return [Check("codes", float((ours.codes.flatten() != theirs[0].flatten()).sum()), 0)]
        if name in ("a dense linear", "copying it"):
            return []  # the limit: it computes with other weights
        rounding = 2 * torch.finfo(ours.dtype).eps
        # bitsandbytes' product of one token is in bf16, whatever the dtype
        most = 1e-2 if what == "NF4 one token" else rounding
        return [Check("result", apart(theirs, ours), most)]

    return check


def rows(asked: Asked) -> Iterator[Row]:
    torch.manual_seed(0)
    for what, setting, make in cases(asked.quick):
        if not asked.wants(what, setting):
            continue
        sides = make()
        check = checked(what, sides)
        seconds = timed(sides, asked.turns(ROUNDS), WARM_UP)
        for name in list(sides)[1:]:
            yield compared(what, setting, seconds, name, "deltalab", checks=check(name))
