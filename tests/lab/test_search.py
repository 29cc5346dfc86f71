"""A search draws what Optuna draws, whoever is killed and when; pruned trials stay; nothing runs twice."""

import json
import math
import os
from collections import Counter

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

import deltalab.lab as lab
import deltalab.train
from deltalab.cli.sweep import plan as planned
from deltalab.cli.sweep import table as status
from deltalab.core.files import owned, write_json
from deltalab.core.spec import build, digest
from deltalab.lab import search
from deltalab.lab.compare import runs_of
from deltalab.lab.journal import JOURNAL, alone
from deltalab.lab.search import studies
from deltalab.lab.spec import SweepSpec, id_of
from deltalab.lab.trials import create, fail, find, forget_failures
from tests.data.test_tasks import said
from tests.lab.sweeps import plan, spec

LR = {"low": 1e-4, "high": 1e-1, "log": True}
SPACE = {"optim.lr": LR, "adapt.r": {"low": 1, "high": 8}, "adapt.targets": ["q,v", ["q_proj"]], "adapt.0.alpha": {"low": 4.0, "high": 16.0, "step": 4.0}}  # fmt: skip
EVALUATIONS = 6


def losses(lr: float, r: int, alpha: float) -> list[float]:
    """Held-out losses of a run that is made up: 2 before training, and then towards a value that the setting decides."""
    end = 1 + (math.log10(lr) + 2.2) ** 2 / 10 + (r - 5) ** 2 / 100 + alpha / 1000
    return [end + (2 - end) * math.exp(-i * (0.3 + 100 * lr)) for i in range(EVALUATIONS)]


def of_run(run) -> list[float]:
    return losses(run.optim.lr, run.adapt[0].r, run.adapt[0].alpha)


@pytest.fixture
def made_up(monkeypatch):
    """Runs without a model: the made-up losses, a record, and which ran, in order."""
    ran = []

    def run_spec(run, place, *, progress, watch):
        with owned(place):
            ran.append(id_of(run))
            rows = []
            for i, loss in enumerate(of_run(run)):
                rows.append({"step": 2 * i, "loss": loss})
                if watch is not None and 0 < i < EVALUATIONS - 1:
                    watch(rows)
            held_out = [row["loss"] for row in rows]
            write_json(place / "record.json", {
                "format": 1, "kind": "train", "seed": run.seed, "seconds": 1.0, "spec": run.plain(),
                "scores": {"before": {}, "after": {"skills": {"score": 1 / held_out[-1]}}},
                "result": {"loss": [2.0, 1.0], "held_out": held_out, "training_seconds": 1.0, "tokens": 9, "steps": 9},
                "sizes": {"trained": 1, "base": 9, "adapter_bytes": 9},
            })  # fmt: skip

    monkeypatch.setattr(deltalab.train, "run_spec", run_spec)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return ran


def sweep_of(folder, seeds=(1, 2), base=None, **fields):
    fields = {"space": SPACE, "trials": 16, **fields}
    return create(spec(product={}, seeds=list(seeds), search=fields, **({"base": base} if base else {})), folder)


def told(study) -> list[tuple]:
    return [(t.number, t.state, t.params, t.value, t.intermediate_values) for t in study.get_trials()]


def reference(name: str, sampler: str, pruner, trials: int, rises: bool):
    """The same by `study.optimize`, a trial at a time so that its sampler has the seed that the search gives it."""
    choices = ["q,v", json.dumps(["q_proj"])]
    grid = {"optim.lr": [0.001, 0.01], "adapt.r": list(range(1, 9)), "adapt.targets": choices, "adapt.0.alpha": [4.0, 8.0, 12.0, 16.0]}  # fmt: skip
    study = optuna.create_study(study_name=name, direction="maximize" if rises else "minimize", pruner=pruner)

    def objective(trial):
        lr = trial.suggest_categorical("optim.lr", grid["optim.lr"]) if sampler == "grid" else trial.suggest_float("optim.lr", 1e-4, 1e-1, log=True)  # fmt: skip
        r = trial.suggest_int("adapt.r", 1, 8)
        trial.suggest_categorical("adapt.targets", choices)
        found = losses(lr, r, trial.suggest_float("adapt.0.alpha", 4, 16, step=4))
        for i, loss in enumerate(found[1:], 1):
            trial.report(-loss if rises else loss, i)
            if i < EVALUATIONS - 1 and trial.should_prune():
                raise optuna.TrialPruned
        return 1 / found[-1] if rises else found[-1]

    kinds = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler, "random": optuna.samplers.RandomSampler}  # fmt: skip
    for number in range(trials):
        seed = int(digest([1, number])[:8], 16)
        study.sampler = optuna.samplers.GridSampler(grid, 1) if sampler == "grid" else kinds[sampler](seed=seed)
        study.optimize(objective, n_trials=1)
    return study


