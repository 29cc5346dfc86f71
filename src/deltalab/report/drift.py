"""How far groups of weights drifted: the group in question against random groups of two kinds, through training and depth."""

import math
from collections.abc import Iterable
from typing import Any

from deltalab.report.panels import Effects, Line, Lines, Mark, Panel, Plot, Spread, Spreads, on_one_axis
from deltalab.report.values import (
    LONG,
    Cell,
    Record,
    Section,
    Table,
    capital,
    cells,
    drift,
    group_colour,
    limits,
    number,
    p_value,
    pictured,
    place,
    seeds,
    shown,
    tuned,
)
from deltalab.report.verdicts import Told, several, tests, told

METRICS = {
    "l2_per_sqrt": ("L2 per entry", "‖ΔW[G]‖ / √|G|"),
    "relative_norm": ("Relative change", "‖ΔW[G]‖ / ‖W₀[G]‖"),
    "cosine_distance": ("Cosine distance", "1 − cos(W₀[G], W[G])"),
}
MAIN = "l2_per_sqrt"
NULLS = {"magnitude": "matched on |W|", "utility": "matched on the utility score"}
"""Kinds of random groups in words."""
TIMES = "times the random groups' mean"
MEASURES = {"l2_per_sqrt": "L2 per entry", "cosine_distance": "angle turned"}
"""Measures that a verdict rests on."""


def section(record: Record) -> Section:
    """Figures and tables of the drift."""
    plots = [_against(record), *_curves(record), _distributions(record)]
    tables = [*_verdict_table(record), _table(record), *tests(told(record, "drift"), "tests-drift")]
    return Section("drift", "How far the weights moved", [plot for plot in plots if plot.panels], tables)


# ---- against random groups ----------------------------------------------------------------------------------------


def _against(record: Record) -> Plot:
    """The picture of the verdict; with a single cell also through training and through depth."""
    focus, found = record["focus"], cells(record)
    panels: list[Panel] = [*on_one_axis([panel for cell in found if (panel := _effect(record, cell))])]
    if len(found) == 1:
        free = next(iter(found[0].arms.values()))
        for kind in free["final"]:
            panels += [panel for panel in (_training(record, free, kind), _depth(record, free, kind)) if panel]
    n = " and ".join(
        f"{one['n']} {NULLS.get(kind, kind)}" for kind, one in next(iter(tuned(record).values()))["final"].items()
    )
    margin = record["spec"].get("margin")
    caption = (
        f"L2 per entry of '{focus}' over the mean of random groups with its count in each matrix ({n}); nothing frozen."
    )
    caption += " Histograms: the random groups." + (f" Grey zone: the margin of {100 * margin:g} %." if margin else "")
    caption += " Grey band: 2.5 % to 97.5 % of the random groups." if len(found) == 1 else ""
    if seeds(record) > 1:
        caption += (
            f" Bar: 95 % over {seeds(record)} seeds; small dots: each seed. Random groups are averaged over seeds."
        )
    return Plot("against", f"Does '{focus}' drift otherwise than chance?", caption, panels)


def _effect(record: Record, cell: Cell) -> Effects | None:
    """The group among the random groups of each kind, at the last step."""
    free = next(iter(cell.arms.values()))
    one = next((one for one in told(record, "drift") if one.where == cell.name), None)
    marks = []
    for kind, end in free["final"].items():
        found = one.numbers["nulls"].get(kind, {}).get(MAIN, {}) if one else {}
        value = found.get("ratio") or _mean(end["values"])
        points = several(found.get("per_seed") or end["values"])
        label = NULLS.get(kind, kind)
        marks.append(
            Mark(
                label,
                value,
                group_colour(record["focus"]),
                found.get("low"),
                found.get("high"),
                points,
                end["draws"],
                note=f"{value:.3f}",
            )
        )
    if not marks:
        return None
    margin = one.numbers.get("margin") if one else None
    zones = [(1 / (1 + margin), 1 + margin, "")] if margin else []
    name = "against-draws" + (f"-{cell.name}" if cell.name else "")
    return Effects(name, place(cell, f"{record['focus']} among random groups"), TIMES, marks, 1.0, zones)


