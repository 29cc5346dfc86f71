"""`deltalab train` given what it cannot use: a message with a way on, no traceback, nothing half-written."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.core.files import owned
from tests.bad_input.kit import deltalab, interrupted, left_behind, rows, save_model, write_data
from tests.helpers import small_disk, tiny_llama


def untouched(folder: Path) -> bool:
    """Nothing that looks like a result was written."""
    return not left_behind(folder) and not list(folder.rglob("record.json")) and not list(folder.rglob("adapter*"))


def test_the_spec_of_these_tests_trains(spec: Path) -> None:
    said = deltalab("train", spec)
    assert said.code == 0, said.err
    assert (spec.parent / "out" / "record.json").is_file()


def test_all_faults_of_a_spec_are_told_at_once(spec: Path) -> None:
    said = deltalab(
        "train",
        spec,
        "optmi.lr=1",
        "optim.lr=fast",
        "adapt.0.rr=4",
        "data.0.pth=x",
        "run.too_long=drop",
        "seed=-1",
        "optim.batch=2.5",
    )
    said.fails_with(
        "spec.yaml has 7 faults", "optmi: unknown key; did you mean optim?", "optim.lr: should be a valid number (got 'fast')",
        "adapt.0.rr: unknown key; did you mean r?", "data.0.pth: unknown key; did you mean path", "run.too_long: should be 'skip' or 'cut' (got 'drop')",
        "seed: should be greater than or equal to 0 (got -1)", "optim.batch: should be a valid integer",
    )  # fmt: skip
    assert untouched(spec.parent)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["adapt.0.targets=[q_prj, v_proj]"], ["'q_prj' matches no", "nearest: q_proj", "deltalab targets"]),
        (["adapt.0.targets=[mlp.*.nothing]"], ["matches no"]),
        (["adapt.0.layers=[7]"], ["7", "2 layers"]),
        (["adapt.0.method=lroa"], ["'method' 'lroa' is unknown; did you mean lora"]),
        (["adapt=[]"], ["adapt: "]),
        (["data=[]"], ["data: "]),
        (["data.0.task=instrct"], ["'instrct' is unknown; did you mean instruct"]),
        (["model=null"], ["model: should be a valid string (got None)"]),
        (["optim.steps=0"], ["optim.steps: should be greater than 0 (got 0)"]),
        (["optim.epochs=1"], ["give steps or epochs, not both"]),
        (["run.context=100000"], ["100000", "128"]),
        (["run.context=3"], ["no sample of 24 has a token to learn from", "24 longer than the context of 3"]),
        (["track=wandbb"], ["track.0.to: should be 'wandb', ", "(got 'wandbb'); did you mean wandb?"]),
        (["track=[{to: wandb, projct: x}]"], ["track.0.projct: unknown key; did you mean project?"]),
        (["track=[wandb, wandb]"], ["track: wandb stands there twice"]),
        (["optim.steps"], ["'optim.steps' is no key=value"]),
        (["optim.steps.x=1"], ["has no key 'x'"]),
    ],
)
def test_a_spec_that_asks_for_what_cannot_be(spec: Path, overrides: list[str], parts: list[str]) -> None:
    deltalab("train", spec, *overrides).fails_with(*parts)
    assert untouched(spec.parent)


def test_a_spec_file_that_is_none(here: Path, spec: Path) -> None:
    deltalab("train", here / "spek.yaml").fails_with("does not exist", "nearest: spec.yaml")
    spec.write_text("model: [")
    deltalab("train", spec).fails_with("no valid YAML")
    deltalab("trian", spec).fails_with("'trian' is no verb", "nearest: train")
    assert deltalab("train").code == 2


def break_model(folder: Path, how: str) -> None:
    """Damage a model folder in a named way."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "weights cut in their head":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "weights empty":
        weights.write_bytes(b"")
    elif how == "weights missing":
        weights.unlink()
    elif how == "pickled weights":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "config cut":
        config.write_text(config.read_text()[:50])
    elif how == "config missing":
        config.unlink()
    elif how == "tokenizer missing":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif how == "tokenizer cut":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    elif how == "tensor missing":
        tensors = safetensors.torch.load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    elif how == "another shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 52}))


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("weights cut", ["model.safetensors"]),
        ("weights cut in their head", ["model.safetensors"]),
        ("weights empty", ["model.safetensors"]),
        ("weights missing", ["safetensors"]),
        ("pickled weights", ["safetensors"]),
        ("config cut", ["config.json"]),
        ("config missing", ["config.json"]),
        ("tokenizer missing", ["tokenizer"]),
        ("tokenizer cut", ["tokenizer"]),
        ("tensor missing", ["model.layers.1.mlp.up_proj.weight"]),
        ("another shape", ["has another shape for", "mlp"]),
    ],
)
def test_a_damaged_model(spec: Path, model: Path, how: str, parts: list[str]) -> None:
    broken = spec.parent / "broken"
    shutil.copytree(model, broken)
    break_model(broken, how)
    deltalab("train", spec, f"model={broken}").fails_with("broken", *parts)
    assert untouched(spec.parent)


