"""A sweep on a local Ray cluster: the same records, also where a worker is killed."""

import contextlib
import os
import random
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from deltalab.core.spec import build
from deltalab.lab import on_ray, search
from deltalab.lab.on_ray import Resources, run_on_ray, search_on_ray
from deltalab.lab.spec import SweepSpec
from deltalab.lab.trials import create, failure, find, work
from tests.data.test_tasks import said
from tests.lab.sweeps import plan, results, spec
from tests.lab.test_local import TWO_DOZEN, undisturbed

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are found through /proc")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def running() -> list[int]:
    """Processes of Ray that run a trial now."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if b"ray::_trial" in read(entry / "cmdline")]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_its_records_are_those_of_this_process(tmp_path):
    here, there = create(spec(), tmp_path / "here"), create(spec(), tmp_path / "ray")
    work(here, here.trials)
    lines = []
    run_on_ray(there, there.trials, Resources(), say=lines.append)
    assert results(tmp_path / "ray") == results(tmp_path / "here")
    assert sorted(lines) == sorted(f"finished: {trial.label}" for trial in there.trials)
    run_on_ray(there, there.trials, Resources(), say=lines.append)  # nothing is done again


@contextlib.contextmanager
def a_kill(sweep, times=1):
    """As often as that a worker is killed while a trial has a checkpoint; the list has their processes then."""
    killed, over = [], threading.Event()

    def kill():
        while len(killed) < times and not over.wait(random.Random(len(killed)).uniform(0.05, 1) if killed else 0.05):
            if list(sweep.folder.glob("trials/*/checkpoints/*")):
                for pid in running()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield killed
    over.set()
    thread.join()


@pytest.mark.slow
def test_two_dozen_trials_with_killed_workers(tmp_path):
    want = undisturbed(tmp_path / "calm", **TWO_DOZEN)
    sweep, lines = create(build(SweepSpec, plan(**TWO_DOZEN)), tmp_path / "ray"), []
    with a_kill(sweep, times=6) as killed:
        run_on_ray(sweep, sweep.trials, Resources(), say=lines.append)
    assert len(killed) == 6
    assert results(sweep.folder) == want
    assert len(want) == len(lines) == 24


def test_a_search_with_a_killed_worker_is_that_of_this_process(tmp_path):
    base = {**plan()["base"], "optim": {"steps": 60, "batch": 4}, "run": {"checkpoint_every": 10}}
    fields = {"space": {"optim.lr": [0.001, 0.01, 0.03]}, "trials": 9, "sampler": "grid", "pruner": "none"}
    made = [create(spec(base=base, product={}, search=fields), tmp_path / name) for name in ("here", "ray")]
    search.work(made[0])
    lines = []
    with a_kill(made[1]) as killed:
        search_on_ray(made[1], Resources(), say=lines.append)
    assert killed
    here, there = (find(tmp_path / name) for name in ("here", "ray"))
    assert results(there.folder) == results(here.folder)
    assert len(results(there.folder)) == 5  # three settings, and the best with two seeds
    assert sorted(lines) == sorted(f"finished: {trial.label}" for trial in there.all)
    search_on_ray(there, Resources(), say=lambda line: pytest.fail(f"again: {line}"))


def test_a_search_prunes_on_ray(tmp_path):
    base = {**plan()["base"], "eval": {"every": 2}}
    space = {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    fields = {"space": space, "trials": 4, "pruner": "halving", "then": False}
    sweep, lines = create(spec(base=base, product={}, search=fields), tmp_path / "s"), []
    search_on_ray(sweep, Resources(cpus=2), say=lines.append)  # one at a time
    states = Counter(find(sweep.folder).states().values())
    assert states["pruned"] > 0
    assert states["pruned"] + states["finished"] == len(lines) == 4


def test_a_mistake_and_a_trial_that_kills_its_workers(tmp_path, monkeypatch):
    bad = {"task": "instruct", "path": str(tmp_path / "none.json")}
    good = {"task": "skills", "n": 8, "n_test": 2}
    sweep = create(spec(product={}, cases=[{"name": "bad", "data": [bad]}, {"name": "good", "data": [good]}, {"name": "deadly", "data": [good], "optim.lr": 0.5}], seeds=[1]), tmp_path / "s")  # fmt: skip
    deadly = sweep.trials[2].id

    def trial(folder, id):
        if id == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        from deltalab.lab.on_ray import _trial

        return _trial(folder, id)

    monkeypatch.setattr(on_ray, "_trial", trial)
    run_on_ray(sweep, sweep.trials, Resources(), say=lambda line: None)
    assert list(sweep.states().values()) == ["failed", "finished", "failed"]
    assert "none.json' does not exist" in failure(sweep, sweep.trials[0])["error"]
    assert "the process that ran it ended, 3 times" in failure(sweep, sweep.trials[2])["error"]


def test_what_fails_before_a_trial_begins_is_told_as_it_is(tmp_path, monkeypatch):
    sweep = create(spec(product={}, seeds=[1]), tmp_path / "s")

    def trial(folder, id):
        raise ValueError("no such folder here")

    monkeypatch.setattr(on_ray, "_trial", trial)
    run_on_ray(sweep, sweep.trials, Resources(), say=lambda line: None)
    assert failure(sweep, sweep.trials[0])["error"] == "no such folder here"


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said(lambda: run_on_ray(create(spec(), tmp_path / "s"), [], Resources()), "needs Ray", "deltalab[ray]")
