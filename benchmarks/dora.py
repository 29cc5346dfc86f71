"""A training step of DoRA: peft's time over ours, ours over the frozen base's, and what autograd keeps.

    .venv/bin/python -m benchmarks dora

The models and sizes of `step`, with DoRA r 8 on every linear of the blocks. With dropout both sides take a second product with the
base's weight, as in the authors' code.
"""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.harness import Asked, Row
from benchmarks.sides import Case, Side
from benchmarks.step import BF16, FP32, ROUNDS, of_case
from benchmarks.step import side as side_of

FASTER = {FP32: 1.20, BF16: 1.33}
"""dtype -> peft / ours at least, without dropout."""


def cases() -> list[Case]:
    return [Case(size, dtype, method="dora", dropout=p) for p in (0.0, 0.05) for dtype in (FP32, BF16) for size in ("S", "L")]  # fmt: skip


def rows(asked: Asked) -> Iterator[Row]:
    chosen = [case for case in cases() if asked.wants("DoRA step", str(case))]
    if asked.quick:
        chosen = [replace(chosen[0], tokens=32, sequences=2, layers=2)] if chosen else []
    for case in chosen:
        faster = None if case.dropout else FASTER[case.dtype]
        yield from of_case("DoRA step", case, asked.turns(ROUNDS), faster, None, None)


def side(name: str, only: str) -> Side:
    """One side of the first case that matches, for the profile."""
    return side_of(name, only, cases(), "DoRA step")
