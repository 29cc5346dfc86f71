"""What every method keeps to, over the table of methods: a new one joins by its line there.

Bounds are relative errors by norm. In bf16 the merged weight itself is rounded to 8 bits, about 4e-3 an entry, so the
merged model is held to 3e-2 of the adapted one's logits there, and to 1e-5 in fp32.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import adaptation, attached, merged_weight, param_groups
from deltalab.deltas.attach import attach
from deltalab.deltas.base import WeightDelta
from deltalab.deltas.peft_format import WEIGHTS, load_trained_state, trained_state
from deltalab.deltas.sites import place, places
from tests.conformance.kit import (
    adapted,
    double,
    driven,
    everywhere,
    gradients,
    holding_constants,
    of,
    parameters,
    run,
    where_it_sits,
)
from tests.deltas.perturb import perturbed, states_equal
from tests.families import FAMILIES, inputs, logits, loss_of, model_of
from tests.helpers import assert_close_by_norm, tokens


def test_the_start_is_the_base(method, family):
    assert torch.equal(logits(adapted(method, family, moved=False)), logits(model_of(family)))


@of(lambda family: not family.experts)
def test_the_start_depends_on_seed_and_path_alone(method, family):
    def starts(seed, targets="attention", scale=1.0):
        model = model_of(family)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= scale
        return {
            key: value.clone()
            for key, value in trained_state(dl.adapt(model, method(targets=targets), seed=seed)).items()
        }

    one, again, wider, other, elsewhere = starts(1), starts(1), starts(1, "all-linear"), starts(2), starts(1, scale=2.0)
    assert one
    assert all(torch.equal(one[key], again[key]) and torch.equal(one[key], wider[key]) for key in one)
    random = [k for k in one if one[k].unique().numel() > 1 and torch.equal(one[k], elsewhere[k])]
    assert all(not torch.equal(one[key], other[key]) for key in random), "drawn, but not from the seed"
    assert len({tuple(one[key].flatten()[:4].tolist()) for key in random}) == len(random), "two modules start alike"


def test_adapted_weight_computes_what_the_forward_does(method, family):
    model, plain = double(adapted(method, family)), double(model_of(family))
    deltas, found = attached(model), {path: place(model, path) for path in attached(model)}
    changed = []
    for path, held in found.items():
        kept = {}
        for other, delta in deltas.items():  # the same module's: experts hold two weights
            if found[other].module is held.module:
                kept[held.name if other == path else found[other].name] = held.oriented(delta.adapted(found[other].W))
        if held.kind == "linear" and held.module.bias is not None:
            kept["bias"] = deltas[path].adapted_bias(held.module.bias)
        assert_close_by_norm(run(held), run(place(plain, path), kept), 1e-10)
        changed.append(not torch.equal(held.W, deltas[path].adapted(held.W)))
    assert any(changed)  # a budget may leave nothing to some
    kinds = {held.kind for held in found.values()}
    about = FAMILIES[family]
    possible = {"linear"} | ({"experts"} if about.experts else set()) | ({"embedding"} if about.embedding else set())
    assert kinds == possible & method.sits_on


def test_merged_model_computes_what_the_adapted_one_does(method, family):
    model = adapted(method, family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    plain = dl.merged(model)
    assert_close_by_norm(logits(plain), logits(model), FAMILIES[family].merged)
    assert not torch.equal(logits(plain), logits(model_of(family)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "merging changed the model"
    assert [type(m) for m in model.modules()] == classes
    assert [type(m) for m in plain.modules()] == [type(m) for m in model_of(family).modules()]
    assert list(plain.state_dict()) == list(model_of(family).state_dict())


def test_merged_model_shares_what_no_delta_touched(method, family):
    model = dl.adapt(model_of(family), method(targets="attention"))
    plain, own = dict(dl.merged(model).named_parameters()), dict(model.named_parameters())
    touched = {f"{path}.weight" for path in attached(model)}
    for path, delta in attached(model).items():
        bias = own.get(f"{path}.bias")
        touched |= {f"{path}.bias"} if bias is not None and delta.adapted_bias(bias) is not bias else set()
    assert touched < plain.keys()
    for name, parameter in plain.items():
        assert (parameter.data_ptr() == own[name].data_ptr()) == (name not in touched), name


def test_only_the_delta_trains(method, family):
    model = adapted(method, family)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(".delta." in name for name in names)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if ".delta." not in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2), weight_decay=0.1)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())
    assert all(not torch.equal(now[name], value) for name, value in before.items())
    assert dl.trainable(model).count == sum(p.numel() for p in now.values() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(method, family, reentrant):
    model = adapted(method, family).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss_of(model).backward()
    want = gradients(model)
    assert want.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    runs = []
    last = place(model, list(attached(model))[-1])  # a weight in the last block
    last.module.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    loss_of(model).backward()
    assert len(runs) == 2, "the block runs again in the backward"
    got = gradients(model)
    assert got.keys() == want.keys()
    for name in want:
        assert_close_by_norm(got[name], want[name], 1e-5)


def test_autocast(method, family):
    model = adapted(method, family).float()
    want = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**inputs(model))
    out.loss.backward()
    if FAMILIES[family].experts:  # rounding may send a token to another expert: half of the tokens stay where they were
        away = (out.logits.float() - want).detach().norm(dim=-1) / want.norm(dim=-1)
        assert float(away.median()) <= 2e-2
    else:
        assert_close_by_norm(out.logits.float(), want, 5e-2)
    grads = gradients(model)
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.dtype is torch.float32 and g.isfinite().all() for g in grads.values())


def test_save_and_load_are_bitwise(method, family, tmp_path):
    model = adapted(method, family)
    dl.save_adapter(model, tmp_path / "adapter")
    other = dl.load_adapter(model_of(family), tmp_path / "adapter")
    ours, theirs = parameters(model), parameters(other)
    assert ours.keys() == theirs.keys()
    if all(ours[key].shape == theirs[key].shape for key in ours):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert torch.equal(logits(other), logits(model))
    else:  # a file without what was pruned: other sums, of the same terms
        assert_close_by_norm(logits(other), logits(model), FAMILIES[family].merged)
    dl.save_adapter(other, tmp_path / "again")
    file, again = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("adapter", "again"))
    assert file == again


def test_trained_state_is_bitwise(method, family):
    model, other = adapted(method, family), adapted(method, family, moved=False)
    load_trained_state(other, {key: value.clone() for key, value in trained_state(model).items()})
    assert torch.equal(logits(other), logits(model))


def test_disabled_is_the_base_and_comes_back(method, family):
    model, base = adapted(method, family), model_of(family)
    there = logits(model)
    with dl.disabled(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), there)
    with pytest.raises(ZeroDivisionError), dl.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), there)


def test_unload_is_bitwise(method, family):
    model = adapted(method, family)
    loss_of(model).backward()
    assert states_equal(dl.unload(model), model_of(family))
    assert all(p.grad is None for p in model.parameters())
    assert vars(model).keys() == vars(model_of(family)).keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    dl.adapt(model, method(targets="attention"))  # and it can be adapted again


def test_a_failure_midway_leaves_the_model_bitwise(method, family, monkeypatch):
    model = model_of(family)
    calls = iter(range(100))

    def fails(delta):
        if next(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("deltalab.deltas.adapt.attach", lambda where, delta: (attach(where, delta), fails(delta)))
    with pytest.raises(KeyboardInterrupt):
        dl.adapt(model, [method(targets=everywhere(method, family)), dl.Train("norms")])
    assert states_equal(model, model_of(family))
    assert torch.equal(logits(model), logits(model_of(family)))
    assert vars(model).keys() == vars(model_of(family)).keys()


def test_deepcopy_and_pickle_are_independent(method, family):
    model = adapted(method, family)
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        perturbed(twin, seed=7)
        assert not torch.equal(logits(twin), want)
        assert torch.equal(logits(model), want)
        assert states_equal(dl.unload(twin), model_of(family))
        assert adaptation(model).plan


def test_two_adapters_take_turns_bitwise(method, family):
    model = adapted(method, family)
    first = logits(model)
    dl.adapt(model, method(targets="attention"), seed=1, adapter="second")
    assert torch.equal(logits(model), logits(model_of(family))), "the second starts from the base"
    second = logits(driven(perturbed(model, seed=3), method))
    for name, want in (("default", first), ("second", second), ("default", first)):
        assert torch.equal(logits(dl.set_active(model, name)), want)
    assert states_equal(dl.unload(model), model_of(family))


def test_base_keys_do_not_change(method, family):
    keys = [key for key in adapted(method, family).state_dict() if ".delta." not in key]
    assert keys == list(model_of(family).state_dict())


def test_save_pretrained_writes_the_base_alone(method, family, tmp_path):
    model = adapted(method, family)
    for folder, want in ((tmp_path / "base", model_of(family)), (tmp_path / "merged", dl.merged(model))):
        (model if folder.name == "base" else want).save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=model.dtype)
        assert list(again.state_dict()) == list(want.state_dict())
        assert all(torch.equal(value, want.state_dict()[key]) for key, value in again.state_dict().items())


@of(lambda family: family.generates)
def test_generation_with_a_cache_is_the_full_forward(method, family):
    model = adapted(method, family)
    ids = tokens()
    out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True,
                         output_logits=True)  # fmt: skip
    cached = torch.stack(out.logits, 1)  # (batch, new, vocab)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            full = model(input_ids=ids, decoder_input_ids=out.sequences, use_cache=False).logits[:, :-1]
        else:
            full = model(out.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    assert_close_by_norm(cached, full, FAMILIES[family].merged)


def test_entries_and_masks_agree_with_the_dense_change(method, family):
    model = adapted(method, family)
    for path, delta in attached(model).items():
        assert isinstance(delta, WeightDelta)
        W, whole = place(model, path).W, dl.delta_weight(model, path) != 0
        for keep in (None, torch.rand(W.shape) < 0.5):
            delta.keep = keep
            dense = merged_weight(model, path) - W
            index = torch.randperm(W.numel())[:50]
            assert_close_by_norm(dl.delta_weight(model, path), dense, 1e-5)
            assert_close_by_norm(delta.entries(index, W), dl.delta_weight(model, path).flatten()[index], 1e-5)
            if keep is not None:
                assert torch.equal(dl.delta_weight(model, path) != 0, keep & whole)


def test_masked_delta_computes_its_masked_weight(method, family):
    model, plain = double(adapted(method, family)), double(model_of(family))
    for path, delta in attached(model).items():
        held = place(model, path)
        delta.keep = torch.rand(held.W.shape) < 0.5
        if held.kind != "experts":  # those hold two: see the whole model below
            kept = {held.name: held.oriented(held.W + dl.delta_weight(model, path))}
            assert_close_by_norm(run(held), run(place(plain, path), kept), 1e-10)
    assert_close_by_norm(logits(dl.merged(model)), logits(model), 1e-10)


PATHS = {
    "linear": "model.layers.0.self_attn.q_proj",
    "embedding": "model.embed_tokens",
    "experts": "model.layers.0.mlp.experts.down_proj",
}
"""A weight of each kind in a mixtral."""


def test_a_kind_of_weight_is_taken_or_refused_by_name(method, kind):
    model = model_of("mixtral")
    path = PATHS[kind]
    assert places(model)[path].kind == kind
    if kind in method.sits_on:
        assert list(attached(dl.adapt(model, method(targets=[path])))) == [path]
        return
    with pytest.raises(dl.UserError, match=rf"{method.__name__} does not go on '{path}'"):
        dl.adapt(model, method(targets=[path]))
    assert states_equal(model, model_of("mixtral"))


@where_it_sits
def test_gradients_against_finite_differences(method, kind):
    model = double(perturbed(dl.adapt(model_of("mixtral"), method(targets=[PATHS[kind]])), 0.3))
    held = place(model, PATHS[kind])
    holding_constants(held.module)
    values = {f"delta.{n}": p for n, p in held.module.delta.named_parameters()}
    leaves = [p.detach()[..., :40].clone().requires_grad_() for p in values.values()]  # enough of a long row

    def forward(*leaves):
        whole = [torch.cat([leaf, p.detach()[..., 40:]], -1) for leaf, p in zip(leaves, values.values(), strict=True)]
        return run(held, dict(zip(values, whole, strict=True)))

    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)
    x = torch.randn(2, held.W.shape[-1], dtype=torch.float64, requires_grad=True)
    if kind == "linear":
        assert torch.autograd.gradcheck(held.module, x)
