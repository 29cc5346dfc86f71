"""Plain values of the report's pictures: a panel is a NamedTuple of numbers and words, and `describe` says it in words.

A panel is one small picture; a plot is its panels side by side. `drawing.py` draws them, tests check them here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """One line: its label stands at its end. `values` are as many as the panel's `x`, or as its own.

    low, high: the borders of its own band, as many as the values; nothing for none.
    """

    label: str
    values: Sequence[float]
    colour: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    x: Sequence[float] = ()
    dash: str = "-"


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
    reach: tuple[float, float] | None = None  # of the x axis, where several panels are to stand over each other
    logy: bool = False
    keyed: bool = False  # the labels stand in a key below, not at the lines' ends


class Stack(NamedTuple):
    """Lines one above the other over one and the same x, so that they are read at the same steps."""

    name: str
    title: str
    panels: Sequence[Lines]


class Rate(NamedTuple):
    """A share with its interval, and what it is a share of; of several seeds, also the share of each."""

    label: str
    value: float
    low: float
    high: float
    n: int
    hollow: bool = False
    seeds: Sequence[float] = ()


class Rates(NamedTuple):
    """Shares with intervals, one row each."""

    name: str
    title: str
    xlabel: str
    rows: Sequence[Rate]
    colour: str


class Compared(NamedTuple):
    """Shares of several arms under each other in every row, and where all of them came from."""

    name: str
    title: str
    xlabel: str
    arms: Sequence[str]
    colours: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Rate]]]
    start: Rate


class Mark(NamedTuple):
    """An effect: its value with limits, that of each seed, and what random groups came to, where there are any.

    start: where it came from (drawn open). note: words at the end of the row.
    """

    label: str
    value: float
    colour: str
    low: float | None = None
    high: float | None = None
    seeds: Sequence[float] = ()
    draws: Sequence[float] = ()
    start: float | None = None
    note: str = ""


class Effects(NamedTuple):
    """Effects on one axis. neutral: where nothing happened. zones: (from, to, label) that are shaded."""

    name: str
    title: str
    xlabel: str
    rows: Sequence[Mark]
    neutral: float | None = None
    zones: Sequence[tuple[float, float, str]] = ()
    reach: tuple[float, float] | None = None  # of the axis; from what is drawn if not given


class Shares(NamedTuple):
    """Rows of counts that add up to a whole: drawn as bars of 100 %."""

    name: str
    title: str
    parts: Sequence[str]
    colours: Sequence[str]
    rows: Sequence[tuple[str, Sequence[int]]]


class Spread(NamedTuple):
    """How one quantity spreads: a histogram on a log axis, its median, and its quartiles or its mean where known."""

    label: str
    colour: str
    edges: Sequence[float]  # log10
    counts: Sequence[int]
    zeros: int
    median: float  # not a logarithm, nor are the others
    quartiles: tuple[float, float] | None = None
    mean: float | None = None


class Spreads(NamedTuple):
    """Spreads under each other, on one axis. of: what is counted."""

    name: str
    title: str
    xlabel: str
    rows: Sequence[Spread]
    limits: tuple[float, float]  # of the axis, log10
    of: str = "rows"


class Grid(NamedTuple):
    """A small table of numbers, shaded up to `top`; shown times `scale`, which makes shares per cent."""

    name: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    top: float
    scale: float = 100.0


class Point(NamedTuple):
    """A point with limits of its y where they are known. filled: it is told apart from the others. named: its label is to be shown."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    filled: bool = True
    named: bool = True
    colour: str = "blue"


class Scatter(NamedTuple):
    """Points, with a line through some of them. joined: its corners. steps: the line goes in steps, as a front of the best does."""

    name: str
    title: str
    xlabel: str
    ylabel: str
    points: Sequence[Point]
    joined: Sequence[tuple[float, float]] = ()
    steps: bool = True
    logx: bool = False
    ticks: Sequence[float] = ()  # of the x axis; chosen if not given


class Amount(NamedTuple):
    """A named amount, with its limits where they are known. note: words at the end of the row."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: str = "blue"
    note: str = ""


class Amounts(NamedTuple):
    """Amounts with intervals: bars from zero, or dots where zero is far away (`bars` false) or the axis is a logarithm's."""

    name: str
    title: str
    xlabel: str
    rows: Sequence[Amount]
    bars: bool = True
    log: bool = False


class Bars(NamedTuple):
    """Named amounts."""

    name: str
    title: str
    xlabel: str
    rows: Sequence[tuple[str, float]]


Panel = Lines | Stack | Rates | Compared | Effects | Shares | Spreads | Grid | Bars | Scatter | Amounts


