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
