"""Refusals, attack success and skills over the steps of a training, above the drift at the same steps."""

import math
from typing import Any

from deltalab.report.panels import Line, Lines, Plot, Stack
from deltalab.report.values import (
    LONG,
    Record,
    Section,
    Table,
    capital,
    drift,
    harmful_sets,
    percent,
    pictured,
    set_name,
    shown,
)

SHOWN = "l2_per_sqrt"
REPLIES = {"refused": "blue", "complied": "orange", "broken": "grey"}


def section(record: Record) -> Section | None:
    """What was asked while training; None if nothing was."""
    arms = {key: arm for key, arm in pictured(record).items() if arm.get("asked")}
    if not arms:
        return None
    n = sum(one["n"] for name, one in _first(arms)["sets"].items() if name in harmful_sets(record))
    caption = (
        f"Every arm at the same steps, from above: replies to the first {n} harmful prompts ('complied' is the attack success "
        "rate, ASR), false refusals and skills, and the drift of the group in question against matched random groups."
    )
    stacks = [_stack(record, key, arm) for key, arm in arms.items()]
    plot = Plot("steps", "Replies, skills and drift, step by step", caption, stacks)
    return Section("steps", "Step by step", [plot], [_table(record, arms)])


def _first(arms: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = next(iter(arms.values()))["asked"][0]
    return row


def _stack(record: Record, key: str, arm: dict[str, Any]) -> Stack:
    rows = arm["asked"]
    steps = [row["step"] for row in rows]
    harmful = harmful_sets(record)
    lines = [Line(part, [_share(row, harmful, part) for row in rows], colour) for part, colour in REPLIES.items()]
    label = capital(arm["label"])
    panels = [Lines(f"steps-{key}-replies", label, steps, "optimizer step", "harmful prompts, %", lines, top=100.0)]
    others = _others(record, rows)
    if others:
        panels.append(Lines(f"steps-{key}-others", "", steps, "optimizer step", "share, %", others, top=100.0))
    if arm.get("curves"):
        panels.append(_drift(record, key, arm))
    last = max(lines.x[-1] for lines in panels)
    return Stack(f"steps-{key}", label, [lines._replace(reach=(0, last)) for lines in panels])


def _others(record: Record, rows: list[dict[str, Any]]) -> list[Line]:
    """False refusals, and skills."""
    harmless = [name for name in rows[0]["sets"] if name not in harmful_sets(record)]
    out = []
    if harmless:
        out.append(Line("false refusals", [_share(row, harmless, "refused") for row in rows], "orange"))
    if "skills" in rows[0]:
        out.append(Line("skills", [100 * row["skills"] for row in rows], "green"))
    return out


def _share(row: dict[str, Any], sets: list[str], part: str) -> float:
    """Per cent of the prompts of several sets."""
    asked = [row["sets"][name] for name in sets]
    return float(100 * sum(one[part] * one["n"] for one in asked) / sum(one["n"] for one in asked))


def _drift(record: Record, key: str, arm: dict[str, Any]) -> Lines:
    rows, focus = arm["curves"], record["focus"]
    bands = [row["nulls"].get("magnitude", {}).get("band", {}).get(SHOWN) for row in rows]
    edges = tuple([band[side] if band else math.nan for band in bands] for side in ("low", "high"))
    line = Line(shown(focus, arm), [drift(row["groups"][focus], SHOWN) for row in rows], "orange")
    steps = [row["step"] for row in rows]
    return Lines(
        f"steps-{key}-drift",
        "",
        steps,
        "optimizer step",
        "‖ΔW[G]‖ / √|G|",
        [line],
        (edges[0], edges[1]),
        "matched random",
    )


def _table(record: Record, arms: dict[str, Any]) -> Table:
    sets = list(_first(arms)["sets"])
    head = ["", "step"]
    for name in sets:
        head += (
            [f"{set_name(name)} refused", "complied"]
            if name in harmful_sets(record)
            else [f"{set_name(name)} refused falsely"]
        )
    rows = [(arm["label"], str(row["step"]), *_cells(record, row)) for arm in arms.values() for row in arm["asked"]]
    if "skills" in _first(arms):
        head.append("skills")
    sizes = ", ".join(f"{set_name(name)} {one['n']}" for name, one in _first(arms)["sets"].items())
    note = f"Prompts asked: {sizes}; means over seeds where there are several."
    return Table("steps", "Step by step", tuple(head), rows, note, folded=len(rows) > LONG)


def _cells(record: Record, row: dict[str, Any]) -> list[str]:
    out = []
    for name, one in row["sets"].items():
        out.append(percent(one["refused"]))
        if name in harmful_sets(record):
            out.append(percent(one["complied"]))
    return out + ([percent(row["skills"])] if "skills" in row else [])
