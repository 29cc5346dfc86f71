"""A sweep on the disk: its spec, a folder a trial, and whoever works on it.

    sweep.json              the spec, and its trials: id, settings
    trials/<id>/            what `deltalab train` leaves: adapter, curves, record.json; or failed.json; or pruned.json and curves
    search.journal          what a search has drawn, see `search.py`

A trial is taken by the lock of its folder and is finished when its record is there. So any number of processes, on one
machine or on several that share the folder, can work on a sweep without talking to each other: what one of them that is
killed had begun is free again at once, and goes on from its checkpoint.
"""

import contextlib
import fcntl
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltalab.core.errors import UserError
from deltalab.core.files import InUse, read_json, remove, write_json
from deltalab.core.spec import build
from deltalab.lab.spec import SweepSpec, Trial, trials, tuning_trials
from deltalab.lab.tuning import chosen
from deltalab.train.spec import TrainSpec

if TYPE_CHECKING:
    from deltalab.train.loop import Watch

State = Literal["finished", "pruned", "failed", "running", "begun", "waiting"]
ENDED = ("finished", "pruned", "failed")
"""The states of trials that do not run again."""


class Pruned(Exception):
    """A search has ended this trial; its folder says so."""


@dataclass(frozen=True)
class Sweep:
    """A folder with its spec and trials. tuning: those that settings are chosen by; `trials` are then of groups that have them."""

    folder: Path
    spec: SweepSpec
    trials: list[Trial]
    tuning: list[Trial] = field(default_factory=list)

    @property
    def all(self) -> list[Trial]:
        """Every trial that is known."""
        return [*self.tuning, *self.trials]

    def place(self, trial: Trial) -> Path:
        """The trial's folder."""
        return self.folder / "trials" / trial.id

    def state(self, trial: Trial) -> State:
        """How far a trial is. begun: nobody works on it now."""
        place = self.place(trial)
        if (place / "record.json").is_file():
            return "finished"
        if (place / "pruned.json").is_file():
            return "pruned"
        if (place / "failed.json").is_file():
            return "failed"
        if not place.is_dir():
            return "waiting"
        return "running" if _held(place) else "begun"

    def states(self) -> dict[str, State]:
        """Trial's id -> state, of all."""
        return {trial.id: self.state(trial) for trial in self.all}


def create(spec: SweepSpec, folder: str | Path) -> Sweep:
    """The sweep in `folder`, made or found there; a spec that grew keeps the trials that it had.

    Raises: UserError for a trial that is no run, or a folder that holds something else.
    """
    folder = Path(folder)
    made = _sweep(folder, spec)
    if folder.exists() and not (folder / "sweep.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' holds something else than a sweep.", next="choose another folder: --output")
    listed = [{"id": trial.id, "settings": dict(trial.settings), "seed": trial.spec.seed} for trial in made.all]
    write_json(folder / "sweep.json", {"format": 1, "spec": spec.plain(), "trials": listed})
    return made


def find(folder: str | Path) -> Sweep:
    """The sweep that lies in a folder. Raises: UserError if none does."""
    path = Path(folder) / "sweep.json"
    if not path.is_file():
        raise UserError(f"'{folder}' holds no sweep.", found="no sweep.json there", next="deltalab sweep SPEC --output FOLDER makes one")  # fmt: skip
    spec = build(SweepSpec, read_json(path, "sweep")["spec"], str(path))
    return _sweep(Path(folder), spec)


def _sweep(folder: Path, spec: SweepSpec) -> Sweep:
    if spec.search is not None:
        from deltalab.lab.search import sweep_in

        return sweep_in(folder, spec)
    if spec.tune is None:
        return Sweep(folder, spec, trials(spec))
    begun = Sweep(folder, spec, [], tuning_trials(spec))
    return Sweep(folder, spec, trials(spec, chosen(begun)), begun.tuning)


