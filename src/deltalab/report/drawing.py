"""What is in each kind of panel: one function a kind, given the axes and the panel's plain values."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.ticker import MaxNLocator, NullFormatter

from deltalab.report.charts import amounts, key, logarithmic, rows_down, scatter
from deltalab.report.panels import (
    Amounts,
    Bars,
    Compared,
    Effects,
    Grid,
    Lines,
    Mark,
    Rate,
    Rates,
    Scatter,
    Shares,
    Spread,
    Spreads,
    reach_of,
)
from deltalab.report.style import BAND, COLOURS, FAINT, INK, ON, labels_of, power, spread

DOTS = 20
"""Values of a line with a key that get a dot each; of more, the line alone."""
FEW = 40
"""Random groups that are drawn one by one; more become a histogram."""


def _lines(ax: Axes, panel: Lines) -> None:
    if panel.band:
        ax.fill_between(panel.x, *panel.band, color=BAND, alpha=0.55, linewidth=1.2, zorder=1)
    for line in panel.lines:
        colour = COLOURS[line.colour]
        x = line.x or panel.x
        if line.low:
            ax.fill_between(x, line.low, line.high, color=colour, alpha=0.16, linewidth=0, zorder=2)
        dot = "" if panel.keyed and len(x) > DOTS else "o"
        ax.plot(x, line.values, line.dash, color=colour, linewidth=1.8, marker=dot, markersize=2.8, zorder=3, clip_on=False)  # fmt: skip
    ax.set_xlabel(panel.xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlim(panel.reach or (panel.x[0], panel.x[-1] if len(panel.x) > 1 else panel.x[0] + 1))
    if panel.keyed:
        key(ax, panel)
    if panel.logy:
        ax.set_yscale("log")
        ax.set_ylabel(panel.ylabel)
        logarithmic(ax.yaxis)
        return
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    low, high = ax.get_ylim()
    high = panel.top or high
    if panel.zero and all(v >= 0 for line in panel.lines for v in line.values):
        low = 0.0
    ax.set_ylim(low, high if high > low else low + 1)
    exponent = math.floor(math.log10(abs(ax.get_ylim()[1]))) if ax.get_ylim()[1] else 0
    exponent = 0 if -2 < exponent < 4 else exponent
    ax.yaxis.set_major_formatter(lambda y, _: f"{y / 10**exponent:.4g}".replace("-", "−"))
    ax.set_ylabel(panel.ylabel + (f",  {power(exponent, '× ')}" if exponent else ""))
    if not panel.keyed:
        _name_ends(ax, panel, low)


def _name_ends(ax: Axes, panel: Lines, low: float) -> None:
    """Each line's label at its end, apart from the others."""
    ends = [(line.values[-1], line.label, COLOURS[line.colour]) for line in panel.lines]
    if panel.band:
        ends.append(((panel.band[0][-1] + panel.band[1][-1]) / 2, panel.band_label, INK))
    ends = [end for end in ends if math.isfinite(end[0])]
    height = ax.get_ylim()[1] - low
    left, right = ax.get_xlim()
    beside = right + 0.03 * (right - left)
    places = spread([end[0] for end in ends], 0.085 * height, low, low + height)
    for y, (_, label, colour) in zip(places, ends, strict=True):
        ax.text(beside, y, label, fontsize=8.5, color=colour, va="center", clip_on=False)


def _rates(ax: Axes, panel: Rates) -> None:
    for y, row in enumerate(panel.rows):
        _rate(ax, row, y, COLOURS[panel.colour])
        ax.annotate(
            f"{100 * row.value:.0f} %",
            (1.045, y),
            xycoords=("axes fraction", "data"),
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )
    _of_100(ax, panel.xlabel)
    rows_down(ax, [row.label for row in panel.rows])


