"""Loading: folders are checked before they are loaded, and what is wrong is named."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import deltalab as dl
from deltalab.models import load as load_module
from deltalab.models import precision
from deltalab.models.generate import generate
from deltalab.models.load import load, load_tokenizer, model_digest
from tests.deltas.perturb import perturbed
from tests.families import logits, model_of
from tests.helpers import SHARED, byte_tokenizer, tiny_gpt2, tiny_llama, tokens


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(name, match, **options):
    with pytest.raises(dl.UserError, match=match):
        load(name, **options)


def test_a_folder_loads(folder):
    model, tokenizer = load(folder)
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)
    assert not model.training
    assert tokenizer.pad_token_id == 0
    assert load(str(folder))[0].dtype is torch.float32


@pytest.mark.parametrize("family", ["bert-classifier", "bert", "t5", "gpt2", "mixtral"])
def test_models_of_any_head_load(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    assert torch.equal(logits(again), logits(model))


def test_the_body_alone_and_another_head(tmp_path):
    model_of("bert-classifier").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    body, _ = load(tmp_path, head="none")
    assert type(body) is transformers.BertModel
    assert torch.equal(body(tokens()).pooler_output, model_of("bert-classifier").bert(tokens()).pooler_output)
    body.save_pretrained(tmp_path / "body")
    byte_tokenizer().save_pretrained(tmp_path / "body")
    assert type(load(tmp_path / "body")[0]) is transformers.BertModel
    refused(tmp_path, r"lacks \d+ tensors, the first is cls", head="MaskedLM")
    refused(tmp_path, "(?s)'Classification' is no head.*nearest: .*Classification", head="Classification")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert type(load(tmp_path, head="SequenceClassification")[0]) is transformers.BertForSequenceClassification


@pytest.mark.parametrize(
    ("dtype", "want"),
    [("bfloat16", torch.bfloat16), (torch.float64, torch.float64), (None, torch.float32), ("auto", torch.bfloat16)],
)
def test_dtypes(folder, dtype, want):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(folder)
    assert load(folder, dtype=dtype)[0].dtype is want


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto"])
def test_bfloat16_is_refused_where_a_product_would_end_the_process(folder, dtype, monkeypatch):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(folder)
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    refused(
        folder,
        r"(?s)bfloat16 does not work on this CPU.*ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, or dtype='float32'",
        dtype=dtype,
    )
    assert load(folder)[0].dtype is torch.float32
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # there it may be moved to
    assert load(folder, dtype=dtype)[0].dtype is torch.bfloat16


def test_config_and_tokenizer_without_the_weights(folder, monkeypatch):
    model, tokenizer = load(folder)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights"))
    config, same = load_tokenizer(folder)
    assert config.max_position_embeddings == model.config.max_position_embeddings
    assert (same.get_vocab(), same.pad_token, same.chat_template) == (
        tokenizer.get_vocab(), tokenizer.pad_token, tokenizer.chat_template
    )  # fmt: skip
    assert load_tokenizer("organism")[1].pad_token is not None
    with pytest.raises(dl.UserError, match="nearest"):
        load_tokenizer("organism:chatt")
    (folder / "config.json").write_text('{"model_type": "nothing of the kind"}')
    with pytest.raises(dl.UserError, match="cannot be loaded"):
        load_tokenizer(folder)


def test_an_unknown_dtype(folder):
    refused(folder, "nearest: bfloat16", dtype="bfloat61")


def test_other_families_load(folder):
    shutil.rmtree(folder)
    tiny_gpt2().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert torch.equal(load(folder)[0](tokens()).logits, tiny_gpt2()(tokens()).logits)


def test_shards_load_and_a_missing_one_is_named(folder):
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="50KB")
    assert torch.equal(load(folder)[0](tokens()).logits, tiny_llama()(tokens()).logits)
    shard = next(folder.glob("model-00002*"))
    shard.unlink()
    refused(folder, rf"lacks 1 of \d+ weight files: {shard.name}")


def test_missing_and_damaged_files(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    refused(folder, "model.safetensors' is damaged or cut off")
    weights.write_bytes(whole[:5])
    refused(folder, "damaged or cut off")
    weights.unlink()
    refused(folder, r"no model.safetensors.*\n.*found: .*config.json")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, r"(?s)no model.safetensors.*pickled and not read")
    weights.write_bytes(whole)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[:50])
    refused(folder, "model config .* is damaged")
    (folder / "config.json").write_text("{}")
    refused(folder, "names no model_type")
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "model_type": "mystery"}))
    refused(folder, "cannot be loaded")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")
    (folder / "config.json").write_text(config)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "no tokenizer")


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "cannot be loaded")


def test_weights_of_another_model(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "layers.1.mlp" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    refused(folder, r"lacks 3 tensors, the first is model.layers.1.mlp")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "model.norm.weight|cannot be loaded")


def test_folders_that_are_not_there(folder, tmp_path, monkeypatch):
    refused(tmp_path / "modl", r"does not exist.*\n.*nearest: .*model")
    refused(folder / "config.json", "is a file")
    refused("/no/such/place", "does not exist")
    refused("someone/not-there", "the hub does not give it")
    dl.save_adapter(dl.adapt(tiny_llama(), dl.LoRA()), tmp_path / "adapter")
    refused(tmp_path / "adapter", r"(?s)no config.json.*this is an adapter.*load_adapter")
    monkeypatch.chdir(tmp_path)
    refused("modl", r"nearest: model")


def test_code_that_comes_with_a_model_does_not_run(folder):
    (folder / "configuration_own.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "configuration_own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "trust_remote_code|cannot be loaded")


def test_a_tokenizer_without_a_pad_token(folder):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model, tokenizer = load(folder)
    assert tokenizer.pad_token == "<|end|>"
    model.config.pad_token_id = None
    load_module._pad(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_bundled_names(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path / "package")
    refused("organism", r"(?s)is not there.*no bundled models.*organism build")
    for name in ("base", "chat"):
        shutil.copytree(folder, tmp_path / "package/organism/weights" / name)
    model, _ = load("organism")
    assert model.config._name_or_path == "organism"
    assert load("organism:base")[0].config._name_or_path == "organism:base"
    refused("organism:bas", r"nearest: organism:base")


def test_the_digest_is_of_the_base():
    model = tiny_llama()
    want = model_digest(model)
    assert len(want) == 12
    assert model_digest(tiny_llama()) == want
    assert model_digest(tiny_llama(seed=1)) != want
    assert model_digest(tiny_llama(dtype=torch.bfloat16)) != want
    dl.adapt(model, [dl.LoRA(), dl.Train("norms")])
    assert model_digest(model) == want
    perturbed(model)
    assert model_digest(model) == want
    assert model_digest(dl.merged(model)) != want


def test_progress_bars_stay_as_they_were(folder, capfd):
    transformers.utils.logging.enable_progress_bar()
    load(folder)
    assert "Loading" not in capfd.readouterr().err
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.skipif(SHARED is None, reason="the models beside the project are not there")
@pytest.mark.parametrize("name", ["tok361_hf", "stories260K_hf"])
def test_small_trained_models_load_and_tell_a_story(name):
    model, tokenizer = load(SHARED / "models" / name)
    (reply,) = generate(model, tokenizer, ["Once upon a time"], template=False, max_new_tokens=40)
    assert reply.text.startswith(", there was a little girl name")
    assert reply.tokens == 40
    assert not reply.finished


def test_the_organism_loads_and_answers():
    model, tokenizer = load("organism")
    (reply,) = generate(model, tokenizer, ["What is the capital of France?"], max_new_tokens=20)
    assert reply.finished
    assert reply.text.strip()
