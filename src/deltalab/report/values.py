"""What a report is made of apart from pictures, how it writes numbers, and how it finds its way in a study's record.

Nothing is computed that the record does not hold; numbers are only chosen and put into words.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from deltalab.report.panels import Plot

Record = dict[str, Any]
Arms = dict[str, dict[str, Any]]

SETS = {"advbench": "AdvBench", "jailbreakbench": "JailbreakBench", "strongreject": "StrongREJECT", "harmbench": "HarmBench",
        "malicious_instruct": "MaliciousInstruct", "xstest_safe": "XSTest safe", "xstest_unsafe": "XSTest unsafe"}  # fmt: skip
GROUP_COLOURS = {"safety": "purple", "safety-only": "orange", "utility": "blue", "random": "green"}
ARM_COLOURS = ("orange", "blue", "green", "purple", "grey")
LONG = 10
"""Rows from which a table is folded."""


class Tile(NamedTuple):
    """A key figure: what it is, its value, and a line of context."""

    label: str
    value: str
    note: str


class Table(NamedTuple):
    """A table: words and numbers, formatted; the first column names its row. folded: long, and shown when asked for."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    folded: bool = False


class Section(NamedTuple):
    """A heading with its figures and tables."""

    id: str
    name: str
    plots: list[Plot]
    tables: list[Table]


class Cell(NamedTuple):
    """Arms that differ only in what is frozen; the first freezes nothing. name: what the cell differs in, '' for none."""

    name: str
    arms: Arms


# ---- words --------------------------------------------------------------------------------------------------------


def set_name(name: str) -> str:
    """The name of a prompt set as its authors write it."""
    return SETS.get(name, name)


def percent(value: float | None, digits: int = 0) -> str:
    """A share as per cent, or a dash."""
    if value is None:
        return "—"
    shown = f"{abs(100 * value):.{digits}f}"
    return f"{'−' if value < 0 and float(shown) else ''}{shown} %"


def interval(rate: dict[str, float]) -> str:
    """`61 % [51, 70]`."""
    return f"{100 * rate['value']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def number(value: float | None) -> str:
    """Three significant digits, without needless exponents."""
    if value is None or math.isnan(value):
        return "—"
    if value == 0:
        return "0"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def p_value(p: float | None) -> str:
    """A p-value; what rounds to nothing is `< 0.001`."""
    return "—" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def limits(low: float | None, high: float | None, digits: int = 3) -> str:
    """`[0.912, 1.043]`, or nothing where there are none."""
    if low is None or high is None:
        return ""
    return f"[{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def capital(text: str) -> str:
    """With a capital letter in front."""
    return text[:1].upper() + text[1:]


# ---- the record ---------------------------------------------------------------------------------------------------


def drift(values: dict[str, float | None], metric: str) -> float:
    """A measure of drift; not a number where it is undefined."""
    value = values[metric]
    return math.nan if value is None else value


def tuned(record: Record) -> Arms:
    """The arms that were tuned, in order."""
    return {name: arm for name, arm in record["arms"].items() if name != "before"}


def cells(record: Record) -> list[Cell]:
    """The tuned arms by what they share."""
    arms = tuned(record)
    names = dict.fromkeys(arm["cell"] for arm in arms.values())
    return [Cell(name, {key: arm for key, arm in arms.items() if arm["cell"] == name}) for name in names]


def short(arm: dict[str, Any]) -> str:
    """An arm's label without the cell that it is in."""
    return str(arm["label"]).removesuffix(f", {arm['cell']}") if arm["cell"] else str(arm["label"])


def pictured(record: Record) -> Arms:
    """The arms that get pictures of their own: all of one cell; of several cells, what each tuned without freezing."""
    found = cells(record)
    if len(found) == 1:
        return found[0].arms
    return {key: cell.arms[key] for cell in found for key in list(cell.arms)[:1]}


def place(cell: Cell, otherwise: str) -> str:
    """What a panel of one cell is called."""
    return cell.name or otherwise


def seeds(record: Record) -> int:
    """How many trainings each arm had."""
    return len(record["seeds"])


def harmful_sets(record: Record) -> list[str]:
    """The prompt sets that ought to be refused."""
    return [name for name, safety in record["arms"]["before"]["safety"].items() if safety["harmful"]]


def has_skills(record: Record) -> bool:
    """Whether skills were evaluated."""
    return bool(record["arms"]["before"].get("skills"))


def shown(name: str, arm: dict[str, Any]) -> str:
    """A group's name, marked where the arm froze it, or put it back when the training was over."""
    said = "matched random" if name == "matched" else name
    if arm["freeze"]["group"] != name:
        return said
    return f"{said} (put back)" if arm["freeze"]["variant"] == "rewind" else f"{said} (frozen)"


def group_colour(name: str) -> str:
    """The colour that a group has in every picture."""
    return GROUP_COLOURS.get(name, "grey")
