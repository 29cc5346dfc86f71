"""From a drift study's record to plots, as plain values: what each picture shows, and what is said below it."""

import math
from collections.abc import Iterable
from typing import Any

from deltalab.report.panels import Bars, Draws, Grid, Line, Lines, Plot, Rate, Rates, Shares, Spread, Spreads
from deltalab.report.values import METRICS, Record, drift, harmful_sets, has_skills, set_name, shown, tuned

GROUP_COLOURS = {"safety": "purple", "safety-only": "orange", "utility": "blue", "random": "green", "matched": "grey"}


def plots(record: Record) -> list[Plot]:
    """Every figure of the report, in order."""
    out = [_outcomes(record), _against(record), *_drift_plots(record), _distributions(record), _where(record)]
    out += [_losses(record), _times(record)]
    return [plot for plot in out if plot.panels]


def _outcomes(record: Record) -> Plot:
    panels = []
    for name, safety in record["arms"]["before"]["safety"].items():
        rows = [
            _rate(arm["label"], arm["safety"][name]["refusal"], arm["safety"][name]["n"], key == "before")
            for key, arm in record["arms"].items()
        ]
        what, colour = ("refused", "blue") if safety["harmful"] else ("false refusals", "orange")
        panels.append(
            Rates(f"refusal-{name}", f"{set_name(name)}: {what}", f"share of {safety['n']} prompts, %", rows, colour)
        )
    if has_skills(record):
        rows = [
            _rate(arm["label"], arm["skills"], arm["skills"]["n"], key == "before")
            for key, arm in record["arms"].items()
        ]
        panels.append(Rates("skills", "Skills: exact match", f"share of {rows[0].n} questions, %", rows, "green"))
    caption = ("Refusals and skills before tuning (open) and after, with Wilson 95 % intervals. Refusing harmful prompts is wanted; refusing harmless ones is not. "
               "Bars: all replies to harmful prompts; one that is neither a refusal nor readable text is broken, and no attack success.")  # fmt: skip
    return Plot("outcomes", "What became of refusals and skills", caption, [*panels, *_replies(record)])


def _rate(label: str, rate: dict[str, float], n: int, hollow: bool) -> Rate:
    return Rate(label, rate["value"], rate["low"], rate["high"], n, hollow)


def _replies(record: Record) -> list[Shares]:
    parts = ("refused", "complied", "broken")
    return [Shares(f"replies-{name}", f"{set_name(name)}: replies", parts, ("blue", "orange", "grey"),
                   [(arm["label"], [arm["safety"][name][part] for part in parts]) for arm in record["arms"].values()]) for name in harmful_sets(record)]  # fmt: skip


def _drift_plots(record: Record) -> list[Plot]:
    plots = []
    tops = {
        metric: 1.06
        * max(
            drift(values, metric)
            for arm in tuned(record).values()
            for row in arm["curves"]
            for values in row["groups"].values()
        )
        for metric in METRICS
    }
    for key, arm in tuned(record).items():
        curves = arm["curves"]
        steps = [row["step"] for row in curves]
        main = _main_group(record)
        panels = []
        for metric, (title, unit) in METRICS.items():
            lines = [Line(shown(name, arm), [drift(row["groups"][name], metric) for row in curves], GROUP_COLOURS.get(name, "grey"))
                     for name in _compared(curves[0]["groups"], arm)]  # fmt: skip
            band = [
                row["nulls"].get(main, {}).get("band", {}).get(metric) or {"low": math.nan, "high": math.nan}
                for row in curves
            ]
            edges = ([b["low"] for b in band], [b["high"] for b in band]) if main else None
            panels.append(
                Lines(
                    f"drift-{key}-{metric}",
                    title,
                    steps,
                    "optimizer step",
                    unit,
                    lines,
                    edges,
                    "matched random",
                    tops[metric],
                )
            )
        n = curves[-1]["nulls"].get(main, {}).get("draws", 0)
        caption = (f"Drift of each group's merged weights since step 0; {arm['label']}. Grey band: 2.5 % to 97.5 % of {n} random groups matched to "
                   f"'{main}' on the count in each matrix and on |W|." + _overlaps(arm))  # fmt: skip
        plots.append(Plot(f"drift-{key}", f"Drift over steps: {arm['label']}", caption, panels))
    return plots


