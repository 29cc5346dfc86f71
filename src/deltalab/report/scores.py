"""What became of the scores: of groups and of all weights, before a tuning and after it, and how sure that is."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deltalab.report.panels import Effects, Line, Lines, Mark, Panel, Plot, Spread, Spreads, on_one_axis
from deltalab.report.values import (
    LONG,
    Record,
    Section,
    Table,
    Tile,
    capital,
    group_colour,
    limits,
    number,
    p_value,
    percent,
    pictured,
    seeds,
    tuned,
)
from deltalab.report.verdicts import Told, several, tests, told, with_limits

AFTER = {"base": "base weights, tuned activations", "merged": "merged weights"}
"""The two scores after tuning in words."""
COLOURS = {"base": "blue", "merged": "orange"}
GROUPS = {"safety": "safety", "matched": "matched random", "all": "all weights"}


def section(record: Record) -> Section:
    """Figures and tables of the scores."""
    plots = [_changes(record), *(_of_arm(record, key, arm) for key, arm in pictured(record).items())]
    tables = [
        *_verdict_table(record),
        _summaries(record),
        *_selection(record),
        *tests(told(record, "score"), "tests-scores"),
    ]
    return Section("scores", "What became of the scores", [plot for plot in plots if plot.panels], tables)


def tiles(record: Record) -> list[Tile]:
    """The change of the group's mean score, of the first arm."""
    out = []
    for what, label in AFTER.items():
        one = next((one for one in told(record, "score") if one.name == f"score, {what}"), None)
        if one:
            value = with_limits(one.numbers["change"], None, None)
            out.append(Tile(f"Score of '{record['focus']}', {what}", value, _note(one, label)))
    return out


def _note(one: Told, label: str) -> str:
    low, high = one.numbers["low"], one.numbers["high"]
    return f"{label}; one seed" if low is None else f"{label}; {limits(100 * low, 100 * high, 1)}"


# ---- the verdicts' pictures ---------------------------------------------------------------------------------------


def _changes(record: Record) -> Plot:
    """The relative change among those of random groups, with the borders of the hypotheses."""
    panels = []
    for what, label in AFTER.items():
        verdicts = [one for one in told(record, "score") if one.name == f"score, {what}"]
        if verdicts:
            marks = [_mark(record, one, what) for one in verdicts]
            fall, stable = verdicts[0].numbers["fall"], verdicts[0].numbers["stable"]
            zones = [(-math.inf, -100 * fall, "A"), (-100 * stable, 100 * stable, "B")]
            panels.append(Effects(f"score-{what}", capital(label), "change of the mean score, %", marks, 0.0, zones))
    caption = (
        "Mean score of the group after tuning against before, on samples that did not choose it. Zones: A, representational drift "
        "(it falls by more than the border), and B, global redistribution (it stays). Histograms: random groups matched on |W|. "
    )
    caption += _error(told(record, "score"))
    return Plot("score-changes", "Did the scores fall or stay?", caption, on_one_axis(panels), 2)


def _error(verdicts: Sequence[Told]) -> str:
    if not verdicts:
        return ""
    n = verdicts[0].numbers["seeds"]
    if verdicts[0].numbers["low"] is None:
        return "One seed: no interval."
    return f"Bar: 95 % {verdicts[0].numbers['error']}." + (f" Small dots: each of {n} seeds." if n > 1 else "")


def _mark(record: Record, one: Told, what: str) -> Mark:
    numbers = one.numbers
    arm = next((arm for arm in tuned(record).values() if arm["label"] == one.where), next(iter(tuned(record).values())))
    bounds = [None if numbers[side] is None else 100 * numbers[side] for side in ("low", "high")]
    points = [100 * value for value in several(numbers["per_seed"])]
    colour = COLOURS[what] if arm["freeze"]["variant"] == "none" else "green"
    note = with_limits(numbers["change"], None, None)
    return Mark(
        arm["label"],
        100 * numbers["change"],
        colour,
        bounds[0],
        bounds[1],
        points,
        _draws(record, arm, what),
        note=note,
    )


def _draws(record: Record, arm: dict[str, Any], what: str) -> list[float]:
    """The relative change of every random group, in per cent, means over seeds."""
    before = record["arms"]["before"]["scores"]["nulls"].get("magnitude", [])
    after = np.mean([one[what]["nulls"]["magnitude"] for one in arm["scores"]], axis=0) if before else []
    return [100 * (a / b - 1) for a, b in zip(after, before, strict=True) if b]


def _verdict_table(record: Record) -> list[Table]:
    rows = []
    for one in told(record, "score"):
        numbers = one.numbers
        null = numbers["nulls"].get(numbers["null"]) if numbers.get("null") else None
        what = AFTER.get(one.name.removeprefix("score, "), one.name)
        change = with_limits(numbers["change"], numbers["low"], numbers["high"])
        among = (
            (percent(null["null_change"], 1), percent(null["ratio"] - 1, 1), p_value(null["p"])) if null else ("—",) * 3
        )
        rows.append(
            (
                f"{what}, {one.where}" if one.where else what,
                number(_mean(numbers["before"])),
                number(_mean(numbers["after"])),
                change,
                *among,
                one.outcome,
            )
        )
    head = ("", "before", "after", "change", "of random groups", "beyond theirs", "p of that", "in a word")
    return [Table("score-changes", "Mean score of the group", head, rows, folded=len(rows) > LONG)] if rows else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- how scores lie -----------------------------------------------------------------------------------------------


