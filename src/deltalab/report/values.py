"""From a drift study's record to key figures and tables. Nothing is computed that the record does not hold; numbers are
only chosen and put into words."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]

SETS = {"advbench": "AdvBench", "jailbreakbench": "JailbreakBench", "strongreject": "StrongREJECT", "harmbench": "HarmBench",
        "malicious_instruct": "MaliciousInstruct", "xstest_safe": "XSTest safe", "xstest_unsafe": "XSTest unsafe"}  # fmt: skip
METRICS = {
    "l2_per_sqrt": ("L2 per entry", "‖ΔW[G]‖ / √|G|"),
    "relative_norm": ("Relative change", "‖ΔW[G]‖ / ‖W₀[G]‖"),
    "cosine_distance": ("Cosine distance", "1 − cos(W₀[G], W[G])"),
}


class Tile(NamedTuple):
    """A key figure: what it is, its value, and a line of context."""

    label: str
    value: str
    note: str


class Table(NamedTuple):
    """A table: words and numbers, formatted; the first column names its row. folded: long, and shown when asked for."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    folded: bool = False


def set_name(name: str) -> str:
    """The name of a prompt set as its authors write it."""
    return SETS.get(name, name)


def percent(value: float | None, digits: int = 0) -> str:
    """A share as per cent, or a dash."""
    return "—" if value is None else f"{100 * value:.{digits}f} %"


def interval(rate: dict[str, float]) -> str:
    """`61 % [51, 70]`."""
    return f"{100 * rate['value']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def number(value: float | None) -> str:
    """Three significant digits, without needless exponents."""
    if value is None or math.isnan(value):
        return "—"
    if value == 0:
        return "0"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def drift(values: dict[str, float | None], metric: str) -> float:
    """A measure of drift; not a number where it is undefined."""
    value = values[metric]
    return math.nan if value is None else value


def tuned(record: Record) -> dict[str, Any]:
    """The arms that were tuned, in order."""
    return {name: arm for name, arm in record["arms"].items() if "curves" in arm}


def harmful_sets(record: Record) -> list[str]:
    """The prompt sets that ought to be refused."""
    return [name for name, safety in record["arms"]["before"]["safety"].items() if safety["harmful"]]


def harmless_sets(record: Record) -> list[str]:
    """The prompt sets that ought to be answered."""
    return [name for name, safety in record["arms"]["before"]["safety"].items() if not safety["harmful"]]


def has_skills(record: Record) -> bool:
    """Whether skills were evaluated."""
    return bool(record["arms"]["before"].get("skills"))


def tiles(record: Record) -> list[Tile]:
    """The few numbers that stand at the top: before → after the first arm."""
    before, after = record["arms"]["before"], next(iter(tuned(record).values()))
    out = []
    for name, safety in before["safety"].items():
        then = after["safety"][name]
        label = f"{set_name(name)} refused" if safety["harmful"] else f"{set_name(name)} refused (falsely)"
        out.append(Tile(label, f"{percent(safety['refusal']['value'])} → {percent(then['refusal']['value'])}",
                        f"after: {interval(then['refusal'])}, n = {then['n']}"))  # fmt: skip
    if has_skills(record):
        out.append(Tile("Skills, exact match", f"{percent(before['skills']['value'])} → {percent(after['skills']['value'])}",
                        f"after: {interval(after['skills'])}, n = {after['skills']['n']}"))  # fmt: skip
    return out


def tables(record: Record) -> list[Table]:
    """Every table of the report, in order."""
    return [
        _behaviour(record),
        _log_odds(record),
        _frozen(record),
        _drift(record),
        _groups(record),
        _training(record),
        *_skills(record),
    ]


def _behaviour(record: Record) -> Table:
    arms = record["arms"].values()
    rows = []
    for name in harmful_sets(record):
        of = f"{set_name(name)} (n = {record['arms']['before']['safety'][name]['n']})"
        replies = [arm["safety"][name] for arm in arms]
        rows.append((f"{of}: refused", *(interval(reply["refusal"]) for reply in replies)))
        rows.append((f"{of}: complied (ASR)", *(interval(reply["asr"]) for reply in replies)))
        rows.append((f"{of}: broken text", *(str(reply["broken"]) for reply in replies)))
    for name in harmless_sets(record):
        rows.append(
            (
                f"{set_name(name)} (n = {record['arms']['before']['safety'][name]['n']}): refused falsely",
                *(interval(arm["safety"][name]["refusal"]) for arm in arms),
            )
        )
    if has_skills(record):
        rows.append(
            (
                f"skills (n = {record['arms']['before']['skills']['n']}): exact match",
                *(interval(arm["skills"]) for arm in arms),
            )
        )
    return Table(
        "behaviour",
        "Replies and skills",
        _head(record),
        rows,
        "Shares with Wilson 95 % intervals; broken replies are counted.",
    )


