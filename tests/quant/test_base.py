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
from deltalab.quant.base import QuantisedLinear
from deltalab.quant.linear import GroupLinear, GroupQuantiser, quantiser
from deltalab.quant.nf4_linear import NF4Linear, NF4Quantiser
from tests.conformance.kit import merges
from tests.deltas.perturb import perturbed, states_equal
from tests.families import model_of
from tests.helpers import assert_close_by_norm, byte_tokenizer, error_by_norm, tiny_gpt2, tiny_llama, tokens

INT8, NF4 = GroupQuantiser(8, 16), NF4Quantiser(32)
QUANTISERS = {"int8": INT8, "nf4": NF4}
PAIRS = {
    f"{name}-{how}": (method, quantiser)
    for how, quantiser in QUANTISERS.items()
    for name, method in methods().items()
    if merges(method) and (method, quantiser) != (dl.QALoRA, NF4)
}
"""Every weight delta, on every kind of base that takes it."""
every = pytest.mark.parametrize(("method", "quantiser"), PAIRS.values(), ids=PAIRS)
on = pytest.mark.parametrize("quantiser", QUANTISERS.values(), ids=QUANTISERS)
starts_on = pytest.mark.parametrize("quantiser", [GroupQuantiser(4, 16), INT8, NF4], ids=["int4", "int8", "nf4"])
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
        if isinstance(linear, QuantisedLinear):
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


@every
def test_every_delta_computes_its_adapted_weight(method, quantiser):
    model = adapted(method, base(quantiser=quantiser))
    for path, delta in attached(model).items():
        linear = model.get_submodule(path)
        assert isinstance(linear, NF4Linear if quantiser is NF4 else GroupLinear)
        x = torch.randn(3, 5, linear.in_features)
        assert_close_by_norm(linear(x), x @ delta.adapted(linear.weight).mT, 1e-5)
        assert_close_by_norm(merged_weight(model, path), linear.weight + dl.delta_weight(model, path), 1e-5)
    merged = dl.merged(model)
    assert_close_by_norm(merged(tokens()).logits, model(tokens()).logits, 1e-5)
    assert not any(key.endswith(".delta") for key, _ in merged.named_modules())


@every
def test_every_delta_starts_trains_comes_off_and_back(method, quantiser, tmp_path):
    bare = base(quantiser=quantiser)(tokens()).logits
    model = adapted(method, base(quantiser=quantiser), moved=False)
    assert torch.equal(model(tokens()).logits, bare)
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
    assert not torch.equal(there, bare)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_state(model))
    dl.save_adapter(model, tmp_path / "adapter")
    again = dl.load_adapter(base(quantiser=quantiser), tmp_path / "adapter")
    assert_close_by_norm(again(tokens()).logits, there, 1e-6)  # a file that was pruned adds up in another order
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()).logits, there)
    with dl.disabled(model):
        assert torch.equal(model(tokens()).logits, bare)
    assert states_equal(dl.unload(model), base(quantiser=quantiser))


@every
def test_every_delta_in_bfloat16(method, quantiser):
    model = adapted(method, base(lambda: tiny_llama(dtype=torch.bfloat16), quantiser))
    assert all(p.dtype is torch.float32 for delta in attached(model).values() for p in delta.parameters())
    assert model(tokens()).logits.dtype is torch.bfloat16
    merged = dl.merged(model)
    assert merged(tokens()).logits.dtype is torch.bfloat16
    assert_close_by_norm(merged(tokens()).logits, model(tokens()).logits, 3e-2)


@on
@pytest.mark.parametrize(
    "make", [tiny_llama, tiny_gpt2, lambda: model_of("t5"), lambda: tiny_llama(bias=True, tied=True)]
)
def test_the_linears_of_the_blocks_and_nothing_else(make, quantiser):
    model, before = base(make, quantiser), make()
    new = {path: m for path, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    assert list(new) == select(before, "all-linear").names == select(model, "all-linear").names
    assert select(model, "attention").names == select(before, "attention").names
    for path, linear in new.items():
        old = before.get_submodule(path)
        W = old.weight.mT if not isinstance(old, nn.Linear) else old.weight
        assert torch.equal(linear.weight, quantiser.round_trip(W))
        assert (linear.bias is None) == (old.bias is None)
    rest = {name: p for name, p in before.named_parameters() if name.removesuffix(".weight") not in new}
    assert rest.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, rest[name]) for name, p in model.named_parameters())
    twin = plain_twin(model)
    inputs = {"input_ids": tokens(), "labels": tokens()}
    assert_close_by_norm(model(**inputs).logits, twin(**inputs).logits, 1e-6)
    assert len(LINEARS) == 3


