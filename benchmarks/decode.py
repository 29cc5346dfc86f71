"""Decoding: few tokens through quantised linears beside dense ones, and zero-init prompts beside the base.

    .venv/bin/python -m benchmarks decode

Quantised linears of 4096 × 4096 without a gradient: ours, all of Ŵ made first (`whole`), bitsandbytes' linear in NF4 (its
evaluation kernel computes in bf16 whatever the dtype, with scales rounded to bf16, from a second layout of the codes), and a
dense linear of the same dtype, which is the limit without a kernel of its own for codes. Each row's `apart` is the distance to
the product with Ŵ in fp64. The prompts: a random Llama (4 layers), one token in a pass, with their keys and values kept,
made anew in each pass, and without prompts.
"""

from collections.abc import Callable, Iterator
from unittest import mock

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

import deltalab as dl
from benchmarks.bank import SIZES, base
from benchmarks.harness import LEAST, MOST, Asked, Check, Row, apart, compared, timed
from deltalab.deltas import attention
from deltalab.quant import strips
from deltalab.quant.linear import quantiser

ROUNDS, SIDE = 31, 4096
WAYS = ("nf4", "int4-group", "int8")
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = (1, 8, 64)


@torch.no_grad()
def linears(way: str, dtype: torch.dtype, tokens: int, rounds: int) -> Iterator[Row]:
    """One way to quantise, in one dtype."""
    torch.manual_seed(0)
    dense = nn.Linear(SIDE, SIDE, bias=False, dtype=dtype).requires_grad_(False)
    own = quantiser(way).linear(dense.weight, None, dtype)
    x = torch.randn(tokens, SIDE, dtype=dtype)

    def whole() -> Tensor:
        with mock.patch.object(strips, "applies", return_value=False):
            return own(x)

    sides: dict[str, Callable[[], Tensor]] = {"ours": lambda: own(x), "whole": whole, "dense": lambda: dense(x)}
    if way == "nf4":
        four = bnb.nn.Linear4bit(SIDE, SIDE, bias=False, quant_type="nf4", compute_dtype=dtype)
        four.load_state_dict(dense.state_dict())
        theirs = four.to("cpu").eval()
        sides["bitsandbytes"] = lambda: theirs(x)
    want = x.double() @ own.kept().weight(torch.float32).double().mT
    most = 8 * torch.finfo(dtype).eps
    bounds = {"ours": most, "whole": most, "bitsandbytes": 2e-2}
    found = {name: Check(name, apart(sides[name](), want), bound) for name, bound in bounds.items() if name in sides}
    seconds = timed(sides, rounds)
    setting = f"{way}, {tokens} tokens, {SIDE} × {SIDE}, {str(dtype)[6:]}"
    for above, below in (("ours", "dense"), ("whole", "ours"), *((("bitsandbytes", "ours"),) if way == "nf4" else ())):
        checks = [found[name] for name in (above, below) if name in found]
        yield compared("quantised linear, inference", setting, seconds, above, below, checks=checks,
                       direction=MOST if below == "dense" else LEAST)  # fmt: skip


@torch.no_grad()
def prompts(size: str, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """One token in a pass."""
    plain, adapted = base(size, dtype), dl.adapt(base(size, dtype), dl.ZeroInitPrefix(length=10))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter += 0.1
    ids = torch.randint(5, 2048, (1, 1), generator=torch.Generator().manual_seed(0))

    def anew() -> Tensor:
        with mock.patch.object(attention, "kept", lambda module, prompt, call, make: make()):
            return adapted(input_ids=ids).logits

    sides: dict[str, Callable[[], Tensor]] = {
        "kept": lambda: adapted(input_ids=ids).logits,
        "anew": anew,
        "base": lambda: plain(input_ids=ids).logits,
    }
    check = Check("logits", apart(sides["kept"](), sides["anew"]()), 0.0)
    seconds = timed(sides, rounds)
    for above, below in (("kept", "base"), ("anew", "base"), ("anew", "kept")):
        yield compared("zero-init prompts, one token", f"{size} {str(dtype)[6:]}, 10 prompts a layer", seconds, above, below,
                       checks=[check], direction=MOST if below == "base" else LEAST)  # fmt: skip


def rows(asked: Asked) -> Iterator[Row]:
    for way in WAYS[:1] if asked.quick else WAYS:
        for dtype in DTYPES:
            for tokens in TOKENS[:1] if asked.quick else TOKENS:
                if asked.wants("quantised linear", f"{way}, {tokens} tokens, {str(dtype)[6:]}"):
                    yield from linears(way, dtype, tokens, asked.turns(ROUNDS))
    for size in ("S",) if asked.quick else SIZES:
        for dtype in DTYPES:
            if asked.wants("zero-init prompts", f"{size} {str(dtype)[6:]}"):
                yield from prompts(size, dtype, asked.turns(ROUNDS))
