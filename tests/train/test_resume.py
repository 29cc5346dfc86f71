"""A run that was killed, interrupted or damaged goes on as if nothing had been."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.core.files import owned
from deltalab.deltas.peft_format import trained_state
from deltalab.train import EvalSpec, OptimSpec, RunSpec, rng, train
from deltalab.train.checkpoint import Checkpoints
from tests.helpers import byte_tokenizer
from tests.train.runs import At, Noise, adapted, conversations, interrupt, run, spec

CURVES = ("train", "eval", "noise")


def outcome(folder):
    """Everything that must be bitwise the same: adapter and curves."""
    folder = Path(folder)
    files = [folder / "adapter/adapter_model.safetensors", *(folder / f"curves/{name}.jsonl" for name in CURVES)]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return outcome(folder)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_five_random_moments(tmp_path):
    """SIGKILL during steps, curves and checkpoints; the same command each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.runs"])
    steps, killed = 40, []
    for seed in range(5):
        moment = random.Random(seed)
        process = context.Process(target=run, args=(tmp_path / "killed", "lora", steps))
        process.start()
        wanted = lines(tmp_path / "killed/curves/train.jsonl") + moment.randint(2, 5)
        deadline = time.monotonic() + 120
        while (
            process.is_alive()
            and lines(tmp_path / "killed/curves/train.jsonl") < wanted
            and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        time.sleep(moment.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed.append(lines(tmp_path / "killed/curves/train.jsonl"))
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
    for name in ("killed", "undisturbed"):
        process = context.Process(target=run, args=(tmp_path / name, "lora", steps))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert killed[-1] < steps
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.parametrize(("kind", "at"), [("lora", 2), ("lora", 11), ("both", 6), ("adalora", 5)])
def test_interrupted_and_continued_is_bitwise_the_same(tmp_path, kind, at):
    run(tmp_path / "a", kind)
    with pytest.raises(KeyboardInterrupt, match=f"stopped at step {at} of 12"):
        run(tmp_path / "b", kind, probes=[Noise(), At(at, interrupt)])
    assert Checkpoints(tmp_path / "b", 2).last().step == at
    run(tmp_path / "b", kind)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_second_interrupt_stops_at_once(tmp_path):
    def twice(model):
        interrupt(model)
        interrupt(model)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, probes=[At(5, twice)])
    assert Checkpoints(tmp_path, 2).last().step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("damage", "how"),
    [
        ("trained.safetensors", "cut"),
        ("optimizer.safetensors", "gone"),
        ("rng.safetensors", "cut"),
        ("state.json", "cut"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, undisturbed, damage, how):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, probes=[Noise(), At(7, interrupt)])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000007"]
    file = tmp_path / "checkpoints/step-000007" / damage
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        file.unlink()
    assert Checkpoints(tmp_path, 2).last().step == 6
    run(tmp_path)
    assert outcome(tmp_path) == undisturbed


def test_a_finished_run_does_nothing_more(tmp_path, undisturbed):
    run(tmp_path)
    before = Checkpoints(tmp_path, 2).last().step
    again = run(tmp_path)
    assert (before, again.steps, len(again.losses)) == (12, 12, 12)
    assert outcome(tmp_path) == undisturbed


def test_memory_and_time_are_of_all_processes_that_a_run_had(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, probes=[Noise(), At(7, interrupt)])
    file = tmp_path / "checkpoints/step-000007/state.json"
    state = json.loads(file.read_text())
    assert state["run"]["memory"] > 0
    file.write_text(json.dumps(state | {"run": state["run"] | {"memory": 2**40, "seconds": 1e6}}))
    run(tmp_path)
    ended = Checkpoints(tmp_path, 2).last()
    assert (ended.step, ended.state["run"]["memory"]) == (12, 2**40)
    assert ended.state["run"]["seconds"] > 1e6


def test_half_written_curve_lines_are_cut_off(tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, probes=[Noise(), At(7, interrupt)])
    with open(tmp_path / "curves/train.jsonl", "a") as handle:
        handle.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    run(tmp_path)
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize(("change", "said"), [
    ({"fields": {"optim": OptimSpec(lr=1e-3, steps=12, batch=4, weight_decay=0.1)}}, "optim.lr: 0.005 there, 0.001 here"),
    ({"fields": {"eval": EvalSpec(every=4, fraction=0.2, patience=3)}}, "eval.patience: None there, 3 here"),
    ({"data": conversations(25)}, "the data; the held-out data"),
    ({"model": 1}, "the model"),
    ({"kind": "both"}, "the trained parameters"),
])  # fmt: skip
def test_another_run_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, probes=[At(4, interrupt)])
    model = adapted(change.get("kind", "lora"), seed=change.get("model", 0))
    arguments = (model, byte_tokenizer(), change.get("data", conversations()))
    with pytest.raises(UserError) as error:
        train(*arguments, spec(**change.get("fields", {})), folder=tmp_path, progress=False)
    assert "is of another run" in str(error.value)
    assert said in str(error.value)
    assert Checkpoints(tmp_path, 2).last().step == 4
    fresh = spec(**{**change.get("fields", {}), "run": RunSpec(checkpoint_every=3, resume=False)})
    assert train(*arguments, fresh, folder=tmp_path, progress=False).steps == 12


def test_what_does_not_change_the_result_may_change(tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, probes=[At(4, interrupt)])
    run(tmp_path, run=RunSpec(checkpoint_every=5, keep=1))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000012"]
    assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == undisturbed["adapter_model.safetensors"]


def test_a_folder_in_use_is_refused(tmp_path):
    with owned(tmp_path), pytest.raises(UserError, match="is in use"):
        run(tmp_path)


def test_generators_come_back():
    def draws():
        import numpy

        return (
            random.random(),
            random.gauss(0, 1),
            numpy.random.randn(),
            numpy.random.rand(),
            torch.rand(()).item(),
            torch.randn(3).tolist(),
        )

    rng.seed_all(3)
    random.gauss(0, 1), draws()
    state = rng.capture()
    first = draws()
    rng.restore(*state)
    assert draws() == first
    with rng.kept():
        draws()
    rng.restore(*state)
    with rng.kept():
        draws()
    assert draws() == first


def test_measuring_changes_nothing(tmp_path):
    with_probe, without = adapted(), adapted()
    train(with_probe, byte_tokenizer(), conversations(), spec(), probes=[Noise()], progress=False)
    train(without, byte_tokenizer(), conversations(), spec(eval=EvalSpec(every=1, fraction=0.2)), progress=False)
    for name, tensor in trained_state(with_probe).items():
        assert torch.equal(tensor, trained_state(without)[name])