def test_a_model_that_is_not_there(spec: Path, model: Path) -> None:
    deltalab("train", spec, f"model={model}x").fails_with("does not exist", "nearest: ", "model")
    deltalab("train", spec, f"model={spec}").fails_with("is a file")
    deltalab("train", spec, "model=no-one/no-such-model").fails_with("no-one/no-such-model")
    deltalab("train", spec, "model=organism:chta").fails_with("organism:chta")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("gone.jsonl", None, ["gone.jsonl"]),
        ("empty.jsonl", "", ["empty.jsonl"]),
        ("empty.json", "[]", ["empty"]),
        ("cut.json", json.dumps(rows())[:-20], ["cut.json"]),
        ("cut.jsonl", "\n".join(map(json.dumps, rows()))[:-5], ["cut.jsonl", "24"]),
        ("other.jsonl", '{"text": "a"}', ["other.jsonl", "columns: text", "instruction + output"]),
        ("number.json", "3", ["number.json"]),
        ("wrong.jsonl", '{"instruction": 3, "output": "x"}', ["wrong.jsonl", "1"]),
        ("role.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}', ["robot", "assistant"]),
        ("bytes.jsonl", b"\xff\xfe\x00", ["bytes.jsonl"]),
        ("pickle.pkl", b"x", ["pickle.pkl"]),
    ],
)
def test_data_that_is_none(spec: Path, name: str, text: str | bytes | None, parts: list[str]) -> None:
    path = spec.parent / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    deltalab("train", spec, f"data.0.path={path}").fails_with(*parts)
    assert untouched(spec.parent)


def test_data_without_a_reply_to_learn_from(spec: Path) -> None:
    data = write_data(spec.parent / "asked.jsonl", [{"messages": [{"role": "user", "content": "well?"}]}] * 12)
    deltalab("train", spec, f"data.0.path={data}").fails_with(
        "no sample of 12 has a token to learn from", "12 whose labels are all masked", "deltalab preview"
    )
    assert untouched(spec.parent)


def test_a_folder_that_another_run_holds(spec: Path) -> None:
    with owned(spec.parent / "out"):
        deltalab("train", spec).fails_with("'out' is in use", "held by process", "another output folder")
    (spec.parent / "file").write_text("mine")
    deltalab("train", spec, "output=file").fails_with("is a file, a folder is needed")
    assert (spec.parent / "file").read_text() == "mine"


def test_a_folder_that_holds_another_run(spec: Path) -> None:
    assert deltalab("train", spec).code == 0
    before = (spec.parent / "out" / "record.json").read_bytes()
    deltalab("train", spec, "optim.lr=0.5").fails_with(
        "'out' holds another finished run", "optim.lr: 0.0001 there, 0.5 here", "another output folder"
    )
    assert deltalab("train", spec).code == 0  # the same one is left as it is
    assert (spec.parent / "out" / "record.json").read_bytes() == before


def test_a_loss_that_is_not_finite(spec: Path) -> None:
    said = deltalab(
        "train",
        spec,
        "optim.lr=3e37",
        "optim.clip=null",
        "optim.schedule=constant",
        "optim.warmup=0",
        "optim.steps=40",
        "run.checkpoint_every=1",
    )
    said.fails_with("broke down in step", "lower optim.lr")
    assert not left_behind(spec.parent)
    assert not (spec.parent / "out" / "record.json").exists()


