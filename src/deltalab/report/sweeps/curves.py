"""How the groups trained: their losses over steps, with a band over seeds."""

from collections.abc import Callable, Sequence

import numpy as np

from deltalab.report import Curves
from deltalab.report.panels import Line, Lines, Plot
from deltalab.report.sweeps.gather import Gathered
from deltalab.report.training import stretches
from deltalab.report.values import Section

Series = Sequence[tuple[float, float]]
"""x and y of one seed, x rising."""


def section(found: Gathered) -> Section | None:
    """Losses; None where no trial has curves."""
    longest = max((len(one.curves.get("train", ())) for one in found.done), default=0)
    size = max(1, -(-longest // 60))
    panels = [
        lines_of(found, "training-loss", "Training loss", "optimizer step", "loss, nats per token", lambda c: stretches(c.get("train", []), size)),
        lines_of(found, "held-out-loss", "Held-out loss", "optimizer step", "loss, nats per token",
                 lambda c: [(row["step"], row["loss"]) for row in c.get("eval", []) if row["loss"] is not None]),
    ]  # fmt: skip
    there = [panel for panel in panels if panel is not None]
    if not there:
        return None
    over = f", the training loss over stretches of {size} steps" if size > 1 else ""
    caption = f"Mean over counted tokens{over}. {band_note(found)}{found.left_out()}"
    return Section("curves", "How they trained", [Plot("losses", "Loss", caption, there, 2)], [])


def lines_of(
    found: Gathered, name: str, title: str, xlabel: str, ylabel: str, series: Callable[[Curves], Series], zero: bool = False, logy: bool = False
) -> Lines | None:  # fmt: skip
    """A line a group, the mean over its seeds, in a band from the least to the most of them; None without data.

    series: what one seed's curves say. Only where all seeds of a group have a value is one drawn.
    """
    lines = [line for group in found.shown() if (line := _line(found, group, series)) is not None]
    if not lines:
        return None
    x = sorted({value for line in lines for value in line.x})
    return Lines(name, title, x, xlabel, ylabel, lines, zero=zero, logy=logy, keyed=True)


def band_note(found: Gathered) -> str:
    """What a line and its band are."""
    return "Lines: means over seeds; bands: from the least to the most of them." if found.seeds > 1 else "One seed, so no bands."  # fmt: skip


def _line(found: Gathered, group: str, series: Callable[[Curves], Series]) -> Line | None:
    seeds = [dict(values) for one in found.groups[group] if (values := series(one.curves))]
    x = sorted(set.intersection(*(set(values) for values in seeds))) if seeds else []
    if not x:
        return None
    table = np.array([[values[at] for at in x] for values in seeds], dtype=float)
    colour, dash = found.look(group)
    line = Line(group, table.mean(0).tolist(), colour, x=x, dash=dash)
    return line._replace(low=table.min(0).tolist(), high=table.max(0).tolist()) if len(seeds) > 1 else line
