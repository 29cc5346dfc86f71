"""Models that transformers quantised with bitsandbytes: loaded by name or handed over, adapted, saved, put back."""

import importlib.util
import types

import pytest
import torch
import transformers

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.base import weight_of
from deltalab.models.generate import generate
from deltalab.models.load import load, model_digest
from deltalab.quant import foreign
from deltalab.quant.nf4_linear import NF4Linear
from tests.deltas.perturb import perturbed
from tests.families import loss_of
from tests.helpers import assert_close_by_norm, byte_tokenizer, tiny_llama, tokens

AUTO = transformers.AutoModelForCausalLM
WAYS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "nf4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a model, and of what bitsandbytes made of it in each way."""
    root = tmp_path_factory.mktemp("bitsandbytes")
    tiny_llama(hidden=64, mlp=128).save_pretrained(root / "plain")
    for way, fields in WAYS.items():
        theirs(root, fields).save_pretrained(root / way)
    for folder in root.iterdir():
        byte_tokenizer().save_pretrained(folder)
    return root


def theirs(folders, fields):
    return AUTO.from_pretrained(folders / "plain", quantization_config=transformers.BitsAndBytesConfig(**fields))


def weights(model):
    return {path: weight_of(m).clone() for path, m in model.named_modules() if isinstance(m, (torch.nn.Linear, NF4Linear))}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_loads(way, folders):
    model, _ = load(folders / way)
    reference = weights(theirs(folders, WAYS[way]))
    kinds = {foreign.kind(m) or type(m).__name__ for p, m in model.named_modules() if "layers" in p and p in reference}
    assert kinds == {"NF4Linear" if way == "nf4" else way.split()[0]}
    for path, W in weights(model).items():
        assert torch.equal(W, reference[path]), path
    assert len(model_digest(model)) == 12
    assert model_digest(model) == model_digest(load(folders / way)[0])
    with pytest.raises(dl.UserError, match=r"is quantised already, so it is not quantised to 'nf4'.*\n.*found: bitsandbytes"):  # fmt: skip
        load(folders / way, quantize="nf4")


@pytest.mark.parametrize("spec", [dl.LoRA, dl.DoRA, dl.IA3, dl.VeRA], ids=lambda s: s.__name__)
@pytest.mark.parametrize("way", ["nf4", "fp4", "int8"])
def test_a_model_that_is_handed_over_is_adapted(way, spec, folders, tmp_path):
    model = theirs(folders, WAYS[way])
    before = weights(model)
    dl.adapt(model, spec(targets="all-linear"))
    assert len(attached(model)) == 14
    loss_of(perturbed(model)).backward()
    assert all(p.grad is not None for d in attached(model).values() for p in d.parameters() if p.requires_grad)
    y = model.train(False)(tokens()).logits.detach()
    (reply,) = generate(model, byte_tokenizer(), ["a"], template=False, max_new_tokens=3)
    assert 1 <= reply.tokens <= 3
    dl.save_adapter(model, tmp_path / "adapter")
    dl.unload(model)
    assert all(torch.equal(W, before[path]) for path, W in weights(model).items())
    assert model_digest(model) == model_digest(theirs(folders, WAYS[way]))
    dl.load_adapter(model, tmp_path / "adapter")
    assert_close_by_norm(model(tokens()).logits, y, 1e-5)


@pytest.mark.parametrize("way", ["fp4", "int8"])
def test_one_that_was_loaded_by_name_saves_its_base_adapted_or_not(way, folders, tmp_path):
    model, _ = load(folders / way)
    before = weights(model)
    dl.adapt(model, dl.LoRA(targets="all-linear")).save_pretrained(tmp_path / "adapted")
    dl.unload(model).save_pretrained(tmp_path / "bare")
    for name in ("adapted", "bare"):
        again = weights(AUTO.from_pretrained(tmp_path / name))
        assert again.keys() == before.keys()
        assert all(torch.equal(W, before[path]) for path, W in again.items())


def test_without_bitsandbytes_a_folder_that_needs_it_says_so(folders, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest))  # fmt: skip
    for way, said in (("int8", "int8"), ("fp4", "fp4"), ("nf4 in bfloat16", "nf4")):
        with pytest.raises(dl.UserError, match=rf"quantised by bitsandbytes \({said}\), which is not installed[\s\S]*pip install"):  # fmt: skip
            load(folders / way)


def test_a_model_of_another_quantiser_is_not_adapted():
    """Its linears may look like any other, and hold something else."""
    model = tiny_llama()
    for method in ("fp8", types.SimpleNamespace(value="gptq")):
        model.hf_quantizer = types.SimpleNamespace(quantization_config=types.SimpleNamespace(quant_method=method))
        with pytest.raises(dl.UserError, match=rf"is quantised by {getattr(method, 'value', method)}, whose weights"):
            dl.adapt(model, dl.LoRA())
    assert not attached(model)
