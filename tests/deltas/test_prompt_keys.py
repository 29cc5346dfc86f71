"""The prompts' keys and values that are kept in inference: bitwise those that would be made, whatever changes in between."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas import attention, prompt_keys
from deltalab.deltas.adapt import attached, param_groups
from deltalab.deltas.quantise import quantise
from deltalab.quant.linear import quantiser
from tests.deltas.perturb import perturbed
from tests.deltas.zero_init import ARCHITECTURES, moved
from tests.families import model_of
from tests.helpers import tiny_llama, tokens

K = "model.layers.1.self_attn.k_proj"


@torch.no_grad()
def logits(model, **more):
    return model(input_ids=tokens(length=5), **more).logits


def anew(model, **more):
    """Nothing kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "kept", lambda module, prompt, call, make: make())
        return logits(model, **more)


@pytest.fixture
def made(monkeypatch):
    """How often keys and values were made, as a list."""
    calls, make = [], attention.keys_and_values
    monkeypatch.setattr(attention, "keys_and_values", lambda *args: calls.append(1) or make(*args))
    return calls


def both(seed=0):
    """Prompts, and LoRA on the projections that they go through."""
    return perturbed(
        dl.adapt(tiny_llama(), [dl.ZeroInitPrefix(length=3), dl.LoRA(r=2, targets="attention")]), 0.3, seed=seed
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_are_made_once_and_bitwise_the_same(name, dtype, made):
    model = moved(ARCHITECTURES[name].make().to(dtype))
    want = anew(model)
    layers = len(made)
    assert layers == len(attached(model))
    for _ in range(3):
        assert torch.equal(logits(model), want)
    assert len(made) == 2 * layers


def step(model):
    optimizer = torch.optim.AdamW(param_groups(model, 0.1))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    model.zero_grad()


@torch.no_grad()
def in_place(tensor):
    tensor.add_(0.1)


def replaced(model):
    model.get_submodule(K).weight = nn.Parameter(model.get_submodule(K).weight.detach() + 0.1)


def assigned(model):
    """Twice, so that the memory of the first may be taken again."""
    weight = model.get_submodule(K).weight
    weight.data = torch.ones_like(weight)
    weight.data = torch.randn_like(weight)


def rewritten(model):
    model.load_state_dict({name: t + 0.01 if t.is_floating_point() else t for name, t in model.state_dict().items()})


def rescaled(model):
    model.get_submodule(K).delta.s *= 3


def quieted(model):
    model.get_submodule(K).delta.enabled = False


def loaded(model, folder):
    dl.save_adapter(both(seed=1), folder)
    dl.unload(model)
    dl.load_adapter(model, folder)


CHANGES = {
    "an optimizer's step": step,
    "the weight in place": lambda model: in_place(model.get_submodule(K).weight),
    "the delta in place": lambda model: in_place(model.get_submodule(K).delta.B),
    "the prompt in place": lambda model: in_place(model.model.layers[1].self_attn.delta.P),
    "another parameter": replaced,
    "another tensor in the parameter": assigned,
    "a state dict": rewritten,
    "a plain setting": rescaled,
    "a delta switched off": quieted,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "bfloat16 and back": lambda model: model.to(torch.bfloat16).float(),
    "fp64": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_them_anew(change, made):
    model = both()
    before = logits(model)
    assert torch.equal(logits(model), before)
    assert len(made) == 2
    CHANGES[change](model)
    made.clear()
    got = logits(model)
    assert made
    assert torch.equal(got, anew(model))
    assert not torch.equal(got, before)


def test_loads_switches_and_copies(tmp_path):
    model = both()
    before = logits(model)
    twin = copy.deepcopy(model)
    loaded(model, tmp_path / "one")
    assert torch.equal(logits(model), anew(model))
    assert not torch.equal(logits(model), before)
    in_place(twin.get_submodule(K).weight)
    assert torch.equal(logits(twin), anew(twin))
    model = tiny_llama()
    for i, name in enumerate("ab"):
        dl.save_adapter(both(seed=i), tmp_path / name)
        dl.load_adapter(model, tmp_path / name, adapter=name)
    want = {}
    for name in "abab":
        dl.set_active(model, name)
        assert torch.equal(logits(model), want.setdefault(name, anew(model)))
        with dl.disabled(model):
            assert torch.equal(logits(model), logits(tiny_llama()))
        assert torch.equal(logits(model), want[name])


def test_training_makes_them_in_every_pass_and_gradients_reach_the_prompt(made):
    model = both()
    for _ in range(2):
        logits(model)
    made.clear()
    for _ in range(2):
        model(input_ids=tokens()).logits.sum().backward()
    model.train()
    logits(model)
    assert len(made) == 6
    assert all(d.P.grad.abs().max() > 0 for path, d in attached(model).items() if path.endswith("attn"))


def test_autocast_and_inference_mode(made):
    model = both()
    want = anew(model)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model(input_ids=tokens(length=5)).logits, want)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits(model), anew(model))
        assert torch.equal(logits(model), want)
    loss = model(input_ids=tokens()).logits.sum()
    loss.backward()
    with torch.inference_mode():
        made_there = both()  # its parameters tell no version
    made.clear()
    for _ in range(2):
        logits(made_there)
    assert len(made) == 4


def test_a_hook_is_asked_in_every_pass(made):
    model = both()
    before = logits(model)
    handle = model.get_submodule(K).register_forward_hook(lambda module, args, y: 2 * y)
    for _ in range(2):
        got = logits(model)
        assert not torch.equal(got, before)
        assert torch.equal(got, anew(model))
    handle.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("way", ["int8", "nf4", "bitsandbytes"])
def test_a_quantised_base(way):
    base = model_of("llama-bnb4") if way == "bitsandbytes" else quantise(tiny_llama(), quantiser(way))
    model = moved(base)
    want = anew(model)
    for _ in range(2):
        assert torch.equal(logits(model), want)
    if way == "int8":
        in_place(model.get_submodule(K).offset)
        assert torch.equal(logits(model), anew(model))
        assert not torch.equal(logits(model), want)


def test_a_method_that_keeps_what_it_saw_is_asked_each_time():
    model = dl.adapt(tiny_llama(), [dl.ZeroInitPrefix(length=3), dl.LoRAExperts(r=2, targets="attention")])
    perturbed(model, 0.3)
    want = anew(model)
    for _ in range(2):
        assert torch.equal(logits(model), want)


def test_threads_run_one_model():
    model = both()
    want, wrong = anew(model), []

    def work():
        for _ in range(5):
            if not torch.equal(logits(model), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_kept_holds_no_model_and_no_weight():
    model = both()
    logits(model)
    layers = [weakref.ref(layer.self_attn) for layer in model.model.layers]
    assert all(layer() in prompt_keys._ALL for layer in layers)
    weight = weakref.ref(model.get_submodule(K).weight)
    replaced(model)
    gc.collect()
    assert weight() is None
    del model
    gc.collect()
    assert all(layer() is None for layer in layers)
