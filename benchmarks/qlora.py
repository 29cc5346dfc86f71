"""A training step of LoRA on a base in NF4: peft over bitsandbytes' linears beside ours, and what autograd keeps.

    .venv/bin/python -m benchmarks qlora

The models and sizes of `step` with every linear of the blocks in NF4, blocks of 64, scales nested; both sides have the same codes.
fp64 has the weights that the codes stand for.
"""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.harness import Asked, Row
from benchmarks.sides import Case, Side
from benchmarks.step import BF16, FP32, ROUNDS, of_case
from benchmarks.step import side as side_of

FASTER = 1.15


def cases() -> list[Case]:
    return [Case(size, dtype, quantised=True, dropout=p) for dtype, p in ((BF16, 0.0), (FP32, 0.0), (BF16, 0.05)) for size in ("S", "L")]  # fmt: skip


def rows(asked: Asked) -> Iterator[Row]:
    chosen = [case for case in cases() if asked.wants("QLoRA step", str(case))]
    if asked.quick:
        chosen = [replace(chosen[0], tokens=32, sequences=2, layers=2)] if chosen else []
    for case in chosen:
        yield from of_case("QLoRA step", case, asked.turns(ROUNDS), FASTER, None, None)


def side(name: str, only: str) -> Side:
    """One side of the first case that matches, for the profile."""
    return side_of(name, only, cases(), "QLoRA step")
