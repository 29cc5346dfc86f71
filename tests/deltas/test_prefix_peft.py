"""Zero-init attention exchanged with Hugging Face peft's adaption prompts: files, and logits where both compute the paper.

peft differs from the paper in two ways: a GPT-2's term is added after the output projection, and a bias of the output
projection is added a second time. There the files are exchanged all the same, with a warning, and the difference is peft's.
"""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltalab as dl
from deltalab.deltas.adapt import adaptation, attached
from deltalab.deltas.peft_format import CONFIG, WEIGHTS
from tests.deltas.exchange import logits, moved, trained
from tests.deltas.perturb import perturbed, states_equal
from tests.deltas.zero_init import ARCHITECTURES, NARROW, by_the_paper, causal
from tests.families import MLP
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_llama, tokens

SCALAR = {"gate": "linear", "gate_per": "layer"}
AGREE = {
    "llama": lambda: tiny_llama(mlp=MLP, layers=3),
    "llama-heads": lambda: tiny_llama(mlp=MLP, layers=3, kv_heads=4),
    "mistral": lambda: causal("Mistral", **{**NARROW, "num_hidden_layers": 3}, sliding_window=5),
}
DIFFER = {
    "llama-bias": (ARCHITECTURES["llama-bias"].make, "with its bias, which counts twice there"),
    "gpt2": (ARCHITECTURES["gpt2"].make, "after the output projection, here before it"),
}
agree = pytest.mark.parametrize("name", AGREE)
differ = pytest.mark.parametrize("name", DIFFER)


def config(layers=2, length=4, **more):
    return peft.AdaptionPromptConfig(adapter_len=length, adapter_layers=layers, task_type="CAUSAL_LM", **more)


def theirs(base, **more):
    return moved(peft.get_peft_model(base, config(**more)), 0.5)


