"""Groups of runs beside each other: means over seeds with intervals, tests against a baseline, what is within noise.

A group is a setting with its seeds. What two groups share decides the test of their difference:

    the same seeds and the same examples    the table of differences, seeds × examples (`core.stats.crossed`); of one seed,
                                            Student's over examples
    the same seeds                          Student's over the seeds' differences
    other seeds                             Welch's over seeds

p-values of one comparison are corrected together (Holm 1979). A difference whose corrected p is not below α is called within
noise, whatever its size. Groups of different tasks, which share no score, are compared each with the baseline of their own.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as sps

from deltalab.core.errors import UserError, nearest
from deltalab.core.records import read_record
from deltalab.core.spec import digest
from deltalab.core.stats import Estimate, Interval, crossed, holm, share_interval, student, t_interval
from deltalab.lab.rows import OF_DATA, rises, row_of
from deltalab.lab.table import examples, examples_in, row
from deltalab.lab.trials import find

ALPHA = 0.05


@dataclass(frozen=True)
class Run:
    """One run. values: its table row. items: the values of single examples, by `<task>.<measure>`."""

    group: str
    seed: int
    values: Mapping[str, Any]
    items: Mapping[str, Sequence[float]]

    def examples(self, measure: str) -> Sequence[float] | None:
        """The values of single examples whose mean a measure is, if it is one."""
        return self.items.get(measure.removeprefix("score."))


@dataclass(frozen=True)
class Difference:
    """Of a group to the baseline, in a measure: its interval, how it was tested, p, and p corrected for the table."""

    interval: Interval
    how: str
    p: float
    corrected: float = math.nan


@dataclass(frozen=True)
class Line:
    """A group in one measure. interval: of its mean over seeds, or of one seed's examples; None where neither is known.

    baseline: the group that it is compared with, itself for that one; None if nothing is compared.
    """

    group: str
    measure: str
    seeds: tuple[int, ...]
    mean: float
    interval: Interval | None
    baseline: str | None = None
    difference: Difference | None = None

    @property
    def rises(self) -> bool:
        """Whether more is better."""
        return rises(self.measure)

    def verdict(self, alpha: float = ALPHA) -> str:
        """The difference in words; nothing for the baseline, or where no test can be made."""
        if self.difference is None:
            return ""
        if not self.difference.corrected < alpha:
            return "within noise"
        return "better" if (self.difference.interval.value > 0) is self.rises else "worse"


def runs_of(folders: Sequence[str | Path]) -> list[Run]:
    """The finished runs of sweeps and of single runs. Single runs are one group if their specs differ in the seed alone.

    Raises: UserError for a folder that holds neither, or nothing finished.
    """
    found: list[Run] = []
    names: dict[str, str] = {}
    for folder in map(Path, folders):
        if (folder / "sweep.json").is_file():
            sweep = find(folder)
            done = [trial for trial in sweep.trials if sweep.state(trial) == "finished"]
            found += [Run(t.group, t.spec.seed, row(sweep, t), examples(sweep, t)) for t in done]
        else:
            record = read_record(folder)
            if record["kind"] != "train":
                raise UserError(f"'{folder}' is no training run.", found=f"the record of a {record['kind']}")
            same = digest({key: value for key, value in record["spec"].items() if key not in ("seed", "output")})
            group = names.setdefault(same, folder.name)
            found.append(Run(group, record["seed"], row_of(record), examples_in(folder)))
    if not found:
        raise UserError("no finished run is there to compare.", found=", ".join(map(str, folders)), next="deltalab sweep FOLDER --status")  # fmt: skip
    return found


def baseline_of(folders: Sequence[str | Path]) -> str | None:
    """The baseline that the spec of a single sweep names, if it has finished runs."""
    if len(folders) != 1 or not (Path(folders[0]) / "sweep.json").is_file():
        return None
    sweep = find(folders[0])
    named = sweep.spec.baseline
    return named if any(t.group == named and sweep.state(t) == "finished" for t in sweep.trials) else None


def compare(runs: Sequence[Run], measures: Sequence[str], baseline: str | None = None) -> list[Line]:
    """Every group in every measure, task by task, the baseline first in each; without a baseline nothing is tested.

    Raises: UserError for a measure or a baseline that there is not.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    if baseline is not None and baseline not in groups:
        raise UserError(f"no group is called '{baseline}'.", nearest=nearest(baseline, groups) or list(groups))
    known = measures_of(runs)
    for measure in measures:
        if measure not in known:
            raise UserError(f"no run has the measure '{measure}'.", nearest=nearest(measure, known) or known)
    parts = [(stand_in(baseline, part) if baseline else None, part) for part in parts_of(runs)]
    lines = [
        _line(name, groups[name], measure, first)
        for measure in measures for first, part in parts
        if any(_known(run, measure) for group in part for run in groups[group])
        for name in [*([first] if first else []), *(group for group in part if group != first)]
    ]  # fmt: skip
    tested = [_difference(groups[line.group], groups[line.baseline], line.measure) if line.baseline not in (None, line.group) else None for line in lines]  # fmt: skip
    corrected = iter(holm([d.p for d in tested if d is not None]).tolist() if any(tested) else [])
    return [
        line if d is None else replace(line, difference=replace(d, corrected=next(corrected)))
        for line, d in zip(lines, tested, strict=True)
    ]  # fmt: skip


