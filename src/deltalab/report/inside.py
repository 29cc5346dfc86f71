"""Heat maps of layers × modules, and spectra: of `deltalab inspect`, and of probes in a sweep's report."""

import re
from collections.abc import Mapping, Sequence

from deltalab.report.panels import Grid

SMALL = 1e-9
"""Of the largest singular value; smaller ones are not there."""


def place_of(path: str) -> tuple[int | None, str]:
    """The layer that a module's path names, None outside of layers, and its last name."""
    number = re.search(r"(?:^|\.)(\d+)\.", path)
    return int(number[1]) if number else None, path.rpartition(".")[2]


def heat_map(name: str, title: str, at: Mapping[tuple[int, str], float], scale: float = 100.0) -> Grid | None:
    """A value at each layer and module; None without any. scale: what a value is shown times."""
    layers, modules = sorted({layer for layer, _ in at}), list(dict.fromkeys(module for _, module in at))
    if not layers:
        return None
    values = [[at.get((layer, module)) for module in modules] for layer in layers]
    return Grid(name, title, [str(layer) for layer in layers], modules, values, max(at.values()) or 1.0, scale)


def mean_spectrum(spectra: Sequence[Sequence[float]]) -> list[float]:
    """The mean of singular values by number; of what a shorter spectrum lacks it has zeros."""
    longest = max(map(len, spectra), default=0)
    return [sum(s[i] if i < len(s) else 0.0 for s in spectra) / len(spectra) for i in range(longest)]


def trimmed(spectra: Sequence[Sequence[float]]) -> list[float]:
    """The same without what is nothing beside the largest."""
    mean = mean_spectrum(spectra)
    return [value for value in mean if value > SMALL * max(mean)]
