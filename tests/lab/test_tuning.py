"""Settings tuned for each group: tried on validation data, the best of each reported on test data."""

import json

import pytest

import deltalab.lab as lab
from deltalab.cli.sweep import run
from deltalab.cli.sweep_table import table
from deltalab.core.errors import UserError
from deltalab.core.files import write_json
from deltalab.lab import trials as module
from deltalab.lab import tuning
from deltalab.lab.compare import runs_of
from deltalab.lab.trials import create, find, share, work
from deltalab.lab.tuning import at_edges, chosen
from tests.lab.sweeps import spec

LR = {"values": {"optim.lr": [1e-3, 3e-3, 3e-2]}, "validation": 0.25}


def records(sweep, tuning):
    return [
        json.loads((sweep.place(t) / "record.json").read_text()) for t in (sweep.tuning if tuning else sweep.trials)
    ]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    sweep = create(spec(tune=LR), tmp_path_factory.mktemp("tuned") / "s")
    assert len(sweep.tuning) == 6  # two groups, three rates, the first seed
    assert sweep.trials == []
    work(sweep, sweep.all)
    sweep = find(sweep.folder)
    work(sweep, sweep.all)
    return find(sweep.folder)


def test_the_best_on_validation_is_what_is_reported(tuned):
    assert [t.label for t in tuned.tuning[:2]] == ["tuning lr=0.001: r=2, seed=1", "tuning lr=0.003: r=2, seed=1"]
    best = {}
    for trial, record in zip(tuned.tuning, records(tuned, tuning=True), strict=True):
        assert record["spec"]["validation"] == 0.25
        assert record["data"]["samples"] == 36
        assert record["data"]["held_out"] == 12
        best.setdefault(trial.group, []).append((record["result"]["held_out"][-1], record["spec"]["optim"]["lr"]))
    for trial, record in zip(tuned.trials, records(tuned, tuning=False), strict=True):
        assert record["spec"]["validation"] == 0
        assert record["data"]["samples"] == 48
        assert record["data"]["held_out"] == 8
        assert record["spec"]["optim"]["lr"] == min(best[trial.group])[1]
        assert trial.settings["optim.lr"] == record["spec"]["optim"]["lr"]
    assert [t.label for t in tuned.trials] == ["r=2, seed=1", "r=2, seed=2", "r=4, seed=1", "r=4, seed=2"]


def test_tables_keep_the_two_apart(tuned):
    assert list(lab.load(tuned.folder)["group"]) == ["r=2", "r=2", "r=4", "r=4"]
    tried = lab.load(tuned.folder, tuning=True)
    assert list(tried["optim.lr"]) == 2 * [1e-3, 3e-3, 3e-2]
    assert len(runs_of([tuned.folder])) == 4
    assert "10 trials, 10 finished" in table(tuned)
    assert "tuning lr=0.03: r=4, seed=1" in table(tuned)


def test_one_command_does_both(tmp_path, capsys):
    sweep = create(spec(tune={**LR, "values": {"optim.lr": [1e-3, 3e-3]}}, seeds=[1]), tmp_path / "s")
    run(sweep, share(sweep, None), None, 2)
    sweep = find(sweep.folder)
    assert len(sweep.trials) == 2
    run(sweep, share(sweep, None), None, 2)
    assert set(find(sweep.folder).states().values()) == {"finished"}
    assert "2 of 6 trials to run" in capsys.readouterr().out


def fake(sweep, trial, **row):
    """A finished trial with these figures."""
    (sweep.place(trial)).mkdir(parents=True)
    write_json(sweep.place(trial) / "record.json", {})
    ROWS[sweep.place(trial)] = row


ROWS: dict = {}


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.setattr(tuning, "read_record", lambda place: place)
    monkeypatch.setattr(tuning, "row_of", lambda place: ROWS[place])


def test_of_equals_the_lower_held_out_loss_is_chosen(tmp_path, figures):
    sweep = create(spec(product={}, tune=LR), tmp_path / "s")
    for trial, held_out in zip(sweep.tuning, (1.0, 0.5, 0.5), strict=True):
        fake(sweep, trial, **{"score.a.accuracy": 1.0, "held_out": held_out})
    assert chosen(find(sweep.folder)) == {"base": {"optim.lr": 3e-3}}