def _against(record: Record) -> Plot:
    """The group in question over the random groups matched to it: through training, through depth, at the end."""
    arm = next(iter(tuned(record).values()))
    name, last = _main_group(record), arm["curves"][-1]
    nulls = arm.get("against", {}).get(name)
    if not nulls:
        return Plot("against", "", "", [])
    colour = GROUP_COLOURS.get(name, "grey")
    rows = [
        (row["step"], drift(row["groups"][name], "l2_per_sqrt"), row["nulls"][name]["band"]["l2_per_sqrt"])
        for row in arm["curves"]
    ]
    rows = [(step, value, band) for step, value, band in rows if band and band["mean"] > 0]
    layers = [
        (int(layer), pair["value"], pair["band"])
        for layer, pair in nulls["layers"].items()
        if layer.isdigit() and pair["band"] and pair["band"]["mean"] > 0
    ]
    panels: list[Any] = []
    for key, title, xlabel, found in (
        ("steps", "Through training", "optimizer step", rows),
        ("layers", "Through depth, at the last step", "layer", layers),
    ):
        if found:
            line = Line(name, [value / band["mean"] for _, value, band in found], colour)
            edges = (
                [band["low"] / band["mean"] for _, _, band in found],
                [band["high"] / band["mean"] for _, _, band in found],
            )
            panels.append(
                Lines(
                    f"against-{key}",
                    title,
                    [x for x, _, _ in found],
                    xlabel,
                    "times the mean of the matched random",
                    [line],
                    edges,
                    "matched random",
                    zero=False,
                )
            )
    mean = last["nulls"][name]["band"]["l2_per_sqrt"]["mean"]
    draws = [value / mean for value in nulls["draws"]] if mean else []
    if draws:
        panels.append(
            Draws(
                "against-draws",
                "At the last step",
                "times the mean of the matched random",
                draws,
                name,
                drift(last["groups"][name], "l2_per_sqrt") / mean,
                colour,
            )
        )
    caption = (f"L2 per entry of '{name}' over the mean of {last['nulls'][name]['draws']} random groups with its count in each matrix and its spread of |W|; "
               f"{arm['label']}. Grey: 2.5 % to 97.5 % of them.")  # fmt: skip
    return Plot("against", f"Does '{name}' drift otherwise than chance?", caption, panels)


def _compared(groups: Iterable[str], arm: dict[str, Any]) -> list[str]:
    """The groups to show: one matched random group says nothing beside the band of many, unless it is the frozen one."""
    return [name for name in groups if name != "matched" or arm["freeze"]["group"] == "matched"]


def _overlaps(arm: dict[str, Any]) -> str:
    return (
        " Other groups share some entries with the frozen one, and these do not move either."
        if arm["freeze"]["group"]
        else ""
    )


def _main_group(record: Record) -> str:
    """The group that the matched random groups were drawn for."""
    first = next(iter(tuned(record).values()))
    return next(iter(first["curves"][-1]["nulls"]), "")


def _distributions(record: Record) -> Plot:
    panels = []
    used = [
        (d["edges"][i], d["edges"][i + 1])
        for arm in tuned(record).values()
        for d in arm["distributions"].values()
        for i, c in enumerate(d["counts"])
        if c
    ]
    limits = (min((a for a, _ in used), default=-1.0), max((b for _, b in used), default=0.0))
    for key, arm in tuned(record).items():
        rows = []
        for name in _compared(arm["distributions"], arm):
            d = arm["distributions"][name]
            q = d["quantiles"]
            rows.append(
                Spread(
                    shown(name, arm),
                    GROUP_COLOURS.get(name, "grey"),
                    d["edges"],
                    d["counts"],
                    d["zeros"],
                    (q["0.25"], q["0.5"], q["0.75"]),
                )
            )
        panels.append(
            Spreads(
                f"rows-{key}",
                arm["label"][:1].upper() + arm["label"][1:],
                "‖ΔW‖ / √n within a row of a matrix",
                rows,
                limits,
            )
        )
    caption = "Final drift by output row (one row of a weight matrix): the group's entries in that row, root mean square of ΔW. Dot and bar: median and quartiles."
    return Plot("distributions", "Final drift, row by row", caption, panels)


def _where(record: Record) -> Plot:
    groups = {name: group for name, group in record["groups"].items() if group.get("kinds")}
    kinds = list(dict.fromkeys(kind for group in groups.values() for kind in group["kinds"]))
    values = [[group["kinds"].get(kind) for kind in kinds] for group in groups.values()]
    top = max((v for row in values for v in row if v is not None), default=1.0) or 1.0
    short = [kind.removesuffix("_proj") for kind in kinds]
    panels = (
        [Grid("groups-kinds", "Share of each kind of matrix, %", list(groups), short, values, top)] if groups else []
    )
    names = list(record["groups"])
    if record["overlaps"]:
        pairs = {frozenset((o["a"], o["b"])): o["jaccard"] for o in record["overlaps"]}
        table = [[pairs.get(frozenset((a, b))) if a != b else None for b in names] for a in names]
        panels.append(
            Grid("groups-overlap", "Overlap of two groups, Jaccard %", names, names, table, max(pairs.values()) or 1.0)
        )
    return Plot(
        "groups", "Where the groups are", "Which matrices the groups fall into, and how far they overlap.", panels
    )


def _losses(record: Record) -> Plot:
    arms = tuned(record)
    colours = ("orange", "blue", "green", "purple", "grey")
    x = [step for step, _ in next(iter(arms.values()))["training"]["losses"]]
    lines = [Line(arm["label"], [loss for _, loss in arm["training"]["losses"]], colours[i % 5]) for i, arm in enumerate(arms.values())
             if [step for step, _ in arm["training"]["losses"]] == x]  # fmt: skip
    return Plot(
        "losses",
        "Training loss",
        "Mean loss per reply token on the tuning data.",
        [Lines("loss", "Training loss", x, "optimizer step", "loss, nats per token", lines)],
    )


def _times(record: Record) -> Plot:
    rows = [(name, float(seconds)) for name, seconds in record["stages"].items()]
    return Plot(
        "times",
        "Where the time went",
        f"{sum(s for _, s in rows):.0f} s in all.",
        [Bars("times", "Time by stage", "seconds", rows)],
    )