@agree
def test_peft_loads_what_we_save(name, tmp_path):
    make = AGREE[name]
    ours = perturbed(dl.adapt(make(), dl.ZeroInitPrefix(length=4, top=2, **SCALAR)), 0.5)
    dl.save_adapter(ours, tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    assert {key: said[key] for key in ("peft_type", "adapter_len", "adapter_layers", "target_modules")} == {
        "peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 2, "target_modules": "self_attn"}  # fmt: skip
    there = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert error_by_norm(logits(ours), logits(make())) > 1e-2
    assert_close_by_norm(logits(there), logits(ours), 1e-5)
    again = dl.load_adapter(make(), tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert trained(again) == trained(ours)


@agree
def test_we_load_what_peft_saves(name, tmp_path):
    make = AGREE[name]
    theirs(make()).save_pretrained(tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    ours = dl.load_adapter(make(), tmp_path / "theirs")
    assert error_by_norm(logits(there), logits(make())) > 1e-2
    assert_close_by_norm(logits(ours), logits(there), 1e-5)
    spec = next(iter(adaptation(ours).plan.values()))
    assert (spec.gate, spec.gate_per, spec.length) == ("linear", "layer", 4)
    dl.save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@agree
def test_gradients_are_pefts(name):
    make = AGREE[name]
    there = theirs(make())
    ours = dl.adapt(make(), config())
    state = {n.replace("base_model.model.", ""): p for n, p in there.named_parameters() if p.requires_grad}
    for path, delta in attached(ours).items():
        delta.from_peft({key: state[f"{path}.{key}"].detach() for key in delta.slots()})
    for model in (ours, there):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    for path, delta in attached(ours).items():
        assert_close_by_norm(delta.P.grad[None], state[f"{path}.adaption_prompt"].grad, 1e-5)
        assert_close_by_norm(delta.g.grad, state[f"{path}.adaption_gate"].grad, 1e-5)


def test_a_config_of_peft_is_taken_for_a_spec():
    """Its prompts begin as they do there: normal, of deviation 1."""
    ours = dl.adapt(tiny_llama(layers=3), config(length=64))
    there = peft.get_peft_model(tiny_llama(layers=3), config(length=64))
    assert list(attached(ours)) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert dl.trainable(ours).count == sum(p.numel() for p in there.parameters() if p.requires_grad)
    assert all(
        float(d.P.detach().std()) == pytest.approx(1.0, abs=0.05) and not d.g.any() for d in attached(ours).values()
    )
    assert torch.equal(logits(ours), logits(tiny_llama(layers=3)))


@differ
def test_files_go_both_ways_where_peft_computes_something_else(name, tmp_path):
    make, why = DIFFER[name]
    theirs(make()).save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=why):
        ours = dl.load_adapter(make(), tmp_path / "theirs")
    with pytest.warns(UserWarning, match=why):
        dl.save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    there = peft.PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    assert torch.equal(logits(back), logits(there))


@pytest.mark.filterwarnings("ignore:peft adds")
@differ
def test_the_difference_is_pefts(name, tmp_path):
    """Ours is the paper's with the file's tensors, theirs is not; and what they add is what is said of them."""
    make, _ = DIFFER[name]
    theirs(make()).save_pretrained(tmp_path)
    there = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    ours = dl.load_adapter(make(), tmp_path)
    deltas = list(attached(ours).values())
    paper = by_the_paper(make(), ARCHITECTURES[name], [d.P for d in deltas], [d.g.expand(4) for d in deltas])
    assert_close_by_norm(logits(ours), logits(paper), 1e-5)
    assert error_by_norm(logits(there), logits(paper)) > 1e-3
    attention = "transformer.h.0.attn" if name == "gpt2" else "model.layers.0.self_attn"
    output = "c_proj" if name == "gpt2" else "o_proj"
    seen = {}

    def keep(who, value):
        seen.setdefault(who, value)  # the first call's; a hook that returned it would put it in place of the others'

    here, that = ours.get_submodule(attention), there.get_submodule(f"base_model.model.{attention}")
    here.register_forward_hook(lambda module, args, result: keep("ours", result[0]))
    that.register_forward_hook(lambda module, args, result: keep("theirs", result[0]))
    here.get_submodule(output).register_forward_pre_hook(lambda module, args: keep("heads", args[0]))
    that.model.get_submodule(output).register_forward_pre_hook(lambda module, args: keep("plain", args[0]))
    logits(ours)
    logits(there)
    if name == "gpt2":
        term = seen["heads"] - seen["plain"]
        want = that.model.c_proj(seen["plain"]) + term
    else:
        want = seen["ours"] + here.o_proj.bias
    assert_close_by_norm(seen["theirs"], want.detach(), 1e-5)


@pytest.mark.parametrize(
    "spec",
    [{}, {"gate": "linear"}, {"gate_per": "layer"}, {**SCALAR, "layers": [0]}, {**SCALAR, "layers": [0, 2]}],
    ids=str,
)
def test_what_peft_cannot_say_is_saved_in_the_own_format(spec, tmp_path):
    ours = perturbed(dl.adapt(tiny_llama(layers=3), dl.ZeroInitPrefix(length=4, **spec)), 0.5)
    dl.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "DELTALAB"
    assert torch.equal(logits(dl.load_adapter(tiny_llama(layers=3), tmp_path)), logits(ours))


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_peft_where_its_format_is_not_written(tmp_path):
    dl.save_adapter(dl.adapt(ARCHITECTURES["gpt2"].make(), dl.ZeroInitPrefix()), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "DELTALAB"


def test_a_model_that_peft_does_not_know_is_saved_in_the_own_format(tmp_path):
    make = ARCHITECTURES["qwen3"].make
    ours = perturbed(dl.adapt(make(), dl.ZeroInitPrefix(length=4, **SCALAR)), 0.5)
    dl.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "DELTALAB"
    assert torch.equal(logits(dl.load_adapter(make(), tmp_path)), logits(ours))


def test_own_parameters_beside_it_are_saved_in_the_own_format(tmp_path):
    ours = perturbed(dl.adapt(tiny_llama(), [dl.ZeroInitPrefix(length=4, **SCALAR), dl.Train("norms")]), 0.5)
    dl.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "DELTALAB"
    assert torch.equal(logits(dl.load_adapter(tiny_llama(), tmp_path)), logits(ours))


CHANGED = {
    "more layers": ({"adapter_layers": 9}, None, "the last 9 modules called 'self_attn'"),
    "another name": ({"target_modules": "attention"}, None, "called 'attention'"),
    "an MLP": ({"target_modules": "mlp"}, None, "does not go on 'model.layers.1.mlp'"),
    "no length": ({"adapter_len": None}, None, "length"),
    "another length": ({"adapter_len": 5}, None, r"adaption_prompt' has shape \(1, 4, 32\), expected \(1, 5, 32\)"),
    "a key less": ({}, "model.layers.2.self_attn.adaption_gate", "1 missing"),
    "an option": ({"gate_type": "sigmoid"}, None, "gate_type='sigmoid', which is not supported"),
    "excluded": ({"exclude_modules": ["x"]}, None, "exclude_modules"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_file_that_does_not_fit_is_refused_by_name(name, tmp_path):
    change, without, told = CHANGED[name]
    theirs(tiny_llama(layers=3)).save_pretrained(tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**said, **change}))
    if without:
        tensors = load_file(tmp_path / WEIGHTS)
        del tensors[f"base_model.model.{without}"]
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    model = tiny_llama(layers=3)
    with pytest.raises(dl.UserError, match=told):
        dl.load_adapter(model, tmp_path)
    assert states_equal(model, tiny_llama(layers=3))
