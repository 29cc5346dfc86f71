"""Figures from panels: laid out, and written as files or as parts of the page.

The files (PNG, SVG, PDF) hold a plot's panels together; the page lays them out one by one, so it reads on a wide screen and
on a narrow one. Inline, each colour is a CSS variable, so the page can lighten it at night.
"""

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltalab.core.files import replacing
from deltalab.report.charts import key_of
from deltalab.report.drawing import DRAW
from deltalab.report.panels import (
    Amounts,
    Bars,
    Compared,
    Effects,
    Grid,
    Lines,
    Panel,
    Plot,
    Rates,
    Scatter,
    Shares,
    Spreads,
    Stack,
    describe,
)
from deltalab.report.style import BAND, COLOURS, FAINT, INK, LETTER, LINE, ON, WIDTH, labels_of, wrapped

_STYLE = {
    "font.size": 9.5, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.linewidth": 0.8, "text.color": INK,
    "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "xtick.major.size": 3, "ytick.major.size": 3, "svg.fonttype": "path", "svg.hashsalt": "deltalab",
    "axes.unicode_minus": True, "pdf.fonttype": 42, "text.parse_math": False,
}  # fmt: skip


TITLE = 46
"""Letters of a title that fit in full size."""


class Size(NamedTuple):
    """A panel's height and margins, in inches."""

    height: float
    left: float
    right: float
    top: float
    bottom: float


class Row(NamedTuple):
    """Of a panel of rows, in inches: the height of a row, and the margins."""

    height: float = 0.31
    right: float = 0.12
    top: float = 0.36
    bottom: float = 0.56


ROWS = {
    Rates: Row(right=0.52), Bars: Row(right=0.15), Shares: Row(0.33, top=0.58), Spreads: Row(0.5), Grid: Row(0.36, bottom=0.6),
    Compared: Row(0.5, right=0.2, top=0.58), Effects: Row(0.5, right=0.2), Amounts: Row(right=0.2),
}  # fmt: skip


DATES: dict[str, dict[str, None] | None] = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Kinds of files, and what keeps a date out of each: the same figure is the same bytes."""


def save(plot: Plot, folder: str | Path) -> list[Path]:
    """Write the figure as `<name>.png` (200 dpi), `<name>.svg` and `<name>.pdf`, all panels together; returns the paths."""
    figure = draw(plot.panels, plot.columns)
    paths = [Path(folder) / f"{plot.name}.{kind}" for kind in DATES]
    for path in paths:
        with replacing(path) as tmp, matplotlib.rc_context(_STYLE):
            figure.savefig(
                tmp,
                format=path.suffix[1:],
                dpi=200,
                facecolor="white",
                metadata=DATES[path.suffix[1:]],
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
    head = (
        f'<svg viewBox="{attributes[1]}" role="img" aria-label="{html.escape(describe(panel))}" '
        f'style="max-width:{width * 1.5:.0f}px" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"\s*\n\s*", "\n", head + svg[svg.index(">") + 1 :])


def draw(panels: Sequence[Panel], columns: int) -> Figure:
    """The panels on a grid, each as tall as its rows need.

    Margins are set from the labels' lengths: measuring text, as a layout engine does, takes most of the time of drawing.
    """
    columns = min(columns, len(panels))
    lines = [list(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    heights = [max(size_of(panel).height for panel in line) for line in lines]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH * columns, sum(heights)))
        FigureCanvasAgg(figure)
        for i, line in enumerate(lines):
            for j, panel in enumerate(line):
                paint(figure, panel, WIDTH * j, sum(heights[i:]))
    return figure


def size_of(panel: Panel) -> Size:
    """The room that a panel takes, from the lengths of its labels."""
    if isinstance(panel, Stack):
        parts = [size_of(lines) for lines in panel.panels]
        left, right = max(part.left for part in parts), max(part.right for part in parts)
        return Size(0.1 + sum(part.height for part in parts), left, right, 0.36, 0.52)
    if isinstance(panel, Lines):
        if panel.keyed:
            height = key_of(panel)[1]
            return Size(2.95 + height, 0.68, 0.2, 0.36, 0.52 + height)
        labels = [line.label for line in panel.lines] + [panel.band_label]
        return Size(2.95, 0.68, 0.2 + LETTER * max(map(len, labels)), 0.36, 0.52)
    if isinstance(panel, Scatter):
        return Size(3.1, 0.68, 0.3, 0.36, 0.52)
    row, labels = ROWS[type(panel)], [wrapped(label) for label in labels_of(panel)]
    right, top = row.right, row.top
    if isinstance(panel, Amounts):
        right += LETTER * max((len(row.note) for row in panel.rows), default=0)
    if isinstance(panel, Effects):
        right += LETTER * max((len(mark.note) for mark in panel.rows), default=0)
        top += LINE if any(label for _, _, label in panel.zones) else 0
    lines = [line for label in labels for line in label.split("\n")]
    tallest = max((label.count("\n") + 1 for label in labels), default=1)
    height = top + row.bottom + 0.12 + max(row.height, LINE * tallest + 0.06) * len(panel.rows)
    return Size(height, 0.16 + LETTER * max(map(len, lines), default=0), right, top, row.bottom)


def paint(figure: Figure, panel: Panel, left: float, top: float) -> None:
    """Draw the panel on a figure, its upper left corner at (left, top) inches from the figure's lower left one."""
    size = size_of(panel)
    if isinstance(panel, Stack):
        for lines in panel.panels:
            height = size_of(lines).height
            _paint(figure, lines, left, top, size._replace(height=height))
            top -= height
        return
    _paint(figure, panel, left, top, size)


def _paint(figure: Figure, panel: Panel, left: float, top: float, size: Size) -> None:
    width, height = figure.get_size_inches()
    box = (
        (left + size.left) / width,
        (top - size.height + size.bottom) / height,
        (WIDTH - size.left - size.right) / width,
        (size.height - size.top - size.bottom) / height,
    )
    ax = figure.add_axes(box)
    points = 10 * min(1.0, TITLE / max(len(panel.title), 1))
    figure.text((left + 0.06) / width, (top - 0.25) / height, panel.title, size=points, weight="bold", color=INK)
    DRAW[type(panel)](ax, panel)
