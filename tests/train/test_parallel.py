"""Two processes on the CPU train what one does."""

import os
import subprocess
import sys

import pytest
import safetensors.torch

from tests.helpers import ROOT, assert_close_by_norm
from tests.train.test_run import call, place  # noqa: F401 - the fixture


@pytest.mark.slow
def test_two_processes_train_what_one_does(place, tmp_path, capsys):  # noqa: F811
    options = ["adapt.0.dropout=0", "optim.batch=3", "optim.steps=7", "eval.every=3", "eval.best=true"]
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