def _mean(values: list[float]) -> float:
    """The geometric mean over seeds, as of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values)) if all(value > 0 for value in values) else 0.0


def _training(record: Record, arm: dict[str, Any], kind: str) -> Lines | None:
    rows = [
        (row["step"], drift(row["groups"][record["focus"]], MAIN), row["nulls"][kind]["band"][MAIN])
        for row in arm["curves"]
        if row["nulls"].get(kind)
    ]
    rows = [(step, value / band["mean"], band) for step, value, band in rows if band and band["mean"] > 0]
    if not rows:
        return None
    edges = ([band["low"] / band["mean"] for *_, band in rows], [band["high"] / band["mean"] for *_, band in rows])
    line = Line(record["focus"], [value for _, value, _ in rows], group_colour(record["focus"]))
    return Lines(f"against-steps-{kind}", f"Through training, {NULLS.get(kind, kind)}", [step for step, *_ in rows], "optimizer step",
                 TIMES, [line], edges, "random", zero=False)  # fmt: skip


def _depth(record: Record, arm: dict[str, Any], kind: str) -> Lines | None:
    layers = [(int(layer), one) for layer, one in arm["final"][kind]["layers"].items() if layer.isdigit()]
    if not layers:
        return None
    edges = ([one["low"] for _, one in layers], [one["high"] for _, one in layers])
    line = Line(record["focus"], [one["value"] for _, one in layers], group_colour(record["focus"]))
    return Lines(f"against-layers-{kind}", f"By layer, {NULLS.get(kind, kind)}", [layer for layer, _ in layers], "layer",
                 TIMES, [line], edges, "random", zero=False)  # fmt: skip


def _verdict_table(record: Record) -> list[Table]:
    rows = [row for one in told(record, "drift") for kind in one.numbers["nulls"] for row in _verdict_rows(one, kind)]
    head = (
        "",
        "times their mean",
        "over seeds",
        "95 % of them",
        "p, choice of entries",
        "p, seeds",
        "p, alike",
        "in their sd",
    )
    note = "p, alike: two one-sided tests that the difference lies within the margin. The first measure of the first kind decides."
    return (
        [Table("against", "The group against random groups", head, rows, note, folded=len(rows) > LONG)] if rows else []
    )


def _verdict_rows(one: Told, kind: str) -> list[tuple[str, ...]]:
    out: list[tuple[str, ...]] = []
    for measure, label in MEASURES.items():
        found = one.numbers["nulls"][kind].get(measure)
        if not found or found.get("ratio") is None:
            continue
        band = found.get("band") or {}
        out.append((
            ", ".join(filter(None, (label, NULLS.get(kind, kind), one.where))), f"{found['ratio']:.3f}",
            limits(found.get("low"), found.get("high")) or "—", limits(band.get("low"), band.get("high")) or "—",
            p_value(found.get("p_choice")), p_value(found.get("p_seeds")), p_value(found.get("p_same")), number(found.get("cohen_d")),
        ))  # fmt: skip
    return out


# ---- curves -------------------------------------------------------------------------------------------------------


def _curves(record: Record) -> list[Plot]:
    """Every arm in three measures; of a sweep, what is not frozen in one measure, cell by cell."""
    found, tops = cells(record), _tops(record)
    if len(found) > 1:
        panels = [
            _lines(record, key, cell.arms[key], MAIN, tops, place(cell, ""))
            for cell in found
            for key in list(cell.arms)[:1]
        ]
        caption = "L2 per entry of each group since step 0; nothing frozen. " + _BAND
        return [Plot("drift-cells", "Drift over steps, by cell", caption, panels)]
    plots = []
    for key, arm in tuned(record).items():
        panels = [_lines(record, key, arm, metric, tops, METRICS[metric][0]) for metric in METRICS]
        caption = f"Drift of each group's merged weights since step 0; {arm['label']}. {_BAND}{_overlaps(arm)}"
        plots.append(Plot(f"drift-{key}", f"Drift over steps: {arm['label']}", caption, panels))
    return plots


_BAND = "Grey band: 2.5 % to 97.5 % of random groups with the focus's count in each matrix and its spread of |W|."


def _overlaps(arm: dict[str, Any]) -> str:
    if not arm["freeze"]["group"]:
        return ""
    if arm["freeze"]["variant"] == "rewind":
        return " The curves are of the training; its group was put back after the last step."
    return " Other groups share some entries with the frozen one, and these do not move either."


def _tops(record: Record) -> dict[str, float]:
    """Measure → the end of the axis that all arms share."""
    groups = [group for arm in tuned(record).values() for row in arm["curves"] for group in row["groups"].values()]
    values = {metric: [drift(group, metric) for group in groups] for metric in METRICS}
    return {
        metric: 1.06 * max((v for v in found if not math.isnan(v)), default=0.0) for metric, found in values.items()
    }


def _lines(record: Record, key: str, arm: dict[str, Any], metric: str, tops: dict[str, float], title: str) -> Lines:
    rows = arm["curves"]
    lines = [
        Line(shown(name, arm), [drift(row["groups"][name], metric) for row in rows], group_colour(name))
        for name in _compared(rows[0]["groups"], arm)
    ]
    bands = [row["nulls"].get("magnitude", {}).get("band", {}).get(metric) for row in rows]
    low, high = ([band[side] if band else math.nan for band in bands] for side in ("low", "high"))
    steps = [row["step"] for row in rows]
    return Lines(f"drift-{key}-{metric}", title, steps, "optimizer step", METRICS[metric][1], lines, (low, high), "matched random",
                 tops[metric] or None)  # fmt: skip


def _compared(groups: Iterable[str], arm: dict[str, Any]) -> list[str]:
    """The groups to show: one matched random group says nothing beside the band of many, unless it is the frozen one."""
    return [name for name in groups if name != "matched" or arm["freeze"]["group"] == "matched"]


def _table(record: Record) -> Table:
    rows = []
    for arm in tuned(record).values():
        last = arm["curves"][-1]
        for name, values in last["groups"].items():
            band = last["nulls"].get("magnitude", {}).get("band", {}).get(MAIN) if name == record["focus"] else None
            among = f"{number(band['low'])} … {number(band['high'])}" if band else "—"
            rows.append((arm["label"], shown(name, arm), *(number(drift(values, metric)) for metric in METRICS), among))
    head = ("", "group", *(title for title, _ in METRICS.values()), "L2 per entry, matched random")
    note = (
        "; ".join(f"{title}: {unit}" for title, unit in METRICS.values()) + ". Matched random: 2.5 % to 97.5 % of them."
    )
    return Table("drift", "Drift at the last step", head, rows, note, folded=len(rows) > LONG)


# ---- row by row ---------------------------------------------------------------------------------------------------


def _distributions(record: Record) -> Plot:
    """Every arm that is pictured."""
    arms = pictured(record)
    used = [edge for arm in arms.values() for one in arm["distributions"].values() for edge in _used(one)]
    reach = (min(used, default=-1.0), max(used, default=0.0))
    xlabel = "‖ΔW‖ / √n within a row of a matrix"
    panels = [Spreads(f"rows-{key}", capital(arm["label"]), xlabel, _spreads(arm), reach) for key, arm in arms.items()]
    caption = (
        "Final drift by output row (one row of a weight matrix): the group's entries in that row, root mean square of ΔW. "
        "Dot and bar: median and quartiles." + (" The first seed." if seeds(record) > 1 else "")
    )
    return Plot("distributions", "Final drift, row by row", caption, panels)


def _used(one: dict[str, Any]) -> list[float]:
    """The edges of the bins that hold something."""
    return [edge for i, count in enumerate(one["counts"]) if count for edge in one["edges"][i : i + 2]]


def _spreads(arm: dict[str, Any]) -> list[Spread]:
    rows = []
    for name in _compared(arm["distributions"], arm):
        one = arm["distributions"][name]
        q = one["quantiles"]
        rows.append(
            Spread(
                shown(name, arm),
                group_colour(name),
                one["edges"],
                one["counts"],
                one["zeros"],
                q["0.5"],
                (q["0.25"], q["0.75"]),
            )
        )
    return rows
