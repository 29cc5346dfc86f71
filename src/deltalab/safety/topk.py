"""The largest scores, exactly: k of each row, or a share of many matrices together with one of them in memory.

Of equal scores the entry with the lower index is taken, over several matrices that of the earlier matrix.

The k-th largest of many is sought between two bounds. A random sample gives bounds that it almost surely lies between,
with few others (Floyd and Rivest 1975, doi:10.1145/360680.360691). One pass counts what is above them, marks it with a bit each,
and keeps what is between, with its places; the place among the latter is the place among all, and says which of them are marked
too. Bounds that miss it, or hold more than is kept (many equal scores), are narrowed: to the side that it lies on, or by a
histogram of the next sixteen bits of what is between. The result is exact in any case; only the number of passes depends on
the sample.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltalab.core.shapes import Bool, Float

CHUNK = 1 << 18
"""Entries that are looked at together; with what is computed of them they stay in a core's cache."""

SHARE = 256
"""One entry in so many is sampled."""

KEPT = 1 << 22
"""The most entries between the bounds that are kept."""

FEW = 1 << 16
"""So many entries in all need no sample."""

SMALL = 1 / 40
"""Up to this share of a row torch finds its largest faster than numpy parts it."""

DIGIT = 16
"""Bits that one histogram settles."""

Keys = NDArray[np.signedinteger]
"""Integers that order like floats, of their width."""


class Kth(NamedTuple):
    """A k-th largest value. key: see `ordered_keys`. ties: how many of its equals are among the k. equals: of all."""

    key: int
    ties: int
    equals: int


def top_of_rows(score: Float[Tensor, "rows columns"], k: int) -> Bool[Tensor, "rows columns"]:
    """True at the k largest of each row, the first of equal ones; nowhere in a row that holds NaN."""
    if k == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    least, over = _kth_of_rows(score, k)
    mask = score >= least
    if over.any():  # rows with more equals of the k-th than belong to the k
        rows, least = score[over], least[over]
        above, level = rows > least, rows == least
        mask[over] = above | level & (level.cumsum(1) <= k - above.sum(1, keepdim=True))
    return mask


def top_of_all(
    scores: Mapping[str, Float[Tensor, "out in"]], share: float
) -> Iterator[tuple[str, Bool[Tensor, "out in"]]]:
    """Path and mask of the largest over all matrices, one matrix at a time, in order, on the CPU.

    share: of all entries, rounded to whole ones. A sample of a matrix is read, then all of it once; twice or more where many
    scores are equal.
    """
    survey = _Survey(scores)
    k = rounded(share * survey.entries)
    if not k:
        for path in scores:
            yield path, torch.zeros(scores[path].shape, dtype=torch.bool)
        return
    kth, band = _kth(scores, survey, k)
    left = kth.ties
    for path in scores:
        if band.whole:
            parts = band.marks.pop(path)
        else:  # too many equals to keep their places
            parts = [_Marks.of(keys, kth.key, kth.key) for keys in _chunks(scores[path], survey.double)]
        shape = band.shapes[path]
        mask = np.empty(shape.numel(), dtype=bool)
        done = 0
        for part in parts:
            left -= part.into(mask[done : done + part.size], kth.key, left)
            done += part.size
        yield path, torch.from_numpy(mask).view(shape)


def kth_largest(scores: Mapping[str, Tensor], k: int) -> Kth:
    """The k-th largest value over all matrices, 1 ≤ k ≤ entries; each is read twice, or more where many are equal."""
    return _kth(scores, _Survey(scores), k)[0]


def rounded(value: float) -> int:
    """The nearest whole number, halves up."""
    return int(value + 0.5)


def ordered_keys(values: Float[Tensor, " entries"], double: bool = False) -> Keys:
    """Keys, int32 (double: int64), that order like the values: a float's bits are an integer, with those of negatives
    reversed. −0 and 0 have one key; NaN is beyond infinity, on the side of its sign."""
    wide = values.detach().to("cpu", torch.float64 if double else torch.float32).numpy()
    integer: type[np.signedinteger] = np.int64 if double else np.int32
    bits: Keys = wide.view(integer)
    if bits.min(initial=0) >= 0:
        return bits
    bits = (wide + wide.dtype.type(0)).view(integer)  # −0 becomes 0
    return bits ^ ((bits >> np.iinfo(integer).bits - 1) & np.iinfo(integer).max)


def _chunks(score: Tensor, double: bool) -> Iterator[Keys]:
    for part in score.reshape(-1).split(CHUNK):
        yield ordered_keys(part, double)


def _kth_of_rows(score: Tensor, k: int) -> tuple[Float[Tensor, "rows 1"], Bool[Tensor, " rows"]]:
    """The k-th largest of each row, NaN if the row holds one, and whether the next one is equal to it."""
    score, rest = score.detach(), score.shape[1] - k
    if score.device.type != "cpu" or k <= SMALL * score.shape[1]:
        values = score.topk(min(k + 1, score.shape[1]), dim=1).values
        least, following = values[:, :k].amin(1), values[:, k] if rest else None
    else:
        parted = np.partition(score.to(torch.promote_types(score.dtype, torch.float32)).numpy(), rest, axis=1)
        least = torch.from_numpy(parted[:, rest:].min(1)).to(score.dtype)
        following = torch.from_numpy(parted[:, :rest].max(1)).to(score.dtype) if rest else None
    return least[:, None], torch.zeros_like(least, dtype=torch.bool) if following is None else following == least