PAIRS = [("tpe", "median"), ("random", "halving"), ("tpe", "hyperband"), ("gp", "none"), ("grid", "median")]


@pytest.mark.parametrize("measure", [None, "score.skills.score"])
@pytest.mark.parametrize(("sampler", "pruner"), PAIRS)
def test_a_search_is_optunas_own(tmp_path, made_up, sampler, pruner, measure):
    pruners = {"median": optuna.pruners.MedianPruner(), "halving": optuna.pruners.SuccessiveHalvingPruner(min_resource=1),
               "hyperband": optuna.pruners.HyperbandPruner(), "none": optuna.pruners.NopPruner()}  # fmt: skip
    space = {**SPACE, "optim.lr": [0.001, 0.01]} if sampler == "grid" else SPACE
    sweep = sweep_of(tmp_path / "s", space=space, sampler=sampler, pruner=pruner, measure=measure)
    search.work(sweep)
    (study,) = studies(sweep)
    want = reference(study.name, sampler, pruners[pruner], 16, rises=measure is not None)
    assert told(study.study) == told(want)
    assert study.best().number == want.best_trial.number
    states = Counter(t.state.name for t in want.get_trials())
    assert states["PRUNED"] > 0 or pruner == "none", "the case shows nothing"


class Killed(BaseException):
    """In place of SIGKILL: the process ends in the middle of what it does."""


def test_a_process_may_end_at_any_write(tmp_path, made_up, monkeypatch):
    """Before each write to the journal in turn, and after it; one process after the other has the study of one that was let be."""
    fields = {"trials": 10, "sampler": "random", "pruner": "median"}
    calm = sweep_of(tmp_path / "calm", **fields)
    search.work(calm)
    want, runs = told(studies(calm)[0].study), set(made_up)
    assert {state.name for _, state, *_ in want} == {"COMPLETE", "PRUNED"}
    append, left, after = JournalFileBackend.append_logs, [0], [False]

    def counted(self, logs):
        left[0] -= 1
        if left[0] != 0 or after[0]:
            append(self, logs)
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(JournalFileBackend, "append_logs", counted)
    for writes, after[0] in [(1, True), (2, False), (2, True), (3, False), (5, True), (7, False), (11, False)]:
        folder, ends = tmp_path / f"s{writes}{after[0]}", 0
        while True:
            left[0] = writes
            try:
                search.work(sweep_of(folder, **fields))
                break
            except Killed:
                ends += 1
        assert told(studies(find(folder))[0].study) == want
        assert ends >= 4
        assert set(made_up) == runs


def test_a_setting_that_is_drawn_again_does_not_run_again(tmp_path, made_up):
    space = {"optim.lr": [0.001, 0.01], "adapt.r": [2, 4]}
    sweep = sweep_of(tmp_path / "s", space=space, trials=12, sampler="random", pruner="halving", then=False)
    search.work(sweep)
    (study,) = studies(sweep)
    ended = told(study.study)
    assert len(ended) == 12
    assert len(made_up) == len(set(made_up)) == len({tuple(params.items()) for _, _, params, *_ in ended}) <= 4
    by_setting = {}
    for _, state, params, value, steps in ended:
        assert by_setting.setdefault(tuple(params.items()), (state, value, steps)) == (state, value, steps)
    assert [trial.id for trial in find(sweep.folder).tuning] == made_up


def test_a_grid_ends_when_all_of_it_ran(tmp_path, made_up):
    space = {"optim.lr": [0.001, 0.01], "adapt.r": {"low": 1, "high": 7, "step": 3}}
    sweep = sweep_of(tmp_path / "s", space=space, sampler="grid", pruner="none", then=False)
    search.work(sweep)
    assert {(t.spec.optim.lr, t.spec.adapt[0].r) for t in find(sweep.folder).tuning} == {(lr, r) for lr in (0.001, 0.01) for r in (1, 4, 7)}  # fmt: skip
    assert len(made_up) == 6


