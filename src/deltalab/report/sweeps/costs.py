"""What each group costs: tables, fronts of quality and cost, and the comparison in four panels."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from deltalab.lab.compare import Line, pareto
from deltalab.report.panels import Amount, Amounts, Panel, Plot, Point, Scatter
from deltalab.report.sweeps.gather import Gathered, measure_name, unit
from deltalab.report.sweeps.measures import ROWS, fixed, interval_note, signed
from deltalab.report.values import LONG, Section, Table, Tile, capital, number

WIDE = 20.0
"""How many times the least the most has to be for a logarithmic axis."""
NAMED = 12
"""Points that are all named; of more, those on the front and the baseline."""


class Cost(NamedTuple):
    """A column: its head in a table, and how its mean over seeds is written."""

    column: str
    head: str
    write: Callable[[float], str]


def _times(scale: float) -> Callable[[float], str]:
    return lambda value: number(scale * value)


TRAINING = (
    Cost("trained", "trained parameters", lambda v: f"{v:,.0f}"),
    Cost("trained_percent", "% of the model", number),
    Cost("trained_factor", "factor fewer", lambda v: f"{number(v)}×"),
    Cost("adapter_bytes", "adapter, MB", _times(1e-6)),
    Cost("training_seconds", "training, s", number),
    Cost("tokens_per_second", "tokens/s", number),
    Cost("step_seconds", "step, ms", _times(1e3)),
    Cost("memory_above", "memory above the base, MB", _times(1e-6)),
    Cost("saved_activations", "saved activations, MB", _times(1e-6)),
)
USE = (
    Cost("load_seconds", "load, ms", _times(1e3)),
    Cost("latency.base", "forward of the base, ms", _times(1e3)),
    Cost("latency.adapter", "with the adapter, ms", _times(1e3)),
    Cost("latency.merged", "merged, ms", _times(1e3)),
    Cost("merge.largest", "merge error, largest", number),
    Cost("merge.relative", "merge error, relative", number),
    Cost("merge.tolerance", "its tolerance", number),
    Cost("forgetting", "forgetting, nats/token", signed),
)


class Axis(NamedTuple):
    """A cost that is drawn: its column in units of `scale`, its title, and the label of its axis."""

    column: str
    title: str
    label: str
    scale: float = 1.0
    log: bool = False


AXES = (
    Axis("trained", "Parameters trained", "parameters trained", log=True),
    Axis("memory_above", "Memory", "memory above the base, MB", 1e-6),
    Axis("training_seconds", "Training time", "training, s"),
    Axis("adapter_bytes", "Storage", "adapter, MB", 1e-6),
)


def section(found: Gathered) -> Section:
    """Figures and tables of costs."""
    plots = [plot for plot in (_four(found), _fronts(found)) if plot.panels]
    tables = [_table(found, "training-cost", "What training costs", TRAINING), _table(found, "use-cost", "What using it costs", USE)]  # fmt: skip
    return Section("costs", "What it costs", plots, [table for table in tables if len(table.head) > 1])


def tiles(found: Gathered) -> list[Tile]:
    """How little the best trains."""
    factor, trained = found.mean(found.best, "trained_factor"), found.mean(found.best, "trained")
    if found.alike or factor is None or trained is None or factor <= 1:
        return []
    return [Tile("The best trains", f"{number(factor)}× fewer", f"{trained:,.0f} parameters, {number(100 / factor)} % of the model")]  # fmt: skip


def _table(found: Gathered, name: str, title: str, costs: Sequence[Cost]) -> Table:
    """A row a group; columns that nobody has are left out."""
    values = {one.column: [found.mean(group, one.column) for group in found.groups] for one in costs}
    there = [one for one in costs if any(value is not None for value in values[one.column])]
    rows = [
        (group, *("—" if (value := values[one.column][i]) is None else one.write(value) for one in there))
        for i, group in enumerate(found.groups)
    ]
    note = "Means over seeds." if found.seeds > 1 else "One seed."
    if any(one.column == "trained_factor" for one in there):
        note += " The factor is the model's parameters over those trained."
    if any(one.column == "forgetting" for one in there):
        note += " Forgetting: how much the loss of what the base knew rose, the mean over the tasks under `retain`; below zero, it fell."
    return Table(name, title, ("", *(one.head for one in there)), rows, note, folded=len(rows) > 2 * LONG)


def _fronts(found: Gathered) -> Plot:
    """The main measure against each cost that differs between groups."""
    panels = [panel for axis in AXES if (panel := _front(found, axis)) is not None]
    caption = (
        f"{interval_note(found)}{', of those on the front' if len(found.groups) > NAMED else ''}. Filled: on the front, no other group is better and "
        "cheaper by these means; an interval says how sure that is. The steps join the front. "
    )
    caption += "" if len(found.groups) <= NAMED else "Only groups on the front and the baseline are named. "
    caption += "Names that found no room are left out; the tables have all."
    return Plot("pareto", "Quality and cost", caption, panels, 2)


def _front(found: Gathered, axis: Axis) -> Scatter | None:
    costs = {line.group: value for line in found.ranked if (value := found.mean(line.group, axis.column)) is not None}
    lines = [line for line in found.ranked if line.group in costs]
    if len(set(costs.values())) < 2:
        return None
    front = pareto(lines, costs)
    few = len(lines) <= NAMED
    points = [
        Point(line.group, axis.scale * costs[line.group], line.mean, *(_ends(line) if few or line.group in front else (None, None)), line.group in front,
              few or line.group in front or line.group == found.baseline, "blue" if line.group in front else "grey")
        for line in lines
    ]  # fmt: skip
    at = {point.label: (point.x, point.y) for point in points}
    logx = min(costs.values()) > 0 and (axis.log or max(costs.values()) / min(costs.values()) >= WIDE)
    return Scatter(f"pareto-{axis.column}", axis.title, axis.label, unit(found.main), points, [at[name] for name in front], True, logx)  # fmt: skip


def _ends(line: Line) -> tuple[float | None, float | None]:
    return (line.interval.low, line.interval.high) if line.interval else (None, None)


def _four(found: Gathered) -> Plot:
    """Parameters, quality, memory or storage, and time of each group."""
    shown = found.shown(ROWS)
    lines = [line for line in found.lines[found.main] if line.group in shown]
    lines.sort(key=lambda line: shown.index(line.group))
    quality = Amounts("quality", capital(measure_name(found.main)), unit(found.main),
                      [Amount(line.group, line.mean, *_ends(line), _colour(found, line.group), fixed(line.mean)) for line in lines if line.mean == line.mean], found.rises)  # fmt: skip
    costs = {axis.column: _amounts(found, axis, shown) for axis in AXES}
    store = costs["memory_above"] or costs["adapter_bytes"]
    panels: list[Panel] = [panel for panel in (costs["trained"], quality, store, costs["training_seconds"]) if panel is not None]  # fmt: skip
    caption = f"{interval_note(found)} of {measure_name(found.main)}, {'more' if found.rises else 'less'} is better. Green: the best, grey: the baseline."  # fmt: skip
    caption += found.left_out(ROWS)
    return Plot("methods", "The groups beside each other", caption, panels if len(found.groups) > 1 else [], 2)


def _colour(found: Gathered, group: str) -> str:
    return "green" if group == found.best else "grey" if group == found.baseline else "blue"


def _amounts(found: Gathered, axis: Axis, shown: Sequence[str]) -> Amounts | None:
    values = {group: value for group in shown if (value := found.mean(group, axis.column)) is not None}
    if not values:
        return None
    log = min(values.values()) > 0 and max(values.values()) / min(values.values()) >= WIDE
    rows = [Amount(group, axis.scale * value, colour=_colour(found, group), note=f"{value:,.0f}" if axis.column == "trained" else number(axis.scale * value)) for group, value in values.items()]  # fmt: skip
    return Amounts(axis.column, axis.title, axis.label, rows, log=log)
