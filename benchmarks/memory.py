"""Peak resident memory of training steps, above the model: ours beside peft's and the limit's, each in a process of its own.

    .venv/bin/python -m benchmarks memory

Hidden 1024, LoRA r 8 on every linear of the blocks, 4 × 512 tokens, a vocabulary of 32,000: peft takes more than 1 GiB above what
there is once the model is loaded and adapted, so that what the allocator keeps does not matter. Two steps are taken, so
gradients and moments are in it. Medians over several processes.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace

from benchmarks import sides
from benchmarks.harness import MOST, Asked, Row, in_child, peak_above, ratio
from benchmarks.sides import Case
from benchmarks.step import BF16, FP32

PROCESSES, LESS, GIB = 3, 0.45, 2**30


def cases() -> list[Case]:
    plain = [Case("L", dtype, vocabulary=32000, tokens=512, masked=m) for dtype in (BF16, FP32) for m in (0.0, 0.6)]
    return [
        *plain,
        replace(plain[0], dropout=0.05),
        replace(plain[0], method="dora"),
        replace(plain[0], quantised=True),
    ]


def peak(which: int, side: str, quick: bool) -> int:
    """Bytes of one side of one case, of this process."""
    case = of(which, quick)
    made = {"ours": sides.ours, "peft": sides.theirs, "limit": sides.limit}[side](case)

    def work() -> None:
        for _ in range(2):
            made.step()

    return peak_above(work)


def of(which: int, quick: bool) -> Case:
    case = cases()[which]
    return replace(case, size="S", tokens=32, layers=1, vocabulary=2048) if quick else case


def rows(asked: Asked) -> Iterator[Row]:
    for which, case in enumerate(cases()[:1] if asked.quick else cases()):
        method = f"{'Q' * case.quantised}{'DoRA' if case.method == 'dora' else 'LoRA'}"
        if not asked.wants("peak memory", method, str(case)):
            continue
        names = ["ours", "peft"] if case.quantised else ["ours", "peft", "limit"]
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(asked.turns(PROCESSES, quick=1)):
            for name in names:
                found[name].append(in_child(peak, which, name, asked.quick, threads=asked.threads) / GIB)
        medians = {name: statistics.median(taken) for name, taken in found.items()}
        # the same mathematics is shown by the rows of `step`, `dora` and `qlora`; here the losses of a small twin are
        small = replace(of(which, True), tokens=64)
        yield Row(f"{method}, peak memory above the model", str(of(which, asked.quick)), "ours / peft",
                  ratio(found["ours"], found["peft"]), medians, "GiB", target=LESS, direction=MOST,
                  checks=sides.checks(small))  # fmt: skip