def _compared(ax: Axes, panel: Compared) -> None:
    ax.axvspan(100 * panel.start.low, 100 * panel.start.high, color=BAND, alpha=0.4, linewidth=0)
    ax.axvline(100 * panel.start.value, color=INK, linewidth=0.9)
    gap = 0.72 / max(len(panel.arms), 2)
    for y, (_, rates) in enumerate(panel.rows):
        for i, (rate, colour) in enumerate(zip(rates, panel.colours, strict=True)):
            _rate(ax, rate, y + gap * (i - (len(rates) - 1) / 2), COLOURS[colour], size=4.6)
    for y in range(1, len(panel.rows)):
        ax.axhline(y - 0.5, color=FAINT, alpha=0.3, linewidth=0.6)
    _of_100(ax, panel.xlabel)
    rows_down(ax, [label for label, _ in panel.rows])
    _legend(ax, panel.arms, panel.colours, right=True)


def _rate(ax: Axes, rate: Rate, y: float, colour: str, size: float = 6.5) -> None:
    """A share with its interval; the seeds' shares as small dots below it."""
    ax.plot([100 * rate.low, 100 * rate.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    face = ON if rate.hollow else colour
    ax.plot(100 * rate.value, y, "o", markersize=size, color=colour, markerfacecolor=face, markeredgewidth=1.6, clip_on=False, zorder=3)  # fmt: skip
    _seeds(ax, [100 * value for value in rate.seeds], y + 0.045 * size, colour)


def _seeds(ax: Axes, values: Sequence[float], y: float, colour: str) -> None:
    ax.plot(values, [y] * len(values), "o", markersize=2.6, color=colour, alpha=0.75, markeredgewidth=0, clip_on=False)


def _of_100(ax: Axes, xlabel: str) -> None:
    ax.set_xlim(0, 100)
    ax.set_xlabel(xlabel)
    ax.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.7)


def _effects(ax: Axes, panel: Effects) -> None:
    low, high = panel.reach or reach_of([panel])
    for start, end, label in panel.zones:
        start, end = max(start, low), min(end, high)
        if start < end:
            ax.axvspan(start, end, color=BAND, alpha=0.4, linewidth=0)
            ax.annotate(label, ((start + end) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 1), textcoords="offset points", fontsize=8, ha="center", va="bottom")  # fmt: skip
    if panel.neutral is not None:
        ax.axvline(panel.neutral, color=INK, linewidth=0.9)
    for y, mark in enumerate(panel.rows):
        _mark(ax, mark, y)
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.4g}".replace("-", "−"))
    ax.set_xlabel(panel.xlabel)
    rows_down(ax, [mark.label for mark in panel.rows])


def _mark(ax: Axes, mark: Mark, y: float) -> None:
    colour = COLOURS[mark.colour]
    if len(mark.draws) > FEW:
        counts, edges = np.histogram(mark.draws, bins=24)
        heights = 0.66 * counts / max(counts)
        ax.stairs(y + 0.24 - heights, edges, baseline=y + 0.24, fill=True, color=FAINT, alpha=0.55, linewidth=0)
    else:
        ax.vlines(mark.draws, y + 0.08, y + 0.3, color=FAINT, alpha=0.8, linewidth=1.2)
    if mark.low is not None and mark.high is not None:
        ax.plot([mark.low, mark.high], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt")
    if mark.start is not None:
        ax.plot(mark.start, y, "o", markersize=6, color=colour, markerfacecolor=ON, markeredgewidth=1.5, clip_on=False)
    ax.plot(mark.value, y, "o", markersize=6.5, color=colour, markeredgewidth=0, zorder=3, clip_on=False)
    _seeds(ax, mark.seeds, y + 0.3, colour)
    ax.annotate(mark.note, (1.03, y), xycoords=("axes fraction", "data"), fontsize=8.5, va="center", annotation_clip=False)  # fmt: skip


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
    rows_down(ax, [label for label, _ in panel.rows])
    ax.spines["left"].set_visible(False)
    _legend(ax, panel.parts, panel.colours)


def _legend(ax: Axes, labels: Sequence[str], colours: Sequence[str], right: bool = False) -> None:
    """The labels in their colours, below the title."""
    size = 8.5 * min(1.0, 52 / sum(map(len, labels)))
    words: list[Artist] = [
        TextArea(label, textprops={"color": COLOURS[colour], "size": size, "weight": "bold"})
        for label, colour in zip(labels, colours, strict=True)
    ]
    box = HPacker(children=words, pad=0, sep=10)
    ax.add_artist(AnchoredOffsetbox("lower right" if right else "lower left", child=box, frameon=False, bbox_to_anchor=(int(right), 1.0),
                                    bbox_transform=ax.transAxes, pad=0.0, borderpad=0.3))  # fmt: skip


def _spreads(ax: Axes, panel: Spreads) -> None:
    for y, row in enumerate(panel.rows):
        if any(row.counts):
            _spread(ax, row, y)
        else:
            words = f"exactly 0 in all {panel.of}"
            ax.annotate(words, (0.02, y), xycoords=("axes fraction", "data"), fontsize=8.5, color=COLOURS[row.colour], va="center")  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda x, _: power(round(math.log10(x))))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(10 ** panel.limits[0], 10 ** panel.limits[1])
    ax.set_xlabel(panel.xlabel)
    rows_down(ax, labels_of(panel), pad=0.75)
    ax.spines["left"].set_visible(False)