@pytest.mark.parametrize("kib", [40, 200])
def test_a_full_disk(spec: Path, kib: int) -> None:
    """The smaller disk has no room for a checkpoint, the larger one takes some steps to fill."""
    with small_disk(spec.parent / "disk", f"{kib}k") as disk:
        more = ["adapt.0.targets=all-linear", "adapt.0.r=8", "run.checkpoint_every=1", "optim.steps=40", "run.keep=40"]
        deltalab("train", spec, f"output={disk}/out", *more).fails_with(
            "the disk is full", "MiB free", "another folder"
        )
        assert left_behind(disk) == []
        assert not (disk / "out" / "record.json").exists()
        assert not (disk / "out" / "adapter").exists()


LONG = ["optim.steps=100000", "run.checkpoint_every=1000000", "eval.every=1000000"]


def steps_done(folder: Path) -> int:
    """Rows of the training curve."""
    curve = folder / "curves" / "train.jsonl"
    return len(curve.read_text().splitlines()) if curve.exists() else 0


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(spec: Path) -> None:
    out = spec.parent / "out"
    said = interrupted(["train", spec, *LONG], lambda: steps_done(out) > 5)
    said.fails_with("deltalab train", "spec.yaml", "optim.steps=100000", code=130)
    assert left_behind(spec.parent) == []
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert len(kept) == 1
    assert int(kept[0].removeprefix("step-")) == steps_done(out)
    deltalab("train", spec, *LONG, "optim.lr=0.5").fails_with("another run", "optim.lr: 0.0001 there, 0.5 here")


def test_a_kill_leaves_nothing_that_the_next_run_trips_over(spec: Path) -> None:
    out = spec.parent / "out"
    said = interrupted(
        ["train", spec, "optim.steps=40", "run.checkpoint_every=1", "run.keep=2"],
        lambda: steps_done(out) > 8,
        signal.SIGKILL,
    )
    assert said.code == -signal.SIGKILL
    done = deltalab("train", spec, "optim.steps=40", "run.checkpoint_every=1", "run.keep=2", "--quiet")
    assert done.code == 0, done.err
    assert left_behind(spec.parent) == []
    assert steps_done(out) == 40


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no folder", "does not exist"), ("no weights", "adapter_model.safetensors"), ("weights cut", "adapter_model.safetensors"), ("config cut", "adapter_config.json"),
        ("no config", "adapter_config.json"), ("wrong prefix", "lora_A"), ("key missing", "lora_B"), ("wrong shape", "shape"), ("other model", "matches no"),
    ],
)  # fmt: skip
def test_a_damaged_adapter(tmp_path: Path, how: str, said: str) -> None:
    folder = tmp_path / "adapter"
    source = dl.adapt(tiny_llama(), dl.LoRA(r=2, targets="q,v"))
    if how != "no folder":
        dl.save_adapter(source, folder)
        break_adapter(folder, how)
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=said) as caught:
        dl.load_adapter(model, folder)
    assert "adapter" in str(caught.value)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(tensor.equal(before[name]) for name, tensor in after.items())


def break_adapter(folder: Path, how: str) -> None:
    """Damage an adapter folder in a named way."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors: dict[str, Any] = safetensors.torch.load_file(weights)
    if how == "no weights":
        weights.unlink()
        return
    if how == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-50])
        return
    if how == "config cut":
        config.write_text(config.read_text()[:30])
    elif how == "no config":
        config.unlink()
    elif how == "wrong prefix":
        tensors = {f"other.{name}": tensor for name, tensor in tensors.items()}
    elif how == "key missing":
        del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    elif how == "wrong shape":
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = tensors[
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        ][:, :5].contiguous()
    elif how == "other model":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["c_attn"]}))
        tensors = {
            name.replace("q_proj", "c_attn").replace("v_proj", "c_attn2"): tensor for name, tensor in tensors.items()
        }
    safetensors.torch.save_file(tensors, weights)


def test_a_model_without_a_name_in_common(spec: Path, tmp_path: Path) -> None:
    """A model of another depth is refused by the layers that the spec names."""
    other = save_model(tmp_path / "other", layers=1)
    deltalab("train", spec, f"model={other}", "adapt.0.layers=[1]").fails_with("layer")
