"""Starts that look at the model: against peft, against their formulas, and what becomes of them on disk."""

import copy

import numpy as np
import peft
import pytest
import torch

import deltalab as dl
from deltalab.deltas import init
from deltalab.deltas.adapt import attached, base_weight
from deltalab.deltas.base import weight_of
from deltalab.deltas.freeze import freeze
from deltalab.deltas.peft_format import load_trained_state, trained_state
from deltalab.deltas.quantise import quantise
from deltalab.quant.linear import quantiser
from tests.deltas.perturb import drawing_as_we_do, perturbed, states_equal
from tests.families import mixtral
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_gpt2, tiny_llama, tokens

PARTS = ("pissa", "olora")
parts = pytest.mark.parametrize("start", PARTS)
LLAMA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


def ours(start, model=None, **fields):
    return dl.adapt(model or tiny_llama(), dl.LoRA(init=start, r=4, alpha=6, targets=["q_proj", "down_proj"], **fields))


def theirs(start, model=None, **fields):
    config = peft.LoraConfig(init_lora_weights=start, task_type="CAUSAL_LM", **LLAMA | fields)
    return peft.get_peft_model(model or tiny_llama(), config).eval()


def lora_layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def their_change(layer):
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


@pytest.mark.parametrize(
    ("start", "fields", "make"),
    [
        ("pissa", {}, tiny_llama),
        ("olora", {}, tiny_llama),
        ("pissa", {"use_rslora": True}, tiny_llama),
        ("pissa", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, tiny_gpt2),
    ],
)
def test_the_part_that_is_taken_is_what_peft_takes(start, fields, make):
    """B A, and the residual weight that peft trains beside it: the signs of singular vectors are free, products not."""
    model = dl.adapt(make(), peft.LoraConfig(init_lora_weights=start, **LLAMA | fields))
    layers = lora_layers(theirs(start, make(), **fields))
    assert layers.keys() == attached(model).keys()
    for path, delta in attached(model).items():
        assert_close_by_norm(delta.s * delta.B @ delta.A, their_change(layers[path]), 1e-5)
        residual = weight_of(model.get_submodule(path)) - delta.s * delta.B0 @ delta.A0
        assert_close_by_norm(residual, weight_of(layers[path].get_base_layer()), 1e-5)


@parts
def test_the_start_is_the_base_bitwise_and_the_base_is_not_touched(start):
    for make in (tiny_llama, tiny_gpt2, lambda: tiny_llama(dtype=torch.bfloat16)):
        model = dl.adapt(make(), dl.LoRA(init=start, targets="all-linear"))
        assert torch.equal(model(tokens()).logits, make()(tokens()).logits)
        perturbed(model)
        assert not torch.equal(model(tokens()).logits, make()(tokens()).logits)
        with dl.disabled(model):
            assert torch.equal(model(tokens()).logits, make()(tokens()).logits)
        assert states_equal(dl.unload(model), make())


@parts
def test_trains_as_peft_does(start):
    """Five AdamW steps under the same dropout: the same merged weights as peft's residual model reaches."""
    pair = ours(start, dropout=0.3), drawing_as_we_do(theirs(start, lora_dropout=0.3))
    for model in pair:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        for step in range(5):
            torch.manual_seed(step)
            model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
    assert_close_by_norm(pair[0](tokens()).logits, pair[1](tokens()).logits, 1e-4)
    assert error_by_norm(pair[0](tokens()).logits, tiny_llama()(tokens()).logits) > 0.1
    W0, layers = tiny_llama(), lora_layers(pair[1])
    for path in attached(pair[0]):
        moved = weight_of(layers[path].get_base_layer()) + their_change(layers[path]) - W0.get_submodule(path).weight
        assert_close_by_norm(dl.delta_weight(pair[0], path), moved, 1e-3)


