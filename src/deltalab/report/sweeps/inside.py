"""What training did to weights and representations, where probes looked: ranks and sizes over steps, spectra, heat maps, similarity."""

from collections.abc import Callable
from typing import Any

import numpy as np

from deltalab.core.paths import kinds_of, layer_in
from deltalab.report import Curves
from deltalab.report.inside import heat_map, trimmed
from deltalab.report.panels import Grid, Panel, Plot
from deltalab.report.sweeps.curves import band_note, lines_of
from deltalab.report.sweeps.gather import Gathered
from deltalab.report.values import Section

FIRST = " Of a change without factors only the first 32 singular values are known, and its rank reads no higher."
"""Said where ranks are shown: the probes keep no more."""
MAPS = 4
"""Groups that get heat maps."""


def section(found: Gathered) -> Section | None:
    """Figures of what the probes saw; None where none ran."""
    plots = [plot for plot in (_steps(found), _spectra(found), *_maps(found), _similarity(found)) if plot.panels]
    return Section("inside", "What changed inside", plots, []) if plots else None


def _steps(found: Gathered) -> Plot:
    panels = [
        lines_of(found, "relative-norm", "‖ΔW‖ / ‖W‖", "optimizer step", "mean over weights", _over_weights("relative"), zero=True),
        lines_of(found, "effective-rank", "Effective rank of ΔW", "optimizer step", "mean over weights", _over_weights("effective_rank"), zero=True),
    ]  # fmt: skip
    caption = (
        f"The effective rank is exp of the entropy of the singular values.{FIRST} {band_note(found)}{found.left_out()}"
    )
    return Plot("changes", "Size and rank of the change", caption, _there(panels), 2)


def _over_weights(key: str) -> Callable[[Curves], list[tuple[float, float]]]:
    def series(curves: Curves) -> list[tuple[float, float]]:
        rows = ((row["step"], [w[key] for w in row["weights"].values() if w[key] is not None]) for row in curves.get("deltas", []))  # fmt: skip
        return [(step, float(np.mean(values))) for step, values in rows if values]

    return series


def _spectra(found: Gathered) -> Plot:
    def series(curves: Curves) -> list[tuple[float, float]]:
        spectra = [weight["singular"] for weight in _last(curves, "deltas").get("weights", {}).values()]
        return [(i + 1, value) for i, value in enumerate(trimmed(spectra))]

    panel = lines_of(found, "spectra", "Singular values of ΔW at the end", "number", "σ, mean over weights", series, logy=True)  # fmt: skip
    caption = f"As many as the change has, the first 32 at most. {band_note(found)}{found.left_out()}"
    return Plot("spectra", "Spectra", caption, _there([panel]), 1)


def _maps(found: Gathered) -> list[Plot]:
    """Relative norm and effective rank at the end, layers × modules, of a few groups."""
    shown = [name for name in found.shown(MAPS) if any(_last(one.curves, "deltas").get("weights") for one in found.groups[name])]  # fmt: skip
    out = []
    for key, title, unit, scale in (("relative", "Where the change is large", "‖ΔW‖ / ‖W‖, %", 100.0),
                                    ("effective_rank", "Where its rank is high", "effective rank", 1.0)):  # fmt: skip
        grids = [grid for name in shown if (grid := _map(found, name, key, scale, unit)) is not None]
        top = max((value for grid in grids for row in grid.values for value in row if value is not None), default=1.0)
        panels: list[Panel] = [grid._replace(top=top or 1.0) for grid in grids]
        caption = f"{unit.capitalize() if unit[0].isalpha() else unit}, at the last step, means over seeds; rows are layers, shades the same in all panels.{FIRST if scale == 1.0 else ''}{found.left_out(MAPS)}"  # fmt: skip
        out.append(Plot(f"heat-{key.replace('_', '-')}", title, caption, panels, 2))
    return out


def _map(found: Gathered, group: str, key: str, scale: float, unit: str) -> Grid | None:
    seen: dict[tuple[int, str], list[float]] = {}
    changes = [_last(one.curves, "deltas").get("weights", {}) for one in found.groups[group]]
    kinds = kinds_of(path for weights in changes for path in weights)
    for path, weight in (item for weights in changes for item in weights.items()):
        layer, module = layer_in(path), kinds[path]
        if layer is not None and weight[key] is not None:
            seen.setdefault((layer, module), []).append(weight[key])
    means = {at: float(np.mean(values)) for at, values in seen.items()}
    return heat_map(f"heat-{key}-{group}", f"{group}: {unit}", means, scale)


def _similarity(found: Gathered) -> Plot:
    def series(key: str) -> Callable[[Curves], list[tuple[float, float]]]:
        return lambda curves: [(i, v) for i, v in enumerate(_last(curves, "representations").get(key, [])) if v is not None]  # fmt: skip

    panels = [
        lines_of(found, "cka", "Linear CKA", "layer (0: embeddings)", "CKA with the base", series("cka")),
        lines_of(found, "cosine", "Cosine", "layer (0: embeddings)", "mean cosine with the base", series("cosine")),
    ]
    caption = f"How alike the hidden states behind each layer are to the base's, at the last step; 1 is the same. {band_note(found)}{found.left_out()}"
    return Plot("similarity", "Representations beside the base's", caption, _there(panels), 2)


def _last(curves: Curves, name: str) -> dict[str, Any]:
    rows = curves.get(name)
    return rows[-1] if rows else {}


def _there(panels: list[Any]) -> list[Panel]:
    return [panel for panel in panels if panel is not None]
