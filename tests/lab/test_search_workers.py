"""Searches by worker processes: pruned trials stay, mistakes are told, and no kill loses or doubles a trial."""

import json
import math
from collections import Counter

import pytest

import deltalab.lab as lab
from deltalab.cli.sweep_table import table as status
from deltalab.lab import search
from deltalab.lab.local import Crew
from deltalab.lab.search import studies
from deltalab.lab.trials import create, find
from tests.data.test_tasks import said
from tests.lab.sweeps import plan, spec
from tests.lab.test_local import LONGER, disturbed
from tests.train.test_evaluate import sst2

LR = {"low": 1e-4, "high": 1e-1, "log": True}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A real one, by workers: small sst2, by its accuracy."""
    folder = tmp_path_factory.mktemp("search")
    base = {**plan()["base"], "data": [{"task": "sst2", "path": sst2(folder), "test_share": 0.25}], "eval": {"every": 2}}  # fmt: skip
    fields = {"space": {"optim.lr": LR, "adapt.r": [2, 4]}, "trials": 5, "measure": "score.sst2.accuracy", "pruner": "halving", "validation": 0.3}  # fmt: skip
    sweep = create(spec(base=base, product={}, search=fields), folder / "s")
    Crew(sweep, None, 1, 1, lambda line: None).run()
    return find(folder / "s")


def test_pruned_trials_stay(done):
    states = Counter(done.state(trial) for trial in done.tuning)
    assert states.total() == 5
    assert states["pruned"] > 0
    pruned = next(trial for trial in done.tuning if done.state(trial) == "pruned")
    note = json.loads((done.place(pruned) / "pruned.json").read_text())
    rows = [json.loads(line) for line in (done.place(pruned) / "curves" / "eval.jsonl").read_text().splitlines()]
    assert note == {"step": rows[-1]["step"], "held_out": [row["loss"] for row in rows]}
    assert rows[-1]["step"] < 8
    assert not (done.place(pruned) / "checkpoints").exists()
    shown = status(done)
    assert f"pruned    {pruned.id}  {pruned.label}  (step {note['step']}, held-out loss " in shown
    assert "5 of 5 trials drawn" in shown
    assert "best score.sst2.accuracy" in shown
    search.work(done, begin=lambda trial: pytest.fail(f"{trial.label} ran again"))


def test_the_table_has_them(done):
    searched, after = lab.load(done.folder, tuning=True), lab.load(done.folder)
    assert list(searched["number"]) == [0, 1, 2, 3, 4]
    assert list(searched["state"]) == [done.state(trial) for trial in done.tuning]
    pruned = searched[searched["state"] == "pruned"].iloc[0]
    assert math.isnan(pruned["score.sst2.accuracy"])
    assert pruned["held_out"] > 0
    assert pruned["steps"] < 8
    assert list(after["seed"]) == [1, 2]
    assert set(after["group"]) == {"base"}
    best = searched[searched["state"] == "finished"]["score.sst2.accuracy"].max()
    chosen = searched[searched["optim.lr"] == after["optim.lr"].iloc[0]].iloc[0]
    assert chosen["score.sst2.accuracy"] == best


def test_a_mistake_that_a_worker_finds_is_the_commands(tmp_path):
    fields = {"space": {"optim.lr": LR}, "trials": 2, "measure": "score.skills.none"}
    sweep = create(spec(product={}, search=fields), tmp_path / "s")
    said(lambda: Crew(sweep, None, 1, 1, lambda line: None).run(), "no trial has 'score.skills.none'", "held_out")


@pytest.mark.slow
def test_a_search_of_workers_killed_at_random(tmp_path):
    """Driver and workers killed again and again: each trial ends once, and what ended before a kill stays as it was."""
    fields = {"space": {"optim.lr": LR, "adapt.r": [2, 4, 8]}, "trials": 12}
    folder = disturbed(tmp_path, seed=2, kills=6, base=LONGER, product={}, seeds=[1], search=fields)
    sweep = find(folder)
    (study,) = studies(sweep)
    known = study.study.get_trials()
    words = {"COMPLETE": "finished", "PRUNED": "pruned"}
    states = {f"trials/{trial.id}": sweep.state(trial) for trial in sweep.all}
    assert len(known) == 12
    assert [words[trial.state.name] for trial in known] == [states[trial.user_attrs["folder"]] for trial in known]
    folders = {f"trials/{place.name}" for place in (folder / "trials").iterdir()}
    assert folders == set(states)
    for trial in known:
        rows = [json.loads(line)["loss"] for line in (folder / trial.user_attrs["folder"] / "curves" / "eval.jsonl").read_text().splitlines()]  # fmt: skip
        assert list(trial.intermediate_values.values()) == rows[1:]
        assert list(trial.intermediate_values) == list(range(1, len(rows)))
