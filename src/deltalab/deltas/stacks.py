"""Low-rank changes of many adapters, applied together to the rows that each has.

    y_i += B_a A_a x_i,     a = the adapter of row i      (Chen et al. 2023, Punica, arXiv:2310.18547)

Adapters of like rank are stacked, each padded with zeros to the largest of its stack, and a batched product with all A
and one with all B do for them. Rows are sorted by adapter and padded to the most that one has; where that would be more
than twice the rows there are, adapters with like numbers of rows make a stack each. So neither padding more than doubles.

A stack is a copy of what it holds. The first time it is made for the product alone, and the memory goes from one linear
to the next; who asks for the same adapters again gets one that is kept, see `Stacks`. Rows in another order are the same
adapters: only the rows of x are sorted in another way.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deltalab.core.shapes import Float

Pair = tuple[Tensor, Tensor]


class Low:
    """ΔW = B A, with A (r, in) and B, the scale in it, kept as (r, out)."""

    def __init__(self, A: Float[Tensor, "r in"], B: Float[Tensor, "r out"]) -> None:
        self.A, self.B, self.r = A, B, len(A)


class Stacks:
    """Stacks that were asked for twice, by what they are of. Threads may ask at the same time."""

    def __init__(self) -> None:
        self._asked: set[tuple[object, ...]] = set()
        self._kept: dict[tuple[object, ...], Pair] = {}

    def get(self, key: tuple[object, ...], make: Callable[[], Pair]) -> Pair:
        found = self._kept.get(key)
        if found is not None:
            return found
        if key not in self._asked:
            self._asked.add(key)
            return make()
        with torch.inference_mode(False), torch.no_grad():
            return self._kept.setdefault(key, make())


class Where(NamedTuple):
    """The rows of a group's adapters, in a batch.

    take: rows of x, the adapters' one after the other, padding (a row once more) among them; a slice where they follow each
    other, which they do not with padding. real: which are no padding; None for all. to: their places in y. back: for each
    row of y where its change is; None if some row has none.
    """

    take: slice | Tensor
    real: Tensor | None
    to: Tensor
    back: Tensor | None


class Group:
    """Adapters of a run whose changes of a linear are applied together.

    members: their numbers in the run. rows: of the run, of each. r: the largest rank. whole: whether they are all that have
    a like rank, however many rows each has. key: who they are, among the adapters of the run.
    """

    def __init__(self, members: list[int], rows: list[list[int]], r: int, *, whole: bool) -> None:
        self.members, self.rows, self.r, self.whole = members, rows, r, whole
        self.key = tuple(members)
        self._where: dict[tuple[int, int, torch.device], Where] = {}

    def add(self, y: Tensor, x: Tensor, spread: int, stack: Callable[[Tensor], Pair]) -> None:
        """y += B A x on the rows of the group, in place; x has `spread` rows for each of the run.

        stack: A (members, r, in) and B (members, r, out), of the dtype and on the device of the tensor that it gets.
        Of one row an adapter, a CPU reads A and B once and computes little: in fp32 whatever the model's dtype, since its
        products of 16-bit numbers of that shape are slower than fp32's.
        """
        where = self._where_in(x, spread)
        taken = x[where.take] if isinstance(where.take, slice) else x.index_select(0, where.take)
        rows = taken.reshape(len(self.members), -1, x.shape[-1])
        one, half = rows.shape[1] == 1, x.dtype.itemsize == 2
        if one and half and x.device.type == "cpu":
            rows = rows.float()
        A, B = stack(rows)
        low = torch.bmm(A, rows.mT).mT if one or half else torch.bmm(rows, A.mT)
        if isinstance(where.take, slice):
            into = y[where.take]
            if y.is_contiguous() and y.dtype == low.dtype:
                into.view(len(A), -1, y.shape[-1]).baddbmm_(low, B)
            else:
                into += torch.bmm(low, B).view_as(into)
            return
        change = torch.bmm(low, B).view(*taken.shape[:-1], -1)
        if where.back is not None:
            y += change.index_select(0, where.back)
        else:
            y.index_add_(
                0, where.to, (change if where.real is None else change.index_select(0, where.real)).to(y.dtype)
            )

    def stack(self, lows: list[Low], like: Tensor) -> Pair:
        """The members' A and B, filled with zeros up to r; a single one is not copied unless it has to be converted."""
        sides, ranks = ([low.A for low in lows], [low.B for low in lows]), [low.r for low in lows]
        if len(lows) == 1:
            A, B = (side.unsqueeze(0) for (side,) in sides)
        else:
            full = min(ranks) == self.r
            A, B = (torch.cat(s if full else _filled(s, ranks, self.r)).view(len(lows), self.r, -1) for s in sides)
        return A.to(like.device, like.dtype), B.to(like.device, like.dtype)

    def _where_in(self, x: Tensor, spread: int) -> Where:
        key = (spread, x.shape[0], x.device)
        if key not in self._where:
            with torch.inference_mode(False):
                self._where[key] = _where(self.rows, spread, x)
        return self._where[key]


def grouped(ranks: tuple[int, ...], rows: list[list[int]], *, alone: bool) -> list[Group]:
    """What is applied together at a linear. ranks: of a run's adapters there, 0 for one that has no pair. rows: of each.

    alone: every adapter by itself, so that nothing is padded.
    """
    there = [i for i, r in enumerate(ranks) if r]
    if alone:
        return [Group([i], [rows[i]], ranks[i], whole=False) for i in there]
    groups = []
    for bucket in _by(there, lambda i: (ranks[i] - 1).bit_length()):  # up to the same power of two
        counts = [len(rows[i]) for i in bucket]
        whole = max(counts) * len(counts) <= 2 * sum(counts)
        parts = [bucket] if whole else _by(bucket, lambda i: (len(rows[i]) - 1).bit_length())
        for part in parts:
            groups.append(Group(part, [rows[i] for i in part], max(ranks[i] for i in part), whole=whole))
    return groups


def spread_rows(rows: list[int], spread: int, device: torch.device) -> Tensor:
    """Rows of a batch that has `spread` of them for each."""
    each = torch.tensor(rows, device=device).unsqueeze(1) * spread + torch.arange(spread, device=device)
    return each.flatten()


def _by(members: list[int], key: Callable[[int], int]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for i in members:
        found.setdefault(key(i), []).append(i)
    return list(found.values())


def _where(rows: list[list[int]], spread: int, x: Tensor) -> Where:
    most = max(map(len, rows))
    padded = [row for own in rows for row in own + [own[0]] * (most - len(own))]
    real = [i * most + j for i, own in enumerate(rows) for j in range(len(own))]
    places = spread_rows([padded[i] for i in real], spread, x.device)
    found = spread_rows(real, spread, x.device)
    first = padded[0]
    if padded == list(range(first, first + len(padded))):
        return Where(slice(first * spread, (first + len(padded)) * spread), None, places, None)
    every = len(places) == x.shape[0]
    back = torch.empty_like(places).index_copy_(0, places, found) if every else None
    return Where(spread_rows(padded, spread, x.device), None if len(real) == len(padded) else found, places, back)


def _filled(sides: list[Tensor], ranks: list[int], r: int) -> list[Tensor]:
    """Each followed by rows of zeros up to r."""
    parts = []
    for side, rank in zip(sides, ranks, strict=True):
        parts.append(side)
        if rank < r:
            parts.append(side.new_zeros(r - rank, side.shape[1]))
    return parts