def parts_of(runs: Sequence[Run]) -> list[list[str]]:
    """The groups in parts that have no score in common: what was tested on other tasks. Groups without a score are one part."""
    scores: dict[str, set[str]] = {}
    for run in runs:
        scores.setdefault(run.group, set()).update(key for key in run.values if key.startswith("score."))
    parts: list[tuple[list[str], set[str]]] = []
    for group, own in scores.items():
        joined = [part for part in parts if own & part[1] or not own | part[1]]
        names = [name for part in joined for name in part[0]] + [group]
        kept = [part for part in parts if part not in joined]
        parts = [*kept, (names, own.union(*(part[1] for part in joined)))]
    order = list(scores)
    return sorted((sorted(names, key=order.index) for names, _ in parts), key=lambda names: order.index(names[0]))


def stand_in(baseline: str, groups: Sequence[str]) -> str:
    """The baseline, or where it is of another task the group whose settings are most like its own, the first of equals."""
    own = set(settings_in(baseline))
    return baseline if baseline in groups else max(groups, key=lambda group: len(own & set(settings_in(group))))


def settings_in(group: str) -> list[str]:
    """The settings that a group's name is made of: what its commas part, but for those in brackets."""
    return re.split(r", (?![^()]*\))", group)


def at_most_below(line: Line, baseline: Line, margin: float) -> str:
    """Whether a group is at most that share of the baseline's mean worse than it: shown, if the whole 95 % interval of the difference
    says so, refuted if none of it does, else open; nothing where there is no difference.

    A test of non-inferiority at α = .025 (Piaggio et al. 2012, doi:10.1001/jama.2012.87802); p-values are not corrected.
    """
    if line.difference is None:
        return ""
    ends = (line.difference.interval.low, line.difference.interval.high)
    worst, best = ends if line.rises else (-ends[1], -ends[0])
    bound = -margin * abs(baseline.mean)
    return "shown" if worst > bound else "refuted" if best < bound else "open"


def measures_of(runs: Sequence[Run]) -> list[str]:
    """Names of what the runs measured: scores first, then losses."""
    names = dict.fromkeys(key for run in runs for key, value in run.values.items() if isinstance(value, float))
    scores = [name for name in names if name.startswith("score.") and not name.endswith(OF_DATA)]
    return [*scores, *(name for name in ("held_out", "loss") if name in names)]


def pareto(lines: Sequence[Line], costs: Mapping[str, float]) -> list[str]:
    """The groups that no other beats in both, quality (the lines' means) and cost; the cheapest first."""
    sign = 1 if not lines or lines[0].rises else -1
    points = {line.group: (costs[line.group], -sign * line.mean) for line in lines}
    kept = [
        name for name, point in points.items()
        if not any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points.values())
    ]  # fmt: skip
    return sorted(kept, key=lambda name: points[name])


def cost_of(runs: Sequence[Run], column: str) -> dict[str, float]:
    """Group -> the mean of a column over its seeds: trained, seconds, adapter_bytes."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(float(run.values[column]))
    return {name: float(np.mean(values)) for name, values in groups.items()}


def _known(run: Run, measure: str) -> bool:
    """Whether a run has a number of it; a run that diverged may not."""
    value = run.values.get(measure)
    return value is not None and math.isfinite(value)


def _line(group: str, runs: Sequence[Run], measure: str, baseline: str | None) -> Line:
    there = [run for run in runs if _known(run, measure)]
    values = [float(run.values[measure]) for run in there]
    items = [run.examples(measure) for run in there]
    interval: Interval | None = None
    if all(kept is not None and set(kept) <= {0.0, 1.0} and kept for kept in items) and len({len(kept or ()) for kept in items}) == 1:  # fmt: skip
        interval = share_interval([kept for kept in items if kept is not None])
    elif len(values) > 1:
        interval = t_interval(values)
    elif items and items[0] is not None and len(items[0]) > 1:
        interval = t_interval(items[0])
    mean = float(np.mean(values)) if values else math.nan
    return Line(group, measure, tuple(run.seed for run in there), mean, interval, baseline)


def _difference(runs: Sequence[Run], baseline: Sequence[Run], measure: str) -> Difference | None:
    """The test that what the groups share allows; None where there is nothing to tell a difference from."""
    ours, theirs = ({run.seed: run for run in group if _known(run, measure)} for group in (runs, baseline))
    seeds = [seed for seed in ours if seed in theirs]
    pairs = [(ours[seed].examples(measure), theirs[seed].examples(measure)) for seed in seeds]
    lengths = {len(kept) for pair in pairs for kept in pair if kept is not None}
    if pairs and all(a is not None and b is not None for a, b in pairs) and len(lengths) == 1 and lengths.pop() > 1:
        table = np.array([np.subtract(a, b) for a, b in pairs])  # type: ignore[arg-type]
        found = student(table[0]) if len(table) == 1 else crossed(table)
        return _told(found, f"{len(table)} seed{'s' * (len(table) > 1)} × {table.shape[1]} examples, paired")
    if len(seeds) > 1:
        found = student([float(ours[s].values[measure]) - float(theirs[s].values[measure]) for s in seeds])
        return _told(found, f"{len(seeds)} seeds, paired")
    a, b = ([float(run.values[measure]) for run in group.values()] for group in (ours, theirs))
    if min(len(a), len(b)) < 2:
        return None
    test = sps.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Difference(Interval(float(np.mean(a) - np.mean(b)), float(low), float(high)), f"{len(a)} and {len(b)} seeds", float(test.pvalue))  # fmt: skip


def _told(found: Estimate, how: str) -> Difference:
    return Difference(found.interval(), how, found.p())
