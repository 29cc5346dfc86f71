"""A sweep on a local Ray cluster: the same records, also where a worker is killed."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from deltalab.core.spec import build
from deltalab.lab import on_ray
from deltalab.lab.on_ray import Resources, run_on_ray
from deltalab.lab.spec import SweepSpec
from deltalab.lab.trials import create, failure, work
from tests.data.test_tasks import said
from tests.lab.sweeps import plan, results, spec

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


def test_a_killed_worker_is_replaced_and_goes_on(tmp_path):
    base = {**plan()["base"], "optim": {"steps": 120, "batch": 4}, "run": {"checkpoint_every": 10}}
    fields = {"base": base, "product": {}, "seeds": [1, 2, 3]}
    calm = create(build(SweepSpec, plan(**fields)), tmp_path / "calm")
    work(calm, calm.trials)
    sweep, killed = create(build(SweepSpec, plan(**fields)), tmp_path / "ray"), []

    def kill():
        while not killed:
            if list(sweep.folder.glob("trials/*/checkpoints/*")):
                killed.extend(running()[:1])
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    threading.Thread(target=kill, daemon=True).start()
    run_on_ray(sweep, sweep.trials, Resources(), say=lambda line: None)
    assert killed
    assert results(tmp_path / "ray") == results(tmp_path / "calm")


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