@on
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, quantiser):
    model = adapted(dl.LoRA, base(quantiser=quantiser)).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, gradient in want.items():
        assert_close_by_norm(dict(model.named_parameters())[name].grad, gradient, 1e-6)


@on
@pytest.mark.parametrize("method", [dl.LoRA, dl.DoRA])
def test_gradients_are_those_of_the_dequantised_model(method, quantiser):
    model = adapted(method, base(quantiser=quantiser))
    twin = perturbed(dl.adapt(plain_twin(base(quantiser=quantiser)), method(targets="all-linear")))
    for one in (model, twin):
        one(input_ids=tokens(), labels=tokens()).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_close_by_norm(p.grad, theirs[name].grad, 1e-5)


WAYS = {"int4-group": (16, 4 + 8 * 8 / 16), "int8": (16, 8 + 8 * 8 / 16), "nf4": (64, 4 + 8 / 64)}
"""Size of a group or block, and bits an entry."""


@pytest.mark.parametrize("way", WAYS)
def test_loading_is_quantising_what_was_loaded(folder, way):
    size, bits = WAYS[way]
    model, _ = dl.load(folder, quantize=way, group_size=size)
    assert states_equal(model, quantise(dl.load(folder)[0], quantiser(way, size)))
    assert not model.training
    again, _ = dl.load(folder, quantize=way, group_size=size, adapt=dl.LoRA(targets="mlp"), seed=3)
    want = dl.adapt(model, dl.LoRA(targets="mlp"), seed=3)
    assert states_equal(again, want)
    assert torch.equal(again(tokens()).logits, want(tokens()).logits)
    assert model_digest(again) == model_digest(dl.unload(model)) != model_digest(dl.load(folder)[0])
    linears = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    few = {"nested_absmax", "nested_map"}  # of no account in a matrix that is not tiny, as NF4's one offset
    buffers = [b for m in linears for name, b in m.named_buffers() if name not in few and b.ndim]
    kept = sum(b.numel() * b.element_size() for b in buffers)
    assert kept * 8 == sum(m.weight.numel() * bits for m in linears)


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


def test_codes_without_groups_refuse_what_needs_them():
    for start in (
        lambda: dl.adapt(base(quantiser=NF4), dl.QALoRA(r=2, group_size=8)),
        lambda: quantise(tiny_llama(), NF4, dl.QALoRA()),
    ):
        with pytest.raises(dl.UserError, match=r"QALoRA[\s\S]*q_proj' is quantised without any[\s\S]*int4-group"):
            start()


@on
def test_a_weight_that_is_not_finite_is_refused_before_anything_is_quantised(quantiser):
    model = tiny_llama()
    last = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(last).weight[0, 0] = float("inf")
    before = copy.deepcopy(model)
    with pytest.raises(dl.UserError, match=f"'{last}' cannot be quantised[\\s\\S]*not finite"):
        quantise(model, quantiser, dl.LoRA())
    assert states_equal(model, before)
    assert not attached(model)


@pytest.mark.parametrize("way", QUANTISERS)
def test_own_weights_train_beside_a_quantised_base(folder, way):
    spec = [dl.LoRA(targets="q,v"), dl.Train(["norms", "bitfit"])]
    model, _ = dl.load(folder, quantize=way, adapt=spec)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert f"{Q}.bias" in names
    assert "model.norm.weight" in names
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    biases = [p.grad for name, p in model.named_parameters() if name.endswith("proj.bias")]
    assert all(gradient is not None for gradient in biases)
    assert any(bool(gradient.abs().sum() > 0) for gradient in biases)
    assert states_equal(dl.unload(perturbed(model)), dl.load(folder, quantize=way)[0])


def distances(model, start=tiny_llama):
    """‖W − (Ŵ + ΔW)‖ of every quantised matrix, W that of the model that was loaded."""
    whole = start()
    return {
        path: float((whole.get_submodule(path).weight.detach() - merged_weight(model, path)).norm())
        for path, m in model.named_modules()
        if isinstance(m, QuantisedLinear)
    }


@starts_on
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_takes_a_part_of_the_weight_takes_it_before_the_quantisation(quantiser, start, tmp_path):
    spec = dl.LoRA(r=8, init=start, targets="all-linear")
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
    assert error_by_norm(model(tokens()).logits, want) < (0.015 if quantiser is INT8 else 0.25)
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


@starts_on
def test_loftq_starts_closer_than_quantising_does_and_closer_with_more_steps(quantiser):
    """On every matrix closer than plain; steps alternate two projections, one of them not convex: closer on the whole."""
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
