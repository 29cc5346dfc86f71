"""Workers side by side: killed at random moments, driver or worker, no trial is lost, doubled or changed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltalab.core.spec import build
from deltalab.lab import local
from deltalab.lab.local import Crew
from deltalab.lab.spec import SweepSpec
from deltalab.lab.trials import create, failure, find, work
from tests.lab.sweeps import plan, results, spec, written

LONGER = {**plan()["base"], "optim": {"steps": 80, "batch": 4, "lr": 0.003}, "run": {"checkpoint_every": 7}}
"""Seconds a trial, so that kills fall into it."""
TWO_DOZEN = {
    "base": LONGER,
    "product": {"adapt.r": [1, 2, 4, 8], "optim.lr": [0.001, 0.003]},
    "seeds": [42, 1337, 2024],
}
DELTALAB = str(Path(sys.executable).parent / "deltalab")


def start(path, folder, *options):
    return subprocess.Popen([DELTALAB, "sweep", str(path), "--no-report", "--output", str(folder), *options],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def workers_of(pid: int) -> list[int]:
    """The worker processes of a driver."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields, words = (entry / "stat").read_text().rpartition(")")[2].split(), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"deltalab.lab.local" in words:
            found.append(int(entry.name))
    return found


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
    return found


def undisturbed(folder: Path, **fields):
    sweep = create(build(SweepSpec, plan(**fields)), folder)
    work(sweep, sweep.trials)
    return results(folder)


def disturbed(tmp_path: Path, seed: int, kills: int, **fields) -> Path:
    """The sweep with two workers, and SIGKILL for the driver or a worker at random moments."""
    rng, folder, path = random.Random(seed), tmp_path / "s", written(tmp_path, **fields)
    for number in range(kills):
        driver = start(path, folder, "--jobs", "2")
        until(lambda driver=driver: list(folder.glob("trials/*/curves")) or driver.poll() is not None)
        time.sleep(rng.uniform(0, 2))
        workers = workers_of(driver.pid)
        if number % 2:
            for pid in rng.sample(workers, min(1, len(workers))):
                os.kill(pid, signal.SIGKILL)
            time.sleep(rng.uniform(0.5, 2))
        driver.kill()
        driver.communicate()
        until(lambda workers=workers: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    said, _ = start(path, folder, "--jobs", "2").communicate(timeout=600)
    assert "table: " in said, said
    return folder


def test_killed_and_gone_on_with(tmp_path):
    fields = {"base": LONGER, "product": {}}
    want = undisturbed(tmp_path / "calm", **fields)
    assert results(disturbed(tmp_path, seed=0, kills=2, **fields)) == want
    assert len(want) == 2


@pytest.mark.slow
def test_two_dozen_trials_killed_again_and_again(tmp_path):
    want = undisturbed(tmp_path / "calm", **TWO_DOZEN)
    assert results(disturbed(tmp_path, seed=1, kills=6, **TWO_DOZEN)) == want
    assert len(want) == 24


def test_a_worker_that_dies_is_replaced(tmp_path):
    sweep, said = create(spec(), tmp_path / "s"), []
    crew = Crew(sweep, None, 1, 1, said.append)
    killed = []

    def say(line):
        said.append(line)
        if line.startswith("finished") and not killed:
            killed.append(crew._workers[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    crew.say = say
    crew.run()
    assert set(sweep.states().values()) == {"finished"}
    assert len(killed) == 1


def test_a_trial_that_kills_its_workers_is_given_up(tmp_path, monkeypatch):
    """The trial's own process ends each time; the others are finished all the same."""
    sweep, said = create(spec(product={}), tmp_path / "s"), []
    bad = sweep.trials[0]
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'deltalab.lab.local' in ' '.join(sys.orig_argv):\n"
        "    import deltalab.train.run as run\n"
        "    before = run.run_spec\n"
        f"    run.run_spec = lambda spec, *a, **k: os.kill(os.getpid(), signal.SIGKILL) if spec.seed == {bad.spec.seed} else before(spec, *a, **k)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    Crew(sweep, None, 1, 1, said.append).run()
    assert list(sweep.states().values()) == ["failed", "finished"]
    assert "ended with signal 9, 3 times" in failure(sweep, bad)["error"]
    assert sum("goes on from its checkpoint" in line for line in said) == 2


def test_workers_that_cannot_begin_are_a_fault(tmp_path, monkeypatch):
    sweep = create(spec(product={}), tmp_path / "s")
    monkeypatch.setattr(local.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="before they take a trial"):
        Crew(sweep, None, 1, 1).run()


def test_ctrl_c_keeps_checkpoints(tmp_path):
    path = written(tmp_path, base={**plan()["base"], "optim": {"steps": 4000, "batch": 4}, "run": {"checkpoint_every": 4000}})  # fmt: skip
    driver = start(path, tmp_path / "s", "--jobs", "2")
    until(lambda: len([p for p in (tmp_path / "s").glob("trials/*/curves/train.jsonl") if p.stat().st_size > 500]) == 2)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, said
    assert "Traceback" not in said
    assert "to go on: deltalab sweep" in said
    sweep = find(tmp_path / "s")
    assert sorted(sweep.states().values()) == ["begun", "begun", "waiting", "waiting"]
    assert len(list((tmp_path / "s").glob("trials/*/checkpoints/*"))) >= 2