@parts
@pytest.mark.parametrize("stabilised", [False, True])
def test_saved_it_is_plain_lora_of_twice_the_rank(start, stabilised, tmp_path):
    model = perturbed(ours(start, rank_stabilised=stabilised, rank_pattern={"*down_proj": 3}))
    dl.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert_close_by_norm(loaded(tokens()).logits, model(tokens()).logits, 1e-5)
    layers = lora_layers(loaded)
    assert {path: layer.r["default"] for path, layer in layers.items()} == {
        path: 2 * delta.A.shape[0] for path, delta in attached(model).items()
    }
    again = dl.load_adapter(tiny_llama(), tmp_path)
    assert_close_by_norm(again(tokens()).logits, model(tokens()).logits, 1e-5)
    for path, delta in attached(again).items():
        assert delta.A0 is None
        assert_close_by_norm(dl.delta_weight(again, path), dl.delta_weight(model, path), 1e-5)


@parts
@pytest.mark.parametrize("stabilised", [False, True])
def test_a_file_that_peft_saved_unconverted(start, stabilised, tmp_path):
    """peft takes the part out of the weights again when it loads, and so do we; what we save then is converted."""
    perturbed_there = theirs(start, use_rslora=stabilised)
    with torch.no_grad():
        for name, parameter in perturbed_there.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    perturbed_there.save_pretrained(tmp_path / "theirs")
    want = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs").eval()(tokens()).logits
    model = dl.load_adapter(tiny_llama(), tmp_path / "theirs")
    assert error_by_norm(want, tiny_llama()(tokens()).logits) > 0.1
    assert_close_by_norm(model(tokens()).logits, want, 1e-5)
    dl.save_adapter(model, tmp_path / "ours")
    converted = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert_close_by_norm(converted(tokens()).logits, want, 1e-5)


@pytest.mark.parametrize(
    ("start", "make", "fields", "says"),
    [
        ("pissa_niter_4", tiny_llama, {}, "cannot be made again"),
        ("olora", tiny_gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}, "transposed"),
    ],
)
def test_files_whose_start_cannot_be_made_again(start, make, fields, says, tmp_path):
    theirs(start, make(), **fields).save_pretrained(tmp_path)
    model = make()
    with pytest.raises(dl.UserError, match=says):
        dl.load_adapter(model, tmp_path)
    assert states_equal(model, make())
    assert "_deltalab" not in vars(model)


def test_a_quantised_base_is_refused_by_name(tmp_path):
    theirs("pissa").save_pretrained(tmp_path)
    model = quantise(tiny_llama(), quantiser("int8", 8))
    with pytest.raises(dl.UserError, match=r"layers.0.self_attn.q_proj.*quantised"):
        dl.load_adapter(model, tmp_path)
    with pytest.raises(dl.UserError, match="quantised already"):
        ours("olora", model)


@parts
def test_training_goes_on_from_what_it_left(start, tmp_path):
    """The state of a training has the start in it, so it needs no second one that is the same to the bit."""
    model, other = (
        perturbed(ours(start)),
        dl.adapt(tiny_llama(), dl.LoRA(init=start, r=4, alpha=6, targets=["q_proj", "down_proj"])),
    )
    state = {name: tensor.clone() for name, tensor in trained_state(model).items()}
    for delta in attached(other).values():
        delta.A0.neg_()
    load_trained_state(other, state)
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits)
    delta = next(iter(attached(model).values()))
    delta.keep = torch.rand(delta.change(torch.empty(0)).shape) < 0.5  # which peft's format cannot say
    dl.save_adapter(model, tmp_path)
    assert torch.equal(dl.load_adapter(tiny_llama(), tmp_path)(tokens()).logits, model(tokens()).logits)


@parts
@pytest.mark.parametrize("variant", ["delta_mask", "rewind"])
def test_frozen_entries_are_those_of_the_loaded_model(start, variant):
    model = ours(start)
    path = next(iter(attached(model)))
    mask = torch.rand(weight_of(model.get_submodule(path)).shape) < 0.3
    freezer = freeze(model, {path: mask}, variant)
    perturbed(model)
    freezer.finish()
    change = dl.delta_weight(model, path)
    assert torch.equal(change != 0, ~mask)
    assert freezer.proof()["held"]
    merged = dl.merged(model)
    assert torch.equal(merged.get_submodule(path).weight[mask], tiny_llama().get_submodule(path).weight[mask])
    assert_close_by_norm(merged(tokens()).logits, model(tokens()).logits, 1e-5)