def work(
    sweep: Sweep, mine: Sequence[Trial], say: Callable[[str], None] = lambda _: None,
    begin: Callable[[Trial], None] = lambda _: None,
) -> None:  # fmt: skip
    """Run what is left of these trials, one after the other, past those that others hold; returns when none is free.

    A trial that fails is recorded with its error, and the rest go on. begin: called with each that is to be run.
    """
    free = True
    while free:
        free = False
        for trial in mine:
            if sweep.state(trial) in ("waiting", "begun"):
                # one that another process took, or looked at, in this moment may be free again
                begin(trial)
                free |= run_one(sweep, trial, say) == "running"
        if free:
            time.sleep(0.2)


def run_one(
    sweep: Sweep, trial: Trial, say: Callable[[str], None] = lambda _: None, watch: "Watch | None" = None
) -> State:
    """Run one trial to its end, unless somebody else does. watch: as `run_spec` takes it; `Pruned` from it is an end."""
    from deltalab.train import run_spec
    from deltalab.train.checkpoint import Checkpoints

    try:
        run_spec(tracked(sweep, trial), sweep.place(trial), progress=False, watch=watch)
    except InUse:
        return "running"
    except Pruned as why:
        Checkpoints(sweep.place(trial), 1).clear()
        say(f"pruned: {trial.label}: {why}")
        return "pruned"
    except Exception as error:
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        fail(sweep, trial, told, traceback.format_exc())
        say(f"failed: {trial.label}: {told.splitlines()[0]}")
        return "failed"
    say(f"finished: {trial.label}")
    return "finished"


def tracked(sweep: Sweep, trial: Trial) -> TrainSpec:
    """The trial's spec, its trackers' runs named and grouped after the sweep where the spec says nothing else."""
    names = {"name": trial.label, "group": sweep.folder.resolve().name}
    track = [{**one.plain(), **{k: v for k, v in names.items() if one.plain()[k] is None}} for one in trial.spec.track]
    return trial.spec.but(track=track) if track else trial.spec


def fail(sweep: Sweep, trial: Trial, error: str, trace: str = "") -> None:
    """Record that a trial failed; it does not run again unless that is asked for."""
    place = sweep.place(trial)
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "failed.json", {"error": error, "traceback": trace})


def forget_failures(sweep: Sweep) -> int:
    """Failed trials are free again; how many there were."""
    failed = [sweep.place(trial) for trial in sweep.all if sweep.state(trial) == "failed"]
    for place in failed:
        remove(place / "failed.json")
    if failed and sweep.spec.search is not None:
        from deltalab.lab.search import reopen

        reopen(sweep)
    return len(failed)


def share(sweep: Sweep, shard: str | None) -> list[Trial]:
    """The trials of shard `i/n`, i from 1: every n-th, or of every n-th group where settings are tuned for each.

    Raises: UserError for what is no such pair.
    """
    if shard is None:
        return sweep.all
    part, _, of = shard.partition("/")
    if not (part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        raise UserError(
            f"--shard {shard} is no part of a whole.", next="--shard 1/4 … --shard 4/4, one on each machine"
        )
    if sweep.tuning:
        groups = list(dict.fromkeys(trial.group for trial in sweep.tuning))[int(part) - 1 :: int(of)]
        return [trial for trial in sweep.all if trial.group in groups]
    return sweep.trials[int(part) - 1 :: int(of)]


def failure(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    """error and traceback of a failed trial."""
    return dict(read_json(sweep.place(trial) / "failed.json", "failure"))


def step_of(sweep: Sweep, trial: Trial) -> int:
    """The last step that a trial has told of."""
    path = sweep.place(trial) / "curves" / "train.jsonl"
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        return int(json.loads(path.read_text().splitlines()[-1])["step"])
    return 0


def _held(place: Path) -> bool:
    """Whether a process has the folder's lock."""
    with _opened(place / ".lock") as lock:
        if lock is None:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)