def _spread(ax: Axes, row: Spread, y: float) -> None:
    colour = COLOURS[row.colour]
    heights = [y + 0.18 - 0.72 * count / max(row.counts) for count in row.counts]
    edges = [10**edge for edge in row.edges]
    ax.stairs(heights, edges, baseline=y + 0.18, fill=True, color=colour, alpha=0.35, linewidth=0)
    if row.quartiles:
        ax.plot(row.quartiles, [y + 0.27, y + 0.27], color=colour, linewidth=2.2, solid_capstyle="butt")
    ax.plot(row.median, y + 0.27, "o", color=colour, markersize=5)
    if row.mean:
        ax.plot(row.mean, y + 0.27, "d", color=colour, markersize=5, markerfacecolor=ON)


def _grid(ax: Axes, panel: Grid) -> None:
    for y, line in enumerate(panel.values):
        for x, value in enumerate(line):
            if value is None:
                continue
            shade = min(1.0, value / panel.top)
            ax.barh(y, 0.96, left=x - 0.48, height=0.94, color=COLOURS["blue"], alpha=0.05 + 0.95 * shade, linewidth=0)
            ax.text(
                x,
                y,
                f"{panel.scale * value:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color=ON if shade > 0.6 else INK,
            )
    ax.set_xlim(-0.5, len(panel.columns) - 0.5)
    turned = max(map(len, panel.columns)) > 6
    ax.set_xticks(range(len(panel.columns)), panel.columns, fontsize=8, rotation=30 if turned else 0)
    ax.tick_params(length=0)
    rows_down(ax, panel.rows, pad=0.5)
    for side in ax.spines.values():
        side.set_visible(False)


def _bars(ax: Axes, panel: Bars) -> None:
    top = max((value for _, value in panel.rows), default=1.0) or 1.0
    for y, (_, value) in enumerate(panel.rows):
        ax.barh(y, value, height=0.6, color=COLOURS["blue"], linewidth=0)
        ax.text(value + 0.015 * top, y, f"{value:.1f}" if value < 100 else f"{value:.0f}", va="center", fontsize=8.5)
    ax.set_xlim(0, 1.12 * top)
    ax.set_xlabel(panel.xlabel)
    rows_down(ax, [label for label, _ in panel.rows])


DRAW: dict[type, Any] = {
    Lines: _lines, Rates: _rates, Compared: _compared, Effects: _effects, Shares: _shares, Spreads: _spreads, Grid: _grid, Bars: _bars,
    Scatter: scatter, Amounts: amounts,
}  # fmt: skip
