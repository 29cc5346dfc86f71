"""A sweep on the disk: who works on what, what failed, what is left, and the table over all."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import deltalab.lab as lab
from deltalab.cli.sweep_table import table as status
from deltalab.core.files import owned
from deltalab.lab import table
from deltalab.lab.spec import id_of, trials
from deltalab.lab.trials import Sweep, create, failure, find, forget_failures, run_one, share, tracked, work
from tests.data.test_tasks import said
from tests.lab.sweeps import results, spec


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    sweep = create(spec(), tmp_path_factory.mktemp("sweep") / "s")
    work(sweep, sweep.trials)
    return sweep


def test_every_trial_has_its_record(done):
    assert set(done.states().values()) == {"finished"}
    assert set(results(done.folder)) == {trial.id for trial in done.trials}
    assert find(done.folder) == done


def test_what_is_finished_does_not_run_again(done):
    before = {p: p.stat().st_mtime_ns for p in done.folder.rglob("record.json")}
    work(done, done.trials, begin=lambda trial: pytest.fail(f"{trial.label} ran again"))
    assert {p: p.stat().st_mtime_ns for p in done.folder.rglob("record.json")} == before


def test_the_table(done):
    frame = lab.load(done.folder)
    assert list(frame["id"]) == [trial.id for trial in done.trials]
    assert list(frame["adapt.r"]) == [2, 2, 4, 4]
    assert list(frame["seed"]) == [1, 2, 1, 2]
    assert list(frame["group"]) == ["r=2", "r=2", "r=4", "r=4"]
    record = json.loads((done.place(done.trials[2]) / "record.json").read_text())
    assert frame["loss"][2] == record["result"]["loss"][1]
    assert frame["trained"][2] == 2 * frame["trained"][0]
    pd.testing.assert_frame_equal(pd.read_parquet(table.write(done)), frame)


def test_a_sweep_that_grows_keeps_what_it_had(done, tmp_path):
    import shutil

    shutil.copytree(done.folder, tmp_path / "s")
    grown = create(spec(product={"adapt.r": [4, 8]}), tmp_path / "s")
    assert list(grown.states().values()) == ["finished"] * 2 + ["waiting"] * 2
    assert len(lab.load(tmp_path / "s")) == 2


def test_a_failing_trial_is_recorded_and_the_rest_go_on(tmp_path):
    path = tmp_path / "data.jsonl"
    bad = {"task": "instruct", "path": str(path)}
    good = {"task": "skills", "n": 8, "n_test": 2}
    sweep = create(spec(product={}, cases=[{"name": "bad", "data": [bad]}, {"name": "good", "data": [good]}], seeds=[1]), tmp_path / "s")  # fmt: skip
    lines = []
    work(sweep, sweep.trials, lines.append)
    assert list(sweep.states().values()) == ["failed", "finished"]
    assert "data.jsonl' does not exist" in failure(sweep, sweep.trials[0])["error"]
    assert "read_rows" in failure(sweep, sweep.trials[0])["traceback"]
    assert lines[0].startswith("failed: bad, seed=1: data file")
    shown = status(sweep)
    assert "2 trials, 1 failed, 1 finished" in shown
    assert "bad, seed=1  (data file" in shown
    assert list(lab.load(sweep.folder)["group"]) == ["good"]
    work(sweep, sweep.trials, begin=lambda trial: pytest.fail("it ran again"))
    path.write_text('{"prompt": "a", "response": "b"}\n' * 12)
    assert forget_failures(sweep) == 1
    work(sweep, sweep.trials)
    assert set(sweep.states().values()) == {"finished"}


def test_a_trial_that_another_process_has_is_left_alone(tmp_path):
    sweep = create(spec(product={}), tmp_path / "s")
    first, second = sweep.trials
    code = f"import sys; from deltalab.core.files import owned\nwith owned({str(sweep.place(first))!r}): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        assert sweep.states() == {first.id: "running", second.id: "waiting"}
        assert run_one(sweep, first) == "running"
        work(sweep, sweep.trials)
        assert sweep.states() == {first.id: "running", second.id: "finished"}
        holder.kill()
    assert sweep.state(first) == "begun"
    work(sweep, sweep.trials)
    assert set(sweep.states().values()) == {"finished"}


def test_looking_does_not_disturb_who_works(tmp_path):
    """A state is read while a worker takes the trial: it is free again, and no failure is recorded."""
    sweep = create(spec(product={}, seeds=[1]), tmp_path / "s")
    (trial,) = sweep.trials
    with owned(sweep.place(trial)):
        assert run_one(sweep, trial) == "running"
        assert sweep.state(trial) == "running"
    assert not (sweep.place(trial) / "failed.json").exists()
    work(sweep, sweep.trials)
    assert sweep.state(trial) == "finished"


def test_shards_are_all_of_it_and_none_twice():
    found = Sweep(Path(), spec(), trials(spec(seeds=[1, 2, 3])))
    parts = [share(found, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(t.id for part in parts for t in part) == sorted(t.id for t in found.trials)
    assert share(found, None) == found.trials
    for wrong in ("0/2", "3/2", "a/b", "1", "1/2/3"):
        said(lambda wrong=wrong: share(found, wrong), "is no part of a whole", "--shard 1/4")


def test_folders_of_something_else(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("x")
    said(lambda: create(spec(), tmp_path / "s"), "holds something else than a sweep")
    said(lambda: find(tmp_path / "s"), "holds no sweep", "deltalab sweep")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["mine.txt"]


def test_trackers_go_through_a_sweep_and_name_its_trials(tmp_path):
    plain = create(spec(), tmp_path / "ranks")
    base = {**spec().base, "track": ["tensorboard", {"to": "wandb", "name": "mine"}]}
    told = create(spec(base=base), tmp_path / "ranks")
    assert [trial.id for trial in told.trials] == [trial.id for trial in plain.trials]
    assert tracked(plain, plain.trials[0]) == plain.trials[0].spec
    first, second = tracked(told, told.trials[0]).track
    assert (first.name, first.group) == ("r=2, seed=1", "ranks")
    assert (second.name, second.group) == ("mine", "ranks")
    assert id_of(tracked(told, told.trials[0])) == told.trials[0].id
