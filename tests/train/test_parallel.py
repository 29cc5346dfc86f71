"""Two processes on the CPU train what one does."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch

from tests.helpers import ROOT, assert_close_by_norm, tiny_llama, tokens
from tests.train.test_run import call, place  # noqa: F401 - the fixture


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapt", "how"),
    [
        ("{method: lora, r: 2}", []),
        ("{method: lora, r: 2}", ["run.tokens=70"]),
        ("{method: lora, r: 2}", ["run.pack=false", "run.tokens=70"]),
        ("{method: adalora, init_r: 4, target_r: 2, orth_reg_weight: 5.0}", []),
    ],
    ids=["packed", "to a budget", "padded to a budget", "with a penalty"],
)
def test_two_processes_train_what_one_does(place, tmp_path, capsys, adapt, how):  # noqa: F811
    options = [*how, f"adapt=[{adapt}]", "optim.batch=3", "optim.steps=7", "eval.every=3", "eval.best=true"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29517",
        "-m",
        "deltalab",
        "train",
        str(place / "spec.yaml"),
    ]
    done = subprocess.run(
        [*launch, f"output={tmp_path / 'two'}", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 steps,") == 1
    assert done.stderr.count("step 7/7 · held-out") == 1
    call("train", place / "spec.yaml", f"output={tmp_path / 'one'}", "--quiet", *options)
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two")
    )
    for key in one:
        assert_close_by_norm(two[key], one[key], 1e-4)
    norms = [
        [json.loads(line)["grad_norm"] for line in (tmp_path / name / "curves/train.jsonl").open()]
        for name in ("one", "two")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.slow
def test_the_callback_in_two_processes(tmp_path):
    """transformers.Trainer on halves of each batch: the same gradients, the penalty's once, and the same schedule."""
    outcomes = []
    for name, launch in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29519"]),
    ):
        done = subprocess.run(
            [sys.executable, *launch, __file__, str(tmp_path / name)],
            capture_output=True, text=True, cwd=ROOT, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        log = json.loads((tmp_path / name / "checkpoint-6/trainer_state.json").read_text())["log_history"]
        norms = [row["grad_norm"] for row in log if "grad_norm" in row]
        outcomes.append((norms, safetensors.torch.load_file(tmp_path / name / "checkpoint-6/model.safetensors")))
    (norms, one), (other, two) = outcomes
    assert other == pytest.approx(norms, rel=1e-4)
    for key in one:
        assert_close_by_norm(two[key].double(), one[key].double(), 1e-4)


def trains(folder):
    """A run of the Trainer in each process of a launcher."""
    import transformers

    import deltalab as dl

    spec = dl.AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=2, targets="attention", orth_reg_weight=5.0)
    model = dl.adapt(tiny_llama(hidden=16, layers=1, mlp=24), spec, seed=1)
    data = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in tokens(24, 10).tolist()]
    args = transformers.TrainingArguments(
        output_dir=folder, max_steps=6, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)), use_cpu=True,
        learning_rate=5e-3, logging_steps=1, save_steps=6, report_to="none", disable_tqdm=True, seed=3,
    )  # fmt: skip
    transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=[dl.TrainerCallback()]).train()


if __name__ == "__main__":
    trains(sys.argv[1])
