"""The largest scores, exactly: k of each row, or k of many matrices together with one of them in memory.

Of equal scores the entry with the lower index is taken, over several matrices that of the earlier matrix.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deltalab.core.shapes import Bool, Float, Int

DIGIT = 16
"""Bits of a float that one pass over the matrices settles."""


def top_of_rows(score: Float[Tensor, "rows columns"], k: int) -> Bool[Tensor, "rows columns"]:
    """True at the k largest of each row, the first of equal ones."""
    if k == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    least = score.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, level = score > least, score == least
    return above | level & (level.cumsum(1) <= k - above.sum(1, keepdim=True))


def top_of_all(scores: Mapping[str, Float[Tensor, "out in"]], k: int) -> Iterable[tuple[str, Bool[Tensor, "out in"]]]:
    """Path and mask of the k largest over all matrices, one matrix at a time, in order."""
    least, ties = kth_largest(scores, k) if k else (0, 0)
    for path in scores:
        keys = ordered_keys(scores[path])
        level = keys == least
        first = level & (level.cumsum(0) <= ties)
        ties -= int(first.sum())
        yield path, (first | (keys > least) & (k > 0)).view(scores[path].shape)


def kth_largest(scores: Mapping[str, Tensor], k: int) -> tuple[int, int]:
    """The key of the k-th largest value over all matrices, and how many of its equals are among the k.

    Found by its bits, sixteen at a time from the top: the histogram of the leading digit says which digit the value
    has, then only what shares it counts. Two passes for fp32, four for fp64.
    """
    width = max((64 if scores[path].dtype == torch.float64 else 32) for path in scores)
    least = 0
    for shift in range(width - DIGIT, -1, -DIGIT):
        leading = shift == width - DIGIT
        histogram = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for path in scores:
            keys = ordered_keys(scores[path], width)
            digits = (
                (keys >> shift) + (1 << DIGIT - 1)
                if leading
                else keys[keys >> (shift + DIGIT) == least] >> shift & 0xFFFF
            )
            histogram += torch.bincount(digits, minlength=1 << DIGIT).cpu()
        above = histogram.flip(0).cumsum(0).flip(0) - histogram  # entries with a larger digit
        digit = int(((above < k) & (above + histogram >= k)).nonzero()[0, 0])
        k -= int(above[digit])
        least = digit - (1 << DIGIT - 1) if leading else least << DIGIT | digit
    return least, k


def ordered_keys(score: Float[Tensor, "out in"], width: int | None = None) -> Int[Tensor, " entries"]:
    """int64 keys, flat, that order like the values: a float's bits are an integer, with those of negatives reversed."""
    double = score.dtype == torch.float64 if width is None else width == 64
    flat = (
        score.flatten().to(torch.float64 if double else torch.float32) + 0.0
    )  # −0 becomes 0: equal as scores, so as keys
    bits = flat.view(torch.int64) if double else flat.view(torch.int32).long()
    return torch.where(bits >= 0, bits, bits ^ ((1 << (63 if double else 31)) - 1))
