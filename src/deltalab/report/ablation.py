"""What is left of refusals and skills when a group of weights is at zero, against random groups at zero."""

from typing import Any

import numpy as np

from deltalab.report.panels import Effects, Mark, Plot
from deltalab.report.values import Record, Section, Table, p_value, percent
from deltalab.report.verdicts import tests, told

PARTS = {
    "refused": "harmful prompts refused",
    "complied": "complied (ASR)",
    "broken": "broken text",
    "skills": "skills, exact match",
}
COLOURS = {"refused": "blue", "complied": "orange", "broken": "grey", "skills": "green"}


def section(record: Record) -> Section | None:
    """The picture and the numbers; None if nothing was set to zero."""
    shares = record.get("ablation")
    if not shares:
        return None
    focus, random, before = (
        shares[record["focus"]],
        [one for name, one in shares.items() if name != record["focus"]],
        _before(record),
    )
    parts = [part for part in PARTS if part in focus]
    marks = [
        Mark(PARTS[part], 100 * focus[part], COLOURS[part], draws=[100 * one[part] for one in random],
             start=None if before.get(part) is None else 100 * before[part], note=percent(focus[part]))
        for part in parts
    ]  # fmt: skip
    caption = (
        f"Shares of replies with the group '{record['focus']}' at zero (filled), of the whole model (open), and with each of "
        f"{len(random)} random groups matched on |W| at zero (grey). All harmful prompts together."
    )
    plot = Plot(
        "ablation",
        f"Without '{record['focus']}'",
        caption,
        [Effects("ablation", "At zero", "share, %", marks, reach=(0, 100))],
        1,
    )
    tables = [_table(record, parts, focus, random, before), *tests(told(record, "ablation"), "tests-ablation")]
    return Section("ablation", "Without the group", [plot], tables)


def _before(record: Record) -> dict[str, float]:
    """Shares of the whole model, as the verdict has them."""
    found = told(record, "ablation")
    return dict(found[0].numbers["before"]) if found else {}


def _table(
    record: Record, parts: list[str], focus: dict[str, float], random: list[dict[str, float]], before: dict[str, float]
) -> Table:
    p: dict[str, float] = next((one.numbers.get("p", {}) for one in told(record, "ablation")), {})
    rows = [(PARTS[part], percent(before.get(part)), percent(focus[part]), _spread([one[part] for one in random]), p_value(p.get(part)))
            for part in parts]  # fmt: skip
    head = ("", "whole model", f"{record['focus']} at zero", "random groups at zero", "p of a loss")
    return Table("ablation", "At zero", head, rows, "Random groups: median, least and largest.")


def _spread(values: list[Any]) -> str:
    return f"{percent(float(np.median(values)))} [{100 * min(values):.0f}, {100 * max(values):.0f}]" if values else "—"
