"""IA³ against Hugging Face peft and against its formula."""

import json

import peft
import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.select import leaf
from deltalab.deltas.site import Site
from deltalab.deltas.sites import place
from tests.deltas.perturb import base_of, perturbed, trained_alike
from tests.families import FAMILIES, model_of
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_llama, tokens

MODELS = {**{name: lambda name=name: model_of(name) for name in FAMILIES}, "bias": lambda: tiny_llama(bias=True)}
CONFIGS = {
    "llama default": ("llama", {}),
    "gpt2 default": ("gpt2", {"fan_in_fan_out": True}),
    "bert default": ("bert", {}),
    "t5 default": ("t5", {}),
    "neox default": ("gpt_neox", {}),
    "biases": ("bias", {"target_modules": ["q_proj", "up_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "no feed-forward": ("bias", {"target_modules": ["down_proj", "v_proj"], "feedforward_modules": []}),
    "expressions": ("bias", {"target_modules": r".*\.1\..*proj", "feedforward_modules": r".*\.(up|down)_proj"}),
    "all-linear": ("gpt2", {"target_modules": "all-linear", "feedforward_modules": ["mlp.c_proj"],
                            "fan_in_fan_out": True}),
}  # fmt: skip
SPECS = {
    "default": ("llama", dl.IA3()),
    "gpt2 default": ("gpt2", dl.IA3()),
    "bert default": ("bert", dl.IA3()),
    "t5 default": ("t5", dl.IA3()),
    "phi3 default": ("phi3", dl.IA3()),
    "biases": ("bias", dl.IA3(targets="all-linear")),
    "gpt2 everywhere": ("gpt2", dl.IA3(targets="all-linear")),
    "layers": ("bias", dl.IA3(layers=[-1])),
    "named": ("bias", dl.IA3(targets=["q_proj", "up_proj"], feedforward=["up_proj"])),
    "one layer's": ("bias", dl.IA3(targets=["up_proj"], feedforward=["layers.1.mlp.up_proj"])),
    "none": ("bias", dl.IA3(targets="mlp", feedforward=[])),
}
DEFAULT = {
    "llama": {"k_proj": 2, "v_proj": 2, "down_proj": 2},
    "gpt2": {"c_attn": 2, "c_proj": 2},
    "bert": {"key": 2, "value": 2, "dense": 2},
    "t5": {"k": 6, "v": 6, "wo": 4},
    "gpt_neox": {"query_key_value": 2, "dense_4h_to_h": 2},
    "phi3": {"qkv_proj": 2, "down_proj": 2},
    "mixtral": {"k_proj": 2, "v_proj": 2, "down_proj": 2},
    "qwen3_moe": {"k_proj": 2, "v_proj": 2, "down_proj": 2},
    "gpt_oss": {"k_proj": 2, "v_proj": 2, "down_proj": 2},
}


def logits(model, seed=0):
    ids = tokens(seed=seed)
    more = {"labels": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def scales(model):
    """What peft trains: path -> (its scale, whether it is of the input)."""
    return {
        name.removeprefix("base_model.model."): (module.ia3_l["default"], module.is_feedforward)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.ia3.IA3Layer)
    }


def moved(model, seed=1):
    """peft's scales away from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for scale, _ in scales(model).values():
            scale += 0.3 * torch.randn(scale.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(("family", "config"), CONFIGS.values(), ids=CONFIGS)
def test_we_load_what_peft_saves(family, config, tmp_path):
    theirs = moved(peft.get_peft_model(MODELS[family](), peft.IA3Config(**config)))
    theirs.save_pretrained(tmp_path)
    ours = dl.load_adapter(MODELS[family](), tmp_path)
    want = logits(theirs)
    assert error_by_norm(logits(MODELS[family]()), want) > 0.01
    assert_close_by_norm(logits(ours), want, 1e-5)
    assert {path: delta.of_input for path, delta in attached(ours).items()} == {
        path: of_input for path, (_, of_input) in scales(theirs).items()
    }
    assert_close_by_norm(logits(dl.merged(ours)), logits(theirs.merge_and_unload()), 1e-5)


@pytest.mark.parametrize(("family", "spec"), SPECS.values(), ids=SPECS)
def test_peft_loads_what_we_save(family, spec, tmp_path, recwarn):
    ours = perturbed(dl.adapt(MODELS[family](), spec), 0.3)
    dl.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[family](), tmp_path).eval()
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]
    assert_close_by_norm(logits(theirs), logits(ours), 1e-5)
    assert {path: of_input for path, (_, of_input) in scales(theirs).items()} == {
        path: delta.of_input for path, delta in attached(ours).items()
    }
    again = dl.load_adapter(MODELS[family](), tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_the_config_is_what_people_read(tmp_path):
    dl.save_adapter(dl.adapt(tiny_llama(), dl.IA3()), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert config["feedforward_modules"] == ["down_proj"]
    assert config["peft_type"] == "IA3"
    assert not {"bias", "layers_to_transform"} & config.keys()


@pytest.mark.parametrize("family", ["bias", "gpt2"])
def test_trains_as_peft_does(family, tmp_path):
    """Ten AdamW steps from the same start: the same scales."""
    config = peft.IA3Config(target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs = moved(peft.get_peft_model(MODELS[family](), config if family == "bias" else peft.IA3Config()))
    theirs.save_pretrained(tmp_path)
    ours = dl.load_adapter(MODELS[family](), tmp_path)
    before = {path: delta.l.detach().clone() for path, delta in attached(ours).items()}
    trained_alike(ours, theirs)
    for path, (scale, _) in scales(theirs).items():
        assert_close_by_norm(attached(ours)[path].to_peft()["ia3_l"], scale, 1e-5)
        assert error_by_norm(before[path], scale.flatten()) > 1e-2


@pytest.mark.parametrize("family", DEFAULT)
def test_without_targets_it_goes_where_the_paper_puts_it(family):
    model = dl.adapt(MODELS[family](), dl.IA3())
    found = {}
    for path, delta in attached(model).items():
        found[leaf(path)] = found.get(leaf(path), 0) + 1
        assert delta.of_input == (leaf(path) in {"down_proj", "dense", "wo", "c_proj", "dense_4h_to_h"}), path
        assert "attention.output" not in path
        assert "attn.c_proj" not in path
    assert found == DEFAULT[family]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "gpt_neox"])
def test_the_default_is_pefts(family):
    """Of these families; for BERT peft's ends of names take the attention's output too."""
    theirs = scales(peft.get_peft_model(MODELS[family](), peft.IA3Config()))
    for spec in (dl.IA3(), peft.IA3Config()):
        ours = attached(dl.adapt(MODELS[family](), spec))
        assert {path: delta.of_input for path, delta in ours.items()} == {path: of for path, (_, of) in theirs.items()}


def test_a_model_of_other_names_is_an_error_that_says_so():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
    with pytest.raises(dl.UserError, match="no keys and values"):
        dl.adapt(model, dl.IA3())
    model.blocks[0].add_module("k_proj", nn.Linear(4, 4))
    with pytest.raises(dl.UserError, match="no last linear of an MLP"):
        dl.adapt(model, dl.IA3())
    assert list(attached(dl.adapt(model, dl.IA3(targets=["k_proj"])))) == ["blocks.0.k_proj"]
    with pytest.raises(dl.UserError, match="'up_prj' of IA3's feedforward matches none"):
        dl.adapt(tiny_llama(), dl.IA3(feedforward=["up_prj"]))


@pytest.mark.parametrize("of_input", [False, True], ids=["output", "input"])
def test_forward_is_the_formula(of_input):
    site = Site("mlp", (5, 4), "linear", torch.float64, torch.device("cpu"))
    delta = dl.IA3(targets=["mlp"], feedforward=["mlp"] if of_input else []).build(site)
    nn.init.normal_(delta.l)
    W, b, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 4), (5,), (7, 4)))
    want = torch.stack([W @ (delta.l * row) + b if of_input else delta.l * (W @ row + b) for row in x])
    assert_close_by_norm(delta(x, base_of(W, b)), want, 1e-12)
    assert_close_by_norm(x @ delta.adapted(W).T + delta.adapted_bias(b), want, 1e-12)
    assert_close_by_norm(delta.adapted(W), W @ delta.l.diag() if of_input else delta.l.diag() @ W, 1e-12)
    assert delta.factors() is None


def test_a_small_change_is_felt_in_16_bits():
    """l = 1.003 is 1 in bf16; as 1 + .003 it moves a good share of the outputs by their last bit."""
    site = Site("k_proj", (64, 32), "linear", torch.float32, torch.device("cpu"))
    delta = dl.IA3().build(site)
    nn.init.constant_(delta.l, 1.003)
    W, x = torch.randn(64, 32).bfloat16(), torch.randn(50, 32).bfloat16()
    moved = (delta(x, base_of(W)) != x @ W.T).float().mean()
    assert 0.3 < moved < 0.9
    assert torch.equal(torch.tensor(1.003).bfloat16(), torch.tensor(1.0).bfloat16())


def test_masked_entries_leave_the_bias_alone():
    model = perturbed(dl.adapt(tiny_llama(bias=True), dl.IA3(targets=["q_proj"])), 0.3)
    for path, delta in attached(model).items():
        delta.keep = torch.zeros(place(model, path).W.shape, dtype=torch.bool)
    assert torch.equal(logits(model), logits(tiny_llama(bias=True)))
    assert torch.equal(logits(dl.merged(model)), logits(tiny_llama(bias=True)))


def test_a_trained_bias_is_scaled_as_it_is_now():
    base = tiny_llama(bias=True)
    model = dl.adapt(base, [dl.IA3(targets=["q_proj"]), dl.Train("*q_proj.bias")])
    perturbed(model, 0.3)
    plain = dl.merged(model)
    assert_close_by_norm(logits(plain), logits(model), 1e-5)
    assert error_by_norm(plain.model.layers[0].self_attn.q_proj.bias, base.model.layers[0].self_attn.q_proj.bias) > 0.1
    assert dl.unload(model) is base
    assert torch.equal(logits(base), logits(tiny_llama(bias=True)))


def test_experts_are_saved_where_peft_refuses_them(tmp_path):
    model = perturbed(dl.adapt(model_of("mixtral"), dl.IA3()))
    dl.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DELTALAB"
    again = dl.load_adapter(model_of("mixtral"), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_random_start_is_refused_and_says_nothing_once_saved(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)
    with pytest.raises(dl.UserError, match="init_ia3_weights=False"):
        dl.adapt(tiny_llama(), config)
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    assert_close_by_norm(logits(dl.load_adapter(tiny_llama(), tmp_path)), logits(theirs), 1e-5)


def test_a_quantised_weight_is_run_but_not_looked_at():
    delta = dl.IA3().build(Site("k_proj", (4, 4), "linear", torch.float32, torch.device("cpu")))
    with pytest.raises(dl.UserError, match="IA3 looks at the weight"):
        delta.change(torch.zeros(8, 1, dtype=torch.uint8))