@parts
def test_experts_and_embeddings_one_by_one(start):
    torch.manual_seed(0)
    base = mixtral().eval()
    model = dl.adapt(copy.deepcopy(base), dl.LoRA(init=start, r=2, targets=["*.experts.*", "embed_tokens"]))
    assert torch.equal(model(tokens()).logits, base(tokens()).logits)
    for path, delta in attached(model).items():
        W = base_weight(model, path)
        for A, B, part in zip(
            *((delta.A, delta.B, W) if W.ndim == 3 else (delta.A[None], delta.B[None], W[None])), strict=True
        ):
            U, S, V = np.linalg.svd(part.detach().numpy())
            want = U[:, :2] * S[:2] @ V[:2] if start == "pissa" else np.linalg.qr(part.detach().numpy())[0][:, :2]
            got = delta.s * B @ A if start == "pissa" else B @ B.mT
            assert_close_by_norm(got, torch.tensor(want if start == "pissa" else want @ want.T), 1e-4)
    perturbed(model)
    assert_close_by_norm(dl.merged(model)(tokens()).logits, model(tokens()).logits, 1e-5)


def test_subspace_iteration_comes_to_the_exact_part():
    W = torch.randn(4, 30, 20, dtype=torch.float64) * torch.logspace(0, -4, 20, dtype=torch.float64)
    exact, sketch = init.pissa(W, 3, 0.5), torch.randn(4, 3, 20, dtype=torch.float64)
    errors = [
        error_by_norm(B @ A, exact.B @ exact.A) for A, B in (init.pissa_fast(W, 3, 0.5, sketch, n) for n in (0, 1, 20))
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4
    assert_close_by_norm(0.5 * exact.B @ exact.A, torch.stack([_best(w, 3) for w in W]), 1e-12)
    model, other = ours("pissa", svd_steps=8), ours("pissa", svd_steps=8)
    assert all(
        torch.equal(a, b) for a, b in zip(trained_state(model).values(), trained_state(other).values(), strict=True)
    )


def test_a_rank_that_the_matrix_does_not_have():
    for start in ("pissa", "olora", "eva", "loftq"):
        with pytest.raises(dl.UserError, match="rank 33"):
            dl.adapt(tiny_llama(), dl.LoRA(init=start, r=33, targets=["q_proj"]), calibration=[{"input_ids": tokens()}])
    with pytest.raises(dl.UserError, match="even rank"):
        dl.adapt(tiny_llama(), dl.LoRA(init="orthogonal", r=3))


def _best(W, r):
    U, S, V = torch.linalg.svd(W)
    return U[:, :r] * S[:r] @ V[:r]


def test_loftq_makes_up_for_the_quantisation():
    W, rough = torch.randn(24, 16, dtype=torch.float64), lambda W: (2 * W).round() / 2
    change = torch.zeros_like(W)
    for steps in (1, 2, 5):
        pair, rest = init.loftq(W, 3, 0.7, rough, steps)
        change = torch.zeros_like(W)
        for _ in range(steps):
            before, change = change, _best(W - rough(W - change), 3)
        assert_close_by_norm(0.7 * pair.B @ pair.A, change, 1e-10)
        assert_close_by_norm(rest, W - before, 1e-10)


@pytest.mark.parametrize("bits", ["int4-group", "int8"])
def test_loftq_while_the_base_is_quantised(bits):
    plain, spec = tiny_llama(), dl.LoRA(init="loftq", r=8, targets="all-linear")
    model, bare = quantise(tiny_llama(), quantiser(bits, 8), spec), quantise(tiny_llama(), quantiser(bits, 8))
    for path, delta in attached(model).items():
        W, Q = plain.get_submodule(path).weight, base_weight(model, path)
        assert_close_by_norm(delta.change(Q), _best(W - Q, 8), 1e-4)
    want = plain(tokens()).logits
    assert error_by_norm(model(tokens()).logits, want) < 0.85 * error_by_norm(bare(tokens()).logits, want)
    with dl.disabled(model):
        assert torch.equal(model(tokens()).logits, bare(tokens()).logits)
    with pytest.raises(dl.UserError, match=r"not being quantised[\s\S]*quantize="):
        dl.adapt(tiny_llama(), spec)
    with pytest.raises(dl.UserError, match="'embed_tokens' is none|embed_tokens' is none"):
        quantise(tiny_llama(), quantiser(bits, 8), spec.but(targets=["embed_tokens"]))
