"""The sweeps that come with the package: every trial is a whole spec, on data that is here."""

from pathlib import Path

import pytest
import yaml

import deltalab as dl
from deltalab.cli import main, sweep
from deltalab.cli.sweep_table import _Look
from deltalab.core.errors import UserError
from deltalab.core.spec import load_spec
from deltalab.data.files import read_rows
from deltalab.lab import presets
from deltalab.lab.spec import SweepSpec, trials, tuning_trials
from deltalab.lab.trials import create, run_one

NAMES = ["alpha-ablation", "code-review", "lora-vs-full", "memory-quality", "method-comparison", "prefix-ablation",
         "rank-ablation", "target-ablation"]  # fmt: skip


def call(capsys, *args, code=0):
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == code
    return capsys.readouterr()


def test_which_there_are():
    assert presets.names() == NAMES
    assert presets.find(Path("mine.yaml")) == Path("mine.yaml")
    assert all(f"{name}," in (sweep.command.__doc__ or "").replace(".", ",") for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_trial_of_a_preset_is_a_run_on_the_bundled_model(name):
    spec = load_spec(SweepSpec, presets.find(Path(name)))
    found = tuning_trials(spec) or trials(spec)
    groups = {trial.group for trial in found}
    assert spec.baseline in {*groups, None}
    assert spec.seeds == (42, 1337, 2024)
    assert {trial.spec.model for trial in found} == {"organism"}
    for task in {task for trial in found for task in (*trial.spec.data, *trial.spec.retain)}:
        assert task.train()
        assert task.test()
    for run in {trial.group: trial.spec for trial in found}.values():  # every delta finds its place
        dl.load("organism", quantize=run.quantize, adapt=list(run.adapt))
    best = {trial.group: trial.tuned for trial in found}
    assert len(trials(spec, best) if spec.tune else found) == 3 * len(groups)


def test_a_preset_by_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = call(capsys, "sweep", "rank-ablation", "--dry-run").out
    assert out.startswith("58 trials, and 3 more of each group with the best")
    assert "r=64, seed=42" in out
    shown = yaml.safe_load(call(capsys, "sweep", "rank-ablation", "base.model=mine", "--show").out)
    assert shown["base"]["model"] == "mine"
    assert call(capsys, "sweep", "rank-ablation", "--show").out == presets.find(Path("rank-ablation")).read_text()
    err = call(capsys, "sweep", "rank-ablatoin", code=2).err
    assert "rank-ablation" in err
    assert list(tmp_path.iterdir()) == []


def test_bundled_data_by_name():
    rows = read_rows("bundled:code-review", split="test")
    assert set(rows[0].values) == {"initial", "approved"}
    with pytest.raises(UserError, match="no data set 'code-reveiw'") as error:
        read_rows("bundled:code-reveiw")
    assert "code-review" in str(error.value)


def test_the_live_table_follows_the_trials(tmp_path):
    from rich.console import Console

    from tests.lab.sweeps import spec

    sweep = create(spec(), tmp_path / "s")
    look = _Look(sweep, 2)

    def shown():
        console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
        console.print(look.table())
        return console.export_text()

    assert "4 trials, 4 waiting" in shown()
    run_one(sweep, sweep.trials[0])
    text = shown()
    assert "1 finished" in text
    assert "less than a minute left" in " ".join(text.split())
    row = next(line for line in text.splitlines() if "r=2" in line)
    assert "1/2" in row
    assert f"{look.rows[sweep.trials[0].id]['held_out']:.4g}" in row
