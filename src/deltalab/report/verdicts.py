"""The verdicts of a study's record: where each is shown, how its outcome is coloured, and the numbers that it rests on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deltalab.report.values import Record, Table, cells, p_value, tuned

BAD = (
    "fell", "drifts more", "no better than random", "broken", "more", "harms", "representational drift", "refusals hang on it",
    "refusals and skills hang on it",
)  # fmt: skip
GOOD = ("kept", "protects", "fewer", "rose")
OPEN = ("undecided", "measures disagree")
TONES = {**dict.fromkeys(BAD, "bad"), **dict.fromkeys(GOOD, "good"), **dict.fromkeys(OPEN, "open")}
"""How the outcome of a verdict is coloured; one that is not here is a plain fact."""

SECTIONS = {
    "drift": "drift",
    "score": "scores",
    "ablation": "ablation",
    "freezing": "freezing",
    "measures": "measures",
    "trials": "trials",
}
"""Kind of a verdict → the section with its picture; the other kinds are of replies."""

FEW = 10
"""Verdicts that are told one below the other; of more, those that several places have become a table of outcomes first."""


class Told(NamedTuple):
    """A verdict of a record. name: without what tells it from others of its sort; where: that, '' for nothing."""

    name: str
    where: str
    outcome: str
    sentence: str
    numbers: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Its whole name, as the record has it."""
        return f"{self.name} ({self.where})" if self.where else self.name

    @property
    def kind(self) -> str:
        """What the verdict is about."""
        return str(self.numbers.get("kind", self.name))

    @property
    def section(self) -> str:
        """Id of the section with its picture."""
        return SECTIONS.get(self.kind, "outcomes")

    @property
    def tone(self) -> str:
        """How its outcome is coloured."""
        return str(self.numbers.get("tone") or TONES.get(self.outcome, "fact"))

    def plain(self) -> dict[str, Any]:
        """As the record has it."""
        return {"name": self.title, "outcome": self.outcome, "sentence": self.sentence, "numbers": dict(self.numbers)}


def told(record: Record, *kinds: str) -> list[Told]:
    """The verdicts of these kinds, in order; of all kinds if none is given."""
    places = [cell.name for cell in cells(record)] + [arm["label"] for arm in tuned(record).values()]
    out = []
    for verdict in record["verdicts"]:
        where = next((place for place in places if place and verdict["name"].endswith(f" ({place})")), "")
        name = verdict["name"].removesuffix(f" ({where})")
        out.append(Told(name, where, verdict["outcome"], verdict["sentence"], verdict["numbers"]))
    return [one for one in out if not kinds or one.kind in kinds]


def apart(verdicts: Sequence[Told]) -> tuple[list[Told], list[Told]]:
    """Verdicts to be told one by one, and those for a table, of which every place (a cell, an arm) has one."""
    names = [one.name for one in verdicts]
    tabled = [one for one in verdicts if len(verdicts) > FEW and names.count(one.name) > 1]
    return [one for one in verdicts if one not in tabled], tabled


def matrix(verdicts: Sequence[Told]) -> tuple[list[str], list[tuple[str, list[Told | None]]]]:
    """Outcomes by place: the verdicts' names, and for each place its verdicts, in the names' order."""
    names = list(dict.fromkeys(one.name for one in verdicts))
    places = dict.fromkeys(one.where for one in verdicts)
    found = {(one.where, one.name): one for one in verdicts}
    return names, [(where, [found.get((where, name)) for name in names]) for where in places]


def tests(verdicts: Sequence[Told], name: str) -> list[Table]:
    """The tests that verdicts rest on, and what became of their p-values."""
    rows = []
    for one in verdicts:
        labels = {"free": "against nothing frozen", "control": "against random frozen", **one.numbers.get("labels", {})}
        for test in one.numbers.get("tests", ()):
            asks = {"change": "a change", "same": "sameness"}[test["asks"]]
            of = labels.get(test["of"], test["of"]) or "—"
            rows.append((one.title, asks, of, p_value(test["p"]), p_value(test["adjusted"])))
    if not rows:
        return []
    family = next((one.numbers["family"] for one in verdicts if "family" in one.numbers), None)
    note = "Holm's adjustment is over all tests of the study that ask the same"
    note += f": {family['change']} for a change, {family['same']} for sameness." if family else "."
    return [Table(name, "Tests", ("", "asks for", "of", "p", "adjusted"), rows, note, folded=True)]


def with_limits(value: float, low: float | None, high: float | None, scale: float = 100, unit: str = " %") -> str:
    """`−12.3 % [−14.0, −10.6]`, signed."""
    shown = f"{_signed(scale * value)}{unit}"
    if low is not None and high is not None:
        shown += f" [{_signed(scale * low)}, {_signed(scale * high)}]"
    return shown


def _signed(value: float) -> str:
    """With a sign, but for what rounds to nothing."""
    return f"{value:+.1f}".replace("-", "−") if round(value, 1) else "0.0"


def several(values: Sequence[float]) -> Sequence[float]:
    """One value a seed, where there is more than one."""
    return list(values) if len(values) > 1 else ()
