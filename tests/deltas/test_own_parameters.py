"""The model's own parameters in adapters: ties, new tokens, heads, and what of it peft's format can say."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import attached
from tests.deltas.perturb import perturbed, states_equal
from tests.families import inputs, logits, model_of
from tests.helpers import assert_close_by_norm

pytestmark = pytest.mark.filterwarnings("ignore")
OWN = "DELTALAB"


def saved(model, folder):
    """The config of the adapter, written to `folder`."""
    dl.save_adapter(model, folder)
    return json.loads((folder / "adapter_config.json").read_text())


def in_peft(family, folder, prepare=lambda model: model):
    model = model_of(family)
    prepare(model)
    theirs = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return theirs(**inputs(model_of(family))).logits


def resized(model, tokens=280, seed=0):
    torch.manual_seed(seed)
    model.resize_token_embeddings(tokens)
    return model.eval()


TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert-classifier": "SEQ_CLS", "bert": None}


@pytest.mark.parametrize("family", TASKS)
def test_the_task_is_that_of_the_models_class(family, tmp_path):
    spec = [dl.LoRA(targets="attention"), *([dl.Train("classifier")] if family == "bert-classifier" else [])]
    assert saved(dl.adapt(model_of(family), spec), tmp_path)["task_type"] == TASKS[family]


def test_the_task_of_other_heads(tmp_path):
    config = model_of("bert").config
    tags = transformers.BertForTokenClassification(config)
    spec = [dl.LoRA(targets="attention"), dl.Train("classifier")]
    assert saved(dl.adapt(tags, spec), tmp_path / "tags")["task_type"] == "TOKEN_CLS"
    body = transformers.BertModel(config)
    assert saved(dl.adapt(body, dl.LoRA(targets="attention")), tmp_path / "body")["task_type"] == "FEATURE_EXTRACTION"
    plain = nn.Sequential(nn.Linear(4, 4))
    assert saved(dl.adapt(plain, dl.LoRA(r=2, targets=["0"])), tmp_path / "plain")["task_type"] is None


def test_a_head_that_does_not_train_is_not_asked_for(tmp_path):
    """Under its task peft wants the head in the file, so the task is left out."""
    model = perturbed(dl.adapt(model_of("bert-classifier"), dl.LoRA(targets=["query", "classifier"])))
    assert saved(model, tmp_path)["task_type"] is None
    assert_close_by_norm(in_peft("bert-classifier", tmp_path), logits(model), 1e-5)
    assert set(attached(dl.load_adapter(model_of("bert-classifier"), tmp_path))) == set(attached(model))


@pytest.mark.parametrize("what", ["lm_head", "embed_tokens"])
def test_a_tied_weight_stays_tied_and_both_users_change(what, tmp_path):
    model = perturbed(dl.adapt(model_of("llama-bias"), [dl.LoRA(r=2), dl.Train([what])]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    assert ("own", "embed_tokens = lm_head", 1, 270 * 32) in dl.trainable(model).rows
    config = saved(model, tmp_path)
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert config["ensure_weight_tying"]
    assert_close_by_norm(in_peft("llama-bias", tmp_path), logits(model), 1e-5)
    theirs = peft.PeftModel.from_pretrained(model_of("llama-bias"), tmp_path, is_trainable=True)
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    again = dl.load_adapter(model_of("llama-bias"), tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))
    assert states_equal(dl.unload(again), model_of("llama-bias"))


@pytest.mark.parametrize(("family", "what", "users"), [("t5", "shared", 4), ("bert", "word_embeddings", 2)])
def test_a_weight_with_other_ties(family, what, users, tmp_path):
    model = perturbed(dl.adapt(model_of(family), [dl.LoRA(r=2, targets="attention"), dl.Train([what])]))
    config = saved(model, tmp_path)
    again = dl.load_adapter(model_of(family), tmp_path)
    assert torch.equal(logits(again), logits(model))
    if config["peft_type"] == OWN:  # a bias that is tied besides is no whole module
        with pytest.raises((ValueError, KeyError)):
            in_peft(family, tmp_path)
    else:
        assert len(config["modules_to_save"]) >= 2
        assert_close_by_norm(in_peft(family, tmp_path), logits(model), 1e-5)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(t.shape == (270, 32) for t in tensors.values()) == users


def test_one_user_of_a_tied_weight_alone_is_refused(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(dl.UserError, match=r"(?s)'model.embed_tokens.weight'.*tied.*untie"):
        dl.adapt(model_of("llama-bias"), config)
    peft.get_peft_model(model_of("llama-bias"), config).save_pretrained(tmp_path)
    model = model_of("llama-bias")
    with pytest.raises(dl.UserError, match="tied"):
        dl.load_adapter(model, tmp_path)
    assert states_equal(model, model_of("llama-bias"))


def test_two_values_of_a_tied_weight_are_refused(tmp_path):
    dl.save_adapter(dl.adapt(model_of("llama-bias"), [dl.LoRA(r=2), dl.Train("lm_head")]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, file)
    model = model_of("llama-bias")
    with pytest.raises(dl.UserError, match=r"two values of 'model.embed_tokens.weight'"):
        dl.load_adapter(model, tmp_path)
    assert states_equal(model, model_of("llama-bias"))


NEW_TOKENS = {
    "in peft's format": [dl.LoRA(r=2), dl.Train(["embed_tokens", "lm_head"])],
    "in the own format": [dl.LoRA(r=2), dl.Train(["embed_tokens", "lm_head", "v_proj"])],
}


@pytest.mark.parametrize("spec", NEW_TOKENS.values(), ids=NEW_TOKENS)
def test_new_tokens_need_the_resized_model(spec, tmp_path):
    model = perturbed(dl.adapt(resized(model_of("llama")), spec))
    dl.save_adapter(model, tmp_path)
    for tokens in (270, 300):
        other = resized(model_of("llama"), tokens)
        before = {key: t.clone() for key, t in other.state_dict().items()}
        with pytest.raises(dl.UserError, match=rf"(?s)280 tokens in .* has {tokens}.*resize_token_embeddings\(280\)"):
            dl.load_adapter(other, tmp_path)
        assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())
    again = dl.load_adapter(resized(model_of("llama"), seed=1), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"target_modules": ["q_proj"]}, {"model.embed_tokens.weight", "lm_head.weight"}),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"model.embed_tokens.weight", "lm_head.weight"}),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"model.embed_tokens.weight", "lm_head.weight"},
        ),
    ],
)
def test_embeddings_that_peft_writes_when_tokens_were_added(options, own, tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")

    def base(seed):
        return resized(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), seed=seed)

    peft.get_peft_model(base(0), peft.LoraConfig(**options)).save_pretrained(tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(base(1), tmp_path / "out").eval()
    ours = dl.load_adapter(base(2), tmp_path / "out")
    assert_close_by_norm(logits(ours), theirs(**inputs(model_of("llama"))).logits, 1e-5)
    assert {n for n, p in ours.named_parameters() if p.requires_grad and ".delta." not in n} == own
    assert states_equal(dl.unload(ours), base(2))


def test_embeddings_that_only_repeat_the_base_are_not_the_adapters(tmp_path):
    config = peft.LoraConfig(target_modules=["embed_tokens", "q_proj"])
    peft.get_peft_model(model_of("llama"), config).save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    ours = dl.load_adapter(model_of("llama"), tmp_path)
    assert all(".delta." in name for name, p in ours.named_parameters() if p.requires_grad)


def test_a_module_with_a_buffer_is_no_set_of_parameters(tmp_path):
    model = model_of("llama")
    model.model.extra = nn.BatchNorm1d(4)
    with pytest.raises(dl.UserError, match="'model.extra', which has a buffer"):
        dl.adapt(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["extra"]))
    dl.adapt(model, [dl.LoRA(r=2), dl.Train(["extra"])])
    assert saved(model, tmp_path)["peft_type"] == OWN


MARKED = {
    "a mask alone": ("llama", dl.Train("norms")),
    "a part of a module": ("llama-bias", [dl.LoRA(targets="mlp"), dl.Train(["q_proj.weight"])]),
    "some biases": ("llama-bias", [dl.LoRA(targets="mlp"), dl.Train(["o_proj.bias"])]),
    "the weight below a delta": ("llama", [dl.LoRA(targets=["q_proj"]), dl.Train(["q_proj"])]),
    "two methods": ("llama", [dl.LoRA(targets=["q_proj"]), dl.VeRA(r=4, targets=["v_proj"])]),
    "names that mean experts": ("qwen3_moe", dl.LoRA(r=2, targets="mlp")),
    "another method on experts": ("mixtral", dl.VeRA(r=4, targets=["down_proj"])),
    "experts and Conv1D's kin": ("gpt_oss", [dl.LoRA(r=2, targets=["experts.*"]), dl.Train(["gate_up_proj_bias"])]),
}


@pytest.mark.parametrize(("family", "spec"), MARKED.values(), ids=MARKED)
def test_what_peft_has_no_words_for_is_marked(family, spec, tmp_path):
    model = perturbed(dl.adapt(model_of(family), spec))
    assert saved(model, tmp_path)["peft_type"] == OWN
    with pytest.raises((ValueError, KeyError)):
        in_peft(family, tmp_path)
    again = dl.load_adapter(model_of(family), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert states_equal(again, model)
    assert states_equal(dl.unload(again), model_of(family))


def test_a_mixture_in_words_of_peft_that_depend_on_the_model():
    with pytest.raises(dl.UserError, match="(?s)'all-linear' means experts.*target_parameters"):
        dl.adapt(model_of("mixtral"), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(dl.UserError, match="target_modules too"):
        dl.adapt(model_of("mixtral"), peft.LoraConfig(target_parameters=["gate_up_proj"]))
    with pytest.raises(
        dl.UserError, match=r"(?s)'gate.weight', which is no parameter.*nearest: gate_up_proj, down_proj"
    ):
        dl.adapt(model_of("mixtral"), peft.LoraConfig(target_modules=[], target_parameters=["gate.weight"]))
