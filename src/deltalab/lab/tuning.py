"""What was tried for each group of a sweep that is tuned, and what is best of it."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from deltalab.core.errors import UserError, nearest
from deltalab.core.records import read_record
from deltalab.lab.rows import rises, row_of

if TYPE_CHECKING:
    from deltalab.lab.trials import Sweep

Tried = dict[str, dict[str, float]]
"""Group -> settings as JSON -> the mean over seeds of the measure that the choice is made by."""


def tried(sweep: "Sweep") -> tuple[str, Tried]:
    """The measure, and what came of every setting that has a finished trial; "" and nothing before one has.

    Raises: UserError if a trial does not have the measure.
    """
    rows = [(t, row_of(read_record(sweep.place(t)))) for t in sweep.tuning if sweep.state(t) == "finished"]
    if not rows:
        return "", {}
    known = [key for key, value in rows[0][1].items() if isinstance(value, float) and key.startswith("score.")]
    asked = sweep.spec.tune and sweep.spec.tune.by
    if sweep.spec.search is not None:
        asked = sweep.spec.search.measure or "held_out"
    by = asked or next(iter(known), "held_out")
    values: dict[str, dict[str, list[float]]] = {}
    for trial, row in rows:
        if row.get(by) is None:
            raise UserError(
                f"no run has the measure '{by}' to choose by.",
                nearest=nearest(by, known) or [*known, "held_out"],
                next="tune.by",
            )
        values.setdefault(trial.group, {}).setdefault(json.dumps(trial.tuned), []).append(float(row[by]))
    return by, {group: {key: float(np.mean(some)) for key, some in of.items()} for group, of in values.items()}


def chosen(sweep: "Sweep") -> dict[str, dict[str, Any]]:
    """Group -> the best of what was tried for it, of every group whose trials to choose by have ended; the first of equals.

    Raises: UserError as `tried`.
    """
    by, found = tried(sweep)
    sign = 1.0 if rises(by) else -1.0
    open_ = {trial.group for trial in sweep.tuning if sweep.state(trial) not in ("finished", "pruned", "failed")}
    return {
        group: json.loads(max(values, key=lambda key: -np.inf if np.isnan(values[key]) else sign * values[key]))
        for group, values in found.items() if group not in open_
    }  # fmt: skip
