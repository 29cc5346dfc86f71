"""What became of refusals and skills: every arm before and after, and how sure the changes are."""

from collections.abc import Sequence
from typing import Any

from deltalab.report.panels import Compared, Effects, Mark, Panel, Plot, Rate, Rates, Shares, on_one_axis
from deltalab.report.values import (
    ARM_COLOURS,
    LONG,
    Cell,
    Record,
    Section,
    Table,
    Tile,
    cells,
    harmful_sets,
    has_skills,
    interval,
    number,
    percent,
    place,
    seeds,
    set_name,
    short,
    tuned,
)
from deltalab.report.verdicts import Told, several, tests, told, with_limits

KINDS = ("refusals", "false refusals", "skills")
PARTS, PART_COLOURS = ("refused", "complied", "broken"), ("blue", "orange", "grey")


def section(record: Record) -> Section:
    """Figures and tables of replies and skills."""
    plots = [
        Plot("outcomes", "Before tuning and after", _caption(record), [*_shares_of_sets(record), *_replies(record)])
    ]
    changes = _changes(record)
    if changes:
        plots.append(Plot("changes", "How sure the changes are", _CHANGES.format(dots=dots(record)), changes))
    tables = [
        *_set_tables(record),
        *_skills(record),
        *_change_table(record),
        *tests(told(record, *KINDS), "tests-outcomes"),
    ]
    return Section("outcomes", "Refusals and skills", plots, tables)


def tiles(record: Record) -> list[Tile]:
    """Before → after the first arm."""
    before, after = record["arms"]["before"], next(iter(tuned(record).values()))
    out = []
    for name, safety in before["safety"].items():
        then = after["safety"][name]
        label = f"{set_name(name)} refused" if safety["harmful"] else f"{set_name(name)} refused (falsely)"
        out.append(_tile(label, safety["refusal"], then["refusal"], then["n"]))
    if has_skills(record):
        out.append(_tile("Skills, exact match", before["skills"], after["skills"], after["skills"]["n"]))
    return out


def _tile(label: str, before: dict[str, float], after: dict[str, float], n: int) -> Tile:
    value = f"{percent(before['value'])} → {percent(after['value'])}"
    return Tile(label, value, f"after: {interval(after)}, n = {n}")


# ---- shares of each set -------------------------------------------------------------------------------------------


def _caption(record: Record) -> str:
    how = "with Wilson 95 % intervals" if seeds(record) == 1 else (
        f"means over {seeds(record)} seeds, with 95 % intervals over seeds and prompts; small dots: each seed"
    )  # fmt: skip
    first = "Open: before tuning" if len(cells(record)) == 1 else "Line and grey band: before tuning"
    return (
        f"{first}; filled: after, {how}. Refusing harmful prompts is wanted; refusing harmless ones is not. Bars: all "
        "replies to harmful prompts; one that is neither a refusal nor readable text is broken, and no attack success."
    )


def _shares_of_sets(record: Record) -> list[Panel]:
    """A panel for each set of prompts, and one for skills."""
    panels = []
    for name, safety in record["arms"]["before"]["safety"].items():
        what, colour = ("refused", "blue") if safety["harmful"] else ("false refusals", "orange")
        panels.append(
            _panel(
                record,
                f"refusal-{name}",
                f"{set_name(name)}: {what}",
                f"share of {safety['n']} prompts, %",
                colour,
                name,
            )
        )
    if has_skills(record):
        n = record["arms"]["before"]["skills"]["n"]
        panels.append(_panel(record, "skills", "Skills: exact match", f"share of {n} questions, %", "green", None))
    return panels


def _panel(record: Record, name: str, title: str, xlabel: str, colour: str, of: str | None) -> Panel:
    """Rows are arms; where a few arms come in several cells, rows are cells and the arms stand under each other in each."""
    found, arms = cells(record), record["arms"]
    kinds = list(dict.fromkeys(short(arm) for arm in tuned(record).values()))
    if len(found) == 1 or len(kinds) > len(ARM_COLOURS):  # more arms than colours: each has a row of its own
        each = [_rate(arm, of, key == "before")._replace(label=arm["label"]) for key, arm in arms.items()]
        return Rates(name, title, xlabel, each, colour)
    rows = [(cell.name or "as in the spec", [_rate(arm, of) for arm in cell.arms.values()]) for cell in found]
    return Compared(name, title, xlabel, kinds, ARM_COLOURS[: len(kinds)], rows, _rate(arms["before"], of))


def dots(record: Record) -> str:
    """What a caption says of the seeds' small dots, where there are any."""
    return "; small dots: each seed" if seeds(record) > 1 else ""


def _rate(arm: dict[str, Any], of: str | None, hollow: bool = False) -> Rate:
    """Refusals of a set of prompts, or skills (None)."""
    found = arm["skills"] if of is None else arm["safety"][of]
    rate = found if of is None else found["refusal"]
    runs = [run["skills"] if of is None else run["safety"][of]["refusal"] for run in arm["runs"]]
    return Rate(short(arm), rate["value"], rate["low"], rate["high"], found["n"], hollow, several(runs))


