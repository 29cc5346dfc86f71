"""Sums over the entries of groups, set after set: groups in memory, and random ones that nobody holds."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from deltalab.core.shapes import Float, Int

Indices = Mapping[str, Tensor]
"""Module path → flat indices (row · in + column) of a group's entries in that matrix."""
TILE = 1 << 18
"""Entries of draws that are added up at a time: their indices stay in the cache."""


class Draws(Protocol):
    """Random groups that are drawn when they are asked for (`deltalab.safety.nulls.Nulls`), matrix by matrix."""

    def __len__(self) -> int:
        """How many."""
        ...

    @property
    def paths(self) -> Sequence[str]:
        """The matrices that they may have entries in."""
        ...

    def indices(self, path: str) -> Iterator[Int[Tensor, " k"]]:
        """Flat indices in one matrix of draw after draw, in any order within a draw."""
        ...


class Listed:
    """Groups in memory as `Draws`."""

    def __init__(self, groups: Sequence[Indices]) -> None:
        self.groups = groups
        self.paths = list(dict.fromkeys(path for group in groups for path in group))

    def __len__(self) -> int:
        return len(self.groups)

    def indices(self, path: str) -> Iterator[Int[Tensor, " k"]]:
        """The groups' own indices; none where a group lacks the matrix."""
        none = torch.zeros(0, dtype=torch.int64)
        return (group.get(path, none) for group in self.groups)


class Terms(NamedTuple):
    """The four terms of entries of one matrix. values: of given entries; every: of all, (entries, 4), where kept."""

    values: Callable[[Tensor], Tensor]
    device: torch.device
    every: Tensor | None = None

    def at(self, index: Int[Tensor, " k"]) -> Float[Tensor, "k four"]:
        """Of these entries."""
        return self.values(index.to(self.device))

    def sums(self, indices: Sequence[Tensor]) -> Float[np.ndarray, "n five"]:
        """Entries and summed terms of several sets."""
        """Entries and summed terms of several sets."""
        counts = torch.tensor([len(index) for index in indices])
        index = torch.cat(list(indices))
        if self.every is not None and self.device.type == "cpu" and torch.backends.mkl.is_available():
            # a sparse matrix of ones picks and adds in one pass, several times faster than gathering first
            ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
            shape, ones = (len(indices), len(self.every)), torch.ones(len(index), dtype=torch.float64)
            with warnings.catch_warnings():  # torch calls these tensors beta, once a process
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
                picks = torch.sparse_csr_tensor(ends, index.long(), ones, shape, check_invariants=False)
            totals = picks @ self.every
        else:
            lengths = counts.to(self.device)
            totals = torch.segment_reduce(self.at(index), "sum", lengths=lengths, axis=0, initial=0.0)
        return torch.cat([counts[:, None].double(), totals.cpu()], 1).numpy()


class Stream:
    """The first `n` sets of a stream of indices; `expected` is about how many entries they have together."""

    def __init__(self, indices: Iterable[Tensor], n: int) -> None:
        rest = iter(itertools.islice(indices, n))
        first = list(itertools.islice(rest, 1))
        self.n, self.expected = n, n * len(first[0]) if first else 0
        self._indices = itertools.chain(first, rest)

    def __iter__(self) -> Iterator[Tensor]:
        return self._indices

    def sums(self, terms: Terms) -> Float[np.ndarray, "n five"]:
        """Entries and summed terms of each set, some sets at a time."""
        parts, tile, size = [np.empty((0, 5))], [], 0
        for index in self:
            tile.append(index)
            size += len(index)
            if size >= TILE:
                parts.append(terms.sums(tile))
                tile, size = [], 0
        if tile:
            parts.append(terms.sums(tile))
        return np.concatenate(parts)


def terms_of(w: Tensor, d: Tensor, epsilon: float) -> Float[Tensor, "k four"]:
    """w², d², w·d and |d|/(|w|+ε) of each entry, in fp64."""
    w, d = w.double(), d.double()
    return torch.stack([w * w, d * d, w * d, d.abs() / (w.abs() + epsilon)], dim=1)
