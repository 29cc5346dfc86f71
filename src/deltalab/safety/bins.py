"""Quantile bins of the entries of each matrix, or of its units: what a random group is matched on."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import write_with
from deltalab.safety.units import Units

BINS = 20
FEWEST = 4
"""Units in a bin at the least: of few units there are fewer bins."""


class Bins(Mapping[str, Tensor]):
    """Path → bin of each entry, (out, in), uint8; of units: family → bin of each unit, (units,). Higher is larger.

    of: what the values were, for tables. unit: the kind of unit.
    """

    def __init__(self, of: str, unit: str, tensors: dict[str, Tensor], file: Path | None = None) -> None:
        self.of, self.unit, self.file, self._tensors = of, unit, file, tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UserError(f"'{name}' has no bins.", nearest=nearest(name, self._tensors), next="bin every matrix")
        if self.file is None:
            return self._tensors[name]
        with safe_open(self.file, "pt") as handle:
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:  # a mapping's own would read the bins to find out
        return name in self._tensors

    def save(self, file: str | Path) -> None:
        """Write a safetensors file, one byte an entry, whole or not at all."""
        data = save({name: self[name].contiguous() for name in self}, {"of": self.of, "unit": self.unit})
        write_with(file, lambda handle: handle.write(data))

    @classmethod
    def load(cls, file: str | Path) -> "Bins":
        """Bins that `save` wrote; a matrix is read when it is asked for.

        Raises: UserError if the file is missing or damaged.
        """
        try:
            with safe_open(file, "pt") as handle:
                about, names = handle.metadata(), list(handle.keys())
            return cls(about["of"], about["unit"], dict.fromkeys(names, torch.empty(0)), Path(file))
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise UserError(
                f"bins '{file}' are missing or damaged.", found=str(error), next="make them again"
            ) from None


def bins_of(values: Mapping[str, Tensor], bins: int = BINS, units: Units | None = None, of: str = "|W|") -> Bins:
    """Quantile bins of |values| in each matrix, or of the units' means of |values| in each family.

    values: path → (out, in): the weights, or the utility score; read once, one matrix at a time, and not kept, so
    weights may train afterwards. bins: how many, at most 256; in a family of fewer than four units a bin, as many as
    keep four. Entry of rank r (of equal ones the first is lower) of n is in bin r · bins // n.
    Raises: UserError for another number of bins.
    """
    if not 1 <= bins <= 256:
        raise UserError(f"{bins} bins cannot be made.", next="give 1 to 256; 20 is usual")
    if units is None or units.kind == "entry":
        return Bins(of, "entry", {path: _ranked(values[path], bins) for path in values})
    means = units.means(values, absolute=True)
    few = {name: max(1, min(bins, mean.numel() // FEWEST)) for name, mean in means.items()}
    return Bins(of, units.kind, {name: _ranked(mean, few[name]) for name, mean in means.items()})


def _ranked(values: Tensor, bins: int) -> Tensor:
    order = np.argsort(values.detach().abs().float().flatten().cpu().numpy(), kind="stable")
    found = np.empty(len(order), dtype=np.uint8)
    found[order] = np.arange(len(order)) * bins // len(order)
    return torch.from_numpy(found).view(values.shape)
