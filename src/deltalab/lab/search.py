"""A search: Optuna draws the settings of a sweep's trials, one study for each of its groups.

Optuna's storage holds what was drawn and what came of it; the trials' folders say who is at work and how far. Both are read and
written under one lock, in which a process that looks for work

    tells Optuna of every trial whose folder has come to an end, whoever ran it;
    takes over a drawn trial that nobody works on: from its checkpoint, if it has one;
    and draws a new one where none is left and the study is not full.

So a process may be killed anywhere and no trial is lost, run twice or counted twice: a trial is drawn in one write. A setting that
is drawn again has the same folder, and its result is told again. The sampler's seed is a function of the spec's first seed and the
trial's number: processes side by side draw apart, and one that starts again does not repeat itself.
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import read_json, write_json
from deltalab.core.records import read_record
from deltalab.core.spec import digest
from deltalab.lab.journal import JOURNAL, BaseStorage, alone, optuna, storage_in
from deltalab.lab.rows import rises, row_of
from deltalab.lab.sampling import draw, pruner, values_of
from deltalab.lab.space import SearchSpec
from deltalab.lab.spec import SweepSpec, Trial, id_of, run_of, short, trials, words
from deltalab.lab.trials import Pruned, Sweep, run_one

COMPLETE, FAIL, PRUNED, RUNNING = (optuna.trial.TrialState[name] for name in ("COMPLETE", "FAIL", "PRUNED", "RUNNING"))
WORDS = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "not ended", "WAITING": "not ended"}
LOCK = "search.lock"
PAUSE = 0.5
"""Seconds before a process that found nothing to do looks again."""


class Study:
    """The search in one group. group: a trial of it, with no setting from the space."""

    def __init__(self, sweep: Sweep, group: Trial, storage: BaseStorage) -> None:
        self.sweep, self.spec, self.group, self.search = sweep, sweep.spec, group, search_of(sweep.spec)
        self.measure = self.search.measure or "held_out"
        self.sign = -1.0 if rises(self.measure) else 1.0
        self.seed = self.spec.seeds[0]
        sizes = [len(values or ()) for values in self.search.grids().values()]
        self.most = min(self.search.trials, math.prod(sizes)) if self.search.sampler == "grid" else self.search.trials
        space = self.search.plain()["space"]
        same = digest([self.spec.base, dict(group.settings), space, self.search.validation, self.measure, self.seed])
        self.name = f"{group.group} {same}"
        self.study = self._made(storage)

    def ended(self) -> bool:
        """Whether every trial has come to an end."""
        known = self.study.get_trials(deepcopy=False)
        return len(known) >= self.most and all(trial.state.is_finished() for trial in known)

    def listed(self) -> list[Trial]:
        """The trials that were drawn, each setting once."""
        found: dict[str, Trial] = {}
        for known in self.study.get_trials(deepcopy=False):
            if trial := self._trial(known.number, known.params):
                found.setdefault(trial.id, trial)
        return list(found.values())

    def after(self) -> list[Trial]:
        """The best setting with every seed, on the test data; nothing before the search has ended."""
        best = self.best() if self.search.then and self.ended() else None
        return trials(self.spec, {self.group.group: values_of(self.search, best.params)}) if best else []

    def best(self) -> "optuna.trial.FrozenTrial | None":
        """The finished trial with the best measure, the first of several."""
        done = self.study.get_trials(deepcopy=False, states=(COMPLETE,))
        return min(done, key=lambda trial: (self.sign * (trial.value or 0.0), trial.number), default=None)

    def left(self) -> int:
        """Runs that are to be made, as far as is known."""
        if not self.ended():
            return self.most - sum(t.state.is_finished() for t in self.study.get_trials(deepcopy=False)) + len(self.spec.seeds) * self.search.then  # fmt: skip
        return sum(self.sweep.state(trial) in ("waiting", "begun", "running") for trial in self.after())

    def claim(self, taken: Collection[str] = ()) -> Trial | None:
        """A trial to be run now, none of those with the ids `taken`. None: the others have them all, or all is done."""
        with alone(self.sweep.folder / LOCK):
            for known in self._open():
                trial = self._trial(known.number, known.params)
                if trial is not None and trial.id in taken:
                    continue
                state = self.sweep.state(trial) if trial else "failed"
                if state in ("waiting", "begun"):
                    return trial
                if state != "running":
                    self._settle(known, trial, state)
        left = (trial for trial in self.after() if trial.id not in taken)
        return next((trial for trial in left if self.sweep.state(trial) in ("waiting", "begun")), None)

    def _open(self) -> Iterator["optuna.trial.FrozenTrial"]:
        """What was drawn and has not ended, then new ones."""
        yield from self.study.get_trials(deepcopy=False, states=(RUNNING,))
        while (number := len(self.study.get_trials(deepcopy=False))) < self.most:
            drawn = draw(self.study, self.search, self.seed)
            if trial := self._trial(number, drawn.params):
                drawn.user_attrs = {"folder": f"trials/{trial.id}"}
            self.study.add_trial(drawn)
            yield self.study.get_trials(deepcopy=False)[number]

    def reopen(self, storage: BaseStorage) -> None:
        """Failed trials whose folder says so no more are to be run. Optuna ends a trial once, so the study is written anew."""
        known, again = self.study.get_trials(), []
        for trial in known:
            found = self._trial(trial.number, trial.params)
            if trial.state == FAIL and found is not None and self.sweep.state(found) != "failed":
                trial.state, trial.datetime_complete = RUNNING, None
                again.append(trial)
        if again:
            optuna.delete_study(study_name=self.name, storage=storage)
            self.study = self._made(storage)
            self.study.add_trials(known)

    def watch(self, trial: Trial) -> Callable[[Sequence[Mapping[str, Any]]], None] | None:
        """What `run_spec` calls at each held-out evaluation of a trial of the search: Optuna hears of it and may end the trial."""
        number = trial.number
        if number is None:
            return None

        def look(rows: Sequence[Mapping[str, Any]]) -> None:
            known = self.study.get_trials(deepcopy=False)[number]
            if known.state.is_finished():  # given up from outside, after its process had died too often
                return
            losses = [row["loss"] for row in rows]
            drawn = self._report(known, losses)
            # a run that goes on from a checkpoint comes past evaluations that it was let go on after
            if (known.last_step or 0) < len(losses) and drawn.should_prune():
                # while the run still holds its folder, so that nobody takes it over
                place = self.sweep.place(trial)
                write_json(place / "pruned.json", {"step": rows[-1]["step"], "held_out": losses})
                raise Pruned(f"at step {rows[-1]['step']}, held-out loss {short(losses[-1])}")

        return look

    def line(self) -> str:
        """How far the search is, in words."""
        counts = Counter(WORDS[trial.state.name] for trial in self.study.get_trials(deepcopy=False))
        told = [f"{n} {state}" for state, n in counts.items()]
        line = f"search in '{self.group.group}': {', '.join([f'{sum(counts.values())} of {self.most} trials drawn', *told])}"
        if best := self.best():
            line += f"; best {self.measure} {best.value:.4g} in #{best.number}: {words(values_of(self.search, best.params))}"
        return line

    def _made(self, storage: BaseStorage) -> "optuna.Study":
        with contextlib.suppress(KeyError):  # looked for first: whoever only reads writes nothing
            return optuna.load_study(study_name=self.name, storage=storage, pruner=pruner(self.search))
        directions = optuna.study.StudyDirection
        direction = directions.MINIMIZE if self.sign > 0 else directions.MAXIMIZE
        return optuna.create_study(storage=storage, study_name=self.name, direction=direction, pruner=pruner(self.search), load_if_exists=True)  # fmt: skip

    def _trial(self, number: int, params: Mapping[str, Any]) -> Trial | None:
        """The run of a drawn setting; None if its parts do not go together."""
        tried = values_of(self.search, params)
        settings = {**self.group.settings, **tried}
        try:
            run = run_of(
                self.spec, {**settings, "validation": self.search.validation, "costs": False}, f"#{number}", self.seed
            )
        except UserError:
            return None
        return Trial(id_of(run), self.group.group, settings, run, tried, number)

    def _settle(self, known: "optuna.trial.FrozenTrial", trial: Trial | None, state: str) -> None:
        """Tell what a folder says of a trial that has ended."""
        if trial is None or state == "failed":
            self.study.tell(known.number, state=FAIL)
        elif state == "pruned":
            self._report(known, read_json(self.sweep.place(trial) / "pruned.json", "note")["held_out"])
            self.study.tell(known.number, state=PRUNED)
        else:
            value, losses = self._measured(read_record(self.sweep.place(trial)))
            self._report(known, losses)
            self.study.tell(known.number, None if math.isnan(value) else value, FAIL if math.isnan(value) else COMPLETE)

    def _measured(self, record: Mapping[str, Any]) -> tuple[float, list[float | None]]:
        """The measure and the held-out losses of a finished trial. Raises: UserError if it has no such measure."""
        row, losses = row_of(record), record["result"]["held_out"]
        if self.measure not in row or (self.measure == "held_out" and not losses):
            there = [key for key in row if key.startswith("score.")] + ["held_out"] * bool(losses)
            raise UserError(f"search.measure: no trial has '{self.measure}'.", nearest=nearest(self.measure, there) or there,
                            next="name one that there is; what has run is not run again")  # fmt: skip
        value = row[self.measure]
        return math.nan if value is None else float(value), losses

    def _report(self, known: "optuna.trial.FrozenTrial", losses: Sequence[float | None]) -> "optuna.Trial":
        """The held-out losses as Optuna's steps 1, 2, …, but for that before training; turned over where more of the measure is better."""
        trial = optuna.Trial(self.study, known._trial_id)
        for number, loss in enumerate(losses[1:], 1):
            if number not in known.intermediate_values:
                trial.report(math.nan if loss is None else self.sign * loss, number)
        return trial


