"""Figures from plain values: a panel is a NamedTuple of numbers and words, and one function draws its kind.

A panel is one small picture. A figure is its panels side by side: the files (PNG, SVG) hold them together, the page
lays them out one by one, so it reads on a wide screen and on a narrow one. Colours are Okabe and Ito's order of hues,
darkened until they read as text on white; inline, each is a CSS variable, so the page can lighten them at night.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.ticker import NullFormatter

from deltalab.core.files import replacing

INK, FAINT, BAND, ON = "#1b1f24", "#8a9099", "#b9bec6", "#fefefe"  # ON: text on a filled colour
COLOURS = {"orange": "#b84a00", "blue": "#0062a3", "green": "#00704f", "purple": "#9a3f7c", "grey": "#646b75"}
WIDTH, LETTER = 4.3, 0.073  # inches: a panel, and a letter of a label
_STYLE = {
    "font.size": 9.5, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.linewidth": 0.8, "text.color": INK,
    "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "xtick.major.size": 3, "ytick.major.size": 3, "svg.fonttype": "path", "svg.hashsalt": "deltalab",
    "axes.unicode_minus": True,
}  # fmt: skip


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


Panel = Lines | Rates | Shares | Spreads | Grid | Bars


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
            return f"{panel.title}: " + ", ".join(f"{r.label} {100 * r.value:.0f} % ({100 * r.low:.0f} to {100 * r.high:.0f})" for r in panel.rows) + "."
        case Shares():
            counted = [f"{label}: " + ", ".join(f"{n} {part}" for n, part in zip(counts, panel.parts, strict=True)) for label, counts in panel.rows]
            return f"{panel.title}. {'; '.join(counted)}."
        case Spreads():
            return f"{panel.title}, {panel.xlabel}, medians: " + ", ".join(f"{row.label} {row.quantiles[1]:.3g}" for row in panel.rows) + "."
        case Grid():
            cells = [f"{row}: " + ", ".join(f"{c} {100 * v:.1f}" for c, v in zip(panel.columns, line, strict=True) if v is not None)
                     for row, line in zip(panel.rows, panel.values, strict=True)]  # fmt: skip
            return f"{panel.title}. {'; '.join(cells)}."
        case Bars():
            return f"{panel.title}, {panel.xlabel}: " + ", ".join(f"{label} {value:.1f}" for label, value in panel.rows) + "."


def save(plot: Plot, folder: str | Path) -> list[Path]:
    """Write the figure as `<name>.png` (200 dpi) and `<name>.svg`, all panels together; returns the two paths."""
    figure = draw(plot.panels, plot.columns)
    paths = [Path(folder) / f"{plot.name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        with replacing(path) as tmp, matplotlib.rc_context(_STYLE):
            figure.savefig(tmp, format=path.suffix[1:], dpi=200, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def inline(panel: Panel, number: int) -> str:
    """One panel as an `<svg>` element for a page: ids made unique by `number`, colours as CSS variables, no size."""
    with matplotlib.rc_context(_STYLE):
        buffer = io.StringIO()
        draw([panel], 1).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{number}-", svg)
    for name, colour in {"ink": INK, "faint": FAINT, "band": BAND, "on": ON, **COLOURS}.items():
        svg = svg.replace(colour, f"var(--{name})")
    attributes = re.search(r'viewBox="([^"]+)"', svg)
    assert attributes, "matplotlib's SVG has a viewBox"
    width = float(attributes[1].split()[2])
    head = f'<svg viewBox="{attributes[1]}" role="img" aria-label="{html.escape(describe(panel))}" style="max-width:{width * 1.5:.0f}px" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"\s*\n\s*", "\n", head + svg[svg.index(">") + 1 :])


def draw(panels: Sequence[Panel], columns: int) -> Figure:
    """The panels on a grid, each as tall as its rows need.

    Margins are set from the labels' lengths: measuring text, as a layout engine does, takes most of the time of drawing.
    """
    columns = min(columns, len(panels))
    lines = [list(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    heights = [max(_size(panel).height for panel in line) for line in lines]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH * columns, sum(heights)))
        FigureCanvasAgg(figure)
        for i, line in enumerate(lines):
            for j, panel in enumerate(line):
                size, top = _size(panel), sum(heights[i + 1 :]) + heights[i]
                box = (WIDTH * j + size.left, top - size.height + size.bottom, WIDTH - size.left - size.right, size.height - size.top - size.bottom)
                ax = figure.add_axes((box[0] / (WIDTH * columns), box[1] / sum(heights), box[2] / (WIDTH * columns), box[3] / sum(heights)))
                ax.set_title(panel.title, pad=8)
                _DRAW[type(panel)](ax, panel)
    return figure


class _Size(NamedTuple):
    """A panel's height and margins, in inches."""

    height: float
    left: float
    right: float
    top: float
    bottom: float


