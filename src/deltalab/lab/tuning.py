"""What was tried for each group of a sweep that is tuned, and what is best of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltalab.core.errors import UserError, nearest
from deltalab.core.records import read_record
from deltalab.lab.rows import rises, row_of

if TYPE_CHECKING:
    from deltalab.lab.trials import Sweep


@dataclass(frozen=True)
class Tried:
    """What came of every setting of a group that has a finished trial. by: the measure that the choice is made by.

    means: settings as JSON -> the means over seeds of that measure and of the held-out loss.
    """

    by: str
    means: Mapping[str, tuple[float, float]]

    def best(self) -> dict[str, Any]:
        """The settings that are best; of equals those with the lower held-out loss, then the first."""
        sign = 1.0 if rises(self.by) else -1.0

        def rank(key: str) -> tuple[float, ...]:
            value, held_out = self.means[key]
            return tuple(-np.inf if np.isnan(x) else x for x in (sign * value, -held_out))

        return dict(json.loads(max(self.means, key=rank)))


def tried(sweep: "Sweep") -> dict[str, Tried]:
    """Group -> what was tried for it, by the measure of the spec, else by the group's own first score, else by the held-out loss.

    Raises: UserError if a trial does not have the measure.
    """
    tune, search = sweep.spec.tune, sweep.spec.search
    asked = (search.measure or "held_out") if search else tune.by if tune else None
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for trial in sweep.tuning:
        if sweep.state(trial) == "finished":
            rows.setdefault(trial.group, []).append((json.dumps(trial.tuned), row_of(read_record(sweep.place(trial)))))
    return {group: _means(some, asked) for group, some in rows.items()}


def _means(rows: Sequence[tuple[str, Mapping[str, Any]]], asked: str | None) -> Tried:
    known = [key for key, value in rows[0][1].items() if isinstance(value, float) and key.startswith("score.")]
    by = asked or next(iter(known), "held_out")
    values: dict[str, list[tuple[float, float]]] = {}
    for key, row in rows:
        if row.get(by) is None:
            raise UserError(f"no run has the measure '{by}' to choose by.", nearest=nearest(by, known) or [*known, "held_out"], next="tune.by")  # fmt: skip
        values.setdefault(key, []).append((float(row[by]), float(row.get("held_out") or 0)))
    return Tried(by, {key: tuple(np.mean(some, 0).tolist()) for key, some in values.items()})


def chosen(sweep: "Sweep") -> dict[str, dict[str, Any]]:
    """Group -> the best of what was tried for it, of every group whose trials to choose by have ended.

    Raises: UserError as `tried`.
    """
    found = tried(sweep)
    open_ = {trial.group for trial in sweep.tuning if sweep.state(trial) not in ("finished", "pruned", "failed")}
    return {group: one.best() for group, one in found.items() if group not in open_}


def at_edges(best: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The settings in which the best is the lowest or the highest of three or more numbers that were tried, and which: a wider
    range may hold a better one.
    """
    found = {}
    for key, value in best.items():
        numbers = {one[key] for one in settings if isinstance(one.get(key), int | float)}
        if len(numbers) > 2 and value in (min(numbers), max(numbers)):
            found[key] = "lowest" if value == min(numbers) else "highest"
    return found