def _replies(record: Record) -> list[Shares]:
    if len(cells(record)) > 1:
        return []
    arms = record["arms"].values()
    return [
        Shares(
            f"replies-{name}", f"{set_name(name)}: replies", PARTS, PART_COLOURS, [_counts(arm, name) for arm in arms]
        )
        for name in harmful_sets(record)
    ]


def _counts(arm: dict[str, Any], name: str) -> tuple[str, list[int]]:
    return arm["label"], [arm["safety"][name][part] for part in PARTS]


def _set_tables(record: Record) -> list[Table]:
    out = []
    head = ("", "refused", "complied (ASR)", "broken text", "log-odds of a refusal")
    note = (
        "Shares with 95 % intervals. Log-odds: mean over prompts of log p(R) − log(1 − p(R)) at the first token, R the first "
        "tokens of refusals; 0 is even."
    )
    arms = record["arms"].values()
    for name, before in record["arms"]["before"]["safety"].items():
        of = f"{set_name(name)}, n = {before['n']}" + ("" if before["harmful"] else " (harmless: refusals are false)")
        rows = [_set_row(arm["label"], arm["safety"][name]) for arm in arms]
        out.append(Table(f"replies-{name}", of, head, rows, folded=True))
    return [*out[:-1], out[-1]._replace(note=note)]


def _set_row(label: str, replies: dict[str, Any]) -> tuple[str, ...]:
    return (label, *(interval(replies[key]) for key in ("refusal", "asr", "brokenness")), number(replies["log_odds"]))


def _skills(record: Record) -> list[Table]:
    if not has_skills(record):
        return []
    arms = record["arms"].values()
    families = record["arms"]["before"]["skills"]["families"]
    head = ("", "all", *(f"{family} (n = {one['n']})" for family, one in families.items()))
    rows = [
        (arm["label"], interval(arm["skills"]), *(percent(arm["skills"]["families"][f]["value"]) for f in families))
        for arm in arms
    ]
    return [Table("skills", "Skills by family, exact match", head, rows, folded=True)]


# ---- how sure the changes are -------------------------------------------------------------------------------------

_CHANGES = (
    "Change of each share against the untouched model, prompt by prompt, in percentage points, with 95 % intervals{dots}. "
    "Grey: changes within the margin, which count as none if the whole interval lies there."
)


def _changes(record: Record) -> list[Effects]:
    """One panel a cell."""
    out: list[Effects] = []
    for cell in cells(record):
        verdicts = [one for one in told(record, *KINDS) if one.where == cell.name]
        marks = [mark for one in verdicts for mark in _marks(one)]
        if marks:
            out.append(_effects(f"changes-{len(out)}", cell, marks, verdicts[0].numbers["margin"]))
    return on_one_axis(out)


def _effects(name: str, cell: Cell, marks: Sequence[Mark], margin: float) -> Effects:
    title = place(cell, "Change against the untouched model")
    return Effects(name, title, "percentage points", marks, 0.0, [(-100 * margin, 100 * margin, "")])


def _marks(one: Told) -> list[Mark]:
    colours = {"refusals": "blue", "false refusals": "orange", "skills": "green"}
    return [
        difference(_label(one, of), change, colours[one.kind]) for of, change in one.numbers["sets"].items()
    ]  # fmt: skip


def _label(one: Told, of: str) -> str:
    label = one.numbers.get("labels", {}).get(of, set_name(of))
    return {"refusals": f"{label}: refused", "false refusals": f"{label}: false refusals"}.get(one.kind, label)


def difference(label: str, change: dict[str, Any], colour: str) -> Mark:
    """A change of a share, in percentage points."""
    note = f"{percent(change['before'])} → {percent(change['after'])}"
    points = [100 * value for value in several(change.get("per_seed", ()))]
    return Mark(label, 100 * change["difference"], colour, 100 * change["low"], 100 * change["high"], points, note=note)


def _change_table(record: Record) -> list[Table]:
    rows = [
        (f"{_label(one, of)}, {one.where}" if one.where else _label(one, of), *change_row(change))
        for one in told(record, *KINDS) for of, change in one.numbers["sets"].items()
    ]  # fmt: skip
    head = ("", "before", "after", "change, points", "in a word")
    note = "Changes prompt by prompt with 95 % intervals; the words are decided by adjusted p-values."
    return (
        [Table("changes", "Changes against the untouched model", head, rows, note, folded=len(rows) > LONG)]
        if rows
        else []
    )


def change_row(change: dict[str, Any]) -> tuple[str, ...]:
    """Before, after, difference with its interval, and the word for it."""
    shown = with_limits(change["difference"], change["low"], change["high"], unit="")
    return percent(change["before"], 1), percent(change["after"], 1), shown, change["outcome"]
