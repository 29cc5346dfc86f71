"""The saved form of a quantised model: bitwise the same model again, and bitsandbytes' own where it is NF4."""

import copy
import json
import sys

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers import auto

import deltalab as dl
from deltalab.deltas.base import weight_of
from deltalab.deltas.quantise import quantise
from deltalab.models.load import load, model_digest
from deltalab.quant.linear import GroupQuantiser, quantiser
from deltalab.quant.nf4_linear import NF4Linear, NF4Quantiser
from tests.deltas.perturb import perturbed
from tests.families import logits, model_of
from tests.helpers import assert_close_by_norm, model_folder, small_disk, tiny_llama
from tests.models.test_quantised import DENSE, WAYS, assert_same

AUTO = transformers.AutoModelForCausalLM


def made(way, **shape):
    return quantise(tiny_llama(**{"hidden": 64, "mlp": 128, **shape}), quantiser(way))


def form(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", DENSE)
def test_a_saved_model_loads_bitwise(family, way, tmp_path):
    dtype = model_of(family).dtype
    model_folder(model_of(family), tmp_path / "plain")
    model = quantise(load(tmp_path / "plain", dtype=dtype)[0], quantiser(way))
    model_folder(model, tmp_path / "once", max_shard_size="40KB")
    again, _ = load(tmp_path / "once", dtype=dtype)
    assert_same(again, model)
    assert model_digest(again) == model_digest(model)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice", max_shard_size="40KB")
    for file in sorted((tmp_path / "once").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_model_loads_in_another_dtype_and_as_its_body(way, tmp_path):
    model = made(way)
    model_folder(model, tmp_path)
    half, _ = load(tmp_path, dtype="bfloat16")
    assert_same(half, made(way).to(torch.bfloat16))
    body, _ = load(tmp_path, head="none")
    assert_same(body, model.model)


def test_transformers_and_bitsandbytes_load_nf4(tmp_path):
    for dtype, nested in ((torch.float32, True), (torch.bfloat16, False)):
        model = quantise(tiny_llama(hidden=64, mlp=128, tied=True, dtype=dtype), NF4Quantiser(double_quant=nested))
        merged = dl.merged(perturbed(dl.adapt(model, dl.LoRA(targets=["layers.1.self_attn.q_proj", "down_proj"]))))
        for name, which in (("all", dl.unload(model)), ("mixed", merged)):
            folder = model_folder(which, tmp_path / f"{name}-{nested}")
            theirs = AUTO.from_pretrained(folder, dtype=dtype)
            for path, linear in which.named_modules():
                if hasattr(linear, "weight") and "layers" in path:
                    there = theirs.get_submodule(path)
                    assert (type(there).__name__ == "Linear4bit") == isinstance(linear, NF4Linear)
                    assert torch.equal(weight_of(there), weight_of(linear)), path
                    if isinstance(linear, NF4Linear):
                        W = bitsandbytes.functional.dequantize_4bit(there.weight.data, there.weight.quant_state)
                        assert torch.equal(W, linear.weight), path
            # on a CPU that multiplies bf16 bitsandbytes rounds the scales to it before the first product
            assert_close_by_norm(logits(theirs), logits(which), 2e-2)
    assert form(folder)["llm_int8_skip_modules"] == [p for p, m in merged.named_modules() if type(m) is torch.nn.Linear]
    assert form(folder)["bnb_4bit_use_double_quant"] is False


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_that_bitsandbytes_made_loads_without_it(nested, tmp_path, monkeypatch):
    tiny_llama(hidden=64, mlp=128, bias=True).save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
    )
    model_folder(AUTO.from_pretrained(tmp_path / "plain", quantization_config=config), tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    got, _ = load(tmp_path / "theirs")
    assert_same(got, quantise(tiny_llama(hidden=64, mlp=128, bias=True), NF4Quantiser(double_quant=nested)))


def test_where_bitsandbytes_would_leave_a_linear_in_fp32_nf4_is_saved_in_our_own_form(tmp_path):
    model_folder(quantise(model_of("t5"), quantiser("nf4")), tmp_path)
    assert form(tmp_path) == {"quant_method": "deltalab", "quantize": "nf4"}


@pytest.mark.parametrize("way", ["int8", "int4-group"])
def test_transformers_loads_our_form_once_it_knows_it_and_refuses_it_before(way, tmp_path, monkeypatch):
    model = made(way)
    model_folder(model, tmp_path)
    assert form(tmp_path) == {"quant_method": "deltalab", "quantize": way}
    again = AUTO.from_pretrained(tmp_path)
    assert_same(again, model)
    again.save_pretrained(tmp_path / "again")
    assert_same(AUTO.from_pretrained(tmp_path / "again"), model)
    assert_same(again.to(torch.bfloat16), load(tmp_path, dtype="bfloat16")[0])
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "deltalab")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AUTO.from_pretrained(tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_an_adapted_model_saves_its_base_and_a_merged_one_what_it_is(way, tmp_path):
    bare = made(way)
    deltas = [dl.LoRA(targets=["layers.0.self_attn.q_proj", "lm_head"]), dl.Train("norms")]
    model = perturbed(dl.adapt(made(way), deltas))
    twin = copy.deepcopy(model)
    for name, which in (("adapted", model), ("copy", twin), ("unloaded", dl.unload(copy.deepcopy(model)))):
        model_folder(which, tmp_path / name)
    assert_same(load(tmp_path / "unloaded")[0], bare)
    adapted = load(tmp_path / "adapted")[0]
    for key, tensor in bare.state_dict().items():  # norms are saved as they are now, like a plain model's
        assert torch.equal(adapted.state_dict()[key], tensor) or "norm" in key
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (tmp_path / "adapted/model.safetensors").read_bytes()
    merged = dl.merged(model)
    again = load(model_folder(merged, tmp_path / "merged"))[0]
    assert_same(again, merged, grad=False)
    assert type(again.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.equal(logits(again), logits(merged))
    assert not hasattr(model.config, "quantization_config")


def test_a_change_that_went_into_the_offsets_is_saved_with_them(tmp_path):
    merged = dl.merged(perturbed(dl.adapt(made("int4-group"), dl.QALoRA(targets="all-linear"))))
    model_folder(merged, tmp_path)
    assert_same(load(tmp_path)[0], merged)
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.offset, made("int4-group").model.layers[0].mlp.up_proj.offset)  # fmt: skip


def test_a_merged_model_without_codes_is_a_plain_one(tmp_path):
    merged = dl.merged(dl.adapt(made("nf4"), dl.LoRA(targets="all-linear")))
    model_folder(merged, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AUTO.from_pretrained(tmp_path)), logits(merged))


def test_saving_into_a_folder_keeps_the_rest_and_drops_the_weights_of_before(tmp_path):
    model_folder(tiny_llama(), tmp_path, max_shard_size="40KB")
    (tmp_path / "notes").mkdir()
    made("int8").save_pretrained(tmp_path)
    assert_same(load(tmp_path)[0], made("int8"))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"notes", "tokenizer.json", "model.safetensors"} <= names
    assert not [name for name in names if "-of-" in name or "index" in name or name.startswith(".")]
    made("nf4").save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load(tmp_path)[0], made("nf4"))


