"""Random groups to compare a group with: kept as seeds, drawn when they are asked for.

A null has as many entries of each matrix as the group, or, matched, of each quantile of |W| (or of the utility score) in
each matrix. Draws come from the whole matrix, the group's own entries included: under the null they are like any other.
A draw depends on its seed and the matrix alone, so one matrix can be drawn over and over without the others.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltalab.core.errors import UserError
from deltalab.core.shapes import Int
from deltalab.safety.bins import BINS, Bins, bins_of
from deltalab.safety.group import Group
from deltalab.safety.sampling import Sampler
from deltalab.safety.units import Units


class Nulls:
    """`n` random groups like `group`; draw i has the seed `seed` + i.

    match: bins whose counts are kept to in each matrix; None for the count of the matrix alone. units: the units that
    the group is made of; then units are drawn, as many of each family (and bin of its units). name: for tables.
    Raises: UserError if the group is not made of these units, or the bins are of other units or matrices.
    """

    def __init__(
        self, group: Group, n: int = 999, seed: int = 0, match: Bins | None = None,
        units: Units | None = None, name: str | None = None,
    ) -> None:  # fmt: skip
        if units is not None and units.kind == "entry":
            units = None
        self.group, self.n, self.seed, self.match, self.units = group, n, seed, match, units
        self.name = name or ("random" if match is None else f"matched on {match.of}")
        self._own: Mapping[str, Tensor] = group if units is None else units.of_group(group)
        self._sizes = {path: out * in_ for path, (out, in_) in group.shapes.items()} if units is None else units.counts
        if match is not None:
            self._check(match)

    def __len__(self) -> int:
        return self.n

    @property
    def paths(self) -> list[str]:
        """The matrices that draws have entries in, or could have."""
        return list(self.group)

    def draw(self, i: int) -> Group:
        """One of the random groups."""
        drawn = {name: _ascending(self._sampler(name).draw(self._rng(name, i))) for name in self._sizes}
        name, info = f"{self.name} {i}", {**self.info, "seed": self.seed + i}
        if self.units is not None:
            return self.units.group(name, drawn, info)
        return Group.of_indices(name, self.group.shapes, drawn, info)

    def indices(self, path: str) -> Iterator[Int[Tensor, " k"]]:
        """Flat indices in one matrix of draw after draw, in any order; bins are read once, and no draw is kept."""
        family = self.units.owner.get(path) if self.units is not None else None
        if self.units is not None and family is None:
            yield from (torch.zeros(0, dtype=torch.int64) for _ in range(self.n))
            return
        name = path if family is None else family.name
        sampler = self._sampler(name)
        for i in range(self.n):
            drawn = sampler.draw(self._rng(name, i))
            if self.units is None:
                yield torch.from_numpy(drawn)
            else:
                yield self.units.entries(path, _ascending(drawn))

    @property
    def info(self) -> dict[str, Any]:
        """How they are drawn, for a record."""
        kind = {"kind": "random"} if self.match is None else {"kind": "matched", "on": self.match.of}
        return {**kind, "like": self.group.name, "unit": self.group.unit if self.units is None else self.units.kind}

    def __str__(self) -> str:
        return f"{self.name}: {self.n} draws like {self.group.name}, seeds from {self.seed}"

    def _sampler(self, name: str) -> Sampler:
        bins = np.zeros(self._sizes[name], np.uint8) if self.match is None else self.match[name].flatten().numpy()
        return Sampler(bins, self._own[name].numpy())

    def _rng(self, name: str, i: int) -> np.random.Generator:
        return np.random.default_rng([self.seed + i, zlib.crc32(name.encode())])

    def _check(self, match: Bins) -> None:
        unit = "entry" if self.units is None else self.units.kind
        if match.unit != unit:
            raise UserError(
                f"a null of {unit} units cannot be matched on bins of {match.unit} units.",
                next="make the bins with the same units=",
            )
        missing = [name for name in self._sizes if name not in match]
        if missing:
            raise UserError(
                f"the bins do not cover '{missing[0]}', which group '{self.group.name}' does.",
                found=f"{len(match)} of {len(self._sizes)} are there",
                next="bin every matrix",
            )


def random_like(group: Group, seed: int, name: str = "random") -> Group:
    """As many entries of each matrix as `group` has there, drawn uniformly from all of the matrix."""
    return _renamed(Nulls(group, 1, seed).draw(0), name)


def matched_random(
    group: Group, weights: Mapping[str, Tensor], seed: int, bins: int = BINS, name: str = "matched random"
) -> Group:
    """As many entries of each matrix *and of each quantile of |weights| in it* as `group` has, drawn uniformly.

    weights: path → (out, in), the weights, or another value to match on (the utility score, say).
    """
    return _renamed(Nulls(group, 1, seed, bins_of(weights, bins)).draw(0), name)


def _renamed(group: Group, name: str) -> Group:
    group.name = name
    return group


def _ascending(drawn: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(drawn))
