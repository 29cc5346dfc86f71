"""Heat maps of layers × modules, and spectra: of `deltalab inspect`, and of probes in a sweep's report."""

from collections.abc import Mapping, Sequence

from deltalab.report.panels import Grid

SMALL = 1e-9
"""Of the largest singular value; smaller ones are not there."""


def heat_map(name: str, title: str, at: Mapping[tuple[int, str], float], scale: float = 100.0) -> Grid | None:
    """A value at each layer and module; None without any. scale: what a value is shown times."""
    layers, modules = sorted({layer for layer, _ in at}), list(dict.fromkeys(module for _, module in at))
    if not layers:
        return None
    values = [[at.get((layer, module)) for module in modules] for layer in layers]
    return Grid(name, title, [str(layer) for layer in layers], modules, values, max(at.values()) or 1.0, scale)


def trimmed(spectra: Sequence[Sequence[float]]) -> list[float]:
    """The mean of singular values by number, zeros in a shorter spectrum, without what is nothing beside the largest."""
    longest = max(map(len, spectra), default=0)
    mean = [sum(s[i] if i < len(s) else 0.0 for s in spectra) / len(spectra) for i in range(longest)]
    return [value for value in mean if value > SMALL * max(mean)]