def search_of(spec: SweepSpec) -> SearchSpec:
    """The search that a sweep has."""
    assert spec.search is not None
    return spec.search


def groups(spec: SweepSpec) -> list[Trial]:
    """A trial of each group, none of its settings from the space.

    Raises: UserError if a value of the space makes no run of one of them, or none of its tasks has the measure.
    """
    search = search_of(spec)
    found = trials(spec.but(search=None, seeds=spec.seeds[:1]))
    for group in found:
        for corner in search.corners():
            name = f"{group.group}, {words(corner)}" if group.settings else words(corner)
            tasks = [f"score.{task.task}." for task in run_of(spec, {**group.settings, **corner}, name, spec.seeds[0]).data]  # fmt: skip
            if search.measure not in (None, "held_out", "loss") and not search.measure.startswith(tuple(tasks)):
                raise UserError(f"search.measure: no run has '{search.measure}'.", nearest=[*(f"{task}…" for task in tasks), "held_out", "loss"])  # fmt: skip
    return found


def studies(sweep: Sweep) -> list[Study]:
    """The study of each group, made or found."""
    storage = storage_in(sweep.folder, search_of(sweep.spec).storage)
    return [Study(sweep, group, storage) for group in groups(sweep.spec)]


def reopen(sweep: Sweep) -> None:
    """Failed trials whose note is gone from their folder are to be run again."""
    storage = storage_in(sweep.folder, search_of(sweep.spec).storage)
    with alone(sweep.folder / LOCK):
        for group in groups(sweep.spec):
            Study(sweep, group, storage).reopen(storage)


def sweep_in(folder: Path, spec: SweepSpec) -> Sweep:
    """The sweep with the trials that are known by now. Raises: UserError as `groups`."""
    groups(spec)
    bare = Sweep(folder, spec, [])
    there = (folder / "sweep.json").is_file() and (search_of(spec).storage or (folder / JOURNAL).is_file())
    found = studies(bare) if there else []
    return Sweep(folder, spec, [t for study in found for t in study.after()], [t for study in found for t in study.listed()])  # fmt: skip


def work(sweep: Sweep, say: Callable[[str], None] = lambda _: None, begin: Callable[[Trial], None] = lambda _: None) -> None:  # fmt: skip
    """Run what the search asks for, and then the best of each group, until nothing is left that others do not hold."""
    import deltalab.train.run  # noqa: F401  before a trial is claimed, for it takes seconds

    found = studies(sweep)
    while True:
        over = all(study.ended() for study in found)  # seen before: what ends while others are asked brings new trials
        study, trial = next(((s, t) for s in found if (t := s.claim())), (None, None))
        if study is not None and trial is not None:
            begin(trial)
            run_one(sweep, trial, say, study.watch(trial))
        elif over:
            return
        else:
            time.sleep(PAUSE)
