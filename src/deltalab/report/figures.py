"""Figures from plain values: one function for each kind of panel.

The files (PNG, SVG) hold a plot's panels together; the page lays them out one by one, so it reads on a wide screen and
on a narrow one. Colours are Okabe and Ito's order of hues,
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
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.ticker import MaxNLocator, NullFormatter

from deltalab.core.files import replacing
from deltalab.report.panels import Bars, Draws, Grid, Lines, Panel, Plot, Rates, Shares, Spreads, describe

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


def save(plot: Plot, folder: str | Path) -> list[Path]:
    """Write the figure as `<name>.png` (200 dpi) and `<name>.svg`, all panels together; returns the two paths."""
    figure = draw(plot.panels, plot.columns)
    paths = [Path(folder) / f"{plot.name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        with replacing(path) as tmp, matplotlib.rc_context(_STYLE):
            figure.savefig(
                tmp,
                format=path.suffix[1:],
                dpi=200,
                facecolor="white",
                metadata={"Date": None} if path.suffix == ".svg" else None,
            )
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
                box = (
                    WIDTH * j + size.left,
                    top - size.height + size.bottom,
                    WIDTH - size.left - size.right,
                    size.height - size.top - size.bottom,
                )
                ax = figure.add_axes(
                    (
                        box[0] / (WIDTH * columns),
                        box[1] / sum(heights),
                        box[2] / (WIDTH * columns),
                        box[3] / sum(heights),
                    )
                )
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
    if isinstance(panel, Draws):
        return _Size(2.95, 0.25, 0.25, 0.36, 0.52)
    if isinstance(panel, Lines):
        labels = [line.label for line in panel.lines] + [panel.band_label]
        return _Size(2.95, 0.62, 0.2 + LETTER * max(map(len, labels)), 0.36, 0.52)
    labels = [row if isinstance(row, str) else row[0] for row in panel.rows] + (
        ["100 of 10,000 rows at 0"] if isinstance(panel, Spreads) and any(row.zeros for row in panel.rows) else []
    )
    left = 0.16 + LETTER * max(map(len, labels), default=0)
    row, top, bottom = {Spreads: (0.5, 0.36, 0.56), Grid: (0.36, 0.36, 0.6), Shares: (0.33, 0.58, 0.56)}.get(
        type(panel), (0.31, 0.36, 0.56)
    )
    return _Size(
        top + bottom + 0.12 + row * len(panel.rows), left, {Rates: 0.52, Bars: 0.15}.get(type(panel), 0.12), top, bottom
    )


def _lines(ax: Axes, panel: Lines) -> None:
    if panel.band:
        ax.fill_between(panel.x, *panel.band, color=BAND, alpha=0.55, linewidth=1.2, zorder=1)
    for line in panel.lines:
        ax.plot(
            panel.x,
            line.values,
            color=COLOURS[line.colour],
            linewidth=1.8,
            marker="o",
            markersize=2.8,
            zorder=3,
            clip_on=False,
        )
    ends = [(line.values[-1], line.label, COLOURS[line.colour]) for line in panel.lines]
    if panel.band:
        ends.append(((panel.band[0][-1] + panel.band[1][-1]) / 2, panel.band_label, INK))
    ax.set_xlabel(panel.xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlim(panel.x[0], panel.x[-1] if len(panel.x) > 1 else panel.x[0] + 1)
    low, high = ax.get_ylim()
    high = panel.top or high
    if panel.zero and all(v >= 0 for line in panel.lines for v in line.values):
        low = 0.0
    ax.set_ylim(low, high if high > low else low + 1)
    power = math.floor(math.log10(abs(ax.get_ylim()[1]))) if ax.get_ylim()[1] else 0
    power = 0 if -2 < power < 4 else power
    ax.yaxis.set_major_formatter(lambda y, _: f"{y / 10**power:.4g}".replace("-", "−"))
    ax.set_ylabel(panel.ylabel + (f",  {_power(power, '× ')}" if power else ""))
    height = ax.get_ylim()[1] - low
    for y, (value, label, colour) in zip(
        spread([e[0] for e in ends], 0.085 * height, low, low + height), ends, strict=True
    ):
        ax.annotate(label, (panel.x[-1], value), (panel.x[-1] + 0.03 * (panel.x[-1] - panel.x[0] or 1), y), fontsize=8.5, color=colour,
                    va="center", annotation_clip=False)  # fmt: skip


def _rates(ax: Axes, panel: Rates) -> None:
    colour = COLOURS[panel.colour]
    for y, row in enumerate(panel.rows):
        ax.plot([100 * row.low, 100 * row.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        ax.plot(100 * row.value, y, "o", markersize=6.5, color=colour, markerfacecolor=ON if row.hollow else colour, markeredgewidth=1.6,
                clip_on=False, zorder=3)  # fmt: skip
        ax.annotate(
            f"{100 * row.value:.0f} %",
            (1.045, y),
            xycoords=("axes fraction", "data"),
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )
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
            if share >= 13:
                ax.text(left + share / 2, y, f"{share:.0f} %", color=ON, fontsize=8.5, ha="center", va="center")
            left += share
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of replies, %")
    _rows(ax, [label for label, _ in panel.rows])
    ax.spines["left"].set_visible(False)
    ax.set_title(panel.title, pad=24)
    words: list[Artist] = [
        TextArea(part, textprops={"color": COLOURS[colour], "size": 8.5, "weight": "bold"})
        for part, colour in zip(panel.parts, panel.colours, strict=True)
    ]
    ax.add_artist(AnchoredOffsetbox("lower left", child=HPacker(children=words, pad=0, sep=12), frameon=False, bbox_to_anchor=(0, 1.0),
                                    bbox_transform=ax.transAxes, pad=0.0, borderpad=0.3))  # fmt: skip


def _spreads(ax: Axes, panel: Spreads) -> None:
    for y, row in enumerate(panel.rows):
        colour, top = COLOURS[row.colour], max(row.counts, default=0)
        if not top:
            ax.annotate(
                "did not move: exactly 0 in every row",
                (0.02, y),
                xycoords=("axes fraction", "data"),
                fontsize=8.5,
                color=colour,
                va="center",
            )
            continue
        heights = [0.72 * c / top for c in row.counts]
        edges = [10**e for e in row.edges]
        ax.stairs(
            [y + 0.18 - h for h in heights], edges, baseline=y + 0.18, fill=True, color=colour, alpha=0.35, linewidth=0
        )
        ax.plot(
            [row.quantiles[0], row.quantiles[2]],
            [y + 0.27, y + 0.27],
            color=colour,
            linewidth=2.2,
            solid_capstyle="butt",
        )
        ax.plot(row.quantiles[1], y + 0.27, "o", color=colour, markersize=5)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda x, _: _power(round(math.log10(x))))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(10 ** panel.limits[0], 10 ** panel.limits[1])
    ax.set_xlabel(panel.xlabel)
    _rows(
        ax,
        [
            row.label
            + (f"\n{row.zeros:,} of {row.zeros + sum(row.counts):,} rows at 0" if row.zeros and sum(row.counts) else "")
            for row in panel.rows
        ],
        pad=0.75,
    )
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
    ax.set_xticks(
        range(len(panel.columns)), panel.columns, fontsize=8, rotation=30 if max(map(len, panel.columns)) > 6 else 0
    )
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


def _draws(ax: Axes, panel: Draws) -> None:
    counts, edges = np.histogram(panel.draws, bins=15)
    ax.stairs(counts, edges, fill=True, color=BAND, alpha=0.8, linewidth=0)
    ax.axvline(panel.value, ymax=0.82, color=COLOURS[panel.colour], linewidth=2)
    right = panel.value > (min(*panel.draws, panel.value) + max(*panel.draws, panel.value)) / 2
    ax.annotate(
        panel.label,
        (panel.value, 0.86),
        xycoords=("data", "axes fraction"),
        fontsize=8.5,
        color=COLOURS[panel.colour],
        ha="right" if right else "left",
    )
    middle = float(np.median(panel.draws))
    ax.annotate(
        f"{len(panel.draws)} matched random",
        (middle, 0.97),
        xycoords=("data", "axes fraction"),
        fontsize=8.5,
        color=INK,
        ha="left" if right else "right",
        va="top",
    )
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_ylim(0, 1.3 * max(counts))
    ax.margins(x=0.12)
    ax.locator_params(axis="x", nbins=5)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.4g}")
    ax.set_xlabel(panel.xlabel)


def _rows(ax: Axes, labels: Sequence[str], pad: float = 0.6) -> None:
    """Named rows from the top down."""
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0, pad=7)
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


_DRAW: dict[type, Any] = {
    Lines: _lines,
    Rates: _rates,
    Shares: _shares,
    Spreads: _spreads,
    Grid: _grid,
    Bars: _bars,
    Draws: _draws,
}
