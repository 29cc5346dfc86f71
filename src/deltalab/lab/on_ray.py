"""A sweep or a search on Ray: a task a trial, on this machine or on the cluster at an address, whose nodes share the sweep's folder.

Ray places the tasks by what each asks for. A task whose worker dies is tried again, and goes on from the trial's checkpoint.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltalab.core.errors import UserError
from deltalab.lab.local import DEATHS
from deltalab.lab.spec import Trial
from deltalab.lab.trials import ENDED, State, Sweep, fail, find, run_one

PAUSE = 1.0
"""Seconds before a trial that another process holds is asked for again."""


@dataclass(frozen=True)
class Resources:
    """What a trial asks for. cpus: also the threads that it computes with. memory: bytes, 0 for no matter."""

    cpus: int = 1
    gpus: float = 0.0
    memory: int = 0


def run_on_ray(
    sweep: Sweep, mine: Sequence[Trial], asks: Resources, *, address: str | None = None, say: Callable[[str], None] = print
) -> None:  # fmt: skip
    """Until every trial is finished or failed. address: of a cluster, `auto` for the one that runs here; None starts one for the time.

    Raises: UserError without Ray, or if no cluster answers at the address.
    """
    with _cluster(address) as ray:
        tasks = _Tasks(ray, sweep, asks, say)
        for trial in mine:
            tasks.begin(trial)
        while tasks.waiting:
            trial, state = tasks.next()
            if state == "running":  # somebody else has it, or had it a moment ago
                time.sleep(PAUSE)
                tasks.begin(trial)


def search_on_ray(sweep: Sweep, asks: Resources, *, address: str | None = None, say: Callable[[str], None] = print) -> None:  # fmt: skip
    """Until what the search asks for, and the best of each group, has run: as many tasks at a time as the cluster has room for.

    Raises: as `run_on_ray`.
    """
    from deltalab.lab.search import studies

    with _cluster(address) as ray:
        tasks, found = _Tasks(ray, sweep, asks, say), studies(sweep)
        while True:
            # seen before the claim: what ends while others are asked brings new trials
            over = all(study.ended() for study in found)
            taken = {trial.id for trial in tasks.waiting.values()}
            free = len(taken) < _room(ray.cluster_resources(), asks)
            trial = next((trial for study in found if (trial := study.claim(taken))), None) if free else None
            if trial is not None:
                tasks.begin(trial)
            elif taken:
                tasks.next()
            elif over:
                return
            else:
                time.sleep(PAUSE)


def _room(there: Mapping[str, float], asks: Resources) -> int:
    """Tasks that a cluster with these resources runs at a time; 1 where it has none yet, for one is to be asked of it."""
    wanted = {"CPU": asks.cpus, "GPU": asks.gpus, "memory": asks.memory}
    return max(1, min(int(there.get(name, 0) // each) for name, each in wanted.items() if each))


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; what was started for this ends with it."""
    try:
        import ray
    except ImportError:
        raise UserError("the executor 'ray' needs Ray, which is not installed.", next="pip install 'deltalab[ray]', or --executor local") from None  # fmt: skip
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers at '{address}'.", found=str(error).splitlines()[0], next="ray start --head, or leave --address out") from None  # fmt: skip
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


class _Tasks:
    """Trials that Ray was asked to run."""

    def __init__(self, ray: Any, sweep: Sweep, asks: Resources, say: Callable[[str], None]) -> None:
        threads = {"OMP_NUM_THREADS": str(asks.cpus), "MKL_NUM_THREADS": str(asks.cpus), "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        options: dict[str, Any] = {"num_cpus": asks.cpus, "num_gpus": asks.gpus, "max_retries": DEATHS - 1, "runtime_env": {"env_vars": threads}}  # fmt: skip
        self.task = ray.remote(_trial).options(**options, **({"memory": asks.memory} if asks.memory else {}))
        self.ray, self.sweep, self.say = ray, sweep, say
        self.waiting: dict[Any, Trial] = {}

    def begin(self, trial: Trial) -> None:
        """Ask for a trial."""
        self.waiting[self.task.remote(str(self.sweep.folder.resolve()), trial.id)] = trial

    def next(self) -> tuple[Trial, State]:
        """The next one that has come to an end, and how; `running` if somebody else holds it."""
        ray = self.ray
        (done, *_), _ = ray.wait(list(self.waiting), num_returns=1)
        trial = self.waiting.pop(done)
        try:
            state: State = ray.get(done)
        except ray.exceptions.RayTaskError as error:  # before the trial began: no sweep at the folder on that node, say
            state = self._failed(trial, str(error.cause), str(error))
        except ray.exceptions.RayError as error:
            told = f"the process that ran it ended, {DEATHS} times; memory may be too small for it"
            state = self._failed(trial, told, str(error))
        if state != "running":
            self.say(f"{state}: {trial.label}")
        return trial, state

    def _failed(self, trial: Trial, error: str, trace: str) -> State:
        fail(self.sweep, trial, error, trace)
        return "failed"


def _trial(folder: str, id: str) -> State:
    """One trial, in a worker of Ray."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sweep = find(folder)
    trial = next(trial for trial in sweep.all if trial.id == id)
    state = sweep.state(trial)
    if state in ENDED:
        return state
    watch = None
    if sweep.spec.search is not None and trial.number is not None:
        from deltalab.lab.search import studies

        watch = next(study for study in studies(sweep) if study.group.group == trial.group).watch(trial)
    return run_one(sweep, trial, watch=watch)
