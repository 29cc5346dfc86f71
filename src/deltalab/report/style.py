"""What figures share: colours, letters, how labels are wrapped and set apart.

Colours are Okabe and Ito's order of hues, darkened until they read as text on white.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

from deltalab.report.panels import Spread, Spreads

INK, FAINT, BAND, ON = "#1b1f24", "#8a9099", "#b9bec6", "#fefefe"  # ON: text on a filled colour
COLOURS = {"orange": "#b84a00", "blue": "#0062a3", "green": "#00704f", "purple": "#9a3f7c", "grey": "#646b75"}
WIDTH, LETTER, LINE = 4.3, 0.073, 0.15  # inches: a panel, a letter of a label, a line of a label
PALETTE = [(colour, dash) for dash in ("-", "--", ":") for colour in COLOURS]
"""Colour and dash of the first line of many, the second, and so on."""
WRAP = 23
"""Letters of a row's label in one line."""


def wrapped(label: str) -> str:
    """A row's label in lines that leave room for what it names."""
    return "\n".join(textwrap.fill(line, WRAP, break_long_words=False) for line in label.split("\n"))


def labels_of(panel: Any) -> list[str]:
    """The labels of a panel's rows."""
    if isinstance(panel, Spreads):
        return [row.label + _zeros(row, panel.of) for row in panel.rows]
    return [row if isinstance(row, str) else row[0] for row in panel.rows]


def _zeros(row: Spread, of: str) -> str:
    """How many were at zero, where the histogram shows the others."""
    total = row.zeros + sum(row.counts)
    if not 0 < row.zeros < total:
        return ""
    share = 100 * row.zeros / total
    return f"\n{share:.1f} % of {of} at 0" if share >= 0.1 else f"\n{row.zeros} of {of} at 0"


def power(exponent: int, before: str = "") -> str:
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


Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def beside(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], taken: Sequence[Box], within: Box, gap: float = 0.07
) -> list[tuple[float, float] | None]:  # fmt: skip
    """Where labels of points go, as the middle of each: beside its point, over no other label and nothing that is taken.

    All in one unit. sizes: width and height of each label. A label that finds no room has no place: the first are served first.
    """
    placed: list[tuple[float, float] | None] = []
    boxes = list(taken)
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        far = [(x + dx * (width / 2 + step), y + dy * (height / 2 + (step if dx == 0 else step * abs(dy))))
               for step in (gap, 2 * gap, 4 * gap, 7 * gap) for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))]  # fmt: skip
        tried = ((a, b, (a - width / 2, b - height / 2, a + width / 2, b + height / 2)) for a, b in far)
        free = next(((a, b, box) for a, b, box in tried if _inside(box, within) and not any(_meet(box, other) for other in boxes)), None)  # fmt: skip
        placed.append(None if free is None else free[:2])
        boxes += [] if free is None else [free[2]]
    return placed


def _inside(box: Box, outer: Box) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
