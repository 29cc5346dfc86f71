"""The spec of a run: defaults, what YAML makes of it, and every fault at once."""

import pytest

from deltalab.core.errors import UserError
from deltalab.core.spec import build, load_spec
from deltalab.data.tasks import InstructTask
from deltalab.deltas import LoRA
from deltalab.train import OptimSpec, TrainSpec

EXAMPLE = """
model: organism
adapt: [{method: lora, r: 8, alpha: 16, targets: all-linear}]
data: [{task: instruct, path: alpaca.json, limit: 1000}]
optim: {lr: 3e-4, steps: 300, batch: 8}
output: runs/first
"""


def read(tmp_path, text, *overrides):
    (tmp_path / "spec.yaml").write_text(text)
    return load_spec(TrainSpec, tmp_path / "spec.yaml", overrides)


def test_the_example(tmp_path):
    spec = read(tmp_path, EXAMPLE, "optim.batch=4", "data.0.limit=3", "adapt.r=2", "optim.weight_decay=1e-2")
    assert spec.adapt == [LoRA(r=2, alpha=16, targets="all-linear")]
    assert spec.data == [InstructTask(path="alpaca.json", limit=3)]
    assert spec.optim == OptimSpec(lr=3e-4, steps=300, batch=4, weight_decay=0.01)
    assert build(TrainSpec, spec.plain()) == spec
    assert build(TrainSpec, spec.plain()).digest() == spec.digest()


def test_defaults_are_the_published_ones():
    spec = build(TrainSpec, {"model": "m", "data": [{"task": "skills"}]})
    assert spec.adapt == [LoRA(r=8, alpha=16, dropout=0.05, targets="q,v")]
    assert (spec.optim.lr, spec.optim.warmup, spec.optim.schedule, spec.optim.betas) == (
        1e-4,
        0.06,
        "cosine",
        (0.9, 0.999),
    )


def test_own_parameters_too(tmp_path):
    spec = read(tmp_path, EXAMPLE, "adapt=[{method: lora}, {method: train, what: norms}]")
    assert [type(item).__name__ for item in spec.adapt] == ["LoRA", "Train"]


def test_every_fault_at_once(tmp_path):
    text = """
modell: organism
adapt: [{method: lora, rnk: 8, alpha: -1}, {method: lra}]
data: [{task: instruct, pth: alpaca.json}, {task: skils}]
optim: {lr: fast, step: 300, betas: [0.9]}
run: {too_long: drop}
"""
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    said = str(error.value)
    for part in ("modell: unknown key; did you mean model", "adapt.0.rnk: unknown key", "adapt.0.alpha: should be greater than 0", "'lra' is unknown; did you mean lora",
                 "data.0.pth: unknown key; did you mean path", "'skils' is unknown; did you mean skills", "optim.lr", "optim.step: unknown key; did you mean steps",
                 "optim.betas", "run.too_long", "model: is needed"):  # fmt: skip
        assert part in said, said


@pytest.mark.parametrize(("change", "said"), [
    ("optim={steps: 3, epochs: 2}", "give steps or epochs, not both"),
    ("optim={batch: 2, accumulate: 4}", "no 4 pieces"),
    ("adapt=[]", "adapt"),
    ("data=[]", "data"),
    ("seed=-1", "seed"),
    ("eval.fraction=1.5", "eval.fraction"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(tmp_path, change, said):
    with pytest.raises(UserError, match="fault") as error:
        read(tmp_path, EXAMPLE, change)
    assert said in str(error.value)