def _size(panel: Panel) -> _Size:
    if isinstance(panel, Lines):
        labels = [line.label for line in panel.lines] + [panel.band_label]
        return _Size(2.95, 0.62, 0.2 + LETTER * max(map(len, labels)), 0.36, 0.52)
    labels = [row if isinstance(row, str) else row[0] for row in panel.rows]
    left = 0.16 + LETTER * max(map(len, labels), default=0)
    row, top, bottom = {Spreads: (0.5, 0.36, 0.56), Grid: (0.36, 0.36, 0.6), Shares: (0.33, 0.58, 0.56)}.get(type(panel), (0.31, 0.36, 0.56))
    return _Size(top + bottom + 0.12 + row * len(labels), left, {Rates: 0.52, Bars: 0.15}.get(type(panel), 0.12), top, bottom)


def _lines(ax: Axes, panel: Lines) -> None:
    if panel.band:
        ax.fill_between(panel.x, *panel.band, color=BAND, alpha=0.55, linewidth=0, zorder=1)
    for line in panel.lines:
        ax.plot(panel.x, line.values, color=COLOURS[line.colour], linewidth=1.8, marker="o", markersize=2.8, zorder=3, clip_on=False)
    ends = [(line.values[-1], line.label, COLOURS[line.colour]) for line in panel.lines]
    if panel.band:
        ends.append(((panel.band[0][-1] + panel.band[1][-1]) / 2, panel.band_label, INK))
    ax.set_xlabel(panel.xlabel)
    ax.set_xlim(panel.x[0], panel.x[-1] if len(panel.x) > 1 else panel.x[0] + 1)
    low, high = ax.get_ylim()
    high = panel.top or high
    if all(v >= 0 for line in panel.lines for v in line.values):
        low = 0.0
    ax.set_ylim(low, high if high > low else low + 1)
    power = math.floor(math.log10(abs(ax.get_ylim()[1]))) if ax.get_ylim()[1] else 0
    power = 0 if -2 < power < 4 else power
    ax.yaxis.set_major_formatter(lambda y, _: f"{y / 10**power:.3g}".replace("-", "−"))
    ax.set_ylabel(panel.ylabel + (f",  {_power(power, '× ')}" if power else ""))
    height = ax.get_ylim()[1] - low
    for y, (value, label, colour) in zip(spread([e[0] for e in ends], 0.085 * height, low, low + height), ends, strict=True):
        ax.annotate(label, (panel.x[-1], value), (panel.x[-1] + 0.03 * (panel.x[-1] - panel.x[0] or 1), y), fontsize=8.5, color=colour,
                    va="center", annotation_clip=False)  # fmt: skip


