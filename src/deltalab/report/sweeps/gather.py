"""What lies in a sweep's folder, as the report takes it: finished runs by group, their tests, their curves."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltalab.core.errors import UserError, nearest
from deltalab.core.records import read_record
from deltalab.lab.compare import Line, Run, compare, measures_of, parts_of, settings_in, stand_in
from deltalab.lab.rows import rises
from deltalab.lab.spec import SweepSpec, Trial, words
from deltalab.lab.table import examples, row
from deltalab.lab.trials import State, Sweep, failure, find
from deltalab.lab.tuning import at_edges, chosen, tried
from deltalab.report import Curves, curves_of
from deltalab.report.style import PALETTE
from deltalab.report.values import Record

LOSSES = ("held_out", "loss")
SHOWN = 8
"""Groups with a line of their own in a figure; of more, those that are best."""


@dataclass(frozen=True)
class One:
    """A finished trial: its run, its record, its curves by name."""

    trial: Trial
    run: Run
    record: Record
    curves: Curves


class Tuning(NamedTuple):
    """rows: (group, what was tried, the measure that the choice is by, its mean, "chosen" or nothing). waiting: groups without a choice.

    edge: groups whose choice is the lowest or the highest of what was tried, which "chosen" then says as well.
    """

    rows: list[tuple[str, str, str, float, str]]
    waiting: list[str]
    edge: list[str]


@dataclass(frozen=True)
class Gathered:
    """A sweep and what came of it. groups: those with a finished trial, in the sweep's order.

    main: the measure that groups are ranked by. lines: measure -> a line a group, tested against the baseline, which is first.
    tests: measure -> the number of tests that its p-values were corrected over, those of all scores, or of the losses.
    note: what a reader has to know of the baseline; mostly nothing. tuning: of a sweep that is tuned. parts: the same for the groups
    of each task, where several share no score; no groups of two tasks are compared. task: which that is, of a part.
    """

    name: str
    spec: SweepSpec
    trials: Sequence[Trial]
    states: Mapping[str, State]
    failures: Mapping[str, str]
    groups: Mapping[str, Sequence[One]]
    baseline: str
    main: str
    lines: Mapping[str, Sequence[Line]]
    tests: Mapping[str, int]
    note: str = ""
    tuning: Tuning | None = None
    task: str = ""
    parts: "Sequence[Gathered]" = ()

    @property
    def done(self) -> list[One]:
        """All finished trials."""
        return [one for group in self.groups.values() for one in group]

    @property
    def runs(self) -> list[Run]:
        """Their runs."""
        return [one.run for one in self.done]

    @property
    def counts(self) -> Counter[str]:
        """How many trials are how far."""
        return Counter(self.states[trial.id] for trial in self.trials)

    @property
    def seeds(self) -> int:
        """The most finished seeds that a group has."""
        return max(len(group) for group in self.groups.values())

    @property
    def rises(self) -> bool:
        """Whether more of the main measure is better."""
        return rises(self.main)

    @cached_property
    def ranked(self) -> list[Line]:
        """The lines of the main measure, the best first; groups without it are left out."""
        there = [line for line in self.lines[self.main] if not math.isnan(line.mean)]
        return sorted(there, key=lambda line: -line.mean if self.rises else line.mean)

    @property
    def best(self) -> str:
        """The group with the best mean of the main measure."""
        return self.ranked[0].group

    @property
    def alike(self) -> bool:
        """Whether several groups have one and the same mean of the main measure, so that none is best."""
        return len(self.ranked) > 1 and len({line.mean for line in self.ranked}) == 1

    @cached_property
    def to_best(self) -> list[Line]:
        """The other groups' lines of the main measure, tested against the best."""
        return [line for line in compare(self.runs, [self.main], self.best) if line.group != self.best]

    def shown(self, most: int = SHOWN) -> list[str]:
        """The groups that figures of a few show, in the sweep's order: the best ones, and the baseline."""
        if len(self.groups) <= most:
            return list(self.groups)
        first = [line.group for line in self.ranked if line.group != self.baseline][: most - 1]
        return [name for name in self.groups if name in first or name == self.baseline]

    def left_out(self, most: int = SHOWN) -> str:
        """That some groups are not drawn, for a caption; nothing if all are."""
        if len(self.groups) <= most:
            return ""
        return f" Of {len(self.groups)} groups the {most - 1} best by {measure_name(self.main)} and the baseline."

    def look(self, group: str) -> tuple[str, str]:
        """The colour and the dash that a group has in every figure."""
        shown = self.shown()
        number = shown.index(group) if group in shown else 0
        return PALETTE[number % len(PALETTE)]

    def mean(self, group: str, column: str) -> float | None:
        """The mean of a column over a group's seeds that have it; None if none does."""
        values = [one.run.values.get(column) for one in self.groups[group]]
        there = [float(value) for value in values if value is not None]
        return float(np.mean(there)) if there else None


