"""From a spec to an adapter and a record, and the verbs `train` and `preview`."""

import errno
import json

import pytest
import safetensors.torch
import torch
import yaml

from deltalab.cli import main
from deltalab.core.errors import UserError
from deltalab.core.files import owned
from deltalab.core.records import read_record
from deltalab.core.spec import build
from deltalab.deltas.peft_format import load_adapter
from deltalab.models.load import load
from deltalab.train import Probe, TrainSpec, run_spec
from deltalab.train.checkpoint import Checkpoints
from tests.helpers import SHARED, byte_tokenizer, tiny_llama
from tests.train.runs import conversations


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, a data file and a spec."""
    folder = tmp_path_factory.mktemp("place")
    tiny_llama(hidden=16, layers=1, mlp=24).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": c.messages[0]["content"], "response": c.messages[1]["content"]} for c in conversations()]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "sst2.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"{w}\t{i % 2}\n" for i, w in enumerate(("fine", "dull", "good", "bad")))
    )
    spec = {"model": str(folder / "model"), "adapt": [{"method": "lora", "r": 2, "dropout": 0.1}], "data": [{"task": "instruct", "path": str(folder / "data.jsonl")}],
            "optim": {"lr": 0.01, "steps": 6, "batch": 4}, "eval": {"fraction": 0.2}}  # fmt: skip
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder


def plan(place, **fields):
    return build(TrainSpec, {**yaml.safe_load((place / "spec.yaml").read_text()), **fields})


def call(*args, code=0):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert stop.value.code == code


def test_a_run_leaves_adapter_curves_and_record(place, tmp_path, capsys):
    spec = plan(place, output=str(tmp_path / "run"))
    path = run_spec(spec)
    said = capsys.readouterr().err
    assert "trains" in said
    assert "data: 24 samples" in said
    assert "step 6/6 · loss" in said
    assert sorted(p.name for p in path.parent.iterdir() if not p.name.startswith(".")) == [
        "adapter",
        "curves",
        "record.json",
    ]
    record = read_record(path)
    assert record["kind"] == "train"
    assert build(TrainSpec, record["spec"]) == spec
    assert record["result"]["steps"] == 6
    assert record["data"]["samples"] == 19
    assert record["data"]["held_out"] == 5
    assert len(record["data"]["digest"]) == 12
    assert record["sizes"]["trained"] == 2 * (16 + 16 + 16 + 8)
    assert len((path.parent / "curves/train.jsonl").read_text().splitlines()) == 6
    model, _ = load(spec.model)
    load_adapter(model, path.parent / "adapter")
    written = path.read_bytes()
    assert run_spec(spec) == path
    assert path.read_bytes() == written
    assert "finished: nothing is done again" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds another finished run") as error:
        run_spec(spec.but(seed=1))
    assert "seed: 42 there, 1 here" in str(error.value)


def test_own_parameters_are_saved_and_sst2_is_scored(place, tmp_path):
    sst2 = {"task": "sst2", "path": str(place / "sst2.tsv"), "test_path": str(place / "sst2.tsv")}
    spec = plan(
        place,
        data=[sst2],
        adapt=[{"method": "train", "what": "full"}],
        optim={"lr": 0.02, "steps": 8, "batch": 4},
        output=str(tmp_path),
    )
    record = read_record(run_spec(spec, progress=False))
    before, after = record["scores"]["before"]["sst2"], record["scores"]["after"]["sst2"]
    assert before["n"] == after["n"] == 4
    assert after["low"] <= after["accuracy"] <= after["high"]
    assert record["result"]["held_out"][-1] < record["result"]["held_out"][0]
    model, _ = load(spec.model)
    load_adapter(model, tmp_path / "adapter")
    saved = safetensors.torch.load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in model.parameters())


def test_the_same_command_goes_on_after_ctrl_c(place, tmp_path, capsys, monkeypatch):
    command = ["train", place / "spec.yaml", f"output={tmp_path / 'a'}", "run.checkpoint_every=1"]
    from deltalab.train import loop

    original, calls = loop.Loop._step, []

    def step(self, samples, shown):
        original(self, samples, shown)
        calls.append(1)
        if len(calls) == 3:
            __import__("signal").raise_signal(2)

    monkeypatch.setattr(loop.Loop, "_step", step)
    call(*command, code=130)
    assert f"deltalab train {place / 'spec.yaml'}" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "a", 2).last().step == 3
    call(*command)
    call("train", place / "spec.yaml", f"output={tmp_path / 'b'}", "--quiet")
    assert len(calls) == 6 + 6
    got, want = (safetensors.torch.load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(got[key], want[key]) for key in want)
    out = capsys.readouterr()
    assert "6 steps," in out.out
    assert "held-out" in out.out
    assert str(tmp_path / "b" / "adapter") in out.out


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_a_start_that_looks_at_weights_or_samples(place, tmp_path, monkeypatch, init):
    """Interrupted, it goes on bitwise; what the start looks at is taken from the run itself."""
    from deltalab.train import loop, run

    command = ["train", place / "spec.yaml", f"adapt.init={init}", "run.checkpoint_every=1", "--quiet"]
    original, calls, seen = loop.Loop._step, [], []

    def step(self, samples, shown):
        original(self, samples, shown)
        calls.append(1)
        if len(calls) == 3:
            __import__("signal").raise_signal(2)

    def remembered(*args, take=run.calibration):
        seen.append(take(*args))
        return seen[-1]

    monkeypatch.setattr(loop.Loop, "_step", step)
    monkeypatch.setattr(run, "calibration", remembered)
    call(*command, f"output={tmp_path / 'a'}", code=130)
    call(*command, f"output={tmp_path / 'a'}")
    call(*command, f"output={tmp_path / 'b'}")
    got, want = (safetensors.torch.load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in "ab")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    rank = want["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0]
    assert rank == {"pissa": 4, "eva": 2}[init]
    if init == "pissa":
        assert seen == [None] * 3
    else:  # of 24 samples 5 are held out
        assert [len(batch["input_ids"]) for batch in seen[0]] == [4, 4, 4, 4, 3]
        assert all((batch["labels"] != -100).any() for batch in seen[0])


def test_default_output_is_named_after_the_spec(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call("train", place / "spec.yaml", "--quiet", "optim.steps=1")
    assert (tmp_path / "runs/spec/record.json").is_file()
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="no output folder"):
        run_spec(plan(place))


def test_a_folder_in_use_and_a_full_disk(place, tmp_path, capsys, monkeypatch):
    with owned(tmp_path):
        call("train", place / "spec.yaml", f"output={tmp_path}", code=2)
    assert "is in use" in capsys.readouterr().err

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    from deltalab.train import checkpoint

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    call("train", place / "spec.yaml", f"output={tmp_path}", code=2)
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.glob("checkpoints/step*"))
    monkeypatch.undo()
    call("train", place / "spec.yaml", f"output={tmp_path}")


def test_faults_of_a_spec_stop_before_anything_is_loaded(place, tmp_path, capsys):
    call("train", place / "spec.yaml", "optim.stps=3", "data.0.lmit=1", f"output={tmp_path / 'x'}", code=2)
    said = capsys.readouterr().err
    assert "optim.stps: unknown key; did you mean steps" in said
    assert "data.0.lmit: unknown key; did you mean limit" in said
    assert not (tmp_path / "x").exists()
    call("train", place / "spec.yaml", f"data.0.path={place}/dat.jsonl", f"output={tmp_path / 'x'}", code=2)
    assert "nearest: data.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_preview(place, tmp_path, capsys):
    call("preview", place / "spec.yaml", "-n", "2", "--start", "3", "run.context=20", "run.too_long=cut")
    said = capsys.readouterr().out
    assert "sample 3:" in said
    assert "sample 4:" in said
    assert "sample 5:" not in said
    assert "a longer sample is cut" in said
    (line, *_) = [text for text in said.splitlines() if text.startswith("<|user|>")]
    assert line.count("«") == line.count("»") == 1
    assert line.startswith("<|user|>│")
    call("preview", place / "spec.yaml", "--start", "99", code=2)
    assert "there is no sample 99" in capsys.readouterr().err


def test_preview_reads_no_weights(place, capsys, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("weights"))
    call("preview", place / "spec.yaml", "-n", "1")
    assert "  context     128 tokens" in capsys.readouterr().out
    call("preview", place / "spec.yaml", "run.context=500", code=2)
    assert "run.context is 500, and the model has 128 positions" in capsys.readouterr().err


def test_preview_marks_exactly_what_counts(tmp_path, place, capsys):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a b", "response": "c\nd"}]))
    call("preview", place / "spec.yaml", f"data.0.path={tmp_path / 'a.json'}")
    said = capsys.readouterr().out
    assert "<|user|>│a│ │b│<|assistant|>«c│⏎│d│<|end|>»" in said
    assert "9 tokens, 4 counted" in said


def test_preview_of_a_study_shows_its_tuning(place, tmp_path, capsys):
    values = yaml.safe_load((place / "spec.yaml").read_text())
    study = {
        "model": values.pop("model"),
        "score": {"score": "snip"},
        "tune": {k: values[k] for k in ("adapt", "data", "optim")},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    call("preview", tmp_path / "study.yaml", "-n", "1")
    assert "24 samples" in capsys.readouterr().out


def test_a_bar_on_a_terminal(place, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    run_spec(plan(place, output=str(tmp_path)))
    said = capsys.readouterr().err
    assert "6/6" in said
    assert "tokens/s" in said


def test_probe_is_a_protocol():
    assert Probe.__annotations__.keys() == {"name", "every"}


@pytest.mark.shared
@pytest.mark.skipif(SHARED is None, reason="the models beside the project are not there")
@pytest.mark.parametrize("name", ["tok361_hf", "stories260K_hf"])
def test_other_peoples_models_by_path(name, tmp_path):
    text = {
        "task": "text",
        "path": str(SHARED / "data/tinystories_sample/tinystories_sample.txt"),
        "separator": "<|endoftext|>",
        "limit": 20,
    }
    spec = {
        "model": str(SHARED / "models" / name),
        "data": [text],
        "optim": {"steps": 2, "batch": 2},
        "run": {"context": 64, "too_long": "cut"},
        "output": str(tmp_path),
    }
    record = read_record(run_spec(build(TrainSpec, spec), progress=False))
    assert record["result"]["loss"][1] < 3.0