def test_a_search_that_grows_goes_on(tmp_path, made_up):
    sweep_of(tmp_path / "whole", trials=12)
    search.work(find(tmp_path / "whole"))
    ran = len(made_up)
    for trials in (5, 12):
        sweep_of(tmp_path / "s", trials=trials, then=False)
        search.work(find(tmp_path / "s"))
    assert told(studies(find(tmp_path / "s"))[0].study) == told(studies(find(tmp_path / "whole"))[0].study)
    assert made_up[ran:] == made_up[: len(made_up) - ran]


def test_each_group_is_searched_and_its_best_runs_with_every_seed(tmp_path, made_up):
    cases = [{"name": "LoRA", "adapt": [{"method": "lora", "targets": "q,v"}]}, {"name": "DoRA", "adapt": [{"method": "dora", "targets": "q,v"}]}]  # fmt: skip
    fields = {"space": {"optim.lr": LR, "adapt.r": [2, 4]}, "trials": 6, "validation": 0.2}
    sweep = create(spec(product={}, cases=cases, seeds=[5, 6, 7], search=fields), tmp_path / "s")
    assert sweep.all == []
    search.work(sweep)
    sweep = find(tmp_path / "s")
    for study, name in zip(studies(sweep), ("LoRA", "DoRA"), strict=True):
        best = min((t for t in study.study.get_trials() if t.value and t.state.name == "COMPLETE"), key=lambda t: t.value)  # fmt: skip
        after = [trial for trial in sweep.trials if trial.group == name]
        assert [(t.spec.seed, t.spec.optim.lr, t.spec.adapt[0].r) for t in after] == [(seed, best.params["optim.lr"], best.params["adapt.r"]) for seed in (5, 6, 7)]  # fmt: skip
        assert {trial.spec.adapt[0].method for trial in after} == {name.lower()}
        assert {(t.spec.validation, t.spec.costs) for t in after} == {(0.0, True)}
        searched = [t for t in sweep.tuning if t.group == name]
        assert [t.number for t in searched] == list(range(6))
        assert {(t.spec.seed, t.spec.validation, t.spec.costs) for t in searched} == {(5, 0.2, False)}
    assert "waiting" not in sweep.states().values()
    assert {run.group for run in runs_of([sweep.folder])} == {"LoRA", "DoRA"}
    shown = status(sweep)
    assert shown.count("6 of 6 trials drawn") == 2
    assert "search in 'DoRA'" in shown
    rows = len(made_up)
    search.work(sweep, begin=lambda trial: pytest.fail("it ran again"))
    assert len(made_up) == rows


def test_failed_trials_count_and_run_again_if_that_is_asked_for(tmp_path, made_up, monkeypatch):
    run = deltalab.train.run_spec

    def broken(spec, place, **how):
        if spec.adapt[0].r > 4:
            raise RuntimeError("no room")
        run(spec, place, **how)

    monkeypatch.setattr(deltalab.train, "run_spec", broken)
    sweep = sweep_of(tmp_path / "s", then=False, sampler="random")
    search.work(sweep)
    states = Counter(find(sweep.folder).states().values())
    assert states["failed"] > 0
    assert states.total() == 16
    assert f"{states['failed']} failed" in studies(sweep)[0].line()
    monkeypatch.setattr(deltalab.train, "run_spec", run)
    made_up.clear()
    assert forget_failures(find(sweep.folder)) == states["failed"]
    search.work(sweep)
    assert len(made_up) == states["failed"]
    assert set(find(sweep.folder).states().values()) <= {"finished", "pruned"}
    assert [number for number, *_ in told(studies(sweep)[0].study)] == list(range(16))


def test_a_setting_whose_parts_do_not_go_together_fails(tmp_path, made_up):
    base = {**plan()["base"], "optim": {"steps": 8, "batch": 2}}
    space = {"optim.batch": [8, 2], "optim.accumulate": [1, 4]}
    sweep = sweep_of(tmp_path / "s", base=base, space=space, sampler="grid", pruner="none", then=False)
    search.work(sweep)
    assert Counter(t.state.name for t in studies(sweep)[0].study.get_trials()) == {"COMPLETE": 3, "FAIL": 1}
    assert len(find(sweep.folder).tuning) == 3