def gather(folder: str | Path, baseline: str | None = None, measure: str | None = None) -> Gathered:
    """The sweep in a folder. baseline: a group; the spec's, or else the first, if not given. measure: what groups are ranked by.

    Raises: UserError if there is no sweep, nothing is finished, or for a group or a measure that there is not.
    """
    sweep = find(folder)
    states = sweep.states()
    groups: dict[str, list[One]] = {}
    for trial in sweep.trials:
        if states[trial.id] == "finished":
            groups.setdefault(trial.group, []).append(_one(sweep, trial))
    if not groups:
        told = ", ".join(f"{n} {state}" for state, n in Counter(states.values()).items())
        raise UserError(f"the sweep in '{folder}' has no finished trial to report on.", found=told, next=f"deltalab sweep {folder} --status")  # fmt: skip
    runs = [one.run for group in groups.values() for one in group]
    against, note = _baseline(sweep.spec, list(groups), baseline)
    known = _measured(runs)
    if not known:
        raise UserError(
            f"no finished trial of the sweep in '{folder}' has a score or a loss.",
            next="look at curves/train.jsonl of its trials: did they diverge?",
        )
    if measure is not None and measure not in known:
        raise UserError(f"no run has the measure '{measure}'.", nearest=nearest(measure, known) or known)
    parts = {tuple(part): _measured([run for run in runs if run.group in part]) for part in parts_of(runs)}
    mains = {part: measure if measure in own else own[0] for part, own in parts.items() if own}
    # scores are corrected together, as `deltalab compare` does with them; the losses, which say the same again, apart
    losses = [name for name in known if name in LOSSES and (name == "held_out" or name in mains.values())]
    families = [[name for name in known if name not in LOSSES], losses]
    lines: list[Line] = []
    tests: dict[str, int] = {}
    for family in families:
        some = compare(runs, family, against) if family else []
        tests |= dict.fromkeys(family, sum(line.difference is not None for line in some))
        lines += some
    failed = {t.id: str(failure(sweep, t)["error"]) for t in sweep.trials if states[t.id] == "failed"}
    name = Path(folder).resolve().name
    whole = Gathered(name, sweep.spec, sweep.trials, states, failed, groups, against, measure or known[0], _by_measure(lines), tests, note, _tuning(sweep))  # fmt: skip
    return replace(
        whole, parts=[_part(whole, part, main, lines) for part, main in mains.items()] if len(parts) > 1 else [whole]
    )


def _measured(runs: Sequence[Run]) -> list[str]:
    """The measures that a run has a number of; one that diverged everywhere has none."""
    return [name for name in measures_of(runs) if any(math.isfinite(value) for run in runs if (value := run.values.get(name)) is not None)]  # fmt: skip


def _by_measure(lines: Sequence[Line]) -> dict[str, list[Line]]:
    return {name: [line for line in lines if line.measure == name] for name in dict.fromkeys(line.measure for line in lines)}  # fmt: skip


def _part(whole: Gathered, groups: Sequence[str], main: str, lines: Sequence[Line]) -> Gathered:
    """What is of these groups, by shorter names: without the settings that all of them have and no other group has."""
    others = {setting for group in whole.groups if group not in groups for setting in settings_in(group)}
    common = set.intersection(*(set(settings_in(group)) for group in groups)) - others
    short = {group: ", ".join(one for one in settings_in(group) if one not in common) or group for group in groups}
    own = {short[group]: [replace(one, run=replace(one.run, group=short[group])) for one in whole.groups[group]] for group in groups}  # fmt: skip
    scores = [name for some in own.values() for name in some[0].run.values if name.startswith("score.")]
    tasks = [name.removeprefix("score.").rpartition(".")[0] for name in scores] or ["no score"]
    first = stand_in(whole.baseline, groups)
    renamed = [replace(line, group=short[line.group], baseline=short[first]) for line in lines if line.group in short]
    trials = [replace(trial, group=short[trial.group]) for trial in whole.trials if trial.group in short]
    return replace(whole, trials=trials, groups=own, baseline=short[first], main=main, task=", ".join(dict.fromkeys(tasks)), lines=_by_measure(renamed))  # fmt: skip


def _tuning(sweep: Sweep) -> Tuning | None:
    if not sweep.tuning:
        return None
    best = chosen(sweep)
    rows, edge = [], []
    for group, found in tried(sweep).items():
        settings = [json.loads(key) for key in found.means]
        ends = at_edges(best.get(group, {}), settings) if sweep.spec.tune else {}
        edge += [group] * bool(ends)
        note = f"chosen, the {' and '.join(dict.fromkeys(ends.values()))}" if ends else "chosen"
        rows += [(group, words(setting), found.by, value, note if best.get(group) == setting else "")
                 for setting, (value, _) in zip(settings, found.means.values(), strict=True)]  # fmt: skip
    waiting = dict.fromkeys(trial.group for trial in sweep.tuning if trial.group not in best)
    return Tuning(rows, list(waiting), edge)


def measure_name(measure: str) -> str:
    """A measure in words: `score.rows.accuracy` is the accuracy on rows."""
    if measure in LOSSES:
        return {"held_out": "held-out loss", "loss": "training loss"}[measure]
    task, _, name = measure.removeprefix("score.").rpartition(".")
    return f"{name} on {task}"


def unit(measure: str) -> str:
    """The same for an axis."""
    return f"{measure_name(measure)}, nats per token" if measure in LOSSES else measure_name(measure)


def _one(sweep: Sweep, trial: Trial) -> One:
    place = sweep.place(trial)
    run = Run(trial.group, trial.spec.seed, row(sweep, trial), examples(sweep, trial))
    return One(trial, run, read_record(place), curves_of(place))


def _baseline(spec: SweepSpec, groups: list[str], asked: str | None) -> tuple[str, str]:
    """The group that others are tested against, and what is to be said of the choice."""
    if asked is not None and asked not in groups:
        raise UserError(
            f"no group with a finished trial is called '{asked}'.", nearest=nearest(asked, groups) or groups
        )
    if asked is None and spec.baseline is not None and spec.baseline not in groups:
        return groups[0], f"The baseline '{spec.baseline}' has no finished trial; '{groups[0]}' stands in for it."
    return asked or spec.baseline or groups[0], ""
