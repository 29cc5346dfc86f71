"""The trainings of a study, and where its time went."""

from typing import Any

from deltalab.report.panels import Bars, Line, Lines, Plot
from deltalab.report.values import (
    ARM_COLOURS,
    LONG,
    Cell,
    Record,
    Section,
    Table,
    cells,
    number,
    place,
    seeds,
    short,
    tuned,
)

STAGES = {
    "scores": "scores", "groups": "groups", "evaluate": "replies", "ablate": "replies at zero", "tune": "tuning", "verdict": "verdicts",
    "select": "scores to select", "before": "scores before", "after": "scores after",
}  # fmt: skip
MANY = 14
"""Stages from which those of one sort are added up."""


def section(record: Record) -> Section:
    """Losses, times and sizes of the trainings."""
    plots = [_losses(record), _times(record)]
    return Section("training", "Training and times", [plot for plot in plots if plot.panels], [_table(record)])


def _losses(record: Record) -> Plot:
    panels = [panel for cell in cells(record) for panel in _of_cell(cell, len(cells(record)) == 1)]
    caption = "Mean loss per reply token on the tuning data" + (", over seeds." if seeds(record) > 1 else ".")
    return Plot("losses", "Training loss", caption, panels)


def _of_cell(cell: Cell, held_out: bool) -> list[Lines]:
    out = []
    for key, title in (("losses", "Training loss"), ("held_out", "Held-out loss")):
        curves = {arm: one["training"].get(key) for arm, one in cell.arms.items()}
        first = next(iter(curves.values()))
        if not first or (key == "held_out" and not held_out):
            continue
        x = [step for step, _ in first]
        lines = [
            Line(short(cell.arms[arm]), [loss for _, loss in curve], ARM_COLOURS[i % len(ARM_COLOURS)])
            for i, (arm, curve) in enumerate(curves.items()) if curve and [step for step, _ in curve] == x
        ]  # fmt: skip
        name = f"{key}-{cell.name}" if cell.name else key
        out.append(Lines(name, place(cell, title), x, "optimizer step", "loss, nats per token", lines, zero=False))
    return out


def _times(record: Record) -> Plot:
    seconds = {name: float(value) for name, value in record["stages"].items()}
    rows = [(_stage(name), value) for name, value in seconds.items()]
    if len(rows) > MANY:
        sorts: dict[str, list[float]] = {}
        for name, value in seconds.items():
            sorts.setdefault(STAGES.get(name.partition(":")[0], name), []).append(value)
        rows = [(sort if len(of) == 1 else f"{sort}, {len(of)} times", sum(of)) for sort, of in sorts.items()]
    caption = f"{sum(seconds.values()):.0f} s in all stages together; tunings may have run side by side."
    return Plot("times", "Where the time went", caption, [Bars("times", "Time by stage", "seconds", rows)])


def _stage(name: str) -> str:
    sort, _, of = name.partition(":")
    return f"{STAGES.get(sort, sort)}: {of}" if of else STAGES.get(sort, sort)


def _table(record: Record) -> Table:
    rows = [(arm["label"], *_facts(arm["training"])) for arm in tuned(record).values()]
    head = ("", "trained parameters", "samples", "steps", "tokens", "time", "first loss", "last loss")
    note = "Means over seeds." if seeds(record) > 1 else ""
    return Table("training", "Training", head, rows, note, folded=len(rows) > LONG)


def _facts(training: dict[str, Any]) -> tuple[str, ...]:
    samples = training.get("samples")
    return (
        f"{training['trained']:,}", "—" if samples is None else f"{samples:,}", str(training["steps"]), f"{training['tokens']:,}",
        f"{training['seconds']:.0f} s", number(training["losses"][0][1]), number(training["losses"][-1][1]),
    )  # fmt: skip
