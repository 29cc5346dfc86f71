"""Attention of a training pass, forward and backward: our backward and packed segments, against torch's sdpa.

    .venv/bin/python -m benchmarks attention

Queries, keys and values come as projections make them. A packed row has segments of lengths as instructions have them, a
median of 87 tokens; sdpa gets it whole with a mask of blocks, as transformers makes one (keys repeated where heads share them),
or segment by segment. The check is the error of output and gradients against fp64 beside that of sdpa, both summed.
"""

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Asked, Check, Row, apart, compared, timed
from deltalab.kernels.attention import by_segment, ours_is_faster
from deltalab.kernels.attention_blocks import Sight, attend

LENGTHS, TOKENS = (64, 128, 256, 512, 1024, 2048), 1024
BUDGETS = (1024, 2048, 4096)
HEADS, WIDTH = ((8, 8), (16, 4)), 64
"""Query and key-value heads, and the width of each."""
MEDIAN, SPREAD, MOST = 87, 0.7, 512
"""Of the lengths of segments: exp of a normal number, cut off."""
ROUNDS, AS_NEAR = 11, 1.15

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors(rows: int, length: int, heads: int, kv: int, dtype: str) -> tuple[Tensor, ...]:
    """q, k, v (rows, heads, length, d) over memory as (rows, length, heads, d), and a gradient like that."""
    torch.manual_seed(0)
    made = [torch.randn(rows, length, n, WIDTH).to(getattr(torch, dtype)) for n in (heads, kv, kv, heads)]
    return *(t.transpose(1, 2) for t in made[:3]), made[3]


def step(way: Way, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    given = [t.detach().requires_grad_() for t in (q, k, v)]
    y = way(*given)
    y.backward(g)  # type: ignore[no-untyped-call]
    return [y.detach(), *(t.grad for t in given if t.grad is not None)]


def sdpa(mask: Tensor | None = None) -> Way:
    """As transformers calls it: grouped heads where there is no mask, repeated ones where there is."""

    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if mask is not None and k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        shared = k.shape[1] != q.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
        return y.transpose(1, 2).contiguous()

    return way


def as_near(ours: Way, theirs: Way, given: tuple[Tensor, ...]) -> Check:
    """The sum of our errors against fp64 over the sum of theirs."""
    exact = step(theirs, *(t.double() for t in given))
    errors = [sum(apart(t, e) for t, e in zip(step(way, *given), exact, strict=True)) for way in (ours, theirs)]
    return Check("error of ours / sdpa", errors[0] / errors[1], AS_NEAR)


def segments(budget: int) -> list[int]:
    """Lengths that fill a row."""
    drawn, found = random.Random(0), [0]
    while sum(found) < budget:
        length = int(MEDIAN * drawn.lognormvariate(0, SPREAD)) + 1
        found.append(min(length, MOST, budget - sum(found)))
    return found[1:]


def whole(length: int, heads: int, kv: int, dtype: str, rounds: int) -> Row:
    """Rows of one length each."""
    given = tensors(max(1, TOKENS // length), length, heads, kv, dtype)
    ways: dict[str, Way] = {"sdpa": sdpa(), "ours": lambda q, k, v: attend(q, k, v, WIDTH**-0.5, Sight())}
    seconds = timed({name: lambda way=way: step(way, *given) for name, way in ways.items()}, rounds)  # type: ignore[misc]
    chosen = ours_is_faster(given[0].dtype, length)
    return compared(
        "causal attention", f"{length} tokens, {dtype}, {heads}/{kv} heads", seconds, "sdpa", "ours",
        checks=[as_near(ways["ours"], ways["sdpa"], given)], note="chosen" if chosen else "sdpa is chosen",
    )  # fmt: skip


def packed(budget: int, heads: int, kv: int, dtype: str, rounds: int) -> Iterator[Row]:
    """A row of segments; ours is what is chosen for the dtype."""
    lengths, given = segments(budget), tensors(1, budget, heads, kv, dtype)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = ((ids[:, None] == ids) & torch.ones(budget, budget).tril().bool())[None, None]
    each: Way = lambda q, k, v: by_segment(q, k, v, WIDTH**-0.5, lengths)  # noqa: E731
    blocks: Way = lambda q, k, v: attend(q, k, v, WIDTH**-0.5, Sight(), lengths)  # noqa: E731
    ways = {"block mask": sdpa(mask), "per segment": each, "our backward": blocks}
    seconds = timed({name: lambda way=way: step(way, *given) for name, way in ways.items()}, rounds)  # type: ignore[misc]
    mean = sum(n * n for n in lengths) / sum(lengths)
    chosen = "our backward" if ours_is_faster(given[0].dtype, mean) else "per segment"
    setting = f"{budget} tokens in {len(lengths)} segments, {dtype}, {heads}/{kv} heads"
    check = [as_near(ways[chosen], ways["block mask"], given)] if budget <= TOKENS else []
    yield compared("packed attention", setting, seconds, "block mask", chosen, checks=check, note="chosen")
    yield compared("packed attention", setting, seconds, "per segment", "our backward",
                   note="chosen" if chosen == "our backward" else "sdpa per segment is chosen")  # fmt: skip


def rows(asked: Asked) -> Iterator[Row]:
    """Whole rows of each length, then packed ones."""
    rounds = asked.turns(ROUNDS)
    for dtype in ("bfloat16", "float32"):
        for heads, kv in HEADS[: 1 if asked.quick else None]:
            for length in LENGTHS[: 2 if asked.quick else None]:
                if asked.wants("causal attention", f"{length} tokens, {dtype}, {heads}/{kv} heads"):
                    yield whole(length, heads, kv, dtype, rounds)
            for budget in BUDGETS[: 1 if asked.quick else None]:
                if asked.wants("packed attention", f"{budget} tokens, {dtype}, {heads}/{kv} heads"):
                    yield from packed(budget, heads, kv, dtype, rounds)
