"""A quantised model as the base of a delta: every weight delta on it, loading, and starts before the quantisation."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas import init, methods
from deltalab.deltas.adapt import attached, base_state, base_weight, merged_weight, param_groups
from deltalab.deltas.base import LINEARS
from deltalab.deltas.quantise import quantise
from deltalab.deltas.select import select
from deltalab.deltas.spec import DeltaSpec
from deltalab.models.load import model_digest
from deltalab.quant.linear import GroupLinear, GroupQuantiser
from tests.deltas.perturb import perturbed, states_equal
from tests.families import model_of
from tests.helpers import assert_close_by_norm, byte_tokenizer, error_by_norm, tiny_gpt2, tiny_llama, tokens

INT8 = GroupQuantiser(8, 16)
method = pytest.mark.parametrize("method", methods().values(), ids=methods())
bits = pytest.mark.parametrize("bits", [4, 8])
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    tiny_llama(bias=True).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def base(make=tiny_llama, quantiser=INT8):
    return quantise(make(), quantiser)


def plain_twin(model):
    """The quantised base with its dequantised weights in plain linears."""
    model = copy.deepcopy(model)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, GroupLinear):
            model.set_submodule(path, linear.plain(linear.weight))
    return model


def adapted(method, model=None, moved=True):
    model = dl.adapt(model or base(), method(targets="all-linear"))
    if not moved:
        return model
    perturbed(model)
    if method.after_step is not DeltaSpec.after_step:
        for t in (1, 2, 3):
            model(input_ids=tokens(seed=t), labels=tokens(seed=t)).loss.backward()
            dl.step(model, t, 3)
            model.zero_grad()
    return model


@method
def test_every_delta_computes_its_adapted_weight(method):
    model = adapted(method)
    for path, delta in attached(model).items():
        linear = model.get_submodule(path)
        assert isinstance(linear, GroupLinear)
        x = torch.randn(3, 5, linear.in_features)
        assert_close_by_norm(linear(x), x @ delta.adapted(linear.weight).mT, 1e-5)
        assert_close_by_norm(merged_weight(model, path), linear.weight + dl.delta_weight(model, path), 1e-5)
    merged = dl.merged(model)
    assert_close_by_norm(merged(tokens()).logits, model(tokens()).logits, 1e-5)
    assert not any(key.endswith(".delta") for key, _ in merged.named_modules())


@method
def test_every_delta_starts_trains_comes_off_and_back(method, tmp_path):
    model = adapted(method, moved=False)
    assert torch.equal(model(tokens()).logits, base()(tokens()).logits)
    before = dict(base_state(model))
    assert dl.trainable(model).total == sum(p.numel() for p in tiny_llama().parameters())
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2), weight_decay=0.1)
    for t in (1, 2, 3):
        loss = model(input_ids=tokens(seed=t), labels=tokens(seed=t)).loss
        extra = dl.penalty(model)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        dl.step(model, t, 3)
        optimizer.zero_grad()
    there = model(tokens()).logits
    assert not torch.equal(there, base()(tokens()).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_state(model))
    dl.save_adapter(model, tmp_path / "adapter")
    again = dl.load_adapter(base(), tmp_path / "adapter")
    assert_close_by_norm(again(tokens()).logits, there, 1e-6)  # a file that was pruned adds up in another order
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()).logits, there)
    with dl.disabled(model):
        assert torch.equal(model(tokens()).logits, base()(tokens()).logits)
    assert states_equal(dl.unload(model), base())


@method
def test_every_delta_in_bfloat16(method):
    model = adapted(method, base(lambda: tiny_llama(dtype=torch.bfloat16)))
    assert all(p.dtype is torch.float32 for delta in attached(model).values() for p in delta.parameters())
    assert model(tokens()).logits.dtype is torch.bfloat16
    merged = dl.merged(model)
    assert merged(tokens()).logits.dtype is torch.bfloat16
    assert_close_by_norm(merged(tokens()).logits, model(tokens()).logits, 3e-2)


@pytest.mark.parametrize(
    "make", [tiny_llama, tiny_gpt2, lambda: model_of("t5"), lambda: tiny_llama(bias=True, tied=True)]
)
def test_the_linears_of_the_blocks_and_nothing_else(make):
    model, before = base(make), make()
    new = {path: m for path, m in model.named_modules() if isinstance(m, GroupLinear)}
    assert list(new) == select(before, "all-linear").names == select(model, "all-linear").names
    assert select(model, "attention").names == select(before, "attention").names
    for path, linear in new.items():
        old = before.get_submodule(path)
        W = old.weight.mT if not isinstance(old, nn.Linear) else old.weight
        assert torch.equal(linear.weight, INT8.round_trip(W))
        assert (linear.bias is None) == (old.bias is None)
    rest = {name: p for name, p in before.named_parameters() if name.removesuffix(".weight") not in new}
    assert rest.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, rest[name]) for name, p in model.named_parameters())
    twin = plain_twin(model)
    inputs = {"input_ids": tokens(), "labels": tokens()}
    assert_close_by_norm(model(**inputs).logits, twin(**inputs).logits, 1e-6)
    assert len(LINEARS) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = adapted(dl.LoRA).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, gradient in want.items():
        assert_close_by_norm(dict(model.named_parameters())[name].grad, gradient, 1e-6)


def test_gradients_are_those_of_the_dequantised_model():
    model = adapted(dl.LoRA)
    twin = perturbed(dl.adapt(plain_twin(base()), dl.LoRA(targets="all-linear")))
    for each in (model, twin):
        each(input_ids=tokens(), labels=tokens()).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_close_by_norm(p.grad, theirs[name].grad, 1e-5)


@bits
def test_loading_is_quantising_what_was_loaded(folder, bits):
    model, _ = dl.load(folder, quantize={4: "int4-group", 8: "int8"}[bits], group_size=16)
    assert states_equal(model, quantise(dl.load(folder)[0], GroupQuantiser(bits, 16)))
    assert not model.training
    again, _ = dl.load(
        folder, quantize={4: "int4-group", 8: "int8"}[bits], group_size=16, adapt=dl.LoRA(targets="mlp"), seed=3
    )
    want = dl.adapt(model, dl.LoRA(targets="mlp"), seed=3)
    assert states_equal(again, want)
    assert torch.equal(again(tokens()).logits, want(tokens()).logits)
    assert model_digest(again) == model_digest(dl.unload(model)) != model_digest(dl.load(folder)[0])
    kept = sum(b.numel() * b.element_size() for m in model.modules() if isinstance(m, GroupLinear) for b in m.buffers())
    assert kept == sum(m.weight.numel() * (bits / 8 + 8 / 16) for m in model.modules() if isinstance(m, GroupLinear))


def test_loading_in_bfloat16_with_default_groups(folder):
    model, _ = dl.load(folder, dtype="bfloat16", quantize="int4-group")
    linear = model.get_submodule(Q)
    assert (linear.dtype, linear.scale.dtype, linear.group_size) == (torch.bfloat16, torch.float32, 16)
    assert model(tokens()).logits.dtype is torch.bfloat16


def test_what_is_not_possible_is_refused_by_name(folder):
    for options, match in (
        ({"quantize": "int5"}, r"'int5' is no quantisation[\s\S]*int4"),
        (
            {"quantize": "int4-group", "group_size": 20},
            r"'model.layers.0.self_attn.q_proj'[\s\S]*groups of 20[\s\S]*16",
        ),
        ({"group_size": 16}, "nothing is quantised"),
        (
            {"quantize": "int4-group", "adapt": dl.Train("full")},
            r"'model.layers.0.self_attn.q_proj' is meant to train itself",
        ),
    ):
        with pytest.raises(dl.UserError, match=match):
            dl.load(folder, **options)
    with pytest.raises(dl.UserError, match="quantised already"):
        quantise(base(), INT8)
    for what in ("full", "last-1"):
        with pytest.raises(dl.UserError, match=rf"Train\('{what}'\) cannot train[\s\S]*codes do not train"):
            dl.adapt(base(), dl.Train(what))
    with pytest.raises(dl.UserError, match="too late to quantise"):
        quantise(dl.adapt(tiny_llama(), dl.LoRA()), INT8)
    model = tiny_llama()
    with pytest.raises(dl.UserError, match="matches no"):
        quantise(model, INT8, dl.LoRA(targets="nowhere"))
    assert states_equal(model, tiny_llama())


def test_a_weight_that_is_not_finite_is_refused_before_anything_is_quantised():
    model = tiny_llama()
    last = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(last).weight[0, 0] = float("inf")
    before = copy.deepcopy(model)
    with pytest.raises(dl.UserError, match=f"'{last}' cannot be quantised[\\s\\S]*not finite"):
        quantise(model, INT8, dl.LoRA())
    assert states_equal(model, before)
    assert not attached(model)


def test_own_weights_train_beside_a_quantised_base(folder):
    spec = [dl.LoRA(targets="q,v"), dl.Train(["norms", "bitfit"])]
    model, _ = dl.load(folder, quantize="int8", adapt=spec)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert f"{Q}.bias" in names
    assert "model.norm.weight" in names
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    biases = [p.grad for name, p in model.named_parameters() if name.endswith("proj.bias")]
    assert all(gradient is not None for gradient in biases)
    assert any(bool(gradient.abs().sum() > 0) for gradient in biases)
    assert states_equal(dl.unload(perturbed(model)), dl.load(folder, quantize="int8")[0])


def test_a_base_of_bitsandbytes_works_and_is_not_merged(tmp_path):
    import bitsandbytes as bnb

    model = tiny_llama(hidden=64, mlp=64)
    for path in select(model, "all-linear"):
        four = bnb.nn.Linear4bit(64, model.get_submodule(path).out_features, bias=False, compute_dtype=torch.float32)
        four.load_state_dict(model.get_submodule(path).state_dict())
        model.set_submodule(path, four.to("cpu"))
    total = sum(p.numel() for p in tiny_llama(hidden=64, mlp=64).parameters())
    plain = copy.deepcopy(model)
    perturbed(dl.adapt(model, [dl.LoRA(r=4, targets="attention"), dl.QALoRA(r=4, targets="mlp")]))
    assert dl.trainable(model).total == total
    dl.save_adapter(model, tmp_path)
    there = model(tokens()).logits
    assert torch.equal(dl.load_adapter(copy.deepcopy(plain), tmp_path)(tokens()).logits, there)
    with pytest.raises(dl.UserError, match=r"q_proj' is kept as codes[\s\S]*Linear4bit[\s\S]*full-precision"):
        dl.merged(model)
    assert torch.equal(model(tokens()).logits, there)
    assert torch.equal(dl.unload(model)(tokens()).logits, plain(tokens()).logits)
    with pytest.raises(dl.UserError, match="quantised already"):
        quantise(plain, INT8)


def distances(model, start=tiny_llama):
    """‖W − (Ŵ + ΔW)‖ of every quantised matrix, W that of the model that was loaded."""
    whole = start()
    return {
        path: float((whole.get_submodule(path).weight.detach() - merged_weight(model, path)).norm())
        for path, m in model.named_modules()
        if isinstance(m, GroupLinear)
    }


@bits
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_takes_a_part_of_the_weight_takes_it_before_the_quantisation(bits, start, tmp_path):
    quantiser, spec = GroupQuantiser(bits, 16), dl.LoRA(r=8, init=start, targets="all-linear")
    model = quantise(tiny_llama(), quantiser, spec)
    exact = attached(dl.adapt(tiny_llama(), spec))
    for path, delta in attached(model).items():
        W = tiny_llama().get_submodule(path).weight.detach()
        part = (exact[path].s * exact[path].B @ exact[path].A).detach()
        assert_close_by_norm(dl.delta_weight(model, path), part, 1e-5)
        assert torch.equal(delta.A, exact[path].A)
        assert_close_by_norm(base_weight(model, path), quantiser.round_trip(W - part), 1e-5)
    plain, begun = distances(base(quantiser=quantiser)), distances(model)
    if start == "pissa":
        assert all(begun[path] < 0.75 * plain[path] for path in plain)
    want, bare = tiny_llama()(tokens()).logits, base(quantiser=quantiser)(tokens()).logits
    assert error_by_norm(model(tokens()).logits, want) < (0.25 if bits == 4 else 0.015)
    if start == "pissa":
        assert error_by_norm(model(tokens()).logits, want) < error_by_norm(bare, want)

    there = perturbed(model)(tokens()).logits
    dl.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DELTALAB"
    with pytest.raises(dl.UserError, match=r"belongs to another base.*q_proj"):
        dl.load_adapter(base(quantiser=quantiser), tmp_path)
    prepared = dl.unload(quantise(tiny_llama(), quantiser, spec))
    assert not torch.equal(prepared(tokens()).logits, bare)
    again = dl.load_adapter(prepared, tmp_path)
    assert torch.equal(again(tokens()).logits, there)
    dl.save_adapter(again, tmp_path / "again")
    assert torch.equal(dl.load_adapter(dl.unload(again), tmp_path / "again")(tokens()).logits, there)


@bits
def test_loftq_starts_closer_than_quantising_does_and_closer_with_more_steps(bits):
    """On every matrix closer than plain; steps alternate two projections, one of them not convex: closer on the whole."""
    quantiser = GroupQuantiser(bits, 16)
    plain = distances(base(quantiser=quantiser))
    fitted = distances(quantise(tiny_llama(), quantiser, dl.LoRA(r=4, init="loftq", targets="all-linear")))
    assert plain.keys() == fitted.keys()
    assert all(fitted[path] < 0.9 * plain[path] for path in plain)
    totals = []
    for steps in (1, 2, 5):
        errors = []
        for path in plain:
            W = tiny_llama().get_submodule(path).weight.detach()
            pair, rest = init.loftq(W, 4, 4.0, quantiser.round_trip, steps)
            errors.append(float((W - quantiser.round_trip(rest) - 4.0 * pair.B @ pair.A).norm()))
            assert errors[-1] < 0.9 * plain[path]
        totals.append(sum(errors))
        assert steps > 1 or errors == pytest.approx(list(fitted.values()), rel=1e-4)
    assert totals[0] > totals[1] > totals[2]
