"""From a training run's record, and the curves beside it, to plain values: losses, scores, sizes."""

import itertools
from typing import Any

from deltalab.report.panels import Line, Lines, Plot, Rate, Rates
from deltalab.report.values import Record, Table, Tile, percent

POINTS = 60
"""Stretches of steps over which a loss curve is averaged."""


def tiles(record: Record) -> list[Tile]:
    """The few numbers that stand at the top."""
    result, sizes = record["result"], record["sizes"]
    out = [
        Tile("Loss", f"{result['loss'][0]:.3f} → {result['loss'][1]:.3f}", "nats per reply token, first and last steps")
    ]
    if held := result["held_out"]:
        out.append(
            Tile(
                "Held-out loss",
                f"{held[0]:.3f} → {held[-1]:.3f}",
                f"best {result['best']['loss']:.3f} at step {result['best']['step']}"
                if result["best"]
                else "first and last",
            )
        )
    for task, after in _accuracies(record).items():
        out.append(Tile(f"{task}, accuracy", f"{percent(record['scores']['before'][task]['accuracy'])} → {percent(after['accuracy'])}",
                        f"after: [{100 * after['low']:.0f}, {100 * after['high']:.0f}], n = {after['n']}"))  # fmt: skip
    out.append(
        Tile(
            "Trained",
            f"{sizes['trained']:,}",
            f"of {sizes['base']:,} parameters; adapter {sizes['adapter_bytes'] / 1024:,.0f} KiB",
        )
    )
    return out


def tables(record: Record) -> list[Table]:
    """The run in numbers."""
    result, sizes, data = record["result"], record["sizes"], record["data"]
    spec = record["spec"]
    rows = [("delta", "; ".join(f"{item['method']} on {_where(item)}" for item in spec["adapt"])), ("quantised", spec.get("quantize") or "no"),
            ("steps", f"{result['steps']:,}" + (" (stopped early)" if result["stopped_early"] else "")), ("tokens", f"{result['tokens']:,}"),
            ("training", f"{result['training_seconds']:.0f} s"), ("everything", f"{record['seconds']:.0f} s"), ("device", record["device"]),
            ("trained parameters", f"{sizes['trained']:,} of {sizes['base']:,}"), ("adapter", f"{sizes['adapter_bytes'] / 1024:,.0f} KiB"),
            ("samples", f"{data['samples']:,}"), ("held out", f"{data['held_out']:,}"),
            ("cut, skipped, unlabelled", f"{data['cut']}, {data['skipped']}, {data['unlabelled']}"), ("base", str(record["base"]))]  # fmt: skip
    return [Table("training", "The run", ("", "value"), rows)]


def _where(item: Record) -> str:
    """The targets of a delta, or which of the model's own parameters train, as the spec has them."""
    names = item.get("targets", item.get("what"))
    return ", ".join(names) if isinstance(names, list) else str(names)


def plots(record: Record) -> list[Plot]:
    """Loss over steps, and the tasks' scores before and after."""
    curves, panels = record["curves"], []
    if train := curves.get("train"):
        size = -(-len(train) // POINTS)
        x, y = (list(values) for values in zip(*stretches(train, size), strict=True))
        panels.append(
            Lines("loss", "Training loss", x, "optimizer step", "loss, nats per token", [Line("training", y, "orange")])
        )
    if held := curves.get("eval"):
        line = Line("held out", [row["loss"] for row in held], "blue")
        panels.append(
            Lines(
                "held-out",
                "Held-out loss",
                [row["step"] for row in held],
                "optimizer step",
                "loss, nats per token",
                [line],
            )
        )
    out = (
        [
            Plot(
                "losses",
                "Loss",
                f"Mean over counted tokens; the training loss over stretches of {size} steps."
                if train
                else "Mean over counted tokens.",
                panels,
            )
        ]
        if panels
        else []
    )
    rates = []
    for task, after in _accuracies(record).items():
        pair = (("before", record["scores"]["before"][task], True), ("after", after, False))
        rates.append(
            Rates(
                f"accuracy-{task}",
                f"{task}: accuracy",
                f"share of {after['n']}, %",
                [Rate(label, s["accuracy"], s["low"], s["high"], s["n"], hollow) for label, s, hollow in pair],
                "green",
            )
        )
    return out + ([Plot("scores", "Scores before and after", "With Wilson 95 % intervals.", rates)] if rates else [])


def _accuracies(record: Record) -> dict[str, Any]:
    return {task: after for task, after in record["scores"]["after"].items() if "accuracy" in after}


def stretches(train: list[dict[str, Any]], size: int) -> list[tuple[int, float]]:
    """The last step and the mean training loss of each stretch of `size` steps."""
    parts = [list(rows) for _, rows in itertools.groupby(train, key=lambda row: (row["step"] - 1) // size)]
    return [(rows[-1]["step"], _mean(rows)) for rows in parts]


def _mean(rows: list[dict[str, Any]]) -> float:
    """The mean loss over all counted tokens of some steps."""
    return float(sum(row["loss"] * row["counted"] for row in rows) / sum(row["counted"] for row in rows))
