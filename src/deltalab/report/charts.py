"""Pictures of groups beside each other: points with intervals, named amounts, and the keys of many lines."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from deltalab.report.panels import Amounts, Lines, Point, Scatter
from deltalab.report.style import BAND, COLOURS, FAINT, INK, LINE, ON, WIDTH, Box, beside, power, wrapped

SIZE = 8.0
"""Points of a label beside a point."""
LETTERS, LINES = 0.069, 0.135
"""Inches of a letter and of a line of such a label."""
STEPS = [1, 2, 2.5, 5, 10]
FAR = 0.12
"""Inches between a label and its point from which a line joins them."""
CROWD = 12
"""Points up to which labels keep off the others' limits too."""
KEY = 0.066
"""Inches of a letter in a key."""


def scatter(ax: Axes, panel: Scatter) -> None:
    """Points, their limits, the line through some, and as many names as there is room for."""
    xs = [point.x for point in panel.points]
    if panel.logx:
        ax.set_xscale("log")
        room = max(1.15, (max(xs) / min(xs)) ** 0.08)
        ax.set_xlim(min(xs) / room, max(xs) * room)
        logarithmic(ax.xaxis)
    else:
        room = 0.08 * (max(xs) - min(xs)) or 0.5
        ax.set_xlim(min(xs) - room if min(xs) < room * 2 else max(0.0, min(xs) - room), max(xs) + room)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}".replace("-", "−"))
    if panel.ticks:
        ax.xaxis.set_major_locator(FixedLocator(panel.ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda x, _: short(x))
    ys = [y for point in panel.points for y in (point.y, point.low, point.high) if y is not None]
    room = 0.08 * (max(ys) - min(ys)) or 0.05 * abs(max(ys)) or 0.5
    ax.set_ylim(min(ys) - room, max(ys) + room)
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.4g}".replace("-", "−"))
    ax.set_xlabel(panel.xlabel)
    ax.set_ylabel(panel.ylabel)
    if panel.joined:
        style: dict[str, Any] = {"drawstyle": "steps-post"} if panel.steps else {}
        ax.plot(*zip(*panel.joined, strict=True), color=COLOURS["blue"] if not panel.steps else FAINT, linewidth=1.4, zorder=1, **style)  # fmt: skip
    for point in panel.points:
        _point(ax, point)
    _names(ax, panel)


def _point(ax: Axes, point: Point) -> None:
    colour = COLOURS[point.colour]
    if point.low is not None and point.high is not None:
        ax.plot([point.x, point.x], [point.low, point.high], color=colour, linewidth=1.3, alpha=0.75, solid_capstyle="butt", zorder=2)  # fmt: skip
    ax.plot(point.x, point.y, "o", markersize=6.5, color=colour, markerfacecolor=colour if point.filled else ON, markeredgewidth=1.5, zorder=3, clip_on=False)  # fmt: skip


def _names(ax: Axes, panel: Scatter) -> None:
    """Each name beside its point; one that finds no room is left out. Those of filled points are placed first."""
    frame, dpi = ax.get_window_extent(), ax.figure.dpi

    def at(x: float, y: float) -> tuple[float, float]:
        found = ax.transData.transform((x, y))
        return float(found[0] - frame.x0) / dpi, float(found[1] - frame.y0) / dpi

    points, taken = panel.points, list[Box]()
    for (x0, y0), (x1, y1) in itertools.pairwise(at(*corner) for corner in panel.joined):
        taken += [(x0, y0 - 0.02, x1, y0 + 0.02), (x1 - 0.02, min(y0, y1), x1 + 0.02, max(y0, y1))]
    for point in points:
        (x, low), (_, high), (_, y) = (at(point.x, point.y if v is None else v) for v in (point.low, point.high, point.y))  # fmt: skip
        taken += [(x - 0.02, low, x + 0.02, high)] if len(points) <= CROWD else []
        taken += [(x - 0.05, y - 0.05, x + 0.05, y + 0.05)]
    named = sorted((point for point in points if point.named), key=lambda point: not point.filled)
    labels = [wrapped(point.label) for point in named]
    sizes = [(LETTERS * max(map(len, label.split("\n"))), LINES * (label.count("\n") + 1)) for label in labels]
    within = (0.03, 0.03, float(frame.width) / dpi + 0.15, float(frame.height) / dpi + 0.1)
    places = beside([at(point.x, point.y) for point in named], sizes, taken, within)
    for point, label, size, place in zip(named, labels, sizes, places, strict=True):
        if place is not None:
            _name(ax, point, label, (place[0] * dpi / frame.width, place[1] * dpi / frame.height), size)


