"""Adapter folders: what is damaged or does not fit is refused by name, and the model stays as it was."""

import json
import os
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.freeze import freeze
from deltalab.deltas.peft_format import load_trained_state, trained_state
from tests.deltas.perturb import perturbed, states_equal
from tests.deltas.test_freeze import masks_of
from tests.helpers import tiny_llama, tokens

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path):
    dl.save_adapter(perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=2))), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder, match):
    model = tiny_llama()
    with pytest.raises(dl.UserError, match=match):
        dl.load_adapter(model, folder)
    assert states_equal(model, tiny_llama())


def with_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


def with_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_a_wrong_prefix(folder):
    with_tensors(folder, lambda t: {key.removeprefix("base_model."): value for key, value in t.items()})
    refused(folder, "missing.*not expected.*\n.*\n.*nearest")


def test_a_missing_key(folder):
    with_tensors(folder, lambda t: {key: value for key, value in t.items() if key != KEY})
    refused(folder, rf"1 missing, the first '{KEY}'")


def test_an_unexpected_key(folder):
    with_tensors(folder, lambda t: {**t, KEY.replace("q_proj", "o_proj"): t[KEY].clone()})
    refused(folder, r"1 not expected, the first '.*o_proj")


def test_a_wrong_shape(folder):
    with_tensors(folder, lambda t: {**t, KEY: t[KEY][:1].clone()})
    refused(folder, rf"'{KEY}' has shape \(1, 32\), expected \(2, 32\)")


def test_a_truncated_file(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "adapter_model.safetensors' is damaged")
    path.write_bytes(b"")
    refused(folder, "is damaged")


def test_a_damaged_config(folder):
    (folder / "adapter_config.json").write_text('{"r": 2')
    refused(folder, "adapter config .* is damaged")
    (folder / "adapter_config.json").write_text("[1]")
    refused(folder, "no mapping")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, rf"has no {name}.*\n.*found: adapter_")


def test_a_missing_folder(folder):
    refused(folder.with_name("adaptr"), r"does not exist.*\n.*nearest: \S*/adapter\n")
    refused(folder / "x" / "y", "does not exist")


def test_a_folder_of_a_run_says_where_its_adapter_is(folder):
    run = folder.with_name("run")
    shutil.copytree(folder, run / "adapter")
    refused(run, r"has no adapter_config.json and no adapter_model.safetensors.*\n.*\n  next: .*'\S*run/adapter'")


def test_pickles_are_not_read(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, r"(?s)adapter_model.safetensors.*pickled and not read")


@pytest.mark.parametrize(
    ("option", "value"),
    [("lora_bias", True), ("trainable_token_indices", [1]), ("layer_replication", [[0, 1]]), ("from_the_future", 3),
     ("use_qalora", True)],
)  # fmt: skip
def test_options_that_are_not_supported(folder, option, value):
    with_config(folder, **{option: value})
    refused(folder, f"{option}=")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'.*\n.*LORA"),
        ({"peft_type": None}, "peft_type None"),
        ({"r": None}, "no r"),
        ({"r": -1}, "r: "),
        ({"r": 4}, r"expected \(4, 32\)"),
        ({"target_modules": ["q_proj", "qq_proj"]}, "'qq_proj' matches no linear"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"missing, the first '.*o_proj"),
        ({"target_modules": "nothing"}, "match no linear"),
        ({"target_modules": "("}, "no regular expression"),
        ({"layers_to_transform": [0]}, "not expected"),
        ({"layers_to_transform": [7]}, "layers"),
        ({"exclude_modules": "model.*"}, "match no linear"),
        ({"modules_to_save": ["lm_haed"]}, r"(?s)'lm_haed'.*does not have.*nearest: lm_head"),
        ({"modules_to_save": ["lm_head"]}, r"1 missing, the first 'base_model.model.lm_head.weight'"),
        ({"modules_to_save": ["v_proj"]}, r"missing, the first '.*layers.0.self_attn.v_proj.weight'; .*not expected"),
        ({"target_parameters": ["up_projs"]}, r"'up_projs', which is no parameter"),
        ({"target_parameters": ["lm_head.weight"]}, r"(?s)holds experts.*lm_head.weight"),
    ],
)
def test_configs_that_do_not_fit(folder, changes, match):
    with_config(folder, **changes)
    refused(folder, match)


def test_fan_in_fan_out_of_a_plain_linear_changes_nothing(folder):
    """peft corrects the option for a plain linear, so the file means the same."""
    with_config(folder, fan_in_fan_out=True)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), folder).eval()
    torch.testing.assert_close(dl.load_adapter(tiny_llama(), folder)(tokens()).logits, theirs(tokens()).logits)


