"""Quantising while loading is quantising what was loaded, bit for bit, and never holds the full-precision model."""

import gc

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import deltalab as dl
from deltalab.deltas.quantise import quantise
from deltalab.models import load as load_module
from deltalab.models.load import load, model_digest
from deltalab.models.quantised import CodesConfig
from deltalab.quant.base import QuantisedLinear
from deltalab.quant.linear import GroupQuantiser, quantiser
from tests.families import inputs, model_of
from tests.helpers import model_folder, tiny_llama

WAYS = ["nf4", "int8", "int4-group"]
DENSE = ["llama", "llama-bf16", "llama-bias", "gpt2", "bert-classifier", "t5", "phi3", "gpt_neox"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)


@pytest.fixture
def streams(monkeypatch):
    """How many linears each `load` quantised as they were read, and how many it left for afterwards."""
    seen = []

    def watched(model, how, adapt=None, *, streamed, **options):
        left = [p for p, m in model.named_modules() if type(m) in (nn.Linear, transformers.pytorch_utils.Conv1D)]
        seen.append((len(streamed), len([p for p in left if any(c.isdigit() for c in p)])))
        return quantise(model, how, adapt, streamed=streamed, **options)

    monkeypatch.setattr(load_module, "quantise", watched)
    return seen


def assert_same(got, want, *, grad=True):
    """The same modules and tensors, bitwise. grad: and the same parameters would train."""
    assert [(n, type(m)) for n, m in got.named_modules()] == [(n, type(m)) for n, m in want.named_modules()]
    mine, theirs = got.state_dict(), want.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype is tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    if grad:
        assert [(n, p.requires_grad) for n, p in got.named_parameters()] == [(n, p.requires_grad) for n, p in want.named_parameters()]  # fmt: skip
    assert [m.training for m in got.modules()] == [m.training for m in want.modules()]


@pytest.mark.parametrize("way", ["nf4", "int4-group"])
@pytest.mark.parametrize("family", DENSE)
def test_it_is_what_quantising_the_loaded_model_gives(family, way, tmp_path, streams):
    model = model_of(family)
    model_folder(model, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    want = quantise(load(tmp_path, dtype=model.dtype)[0], quantiser(way))
    got, _ = load(tmp_path, dtype=model.dtype, quantize=way)
    count = sum(isinstance(module, QuantisedLinear) for module in want.modules())
    assert streams == [(count, 0)]
    assert_same(got, want)
    assert model_digest(got) == model_digest(want)
    with torch.no_grad():
        assert torch.equal(got(**inputs(model)).logits, want(**inputs(model)).logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "auto"])
def test_the_weights_are_quantised_in_the_models_dtype(way, dtype, tmp_path):
    model_folder(tiny_llama(bias=True, tied=True, dtype=torch.bfloat16), tmp_path)
    got, _ = load(tmp_path, dtype=dtype, quantize=way, device_map={"": "cpu"})
    assert_same(got, quantise(load(tmp_path, dtype=dtype)[0], quantiser(way)))


def test_the_group_size_passes_through(tmp_path):
    model_folder(tiny_llama(), tmp_path)
    got, _ = load(tmp_path, quantize="int8", group_size=8)
    assert_same(got, quantise(tiny_llama(), GroupQuantiser(8, 8)))
    assert {m.blocksize for m in load(tmp_path, quantize="nf4", group_size=128)[0].modules() if hasattr(m, "blocksize")} == {128}  # fmt: skip
    with pytest.raises(dl.UserError, match=r"q_proj' cannot be quantised: groups of 5[\s\S]*nearest: 1, 2, 4"):
        load(tmp_path, quantize="int8", group_size=5)


def test_one_matrix_at_a_time_is_there_in_full_precision(tmp_path, monkeypatch):
    model = tiny_llama(layers=1, dtype=torch.bfloat16)
    shapes = {tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    model_folder(model, tmp_path)
    del model

    def there():
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta]
        return {t.data_ptr() for t in tensors if t.is_floating_point() and tuple(t.shape) in shapes}

    whole, _ = load(tmp_path)
    assert len(there()) >= 7
    del whole
    gc.collect()
    before, seen, own = there(), [], GroupQuantiser.linear

    def linear(self, W, bias, dtype):
        seen.append(len(there() - before))
        return own(self, W, bias, dtype)

    monkeypatch.setattr(GroupQuantiser, "linear", linear)
    load(tmp_path, quantize="int8")
    assert len(seen) == 7
    assert max(seen) == 1