class _Survey:
    """What one reading of all matrices tells: the number of entries, the width of their keys, and a sample of these."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.entries, self.double, drawn = 0, False, []
        for path in scores:
            flat = scores[path].detach().reshape(-1)
            self.entries += len(flat)
            self.double |= flat.dtype == torch.float64
            if len(flat):
                places = torch.randint(len(flat), (-(-len(flat) // SHARE),), generator=generator)
                drawn.append(flat[places.to(flat.device)].cpu().double())
        self.sample = np.sort(ordered_keys(torch.cat(drawn), self.double)) if self.entries > FEW else None
        limits = np.iinfo(np.int64 if self.double else np.int32)
        self.least, self.most = int(limits.min), int(limits.max)

    def bounds(self, k: int) -> tuple[int, int]:
        """Keys that the k-th largest lies between, ends included, but for one sample in a million."""
        if self.sample is None:
            return self.least, self.most
        size, p = len(self.sample), k / self.entries
        place, spread = size * (1 - p), 5 * (size * p * (1 - p)) ** 0.5 + 5
        low, high = int(place - spread), int(place + spread)
        return (
            self.least if low < 0 else int(self.sample[low]),
            self.most if high >= size else int(self.sample[high]),
        )


class _Marks(NamedTuple):
    """Of the keys of a chunk: a bit for each that is above a band, how many are, and those within it with their places."""

    size: int
    above: int
    bits: NDArray[np.uint8]
    places: NDArray[np.intp]
    keys: Keys

    @classmethod
    def of(cls, keys: Keys, low: int, high: int) -> "_Marks":
        """low, high: the band, both ends within it."""
        width = np.dtype(f"u{keys.itemsize}").type
        within = (keys - keys.dtype.type(low)).view(width) <= width(
            high - low
        )  # a difference below zero wraps to a large one
        above, places = keys > high, np.flatnonzero(within)
        return cls(len(keys), int(np.count_nonzero(above)), np.packbits(above), places, keys[places])

    def into(self, mask: NDArray[np.bool_], key: int, ties: int) -> int:
        """Write the mask of what is above a key of the band, and of the first `ties` that equal it; how many did."""
        mask[:] = np.unpackbits(self.bits, count=self.size).view(bool)
        mask[self.places[self.keys > key]] = True
        equal = self.places[self.keys == key][:ties]
        mask[equal] = True
        return len(equal)


class _Band:
    """How many keys lie above `high`, and those from `low` to `high`: themselves, or their histogram where they are many.

    marks: of every chunk, by path; whole: whether nothing of them was given up.
    """

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.shift = max((high - low).bit_length() - DIGIT, 0)
        self.above, self.inside, self.waiting = 0, 0, 0
        self.kept: list[Keys] = []
        self.histogram: NDArray[np.int64] | None = None
        self.whole = True
        self.marks: dict[str, list[_Marks]] = {}
        self.shapes: dict[str, torch.Size] = {}

    def add(self, path: str, keys: Keys) -> None:
        marks = _Marks.of(keys, self.low, self.high)
        if self.whole:
            self.marks[path].append(marks)
        self.above += marks.above
        self.inside += len(marks.keys)
        self.waiting += len(marks.keys)
        self.kept.append(marks.keys)
        if self.waiting > KEPT:
            self.whole = False
            self.marks.clear()
            self._count()

    def narrowed(self, rank: int) -> "Kth | tuple[int, int]":
        """The `rank`-th largest key of the band, or narrower bounds of it."""
        if self.low == self.high:
            return Kth(self.low, rank, self.inside)
        if self.histogram is None:
            keys = np.concatenate(self.kept)
            key = np.partition(keys, len(keys) - rank)[len(keys) - rank]
            return Kth(int(key), rank - int(np.count_nonzero(keys > key)), int(np.count_nonzero(keys == key)))
        self._count()
        from_above = self.histogram[::-1].cumsum()
        part = len(from_above) - 1 - int(np.searchsorted(from_above, rank))
        low = self.low + (part << self.shift)
        return low, min(low + (1 << self.shift) - 1, self.high)

    def _count(self) -> None:
        """Put the kept keys into the histogram."""
        offsets = np.concatenate(self.kept) - self.kept[0].dtype.type(self.low)  # may wrap: below zero as signed,
        parts = offsets.view(f"u{offsets.itemsize}") >> self.shift  # and right as unsigned
        counts = np.bincount(parts.astype(np.intp), minlength=1 << DIGIT)
        self.histogram = counts if self.histogram is None else self.histogram + counts
        self.kept, self.waiting = [self.kept[0][:0]], 0


def _kth(scores: Mapping[str, Tensor], survey: _Survey, k: int) -> tuple[Kth, _Band]:
    """The k-th largest, and the band that it was found in."""
    low, high = survey.bounds(k)
    while True:
        band = _Band(low, high)
        for path in scores:
            score = scores[path]
            band.shapes[path], band.marks[path] = score.shape, []
            for keys in _chunks(score, survey.double):
                band.add(path, keys)
        if band.above >= k:
            low, high = high + 1, survey.most
        elif band.above + band.inside < k:
            low, high = survey.least, low - 1
        else:
            found = band.narrowed(k - band.above)
            if isinstance(found, Kth):
                return found, band
            low, high = found