@pytest.mark.parametrize(("by", "want"), [("score.a.accuracy", 3e-3), ("held_out", 1e-3), ("score.a.perplexity", 3e-2), (None, 3e-3)])  # fmt: skip
def test_a_choice_is_made_by_the_mean_over_seeds_of_the_measure(tmp_path, figures, by, want):
    sweep = create(spec(product={}, tune={**LR, "by": by, "seeds": [1, 2]}), tmp_path / "s")
    values = [
        (0.5, 1.0, 9.0),
        (0.5, 1.2, 9.0),
        (0.4, 2.0, 5.0),
        (0.8, 2.0, 8.0),
        (0.7, 3.0, 1.0),
        (0.3, float("nan"), 1.0),
    ]
    for trial, (accuracy, held_out, perplexity) in zip(sweep.tuning, values, strict=True):
        assert chosen(find(sweep.folder)) == {}
        fake(sweep, trial, **{"score.a.accuracy": accuracy, "held_out": held_out, "score.a.perplexity": perplexity})
    assert chosen(find(sweep.folder)) == {"base": {"optim.lr": want}}
    assert [t.spec.optim.lr for t in find(sweep.folder).trials] == [want, want]


def test_only_numbers_have_edges_and_of_two_none_is_one():
    tried = [
        {"optim.lr": lr, "optim.batch": batch, "adapt.targets": name}
        for lr in (1, 2, 3)
        for batch in (8, 16)
        for name in "abc"
    ]
    assert at_edges(tried[0], tried) == {"optim.lr": "lowest"}
    assert at_edges(tried[-1], tried) == {"optim.lr": "highest"}
    assert at_edges({**tried[0], "optim.lr": 2}, tried) == {}


def test_groups_of_different_tasks_are_tuned_each_by_their_own_score(tmp_path, figures):
    tasks = {"skills": "score.a.accuracy", "refusals": "score.b.perplexity"}
    data = [[{"task": "skills"}], [{"task": "refusals"}]]
    sweep = create(spec(product={"data": data}, tune=LR), tmp_path / "s")
    for trial, value in zip(sweep.tuning, (1.0, 3.0, 2.0, 9.0, 8.0, 7.0), strict=True):
        fake(sweep, trial, **{tasks[trial.spec.data[0].task]: value})
    assert list(chosen(find(sweep.folder)).values()) == [{"optim.lr": 3e-3}, {"optim.lr": 3e-2}]


def test_failed_tries_are_passed_over_and_a_measure_nobody_has_is_an_error(tmp_path, figures):
    sweep = create(spec(product={}, tune={**LR, "by": "score.a.f1"}), tmp_path / "s")
    for trial in sweep.tuning[:2]:
        module.fail(sweep, trial, "broke down")
    fake(sweep, sweep.tuning[2], **{"score.a.accuracy": 0.5})
    with pytest.raises(UserError, match=r"no run has the measure 'score\.a\.f1'") as error:
        find(sweep.folder)
    assert "score.a.accuracy" in str(error.value)
    ROWS[sweep.place(sweep.tuning[2])] = {"score.a.f1": 0.5}
    assert chosen(find(sweep.folder)) == {"base": {"optim.lr": 3e-2}}


def test_a_case_may_have_values_of_its_own_and_shards_have_whole_groups(tmp_path):
    cases = [{"name": "small", "adapt.r": 2}, {"name": "large", "adapt.r": 8, "tune": {"optim.lr": [0.1]}}, {"name": "mid", "adapt.r": 4}]  # fmt: skip
    sweep = create(spec(product={}, cases=cases, tune=LR), tmp_path / "s")
    tried = {name: [t.spec.optim.lr for t in sweep.tuning if t.group == name] for name in ("small", "large", "mid")}
    assert tried == {"small": [1e-3, 3e-3, 3e-2], "large": [0.1], "mid": [1e-3, 3e-3, 3e-2]}
    assert {t.group for t in share(sweep, "1/2")} == {"small", "mid"}
    assert {t.group for t in share(sweep, "2/2")} == {"large"}


@pytest.mark.parametrize(("fields", "words"), [
    ({"product": {"optim.lr": [1e-3]}, "tune": LR}, "optim.lr varies in two places"),
    ({"cases": [{"name": "a", "tune": {"optim.lr": [0.1]}}]}, "the sweep has none"),
    ({"cases": [{"name": "a", "tune": 3}], "tune": LR}, "tune of a case"),
    ({"tune": {"values": {"optim.rate": [1e-3]}}}, "optim.rate"),
    ({"tune": {"values": {"optim.lr": [1e-3]}, "validation": 0.0}}, "greater than 0"),
])  # fmt: skip
def test_faults(tmp_path, fields, words):
    with pytest.raises(UserError) as error:
        create(spec(**fields), tmp_path / "s")
    assert words in str(error.value)
    assert not (tmp_path / "s").exists()
