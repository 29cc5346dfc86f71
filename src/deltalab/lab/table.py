"""One table over all runs of a sweep: a row a finished trial, its settings, measures and costs as columns."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltalab.core.files import read_json, replacing
from deltalab.core.records import read_record
from deltalab.lab.rows import row_of
from deltalab.lab.spec import Trial, short
from deltalab.lab.trials import Sweep, find

if TYPE_CHECKING:
    import pandas as pd

TABLE = "results.parquet"


def load(folder: str | Path, *, tuning: bool = False) -> "pd.DataFrame":
    """The finished trials of the sweep in a folder, in its order. tuning: those that settings were chosen by, instead;
    of a search also those that it ended, with their `number` in it and their `state`, finished or pruned.

    Columns: id; group, the settings in words; each setting by its key, and `seed`; `score.<task>.<measure>` after training, `before.…` before it;
    loss, held_out; trained and base parameters, trained_percent and trained_factor; adapter_bytes; seconds of the whole run and of
    training; tokens; steps; tokens_per_second; step_seconds; bytes before training, memory_before, at most in it, memory_peak, and
    their difference, memory_above; what `deltalab.train.costs` measures, its parts after a point: latency.merged, merge.relative;
    forgetting.<task>, how far the loss of what the base knew has risen, and forgetting, their mean; base_untouched,
    gradient_only_delta, reloaded.
    Raises: UserError if there is no sweep.
    """
    import pandas as pd

    sweep = find(folder)
    found = sweep.tuning if tuning else sweep.trials
    return pd.DataFrame([row(sweep, trial) for trial in found if sweep.state(trial) in ("finished", "pruned")])


def write(sweep: Sweep) -> Path:
    """The table as one Parquet file in the sweep's folder; its path. Of a search after which nothing runs it is that of the search."""
    frame = load(sweep.folder, tuning=sweep.spec.search is not None and not sweep.spec.search.then)
    with replacing(sweep.folder / TABLE) as tmp:
        frame.to_parquet(tmp)
    return sweep.folder / TABLE


def row(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    """One trial."""
    settings = {key: value if isinstance(value, (int, float, str, bool)) or value is None else short(value)
                for key, value in {**trial.settings, **trial.tuned}.items()}  # fmt: skip
    state, place = sweep.state(trial), sweep.place(trial)
    about = {"id": trial.id, "group": trial.group, **settings}
    if trial.number is not None:
        about |= {"number": trial.number, "state": state}
    if state == "pruned":
        note = read_json(place / "pruned.json", "note")
        return {**about, "seed": trial.spec.seed, "held_out": note["held_out"][-1], "steps": note["step"]}
    return {**about, **row_of(read_record(place))}


def examples(sweep: Sweep, trial: Trial) -> dict[str, list[float]]:
    """The values of single examples after training, by `<task>.<measure>`; empty if the trial has none."""
    return examples_in(sweep.place(trial))


def examples_in(run: Path) -> dict[str, list[float]]:
    """The same of a run's folder."""
    path = run / "examples.json"
    if not path.is_file():
        return {}
    after = read_json(path, "examples")["after"]
    return {f"{task}.{measure}": items for task, found in after.items() for measure, items in found.items()}
