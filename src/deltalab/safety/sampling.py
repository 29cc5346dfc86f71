"""Exact uniform draws without replacement, so many from each of several bins, fast enough for a thousand of them.

A draw begins with a coin for each member of the bins of which much is asked: eight random bits against the bin's
threshold, which is set low. Given how many came up in a bin, they are a uniform set. What is missing is filled up with
uniform proposals, the first new ones kept, and the rare surplus is dropped at random, so that the result is exactly
uniform over the sets with the counts asked for, whatever the thresholds. Where more than half of a bin is asked for,
what stays out is drawn.

Members are handled by their place in an order in which bins follow one another, those with the largest share first.
"""

import numpy as np

from deltalab.core.shapes import Int

SPARSE = 1 / 32
"""Share of a bin below which proposals alone are faster than a coin for each member."""
BELOW = 2.0
"""Standard deviations that the number of coins stays below what is asked for."""


class Sampler:
    """Draws from members 0 … n−1 with as many of each bin as `own` has.

    bins: (n,), uint8, the bin of each member. own: members whose counts are kept to.
    """

    def __init__(self, bins: np.ndarray, own: Int[np.ndarray, " k"]) -> None:
        sizes = np.bincount(bins, minlength=1)
        counts = np.bincount(bins[own], minlength=len(sizes))
        order = np.argsort(-counts / np.maximum(sizes, 1), kind="stable")
        place = np.empty(len(order), np.uint8)
        place[order] = np.arange(len(order))
        self.members = np.argsort(place[bins], kind="stable").astype(np.int32 if len(bins) < 2**31 else np.int64)
        self.sizes, counts = sizes[order], counts[order]
        self.starts = np.cumsum(self.sizes) - self.sizes
        more = 2 * counts > self.sizes
        self.target = np.where(more, self.sizes - counts, counts)
        self.flipped = int(self.sizes[more].sum())  # the first so many places: what is drawn of them stays out
        share = self.target / np.maximum(self.sizes, 1)
        low = share - BELOW * np.sqrt(share * (1 - share) / np.maximum(self.sizes, 1))
        coins = int(self.sizes[: np.flatnonzero(counts > SPARSE * self.sizes).max(initial=-1) + 1].sum())
        self.thresholds = np.repeat((256 * low.clip(0)).astype(np.uint8), self.sizes)[:coins]
        self.mask = np.zeros(len(bins), dtype=bool)
        self.seen = np.zeros(len(bins), dtype=np.int32)

    def draw(self, rng: np.random.Generator) -> Int[np.ndarray, " k"]:
        """The members of one draw, in any order."""
        coins = len(self.thresholds)
        random = rng.bit_generator.random_raw(-(-coins // 8)).view(np.uint8)[:coins]
        np.less(random, self.thresholds, out=self.mask[:coins])
        chosen = np.flatnonzero(self.mask[:coins])
        missing = self.target - np.diff(np.searchsorted(chosen, self.starts), append=len(chosen))
        for surplus in np.flatnonzero(missing < 0):
            first = self.starts[surplus]
            mine = chosen[(chosen >= first) & (chosen < first + self.sizes[surplus])]
            self.mask[rng.choice(mine, -missing[surplus], replace=False, shuffle=False)] = False
            chosen, missing[surplus] = chosen[self.mask[chosen]], 0
        parts = [chosen]
        while missing.any():
            new, missing = self._proposed(rng, missing)
            self.mask[new] = True
            parts.append(new)
        chosen = np.concatenate(parts)
        if self.flipped:
            kept = np.flatnonzero(~self.mask[: self.flipped])
            chosen, drawn = np.concatenate([kept, chosen[chosen >= self.flipped]]), chosen
            self.mask[drawn] = False
        else:
            self.mask[chosen] = False
        return self.members[chosen]

    def _proposed(
        self, rng: np.random.Generator, missing: Int[np.ndarray, " bins"]
    ) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " bins"]]:
        """New places, at most `missing` of each bin, and what is missing then.

        Proposals are uniform over the bin, and the first ones count, without the repeated and those chosen before.
        """
        bins = np.flatnonzero(missing)
        times = (missing[bins] * 1.1 / (1 - self.target[bins] / self.sizes[bins])).astype(np.int64) + 8
        which = np.repeat(bins, times)
        proposed = self.starts[which] + rng.integers(0, self.sizes[which])
        order = np.arange(len(proposed), dtype=np.int32)
        self.seen[proposed[::-1]] = order[::-1]  # of equal ones the last assigned stays, which is the first proposed
        fresh = (self.seen[proposed] == order) & ~self.mask[proposed]
        which, proposed = which[fresh], proposed[fresh]
        found = np.bincount(which, minlength=len(missing))
        rank = np.arange(len(which)) - (np.cumsum(found) - found)[which]
        return proposed[rank < missing[which]], missing - np.minimum(found, missing)
