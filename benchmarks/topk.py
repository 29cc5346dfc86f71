"""The largest of many scores, exactly: np.partition's time over ours, over all matrices and in each row.

    .venv/bin/python -m benchmarks topk

100 million scores, fp32, that lie as SNIP's do (the absolute product of two normal numbers), in 40 matrices that are views of one
array. np.partition gets this array whole, finds the k-th largest and compares with it; of its equals the last ones are taken
out again. Ours goes through the matrices, one after the other. `tied`: rounded to bf16, so that hundreds of thousands are equal at
the threshold. Each mask is compared, bit by bit, with that of a stable sort (of np.partition, beyond 10 million).
Peak memory is that of one selection in a process of its own, its masks included.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import MOST, Asked, Check, Row, compared, exactly, in_child, peak_above, timed
from deltalab.safety.topk import rounded, top_of_all, top_of_rows

ENTRIES, MATRICES, QUICK = 100_000_000, 40, 2_000_000
ROUNDS, WARM_UP, FASTER = 7, 1, 2.0
SHARES = (0.01, 0.05, 0.5)
SORTED = 10_000_000
"""The most entries that are sorted to check a mask."""

Mask = NDArray[np.bool_]


def scores(entries: int, tied: bool) -> NDArray[np.float32]:
    """The same each time."""
    draw = np.random.default_rng(0)
    found = np.abs(draw.standard_normal(entries, np.float32) * draw.standard_normal(entries, np.float32))
    return torch.from_numpy(found).bfloat16().float().numpy() if tied else found


def matrices(flat: NDArray[np.float32]) -> dict[str, torch.Tensor]:
    return {str(i): torch.from_numpy(part).view(500, -1) for i, part in enumerate(np.split(flat, MATRICES))}


def theirs(flat: NDArray[np.float32], share: float) -> Mask:
    first = len(flat) - rounded(share * len(flat))
    least = np.partition(flat, first)[first]
    mask = flat >= least
    over = int(np.count_nonzero(mask)) - (len(flat) - first)
    if over:
        mask[np.flatnonzero(flat == least)[-over:]] = False
    return mask


def ours(parts: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    return dict(top_of_all(parts, share))


def joined(masks: dict[str, torch.Tensor]) -> Mask:
    return np.concatenate([mask.numpy().ravel() for mask in masks.values()])


def sorted_head(flat: NDArray[np.float32], k: int) -> Mask:
    mask = np.zeros(len(flat), dtype=bool)
    mask[np.argsort(-flat, kind="stable")[:k]] = True
    return mask


def differ(a: Mask, b: Mask) -> float:
    return float(np.count_nonzero(a != b))


def rows(asked: Asked) -> Iterator[Row]:
    entries = QUICK if asked.quick else ENTRIES
    for tied in (False, True):
        flat = scores(entries, tied)
        for share in SHARES:
            setting = f"{entries // 10**6} M fp32, top {share:.0%}{', tied' if tied else ''}"
            if asked.wants("global top", setting):
                yield of_all(flat, share, setting, asked)
        del flat
    for share in SHARES:
        setting = f"4096 × 4096 fp32, top {share:.0%} of each row"
        if asked.wants("top of rows", setting):
            yield from of_rows(share, setting, asked)
    setting = f"{entries // 10**6} M fp32, top 5%"
    if asked.wants("peak memory of a global top", setting):
        peaks = {side: in_child(peak, side, entries, threads=asked.threads) / 2**20 for side in ("ours", "np.partition")}  # fmt: skip
        yield Row("peak memory of a global top", setting, "ours / np.partition", exactly(peaks["ours"], peaks["np.partition"]),
                  peaks, "MiB", direction=MOST, note=f"masks are {entries / 2**20:.0f}")  # fmt: skip


def of_all(flat: NDArray[np.float32], share: float, setting: str, asked: Asked) -> Row:
    parts, few = matrices(flat), flat[: SORTED // MATRICES * MATRICES]
    checks = [
        Check("entries that differ", differ(joined(ours(parts, share)), theirs(flat, share)), 0.0),
        Check(f"of {len(few) / 10**6:g} M from a stable sort",
              differ(joined(ours(matrices(few), share)), sorted_head(few, rounded(share * len(few)))), 0.0),
    ]  # fmt: skip
    sides = {"np.partition": lambda: theirs(flat, share), "ours": lambda: ours(parts, share)}
    seconds = timed(sides, asked.turns(ROUNDS), WARM_UP)
    return compared("global top", setting, seconds, "np.partition", "ours", target=FASTER, checks=checks)


def of_rows(share: float, setting: str, asked: Asked) -> Iterator[Row]:
    score = torch.from_numpy(scores(4096 * 4096, False)).view(4096, 4096)
    k = rounded(share * 4096)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: top_of_rows(score, k),
        "np.partition": lambda: score.numpy() >= np.partition(score.numpy(), 4096 - k, axis=1)[:, 4096 - k, None],
        "torch.topk": lambda: torch.zeros(score.shape, dtype=torch.bool).scatter_(1, score.topk(k, sorted=False).indices, True),
    }  # fmt: skip
    want = np.stack([sorted_head(row, k) for row in score.numpy()])
    same = [Check("entries that differ from a stable sort", differ(top_of_rows(score, k).numpy(), want), 0.0)]
    seconds = timed(sides, asked.turns(ROUNDS), WARM_UP)
    for other in ("np.partition", "torch.topk"):
        yield compared("top of rows", setting, seconds, other, "ours", checks=same, note="other does not look at ties")


def peak(side: str, entries: int) -> int:
    """Bytes that one selection takes above the scores."""
    flat = scores(entries, False)
    parts = matrices(flat)
    ours(matrices(flat[: MATRICES * 500]), 0.05)  # what is loaded at the first call
    return peak_above(lambda: ours(parts, 0.05) if side == "ours" else theirs(flat, 0.05))