SPECS = {
    "lora": (lambda: dl.LoRA(r=2, targets="all-linear"), True),
    "dora": (lambda: dl.DoRA(r=2), True),
    "qalora": (lambda: [dl.QALoRA(r=2), dl.Train("norms")], True),
    "peft": (lambda: peft.LoraConfig(r=2, target_modules=["q_proj"]), True),
    "pissa": (lambda: dl.LoRA(r=2, init="pissa"), False),
    "olora": (lambda: dl.LoRA(r=2, init="olora"), False),
    "loftq": (lambda: [dl.LoRA(r=2, init="loftq"), dl.IA3(targets="mlp")], False),
    "eva": (lambda: dl.LoRA(r=2, init="eva"), False),
    "peft-pissa": (lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), False),
}


@pytest.mark.parametrize("way", ["nf4", "int4-group"])
@pytest.mark.parametrize("spec", SPECS)
def test_an_adapter_starts_as_on_the_loaded_model(spec, way, tmp_path, streams):
    """A start that looks at the weights before they are quantised finds them; any other needs no such weights."""
    make, streamed = SPECS[spec]
    way = "int4-group" if spec == "qalora" else way
    model_folder(tiny_llama(), tmp_path)
    batches = [{key: inputs(tiny_llama(), seed)[key] for key in ("input_ids",)} for seed in range(2)]
    got, _ = load(tmp_path, quantize=way, adapt=make(), seed=3, calibration=batches)
    assert streams == [(14, 0) if streamed else (0, 14)]
    assert_same(got, quantise(load(tmp_path)[0], quantiser(way), make(), seed=3, calibration=batches))


def test_weights_that_train_themselves_are_refused(tmp_path):
    model_folder(tiny_llama(), tmp_path)
    for what in ("full", "re:.*q_proj.weight"):
        with pytest.raises(dl.UserError, match=r"q_proj' is meant to train itself, and codes do not train"):
            load(tmp_path, quantize="nf4", adapt=dl.Train(what))
    with pytest.raises(dl.UserError, match="q_prj' matches no module"):
        load(tmp_path, quantize="nf4", adapt=dl.LoRA(targets="q_prj"))


@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_what_is_wrong_with_the_weights_is_named(way, tmp_path):
    model_folder(tiny_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(tensors, match):
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(dl.UserError, match=match):
            load(tmp_path, quantize=way)

    broken = whole[name].clone()
    broken[3, 3] = torch.inf
    refused(whole | {name: broken}, r"'model.layers.1.mlp.up_proj' cannot be quantised: it holds values that are not finite")  # fmt: skip
    refused({key: t for key, t in whole.items() if key != name}, rf"lacks 1 tensors, the first is {name}")
    refused(whole | {name: torch.ones(7, 7)}, rf"has another shape for {name}")


def test_experts_and_several_devices_are_refused(tmp_path, monkeypatch):
    model_folder(model_of("mixtral"), tmp_path / "experts")
    with pytest.raises(dl.UserError, match="holds experts as 3-D parameters"):
        load(tmp_path / "experts", quantize="nf4")
    model_folder(tiny_llama(), tmp_path / "llama")
    spread = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    with pytest.raises(dl.UserError, match=r"stays on one device.*spreads it over 2[\s\S]*found: cpu, disk"):
        load(tmp_path / "llama", quantize="int8", device_map=spread)
    assert_same(load(tmp_path / "llama", quantize="int8", device_map="auto")[0], load(tmp_path / "llama", quantize="int8")[0])  # fmt: skip


def test_transformers_quantises_with_the_config_as_well(tmp_path):
    model_folder(tiny_llama(), tmp_path)
    how = quantiser("int8")
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CodesConfig("int8", how))
    assert_same(got, quantise(tiny_llama(), how))
    assert getattr(got, "hf_quantizer", None) is None
    assert not hasattr(got.config, "quantization_config")
