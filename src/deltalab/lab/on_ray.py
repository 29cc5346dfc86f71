"""A sweep on Ray: a task a trial, on this machine or on the cluster at an address, whose nodes share the sweep's folder.

Ray places the tasks by what each asks for. A task whose worker dies is tried again, and goes on from the trial's checkpoint.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltalab.core.errors import UserError
from deltalab.lab.local import DEATHS
from deltalab.lab.spec import Trial
from deltalab.lab.trials import Sweep, fail, find, run_one

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
        _until_done(ray, sweep, mine, asks, say)
    finally:
        if ours:
            ray.shutdown()


def _until_done(ray: Any, sweep: Sweep, mine: Sequence[Trial], asks: Resources, say: Callable[[str], None]) -> None:
    threads = {"OMP_NUM_THREADS": str(asks.cpus), "MKL_NUM_THREADS": str(asks.cpus), "TOKENIZERS_PARALLELISM": "false"}
    options: dict[str, Any] = {"num_cpus": asks.cpus, "num_gpus": asks.gpus, "max_retries": DEATHS - 1, "runtime_env": {"env_vars": threads}}  # fmt: skip
    task = ray.remote(_trial).options(**options, **({"memory": asks.memory} if asks.memory else {}))
    folder = str(sweep.folder.resolve())
    waiting = {task.remote(folder, trial.id): trial for trial in mine}
    while waiting:
        (done, *_), _ = ray.wait(list(waiting), num_returns=1)
        trial = waiting.pop(done)
        try:
            state = ray.get(done)
        except ray.exceptions.RayTaskError as error:  # before the trial began: no sweep at the folder on that node, say
            fail(sweep, trial, str(error.cause), str(error))
            state = "failed"
        except ray.exceptions.RayError as error:
            fail(
                sweep,
                trial,
                f"the process that ran it ended, {DEATHS} times; memory may be too small for it",
                str(error),
            )
            state = "failed"
        if state == "running":  # somebody else has it, or had it a moment ago
            time.sleep(PAUSE)
            waiting[task.remote(folder, trial.id)] = trial
        else:
            say(f"{state}: {trial.label}")


def _trial(folder: str, id: str) -> str:
    """One trial, in a worker of Ray."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sweep = find(folder)
    trial = next(trial for trial in sweep.all if trial.id == id)
    state = sweep.state(trial)
    return state if state in ("finished", "failed") else run_one(sweep, trial)
