"""A training step of LoRA: peft's time over ours, ours over the limit, and what autograd keeps.

    .venv/bin/python -m benchmarks step [--only 'hidden 512, bf16']

Random Llamas of 4 layers (`sides.py`), 4 × 256 tokens, r 8: forward, backward, AdamW. The limit is the frozen base's forward and
the gradients of its activations, with torch's own operations and no adapter. The vocabulary of 2048 gives the head the share
of a step that it has in large models (4 to 8 % of the weights); rows with 32,000 show a head that weighs as much as the blocks.
Saved activations are counted through saved-tensor hooks, each storage once, without parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness import MOST, Asked, Check, Row, compared, exactly, timed
from benchmarks.sides import Case, Side, checks, limit, ours, theirs
from deltalab.core.errors import UserError, nearest
from deltalab.measure.activations import saved_bytes

ROUNDS, WARM_UP = 15, 2
BF16, FP32 = torch.bfloat16, torch.float32
FASTER = {
    ("S", BF16, 0.0): 1.40, ("L", BF16, 0.0): 1.25, ("S", BF16, 0.05): 1.50, ("L", BF16, 0.05): 1.35,
    ("S", FP32, 0.0): 1.12, ("L", FP32, 0.0): 1.12, ("S", FP32, 0.05): 1.20, ("L", FP32, 0.05): 1.20,
}  # fmt: skip
"""Size, dtype, dropout -> peft / ours at least, of all-linear."""
NEAR = {0.0: 1.03, 0.05: 1.10}
"""Dropout -> ours / limit at most."""
SAVED = 0.34


def cases() -> list[Case]:
    plain = [Case(size, dtype, dropout=p) for dtype in (BF16, FP32) for p in (0.0, 0.05) for size in ("S", "L")]
    few = [Case(size, dtype, "q,v") for dtype in (BF16, FP32) for size in ("S", "L")]
    heads = [Case(size, BF16, vocabulary=v, masked=m) for v, m in ((2048, 0.6), (32000, 0.0), (32000, 0.6)) for size in ("S", "L")]  # fmt: skip
    return [*plain, *few, *heads]


def rows(asked: Asked) -> Iterator[Row]:
    chosen = [case for case in cases() if asked.wants("LoRA step", str(case))]
    if asked.quick:
        chosen = [replace(chosen[0], tokens=32, sequences=2, layers=2)] if chosen else []
    for case in chosen:
        main = case.targets == "all-linear" and case.vocabulary == 2048 and not case.masked
        faster = FASTER[case.size, case.dtype, case.dropout] if main else None
        near = NEAR[case.dropout] if main else None
        yield from of_case("LoRA step", case, asked.turns(ROUNDS), faster, near, SAVED if main and case.dtype is BF16 else None)  # fmt: skip


def of_case(
    what: str, case: Case, rounds: int, faster: float | None, near: float | None, saved: float | None
) -> Iterator[Row]:
    """The three rows of a case: against peft, against the limit, and what is saved. near None: without the limit."""
    mine, other = ours(case), theirs(case)
    same = checks(case, mine, other)
    kept = {"ours": saved_bytes(mine.model, mine.loss) / 2**20, "peft": saved_bytes(other.model, other.loss) / 2**20}
    sides: dict[str, Side] = {"ours": mine, "peft": other}
    if not case.quantised:
        sides["limit"] = limit(case)
    seconds = timed({name: side.step for name, side in sides.items()}, rounds, WARM_UP)
    row = partial(compared, what, str(case), seconds)
    yield row("peft", "ours", target=faster, checks=same)
    if "limit" in sides:
        yield row("ours", "limit", target=near, direction=MOST)
    yield saved_row(what, case, kept, saved, same)


def saved_row(what: str, case: Case, kept: dict[str, float], target: float | None, same: list[Check]) -> Row:
    return Row(f"{what}, saved activations", str(case), "ours / peft", exactly(kept["ours"], kept["peft"]), kept, "MiB",
               target=target, direction=MOST, checks=same)  # fmt: skip


def side(name: str, only: str, known: Sequence[Case] | None = None, what: str = "LoRA step") -> Side:
    """One side of the first case that matches, for the profile.

    Raises: UserError if there is no such side, or no such case.
    """
    makes = {"ours": ours, "plain": partial(ours, kernels="plain"), "peft": theirs, "limit": limit}
    if name not in makes:
        raise UserError(f"there is no side {name!r}.", nearest=nearest(name, makes), next=f"one of: {', '.join(makes)}")
    found = [case for case in known or cases() if Asked(only=only).wants(what, str(case))]
    if not found:
        raise UserError(f"no case matches {only!r}.", found=f"{what}, {(known or cases())[0]} and others")
    return makes[name](found[0])
