"""Plain values of the report's pictures: a panel is a NamedTuple of numbers and words, and `describe` says it in words.

A panel is one small picture; a plot is its panels side by side. `figures.py` draws them, tests check them here.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """One line: its label stands at its end. `values` are as many as the panel's `x`."""

    label: str
    values: Sequence[float]
    colour: str


class Lines(NamedTuple):
    """Lines over x, with the band that they are to be compared with."""

    name: str
    title: str
    x: Sequence[float]
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    band_label: str = ""
    top: float | None = None  # of the y axis, where several panels are to be compared
    zero: bool = True  # whether the y axis begins at 0


class Rate(NamedTuple):
    """A share with its interval, and what it is a share of."""

    label: str
    value: float
    low: float
    high: float
    n: int
    hollow: bool = False


class Rates(NamedTuple):
    """Shares with intervals, one row each."""

    name: str
    title: str
    xlabel: str
    rows: Sequence[Rate]
    colour: str


class Shares(NamedTuple):
    """Rows of counts that add up to a whole: drawn as bars of 100 %."""

    name: str
    title: str
    parts: Sequence[str]
    colours: Sequence[str]
    rows: Sequence[tuple[str, Sequence[int]]]


class Spread(NamedTuple):
    """How one quantity spreads over the rows of a group: a histogram on a log axis with median and quartiles."""

    label: str
    colour: str
    edges: Sequence[float]  # log10
    counts: Sequence[int]
    zeros: int
    quantiles: tuple[float, float, float]  # lower quartile, median, upper quartile; not logarithms


class Spreads(NamedTuple):
    """Spreads of several groups under each other, on one axis."""

    name: str
    title: str
    xlabel: str
    rows: Sequence[Spread]
    limits: tuple[float, float]  # of the axis, log10


class Grid(NamedTuple):
    """A small table of numbers in 0…1, shaded."""

    name: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    top: float


class Bars(NamedTuple):
    """Named amounts."""

    name: str
    title: str
    xlabel: str
    rows: Sequence[tuple[str, float]]


class Draws(NamedTuple):
    """What random draws came to, each a tick on the axis, and where the one value lies that is compared with them."""

    name: str
    title: str
    xlabel: str
    draws: Sequence[float]
    label: str
    value: float
    colour: str


Panel = Lines | Rates | Shares | Spreads | Grid | Bars | Draws


class Plot(NamedTuple):
    """A figure: panels, and the words that go with them."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    columns: int = 3


def describe(panel: Panel) -> str:
    """The panel in words and numbers: its alternative text."""
    match panel:
        case Lines():
            band = [f"{panel.band_label} {panel.band[0][-1]:.3g} to {panel.band[1][-1]:.3g}"] if panel.band else []
            parts = [f"{line.label} {line.values[-1]:.3g}" for line in panel.lines] + band
            return f"{panel.title}, {panel.ylabel}, at {panel.xlabel} {panel.x[-1]:g}: {', '.join(parts)}."
        case Rates():
            return (
                f"{panel.title}: "
                + ", ".join(
                    f"{r.label} {100 * r.value:.0f} % ({100 * r.low:.0f} to {100 * r.high:.0f})" for r in panel.rows
                )
                + "."
            )
        case Shares():
            counted = [
                f"{label}: " + ", ".join(f"{n} {part}" for n, part in zip(counts, panel.parts, strict=True))
                for label, counts in panel.rows
            ]
            return f"{panel.title}. {'; '.join(counted)}."
        case Spreads():
            return (
                f"{panel.title}, {panel.xlabel}, medians: "
                + ", ".join(f"{row.label} {row.quantiles[1]:.3g}" for row in panel.rows)
                + "."
            )
        case Grid():
            cells = [f"{row}: " + ", ".join(f"{c} {100 * v:.1f}" for c, v in zip(panel.columns, line, strict=True) if v is not None)
                     for row, line in zip(panel.rows, panel.values, strict=True)]  # fmt: skip
            return f"{panel.title}. {'; '.join(cells)}."
        case Draws():
            return f"{panel.title}, {panel.xlabel}: {panel.label} {panel.value:.4g}; {len(panel.draws)} random draws from {min(panel.draws):.4g} to {max(panel.draws):.4g}."
        case Bars():
            return (
                f"{panel.title}, {panel.xlabel}: "
                + ", ".join(f"{label} {value:.1f}" for label, value in panel.rows)
                + "."
            )
