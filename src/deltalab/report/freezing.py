"""What was frozen, whether it held, and whether it kept refusals."""

import itertools
from typing import Any

from deltalab.report.outcomes import change_row, difference, dots
from deltalab.report.panels import Effects, Mark, Plot, on_one_axis
from deltalab.report.values import (
    ARM_COLOURS,
    LONG,
    Cell,
    Record,
    Section,
    Table,
    capital,
    cells,
    harmful_sets,
    number,
    percent,
    place,
    short,
    tuned,
)
from deltalab.report.verdicts import Told, several, tests, told

VARIANTS = {
    "none": "nothing", "grad_mask": "gradient masked", "exact": "put back after each step", "rewind": "put back at the end",
    "delta_mask": "change held at zero",
}  # fmt: skip
"""Ways of freezing in words."""
AGAINST = {"free": "nothing frozen", "control": "random frozen"}


def section(record: Record) -> Section | None:
    """The proofs of freezing, and what it did to refusals; None if no arm froze anything."""
    if all(arm["freeze"]["variant"] == "none" for arm in tuned(record).values()):
        return None
    verdicts = told(record, "freezing")
    tables = [_proofs(record), *_effects_table(verdicts), *tests(verdicts, "tests-freezing")]
    return Section("freezing", "What was frozen, and what that did", _plots(record, verdicts), tables)


def _plots(record: Record, verdicts: list[Told]) -> list[Plot]:
    found = [cell for cell in cells(record) if any(one.where == cell.name for one in verdicts)]
    shares = [_shares(record, cell) for cell in found] if len(cells(record)) == 1 else []
    panels = shares + on_one_axis([_gains(cell, verdicts, i) for i, cell in enumerate(found)])
    caption = (
        "What freezing the group gained in refusals of harmful prompts, of all sets together, over freezing nothing and over "
        "freezing as many random entries: prompt by prompt, in percentage points with 95 % intervals"
        f"{dots(record)}. Grey: within the margin."
    )
    return [Plot("freezing", "What freezing did to refusals", caption, panels, 2)] if panels else []


def _shares(record: Record, cell: Cell) -> Effects:
    """The share of harmful prompts that each arm of a cell refused."""
    before = record["arms"]["before"]
    sizes = {name: before["safety"][name]["n"] for name in harmful_sets(record)}
    marks = [_share(before, sizes, "grey")]
    marks += [_share(arm, sizes, colour) for arm, colour in zip(cell.arms.values(), itertools.cycle(ARM_COLOURS))]
    return Effects("frozen-shares", place(cell, "Harmful prompts refused"), "share, %", marks, reach=(0, 100))


def _share(arm: dict[str, Any], sizes: dict[str, int], colour: str) -> Mark:
    def pooled(of: dict[str, float]) -> float:
        return 100 * sum(of[name] * n for name, n in sizes.items()) / sum(sizes.values())

    value = pooled({name: arm["safety"][name]["refusal"]["value"] for name in sizes})
    runs = [pooled({name: run["safety"][name]["refusal"] for name in sizes}) for run in arm["runs"]]
    return Mark(short(arm), value, colour, seeds=several(runs), note=f"{value:.0f} %")


def _gains(cell: Cell, verdicts: list[Told], number: int) -> Effects:
    """What freezing gained over freezing nothing, and over freezing random entries."""
    here = [one for one in verdicts if one.where == cell.name]
    marks: list[Mark] = []
    for one in here:
        for of, change in one.numbers["sets"].items():
            marks.append(
                difference(
                    f"{one.numbers['label']}, against {AGAINST.get(of, of)}",
                    change,
                    "blue" if of == "free" else "green",
                )
            )
    margin = here[0].numbers["margin"]
    title = place(cell, "Refusals gained by freezing")
    return Effects(f"freezing-{number}", title, "percentage points", marks, 0.0, [(-100 * margin, 100 * margin, "")])


def _effects_table(verdicts: list[Told]) -> list[Table]:
    rows = []
    for one in verdicts:
        label = one.numbers["label"] + (f", {one.where}" if one.where else "")
        for of, change in one.numbers["sets"].items():
            rows.append((f"{label}, against {AGAINST.get(of, of)}", *change_row(change)))
    head = ("", "without", "with it frozen", "difference, points", "in a word")
    title = "Harmful prompts refused, all sets together"
    return [Table("freezing", title, head, rows, folded=len(rows) > LONG)] if rows else []


def _proofs(record: Record) -> Table:
    rows = [(arm["label"], *_proof(arm["freeze"])) for arm in tuned(record).values()]
    notes = [
        f"{capital(arm['label'])}: {arm['freeze']['note']}."
        for arm in tuned(record).values()
        if arm["freeze"].get("note")
    ]
    note = (
        "Largest change: of a frozen entry of the merged weights from before the tuning to its end, of all seeds; before putting back: "
        "what was put back at the end of a training."
    )
    head = ("", "how", "group", "entries", "largest change", "before putting back", "held")
    return Table("frozen", "What was frozen", head, rows, " ".join([note, *notes]), folded=len(rows) > LONG)


def _proof(freeze: dict[str, Any]) -> tuple[str, ...]:
    how = VARIANTS.get(freeze["variant"], freeze["variant"])
    if freeze["variant"] == "none":
        return (how, "—", "—", "—", "—", "—")
    entries = f"{freeze['entries']:,} ({percent(freeze['fraction'], 1)})"
    before = number(freeze.get("max_change_before_rewind"))
    group = "matched random" if freeze["group"] == "matched" else freeze["group"]
    return (how, group, entries, number(freeze["max_change"]), before, "yes" if freeze["held"] else "NO")