def _part(summary: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = summary["all"] if name == "all" else summary["groups"][name]
    return found


def _names(record: Record) -> list[str]:
    """The groups that were measured, and all weights."""
    return [*record["arms"]["before"]["scores"]["groups"], "all"]


def _of_arm(record: Record, key: str, arm: dict[str, Any]) -> Plot:
    """How scores lie before and after, and how their means changed with depth."""
    caption = (
        "Histograms: scores before, and after of the base weights under the tuned activations (base) and of the merged weights "
        "(merged). Dot and bar: median and quartiles; diamond: mean. Lines: relative change of the mean score in each layer."
    )
    if seeds(record) > 1:
        caption += f" Histograms of all {seeds(record)} seeds together; lines are means over seeds."
    panels: list[Panel] = [*_histograms(record, key, arm), *_layers(record, key, arm)]
    return Plot(f"scores-{key}", f"Scores before and after: {arm['label']}", caption, panels)


def _histograms(record: Record, key: str, arm: dict[str, Any]) -> list[Spreads]:
    before = record["arms"]["before"]["scores"]
    edges = before["edges"]
    used = [edge for name in _names(record) for edge in _used(edges, _part(before, name)["counts"])]
    reach = (min(used, default=-1.0), max(used, default=0.0))
    panels = []
    for name in _names(record):
        rows = [_spread("before", "grey", edges, [_part(before, name)])]
        for what in AFTER:
            parts = [_part(one[what], name) for one in arm["scores"]]
            rows.append(_spread(f"after, {what}", COLOURS[what], edges, parts))
        panels.append(Spreads(f"scores-{key}-{name}", capital(GROUPS.get(name, name)), "score", rows, reach, "scores"))
    return panels


def _used(edges: Sequence[float], counts: Sequence[int]) -> list[float]:
    """The edges of the bins that hold something to see."""
    least = max(counts) / 300
    return [edge for i, count in enumerate(counts) if count > least for edge in edges[i : i + 2]]


def _spread(label: str, colour: str, edges: Sequence[float], parts: Sequence[dict[str, Any]]) -> Spread:
    """One row of histograms: counts of all seeds together, their mean quartiles and mean."""
    counts = [sum(column) for column in zip(*(part["counts"] for part in parts), strict=True)]
    zeros = sum(part["zeros"] for part in parts)
    low, median, high = (_mean(column) for column in zip(*(part["quartiles"] for part in parts), strict=True))
    return Spread(label, colour, edges, counts, zeros, median, (low, high), _mean([part["mean"] for part in parts]))


def _layers(record: Record, key: str, arm: dict[str, Any]) -> list[Lines]:
    ylabel = "change of the mean, %"
    panels = []
    for what, label in AFTER.items():
        changes = {name: _by_layer(record, arm, what, name) for name in _names(record)}
        x = list(next(iter(changes.values())))
        lines = [
            Line(GROUPS.get(name, name), list(change.values()), "blue" if name == "all" else group_colour(name))
            for name, change in changes.items() if list(change) == x
        ]  # fmt: skip
        if x:
            panels.append(Lines(f"layers-{key}-{what}", f"By layer: {label}", x, "layer", ylabel, lines, zero=False))
    return panels


def _by_layer(record: Record, arm: dict[str, Any], what: str, name: str) -> dict[int, float]:
    """Layer → relative change of the mean score in per cent, mean over seeds."""
    before = _part(record["arms"]["before"]["scores"], name)["layers"]
    after = [_part(one[what], name)["layers"] for one in arm["scores"]]
    layers = [layer for layer, value in before.items() if layer.isdigit() and value]
    return {int(layer): 100 * (_mean([one[layer] for one in after]) / before[layer] - 1) for layer in layers}


def _summaries(record: Record) -> Table:
    before = record["arms"]["before"]["scores"]
    names = _names(record)
    rows = [("before tuning", "", GROUPS.get(name, name), *_summary([_part(before, name)], None)) for name in names]
    for arm in tuned(record).values():
        for what in AFTER:
            for name in names:
                parts = [_part(one[what], name) for one in arm["scores"]]
                numbers = _summary(parts, _part(before, name)["mean"])
                rows.append((arm["label"], what, GROUPS.get(name, name), *numbers))
    head = ("", "score of", "weights", "mean", "change", "median", "sd", "at zero")
    note = "Means over seeds." if seeds(record) > 1 else ""
    return Table("scores", "Scores in numbers", head, rows, note, folded=len(rows) > 2 * LONG)


def _summary(parts: Sequence[dict[str, Any]], before: float | None) -> tuple[str, ...]:
    """Mean and its change, median, standard deviation, share at zero; means over seeds."""
    mean, sd = (_mean([part[key] for part in parts]) for key in ("mean", "sd"))
    median = _mean([part["quartiles"][1] for part in parts])
    zeros = _mean([part["zeros"] / part["n"] for part in parts])
    change = with_limits(mean / before - 1, None, None) if before else "—"
    return number(mean), change, number(median), number(sd), percent(zeros, 1)


def _selection(record: Record) -> list[Table]:
    """The luck of the chosen: the same untouched model, on the samples that chose the group and on the others."""
    chosen = record.get("selection")
    if not chosen:
        return []
    before, focus = record["arms"]["before"]["scores"], record["focus"]
    rows = []
    for label, there, here in (
        (f"group '{focus}'", chosen["groups"][focus]["mean"], before["groups"][focus]["mean"]),
        ("all weights", chosen["all"]["mean"], before["all"]["mean"]),
    ):
        rows.append((label, number(there), number(here), with_limits(here / there - 1, None, None)))
    head = ("", "on the samples that chose it", "on the samples that it is measured on", "difference")
    note = (
        "Mean scores of the untouched model. What the group loses here and all weights do not is the luck of being chosen: measured on "
        "the samples that chose it, a group falls by as much without any tuning."
    )
    return [Table("selection", "Before any tuning: the luck of the chosen", head, rows, note)]