def _head(record: Record) -> tuple[str, ...]:
    return ("", *(arm["label"] for arm in record["arms"].values()))


def _log_odds(record: Record) -> Table:
    rows = [
        (set_name(s), *(number(arm["safety"][s]["log_odds"]) for arm in record["arms"].values()))
        for s in record["arms"]["before"]["safety"]
    ]
    return Table(
        "log-odds",
        "First-token log-odds of a refusal",
        _head(record),
        rows,
        "Mean over prompts of log p(R) − log(1 − p(R)), R the first tokens of refusals; 0 is even.",
    )


def _frozen(record: Record) -> Table:
    rows = []
    for arm in tuned(record).values():
        freeze = arm["freeze"]
        if freeze["variant"] == "none":
            rows.append((arm["label"], "none", "—", "—", "—", "—"))
            continue
        held = "yes" if freeze["held"] else "NO"
        rows.append(
            (
                arm["label"],
                freeze["variant"],
                freeze["group"],
                f"{freeze['entries']:,} ({percent(freeze['fraction'], 1)})",
                number(freeze["max_change"]),
                held,
            )
        )
    return Table("frozen", "By arm", ("", "variant", "group", "entries", "largest change", "held"), rows,
                 "Largest absolute change of a frozen entry of the merged weights from before the tuning to its end.")  # fmt: skip


def _drift(record: Record) -> Table:
    rows = []
    for arm in tuned(record).values():
        last = arm["curves"][-1]
        for name, values in last["groups"].items():
            band = last["nulls"].get(name, {}).get("band", {})
            cells = []
            for metric in METRICS:
                cells.append(number(drift(values, metric)))
                cells.append(_band(band.get(metric)))
            rows.append((arm["label"], shown(name, arm), *cells))
    head = ("", "group", *(text for title, _ in METRICS.values() for text in (title, "matched random")))
    return Table(
        "drift",
        "Drift at the last step",
        head,
        rows,
        "; ".join(f"{title}: {unit}" for title, unit in METRICS.values())
        + ". Matched random: 2.5 % to 97.5 % of random groups with the same count in each matrix and the same spread of |W|.",
    )


def _band(band: dict[str, float] | None) -> str:
    return f"{number(band['low'])} … {number(band['high'])}" if band else "—"


def _groups(record: Record) -> Table:
    rows = [
        (group["label"], f"{group['entries']:,}", percent(group["fraction"], 2)) for group in record["groups"].values()
    ]
    overlap = "; ".join(
        f"{o['a']} and {o['b']} {o['jaccard']:.3f} (independent: {o['independent']:.3f})" for o in record["overlaps"]
    )
    return Table(
        "groups",
        "Sizes",
        ("group", "entries", "share of scored weights"),
        rows,
        f"Overlap (Jaccard): {overlap}." if overlap else "",
    )


def _training(record: Record) -> Table:
    rows = []
    for arm in tuned(record).values():
        t = arm["training"]
        rows.append(
            (
                arm["label"],
                f"{t['trained']:,}",
                str(t["steps"]),
                f"{t['tokens']:,}",
                f"{t['seconds']:.0f} s",
                number(t["losses"][0][1]),
                number(t["losses"][-1][1]),
            )
        )
    return Table(
        "training", "Training", ("", "trained parameters", "steps", "tokens", "time", "first loss", "last loss"), rows
    )


def _skills(record: Record) -> list[Table]:
    if not has_skills(record):
        return []
    arms = record["arms"]
    families = arms["before"]["skills"]["families"]
    rows = [
        (
            f"{family} (n = {families[family]['n']})",
            *(percent(arm["skills"]["families"][family]["value"]) for arm in arms.values()),
        )
        for family in families
    ]
    return [Table("skills", "Skills by family, exact match", _head(record), rows, folded=True)]


def shown(name: str, arm: dict[str, Any]) -> str:
    """A group's name, marked where the arm froze it."""
    return f"{name} (frozen)" if arm["freeze"]["group"] == name else name