def _name(ax: Axes, point: Point, label: str, at: tuple[float, float], size: tuple[float, float]) -> None:
    """A label with its middle at `at`, in shares of the axes; a thin line leads to the point from one that is far.

    size: of the label, in inches.
    """
    said = ax.text(*at, label, transform=ax.transAxes, fontsize=SIZE, ha="center", va="center", color=COLOURS[point.colour], linespacing=1.05, zorder=5)  # fmt: skip
    said.set_path_effects([withStroke(linewidth=2.2, foreground=ON)])
    frame, dpi = ax.get_window_extent(), ax.figure.dpi
    there = ax.transAxes.inverted().transform(ax.transData.transform((point.x, point.y)))
    half = [side * dpi / long / 2 for side, long in zip(size, (frame.width, frame.height), strict=True)]
    edge = [min(max(b, a - h), a + h) for a, b, h in zip(at, there, half, strict=True)]
    if math.hypot((edge[0] - there[0]) * frame.width, (edge[1] - there[1]) * frame.height) > FAR * dpi:
        ax.plot(*zip(edge, there, strict=True), color=FAINT, linewidth=0.7, transform=ax.transAxes, zorder=2.5)


def amounts(ax: Axes, panel: Amounts) -> None:
    """A row an amount: a bar, or a dot on a stem, with its limits."""
    ends = [v for row in panel.rows for v in (row.value, row.low, row.high) if v is not None]
    if panel.log:
        ax.set_xscale("log")
        left, right = 10 ** math.floor(math.log10(min(ends)) - 0.05), 1.15 * max(ends)
    elif panel.bars:
        left, right = min(0.0, *ends), max(0.0, *ends) * 1.04 or 1.0
    else:
        room = 0.1 * (max(ends) - min(ends)) or 0.5
        left, right = min(ends) - room, max(ends) + room
    ax.set_xlim(left, right)
    for y, row in enumerate(panel.rows):
        colour = COLOURS[row.colour]
        if panel.bars and not panel.log:
            ax.barh(y, row.value, height=0.58, color=colour, linewidth=0, alpha=0.85)
        else:
            ax.plot([left, row.value] if panel.log else [left, right], [y, y], color=colour if panel.log else BAND, linewidth=1.0, alpha=0.6, zorder=1)  # fmt: skip
            ax.plot(row.value, y, "o", markersize=6.5, color=colour, markeredgewidth=0, zorder=3, clip_on=False)
        if row.low is not None and row.high is not None:
            bar = panel.bars and not panel.log
            ax.plot([row.low, row.high], [y, y], color=INK if bar else colour, linewidth=1.5, solid_capstyle="butt", zorder=2)  # fmt: skip
        ax.annotate(row.note, (1.03, y), xycoords=("axes fraction", "data"), fontsize=8.5, va="center", annotation_clip=False)  # fmt: skip
    if panel.log:
        logarithmic(ax.xaxis)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}".replace("-", "−"))
    ax.set_xlabel(panel.xlabel)
    rows_down(ax, [row.label for row in panel.rows])


def rows_down(ax: Axes, labels: Sequence[str], pad: float = 0.6) -> None:
    """Named rows from the top down."""
    ax.set_yticks(range(len(labels)), [wrapped(label) for label in labels])
    ax.tick_params(axis="y", length=0, pad=7)
    ax.set_ylim(len(labels) - 1 + pad, -pad)


def key_of(panel: Lines) -> tuple[int, float]:
    """Columns of the key below lines, and its height in inches."""
    longest = max(len(line.label) for line in panel.lines)
    columns = max(1, min(len(panel.lines), int((WIDTH - 0.2) / (KEY * longest + 0.46))))
    return columns, LINE * 1.12 * math.ceil(len(panel.lines) / columns) + 0.08


def key(ax: Axes, panel: Lines) -> None:
    """The lines' labels in rows below the axes."""
    columns = key_of(panel)[0]
    lines = [
        line for column in range(columns) for line in panel.lines[column::columns]
    ]  # a legend fills its columns first
    handles = [Line2D([], [], color=COLOURS[line.colour], linestyle=line.dash, linewidth=1.8) for line in lines]
    frame, dpi = ax.get_window_extent(), ax.figure.dpi
    left, below = 0.6 * dpi / frame.width, 0.46 * dpi / frame.height
    ax.legend(handles, [line.label for line in lines], loc="upper left", bbox_to_anchor=(-left, -below), ncols=columns,
              frameon=False, fontsize=8.5, handlelength=1.9, handletextpad=0.5, columnspacing=1.2, labelspacing=0.25, borderpad=0, borderaxespad=0)  # fmt: skip


def logarithmic(axis: Any) -> None:
    """Ticks that are read: 1, 2, 5 where few decades are shown."""
    low, high = axis.get_view_interval()
    span = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0,) if span > 2.5 else (1.0, 2.0, 5.0) if span > 0.8 else tuple(range(1, 10)), numticks=8 if span > 2.5 else 20))  # fmt: skip
    axis.set_major_formatter(lambda x, _: short(x))
    axis.set_minor_formatter(NullFormatter())


def short(x: float) -> str:
    """`20 k`, `0.05`, `3·10⁻⁴`: a number at a tick."""
    if x == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g} {letter}".replace("-", "−")
    if abs(x) >= 0.001:
        return f"{x:g}".replace("-", "−")
    exponent = math.floor(math.log10(abs(x)) + 1e-9)
    times = f"{x / 10**exponent:.3g}"
    return power(exponent, "" if times == "1" else f"{times}·")