def test_a_full_disk_leaves_what_was_there(tmp_path):
    model = made("int8", hidden=256, mlp=512)
    with small_disk(tmp_path / "small") as disk:
        with pytest.raises(dl.UserError, match="disk is full"):
            model.save_pretrained(disk / "new")
        assert list(disk.iterdir()) == []
        model_folder(tiny_llama(), disk)
        with pytest.raises(dl.UserError, match="disk is full"):
            model.save_pretrained(disk)
        assert torch.equal(logits(load(disk)[0]), logits(tiny_llama()))
    assert not hasattr(model.config, "quantization_config")


def test_linears_quantised_in_two_ways_are_refused(tmp_path):
    model = made("int8")
    linear = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = NF4Quantiser().linear(linear.weight, None, torch.float32)
    with pytest.raises(dl.UserError, match=r"quantised in 2 ways[\s\S]*'model.layers.0.mlp.up_proj': nf4"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("way", "key", "match"),
    [("int8", "weight.offset", "not whole"), ("nf4", "weight.absmax", "weight.absmax' is missing")],
)
def test_what_is_missing_or_does_not_fit_is_named(way, key, match, tmp_path):
    model_folder(made(way), tmp_path)
    file, path = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj"
    whole = load_file(file)
    save_file({k: t for k, t in whole.items() if k != f"{path}.{key}"}, file, {"format": "pt"})
    with pytest.raises(dl.UserError, match=rf"'{path}': [\s\S]*{match}"):
        load(tmp_path)
    parts = {k: t[: len(t) // 2].clone() if k == f"{path}.weight" else t for k, t in whole.items()}
    save_file(parts, file, {"format": "pt"})
    with pytest.raises(dl.UserError, match=rf"'{path}': the codes of a"):
        load(tmp_path)
    save_file({k: t for k, t in whole.items() if not k.startswith(path)}, file, {"format": "pt"})
    with pytest.raises(dl.UserError, match=rf"lacks 1 tensors, the first is {path}.weight"):
        load(tmp_path)


def test_a_quantised_model_is_not_quantised_again(tmp_path):
    for way in ("int8", "nf4"):
        model_folder(quantise(tiny_llama(), GroupQuantiser(8)) if way == "int8" else made(way), tmp_path / way)
        with pytest.raises(dl.UserError, match=r"is quantised already, so it is not quantised to 'int4-group'"):
            load(tmp_path / way, quantize="int4-group")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_other_quantisations_are_named_and_refused(method, tmp_path):
    model_folder(tiny_llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method, "bits": 4}}))  # fmt: skip
    with pytest.raises(dl.UserError, match=rf"is quantised by {method}, whose weights are not read here"):
        load(tmp_path)