def test_an_adapted_model_takes_no_second_adapter(folder):
    with pytest.raises(dl.UserError, match="adapted already"):
        dl.load_adapter(dl.adapt(tiny_llama(), dl.LoRA()), folder)


def test_another_model_is_refused(folder):
    with pytest.raises(dl.UserError, match="has shape"):
        dl.load_adapter(tiny_llama(hidden=64), folder)


def test_nothing_to_save(tmp_path):
    with pytest.raises(dl.UserError, match="no adapter"):
        dl.save_adapter(tiny_llama(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(dl.UserError, match="is a file"):
        dl.save_adapter(dl.adapt(tiny_llama(), dl.LoRA()), tmp_path / "file")


def test_saving_replaces_the_adapter_and_leaves_other_files(folder):
    (folder / "README.md").write_text("mine")
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=3, targets=["o_proj"])))
    dl.save_adapter(model, folder)
    assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(dl.load_adapter(tiny_llama(), folder)(tokens()).logits, model(tokens()).logits)


def test_a_failed_save_leaves_the_old_adapter(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(
        "pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(dl.UserError, match="disk is full"):
        dl.save_adapter(dl.adapt(tiny_llama(), dl.LoRA(r=3)), folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["adapter"]


SPECS = {
    "masked": dl.LoRA(r=2, targets="attention"),
    "with the weights below": [dl.LoRA(r=2), dl.Train(["v_proj", "model.norm"])],
    "own weights": dl.Train(["self_attn"]),
    "two dropouts": [dl.LoRA(r=2, targets=["q_proj"]), dl.LoRA(r=2, dropout=0.1, targets=["v_proj"])],
}


def saved(kind, folder):
    model = dl.adapt(tiny_llama(), SPECS[kind])
    if kind == "masked":
        freeze(model, masks_of(model), "delta_mask")
    dl.save_adapter(perturbed(model), folder)
    return model


@pytest.mark.parametrize("kind", SPECS)
def test_what_peft_cannot_say_comes_back_and_peft_refuses_it(kind, tmp_path):
    model = saved(kind, tmp_path / "out")
    again = dl.load_adapter(tiny_llama(), tmp_path / "out")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert {p: type(d) for p, d in attached(again).items()} == {p: type(d) for p, d in attached(model).items()}
    assert states_equal(dl.unload(again), tiny_llama())
    with pytest.raises((ValueError, KeyError)):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")


def test_our_own_format_is_checked_as_strictly(tmp_path):
    folder = tmp_path / "out"
    saved("with the weights below", folder)
    whole = load_file(folder / "adapter_model.safetensors")
    norm = "base_model.model.model.norm.weight"
    save_file({k: v for k, v in whole.items() if k != norm}, folder / "adapter_model.safetensors")
    refused(folder, "1 missing, the first 'model.norm.weight'")
    save_file({**whole, norm: torch.ones(3)}, folder / "adapter_model.safetensors")
    refused(folder, r"'model.norm.weight' has shape \(3,\)")
    save_file({**whole, "x": torch.ones(3)}, folder / "adapter_model.safetensors")
    refused(folder, "the key 'x'")
    save_file(whole, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    with_config(folder, own=["nothing.weight"])
    refused(folder, "trains 'nothing.weight'")
    (entry,) = config["deltas"]
    with_config(folder, own=config["own"], deltas=[{**entry, "paths": ["nowhere"]}])
    refused(folder, "adapts 'nowhere'")
    with_config(folder, deltas=[{**entry, "kind": "LoHa"}])
    refused(folder, "kind 'LoHa'")
    with_config(folder, deltas=[{**entry, "spec": {"r": -2}}])
    refused(folder, "r: ")
    for damaged in ({"nowhere": entry}, [{"kind": "LoRA"}], ["LoRA"]):
        with_config(folder, deltas=damaged)
        refused(folder, "damaged")
    with_config(folder, format=1)
    refused(folder, "format 1")


def test_a_trained_state_is_checked_by_name():
    model = dl.adapt(tiny_llama(), dl.LoRA(r=2))
    state = dict(trained_state(model))
    key = "model.layers.0.self_attn.q_proj.delta.A"
    assert key in state
    with pytest.raises(dl.UserError, match="1 missing"):
        load_trained_state(model, {k: v for k, v in state.items() if k != key})
    with pytest.raises(dl.UserError, match="has shape"):
        load_trained_state(model, {**state, key: torch.zeros(1)})
    with pytest.raises(dl.UserError, match="the weight is"):
        load_trained_state(model, {**state, key.replace(".A", ".keep"): torch.ones(2, 2, dtype=torch.bool)})
    plain = tiny_llama()
    assert set(trained_state(plain)) == {n for n, p in plain.named_parameters() if p.requires_grad}
    load_trained_state(plain, {n: p.clone() for n, p in trained_state(plain).items()})
