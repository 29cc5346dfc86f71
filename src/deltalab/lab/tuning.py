"""What was tried for each group of a sweep that is tuned, and what is best of it."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deltalab.core.errors import UserError, nearest
from deltalab.core.records import read_record
from deltalab.lab.rows import rises, row_of

if TYPE_CHECKING:
    from deltalab.lab.trials import Sweep

Tried = dict[str, dict[str, tuple[float, float]]]
"""Group -> settings as JSON -> the means over seeds of the measure that the choice is made by, and of the held-out loss."""


def tried(sweep: "Sweep") -> tuple[str, Tried]:
    """The measure, and what came of every setting that has a finished trial; "" and nothing before one has.

    Raises: UserError if a trial does not have the measure.
    """
    rows = [(t, row_of(read_record(sweep.place(t)))) for t in sweep.tuning if sweep.state(t) == "finished"]
    if not rows:
        return "", {}
    known = [key for key, value in rows[0][1].items() if isinstance(value, float) and key.startswith("score.")]
    tune, search = sweep.spec.tune, sweep.spec.search
    by = (search.measure or "held_out") if search else (tune and tune.by) or next(iter(known), "held_out")
    values: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for trial, row in rows:
        if row.get(by) is None:
            raise UserError(
                f"no run has the measure '{by}' to choose by.",
                nearest=nearest(by, known) or [*known, "held_out"],
                next="tune.by",
            )
        values.setdefault(trial.group, {}).setdefault(json.dumps(trial.tuned), []).append(
            (float(row[by]), float(row.get("held_out") or 0))
        )
    return by, {
        group: {key: tuple(np.mean(some, 0).tolist()) for key, some in of.items()} for group, of in values.items()
    }


def chosen(sweep: "Sweep") -> dict[str, dict[str, Any]]:
    """Group -> the best of what was tried for it, of every group whose trials to choose by have ended; of equals that with the
    lower held-out loss, then the first.

    Raises: UserError as `tried`.
    """
    by, found = tried(sweep)
    sign = 1.0 if rises(by) else -1.0
    open_ = {trial.group for trial in sweep.tuning if sweep.state(trial) not in ("finished", "pruned", "failed")}

    def rank(value: tuple[float, float]) -> tuple[float, float]:
        return tuple(-np.inf if np.isnan(x) else x for x in (sign * value[0], -value[1]))  # type: ignore[return-value]

    return {
        group: json.loads(max(values, key=lambda key: rank(values[key])))
        for group, values in found.items() if group not in open_
    }  # fmt: skip


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