class Plot(NamedTuple):
    """A figure: panels, and the words that go with them."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    columns: int = 3


def reach_of(panels: Sequence[Effects]) -> tuple[float, float]:
    """The axis of effects: everything that is drawn, and the borders of the zones, with some room."""
    values = [panel.neutral for panel in panels if panel.neutral is not None]
    values += [
        border for panel in panels for start, end, _ in panel.zones for border in (start, end) if math.isfinite(border)
    ]
    for mark in (mark for panel in panels for mark in panel.rows):
        values += [mark.value, *mark.seeds, *mark.draws]
        values += [value for value in (mark.low, mark.high, mark.start) if value is not None]
    low, high = min(values), max(values)
    room = 0.07 * (high - low) or 0.5
    return low - room, high + room


def on_one_axis(panels: Sequence[Effects]) -> list[Effects]:
    """Effects that are to be compared: their axes reach as far."""
    return [panel._replace(reach=reach_of(panels)) for panel in panels]


def describe(panel: Panel) -> str:
    """The panel in words and numbers: its alternative text."""
    match panel:
        case Lines():
            return f"{panel.title}, {_at_the_end(panel)}."
        case Stack():
            return f"{panel.title}. {'; '.join(_at_the_end(lines) for lines in panel.panels)}."
        case Rates():
            return f"{panel.title}: {', '.join(_rate(row) for row in panel.rows)}."
        case Compared():
            rows = [f"{label}: {', '.join(_rate(rate) for rate in rates)}" for label, rates in panel.rows]
            return f"{panel.title}, from {_rate(panel.start)}. {'; '.join(rows)}."
        case Effects():
            return f"{panel.title}, {panel.xlabel}: {'; '.join(_mark(row) for row in panel.rows)}."
        case Shares():
            counted = [
                f"{label}: {', '.join(f'{n} {part}' for n, part in zip(counts, panel.parts, strict=True))}"
                for label, counts in panel.rows
            ]
            return f"{panel.title}. {'; '.join(counted)}."
        case Spreads():
            medians = ", ".join(f"{row.label} {row.median:.3g}" for row in panel.rows)
            return f"{panel.title}, {panel.xlabel}, medians: {medians}."
        case Grid():
            rows = [f"{row}: {_cells(panel, values)}" for row, values in zip(panel.rows, panel.values, strict=True)]
            return f"{panel.title}. {'; '.join(rows)}."
        case Bars():
            return f"{panel.title}, {panel.xlabel}: {', '.join(f'{label} {value:.1f}' for label, value in panel.rows)}."
        case Scatter():
            said = (f"{p.label} {_said(p.y)}{_limits(p.low, p.high)} at {_said(p.x)}" for p in panel.points)
            return f"{panel.title}, {panel.ylabel} against {panel.xlabel}: {'; '.join(said)}."
        case Amounts():
            said = (f"{row.label} {_said(row.value)}{_limits(row.low, row.high)}" for row in panel.rows)
            return f"{panel.title}, {panel.xlabel}: {'; '.join(said)}."


def _at_the_end(panel: Lines) -> str:
    parts = []
    for line in panel.lines:
        at = f" at {line.x[-1]:g}" if line.x and line.x[-1] != panel.x[-1] else ""
        band = f" ({line.low[-1]:.3g} to {line.high[-1]:.3g})" if line.low else ""
        parts.append(f"{line.label} {line.values[-1]:.3g}{band}{at}")
    if panel.band:
        parts.append(f"{panel.band_label} {panel.band[0][-1]:.3g} to {panel.band[1][-1]:.3g}")
    return f"{panel.ylabel}, at {panel.xlabel} {panel.x[-1]:g}: {', '.join(parts)}"


def _limits(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({_said(low)} to {_said(high)})"


def _said(value: float) -> str:
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "−")


def _rate(rate: Rate) -> str:
    return f"{rate.label} {100 * rate.value:.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f})"


def _mark(mark: Mark) -> str:
    said = f"{mark.label} {mark.value:.4g}"
    if mark.start is not None:
        said += f", from {mark.start:.4g}"
    if mark.low is not None and mark.high is not None:
        said += f" ({mark.low:.4g} to {mark.high:.4g})"
    if mark.seeds:
        said += f", by seed {', '.join(f'{value:.4g}' for value in mark.seeds)}"
    if mark.draws:
        said += f", {len(mark.draws)} random groups from {min(mark.draws):.4g} to {max(mark.draws):.4g}"
    return said.replace("-", "−")


def _cells(panel: Grid, values: Sequence[float | None]) -> str:
    named = zip(panel.columns, values, strict=True)
    return ", ".join(f"{column} {panel.scale * value:.1f}" for column, value in named if value is not None)
