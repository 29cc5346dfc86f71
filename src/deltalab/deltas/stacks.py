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


class Low(NamedTuple):
    """ΔW = B A, with A (r, in) and B, the scale in it, kept as (r, out)."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "r out"]

    @property
    def bucket(self) -> int:
        """Ranks that are stacked together: up to the same power of two."""
        return (len(self.A) - 1).bit_length()


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
    """Low-rank changes that are applied together, and the rows of the run that each has.

    whole: whether it is all of the linear's that are of like rank, however many rows each has.
    """

    def __init__(self, lows: list[Low], rows: list[list[int]], *, whole: bool) -> None:
        self.lows, self.rows, self.whole = lows, rows, whole
        self.r = max(len(low.A) for low in lows)

    def where(self, known: dict[tuple[object, ...], Where], spread: int, x: Tensor) -> Where:
        """Its rows of x, of which there are `spread` for each of the run. known: what other linears of the run found."""
        key = (tuple(rows[0] for rows in self.rows), spread, x.shape[0], x.device)  # a row has one adapter
        if key not in known:
            with torch.inference_mode(False):
                known[key] = _where(self.rows, spread, x)
        return known[key]

    def add(self, y: Tensor, x: Tensor, where: Where, kept: Stacks, path: str) -> None:
        """y += B A x on the group's rows, in place.

        Of one row an adapter, a CPU reads A and B once and computes little: in fp32 whatever the model's dtype, since its
        products of 16-bit numbers of that shape are slower than fp32's.
        """
        taken = x[where.take] if isinstance(where.take, slice) else x.index_select(0, where.take)
        rows = taken.reshape(len(self.lows), -1, x.shape[-1])
        one, half = rows.shape[1] == 1, x.dtype.itemsize == 2
        if one and half and x.device.type == "cpu":
            rows = rows.float()
        A, B = self._stack(kept, path, rows)
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

    def _stack(self, kept: Stacks, path: str, like: Tensor) -> Pair:
        def made() -> Pair:
            A, B = (_stacked([low[side] for low in self.lows], self.r) for side in (0, 1))
            return A.to(like.device, like.dtype), B.to(like.device, like.dtype)

        if len(self.lows) == 1:
            return made()  # for the most part not copied
        first = self.lows[0].bucket if self.whole else tuple(rows[0] for rows in self.rows)
        return kept.get((path, first, like.dtype, like.device), made)


def grouped(lows: list[tuple[Low, list[int]]], *, alone: bool) -> list[Group]:
    """What is applied together at a linear. alone: every adapter by itself, so that nothing is padded."""
    if alone:
        return [Group([low], [rows], whole=False) for low, rows in lows]
    groups = []
    for bucket in _by(lows, lambda low, rows: low.bucket):
        counts = [len(rows) for _, rows in bucket]
        whole = max(counts) * len(counts) <= 2 * sum(counts)
        parts = [bucket] if whole else _by(bucket, lambda low, rows: (len(rows) - 1).bit_length())
        groups += [Group([low for low, _ in part], [rows for _, rows in part], whole=whole) for part in parts]
    return groups


def spread_rows(rows: list[int], spread: int, device: torch.device) -> Tensor:
    """Rows of a batch that has `spread` of them for each."""
    each = torch.tensor(rows, device=device).unsqueeze(1) * spread + torch.arange(spread, device=device)
    return each.flatten()


def _by(
    lows: list[tuple[Low, list[int]]], key: Callable[[Low, list[int]], object]
) -> list[list[tuple[Low, list[int]]]]:
    found: dict[object, list[tuple[Low, list[int]]]] = {}
    for low, rows in lows:
        found.setdefault(key(low, rows), []).append((low, rows))
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


def _stacked(sides: list[Tensor], r: int) -> Float[Tensor, "adapters r n"]:
    """Each with rows of zeros up to r; a single one is not copied."""
    if len(sides) == 1:
        return sides[0].unsqueeze(0)
    filled = []
    for side in sides:
        filled.append(side)
        if len(side) < r:
            filled.append(side.new_zeros(r - len(side), side.shape[1]))
    return torch.cat(filled).view(len(sides), r, -1)