def _rates(ax: Axes, panel: Rates) -> None:
    colour = COLOURS[panel.colour]
    for y, row in enumerate(panel.rows):
        ax.plot([100 * row.low, 100 * row.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        ax.plot(100 * row.value, y, "o", markersize=6.5, color=colour, markerfacecolor=ON if row.hollow else colour, markeredgewidth=1.6,
                clip_on=False, zorder=3)  # fmt: skip
        ax.annotate(f"{100 * row.value:.0f} %", (1.045, y), xycoords=("axes fraction", "data"), fontsize=8.5, va="center", annotation_clip=False)
    ax.set_xlim(0, 100)
    ax.set_xlabel(panel.xlabel)
    ax.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.7)
    _rows(ax, [row.label for row in panel.rows])


def _shares(ax: Axes, panel: Shares) -> None:
    for y, (_, counts) in enumerate(panel.rows):
        left, total = 0.0, sum(counts) or 1
        for count, colour in zip(counts, panel.colours, strict=True):
            share = 100 * count / total
            ax.barh(y, share, left=left, height=0.62, color=COLOURS[colour], linewidth=0)
            if share >= 9:
                ax.text(left + share / 2, y, f"{share:.0f} %", color=ON, fontsize=8.5, ha="center", va="center")
            left += share
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of replies, %")
    _rows(ax, [label for label, _ in panel.rows])
    ax.spines["left"].set_visible(False)
    ax.set_title(panel.title, pad=24)
    words = [TextArea(part, textprops={"color": COLOURS[colour], "size": 8.5, "weight": "bold"}) for part, colour in zip(panel.parts, panel.colours, strict=True)]
    ax.add_artist(AnchoredOffsetbox("lower left", child=HPacker(children=words, pad=0, sep=12), frameon=False, bbox_to_anchor=(0, 1.0),
                                    bbox_transform=ax.transAxes, pad=0.0, borderpad=0.3))  # fmt: skip


def _spreads(ax: Axes, panel: Spreads) -> None:
    for y, row in enumerate(panel.rows):
        colour, top = COLOURS[row.colour], max(row.counts, default=0)
        if not top:
            ax.annotate("did not move: exactly 0 in every row", (0.02, y), xycoords=("axes fraction", "data"), fontsize=8.5, color=colour, va="center")
            continue
        heights = [0.72 * c / top for c in row.counts]
        edges = [10**e for e in row.edges]
        ax.stairs([y + 0.18 - h for h in heights], edges, baseline=y + 0.18, fill=True, color=colour, alpha=0.35, linewidth=0)
        ax.plot([row.quantiles[0], row.quantiles[2]], [y + 0.27, y + 0.27], color=colour, linewidth=2.2, solid_capstyle="butt")
        ax.plot(row.quantiles[1], y + 0.27, "o", color=colour, markersize=5)
        if row.zeros:
            ax.annotate(f"{row.zeros} rows: 0", (0.0, y), xycoords=("axes fraction", "data"), fontsize=8, color=colour, va="center")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda x, _: _power(round(math.log10(x))))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(10 ** panel.limits[0], 10 ** panel.limits[1])
    ax.set_xlabel(panel.xlabel)
    _rows(ax, [row.label for row in panel.rows], pad=0.75)
    ax.spines["left"].set_visible(False)


def _grid(ax: Axes, panel: Grid) -> None:
    for y, line in enumerate(panel.values):
        for x, value in enumerate(line):
            if value is None:
                continue
            shade = min(1.0, value / panel.top)
            ax.barh(y, 0.96, left=x - 0.48, height=0.94, color=COLOURS["blue"], alpha=0.05 + 0.95 * shade, linewidth=0)
            ax.text(x, y, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=ON if shade > 0.6 else INK)
    ax.set_xlim(-0.5, len(panel.columns) - 0.5)
    ax.set_xticks(range(len(panel.columns)), panel.columns, fontsize=8, rotation=30 if max(map(len, panel.columns)) > 6 else 0)
    ax.tick_params(length=0)
    _rows(ax, panel.rows, pad=0.5)
    for side in ax.spines.values():
        side.set_visible(False)


def _bars(ax: Axes, panel: Bars) -> None:
    top = max((value for _, value in panel.rows), default=1.0) or 1.0
    for y, (_, value) in enumerate(panel.rows):
        ax.barh(y, value, height=0.6, color=COLOURS["blue"], linewidth=0)
        ax.text(value + 0.015 * top, y, f"{value:.1f}" if value < 100 else f"{value:.0f}", va="center", fontsize=8.5)
    ax.set_xlim(0, 1.12 * top)
    ax.set_xlabel(panel.xlabel)
    _rows(ax, [label for label, _ in panel.rows])


def _rows(ax: Axes, labels: Sequence[str], pad: float = 0.6) -> None:
    """Named rows from the top down."""
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(labels) - 1 + pad, -pad)


def _power(exponent: int, before: str = "") -> str:
    """10 to a power, in plain letters: matplotlib's own notation is set by a formula parser, which is slow."""
    return f"{before}10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near `values`, at least `gap` apart and within low…high where they fit: labels that do not overlap."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [0.0] * len(values)
    previous = low - gap
    for i in order:
        previous = placed[i] = max(values[i], previous + gap)
    ceiling = high + gap
    for i in reversed(order):
        ceiling = placed[i] = min(placed[i], ceiling - gap)
    return placed


_DRAW: dict[type, Any] = {Lines: _lines, Rates: _rates, Shares: _shares, Spreads: _spreads, Grid: _grid, Bars: _bars}