def test_a_trial_of_somebody_who_is_alive_is_left_to_him(tmp_path, made_up):
    sweep = sweep_of(tmp_path / "s", trials=2, pruner="none", then=False)
    (study,) = studies(sweep)
    first = study.claim()
    assert study.claim() == first, "nobody holds it"
    with owned(sweep.place(first)):
        second = study.claim()
        assert second.number == 1
        with owned(sweep.place(second)):
            assert study.claim() is None
    fail(sweep, first, "gone")
    assert study.claim() == second
    assert [t.state.name for t in study.study.get_trials()] == ["FAIL", "RUNNING"]


def test_half_a_line_at_the_end_of_the_journal_is_cut_off(tmp_path, made_up):
    sweep = sweep_of(tmp_path / "s", trials=3, then=False)
    studies(sweep)[0].claim()
    path = sweep.folder / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"wor')
    search.work(sweep)
    assert path.read_bytes().startswith(whole)
    assert len(told(studies(find(sweep.folder))[0].study)) == 3
    with alone(path):
        pass


def test_a_database_keeps_it_too(tmp_path, made_up):
    fields = {"trials": 7, "storage": f"sqlite:///{tmp_path}/s.db"}
    search.work(sweep_of(tmp_path / "s", **fields))
    search.work(sweep_of(tmp_path / "file", trials=7))
    assert told(studies(find(tmp_path / "s"))[0].study) == told(studies(find(tmp_path / "file"))[0].study)
    assert not (tmp_path / "s" / JOURNAL).exists()
    bad = spec(product={}, search={"space": SPACE, "storage": "nosuch://x"})
    said(lambda: studies(create(bad, tmp_path / "bad")), "no database can be used at 'nosuch://x'", "sqlite:///")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"sampler": "tpee"}, ("search.sampler", "did you mean tpe?")),
        ({"pruner": "medain"}, ("search.pruner", "did you mean median?")),
        ({"space": {"optim.lr": {"low": 1.0, "high": 1.0}}}, ("search.space.optim.lr", "an empty range")),
        ({"space": {"optim.lr": {"low": 0.0, "high": 1.0, "log": True}}}, ("above zero",)),
        ({"space": {"adapt.r": {"low": 1, "high": 8, "step": 3}}}, ("step 3 does not lead from 1 to 8",)),
        ({"space": {"adapt.r": {"low": 1, "high": 8, "step": 0}}}, ("step 0 does not lead",)),
        ({"space": {"optim.lr": []}}, ("search.space.optim.lr",)),
        ({"space": {}}, ("search.space",)),
        ({"space": {"seed": [1, 2]}}, ("seed is not searched for",)),
        ({"sampler": "grid"}, ("optim.lr has no step",)),
        ({"trials": 0}, ("search.trials",)),
        ({"space": {"adapt.r": [2]}, "product": {"adapt.r": [1]}}, ("adapt.r varies in two places",)),
        ({"space": {"adapt.rr": [2]}}, ("rr: unknown key", "did you mean r")),
        ({"space": {"adapt.r": {"low": 0, "high": 4}}}, ("the trial 'r=0'",)),
        ({"tune": {"values": {"optim.lr": [0.1]}}}, ("tune and search: one of them",)),
        ({"measure": "score.sst2.accuracy"}, ("no run has 'score.sst2.accuracy'", "score.skills.…", "held_out")),
    ],
)  # fmt: skip
def test_faults_of_a_search(tmp_path, fields, parts):
    beside = {"product": fields.pop("product", {}), "tune": fields.pop("tune", None)}
    fields = {"space": SPACE, **fields}
    said(lambda: create(build(SweepSpec, plan(search=fields, **beside)), tmp_path / "s"), *parts)
    assert not (tmp_path / "s").exists()


def test_a_measure_that_no_trial_has(tmp_path, made_up):
    sweep = sweep_of(tmp_path / "s", measure="score.skills.scor")
    said(lambda: search.work(sweep), "no trial has 'score.skills.scor'", "nearest: score.skills.score")
    assert len(made_up) == 1
    sweep = sweep_of(tmp_path / "s", measure="score.skills.score", trials=1, then=False)
    search.work(sweep)
    assert len(made_up) == 1
    assert len(lab.load(sweep.folder, tuning=True)) == 1


def test_what_is_going_to_be_searched():
    shown = planned(spec(search={"space": {"optim.lr": LR, "optim.batch": [4, 8]}}))
    assert "a search of 20 trials in each of r=2, r=4, sampler tpe, pruner median" in shown
    assert "optim.lr: 0.0001 to 0.1, logarithmic" in shown
    assert "optim.batch: [4, 8]" in shown
    assert "then the best of each with 2 seeds" in shown
