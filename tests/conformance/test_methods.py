"""What every method keeps to, over the table of methods: a new one joins by its line there.

Bounds are relative errors by norm, `Family.merged` and `Family.double` of the family. On bases of codes (NF4, int8, int4 in
groups, bitsandbytes' NF4) they are those of plain fp32 models, 1e-5, and the start, saving, unloading and switching are
bitwise there too: what the codes cost is in the base, and so on both sides of each comparison.
"""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import adaptation, attached, param_groups
from deltalab.deltas.attach import attach
from deltalab.deltas.peft_format import WEIGHTS, load_trained_state, trained_state
from deltalab.deltas.sites import place
from tests.conformance.kit import (
    adapted,
    blocks,
    double,
    driven,
    everyone,
    everywhere,
    gradients,
    merges,
    of,
    parameters,
)
from tests.deltas.perturb import perturbed, states_equal
from tests.families import FAMILIES, inputs, logits, loss_of, model_of
from tests.helpers import assert_close_by_norm, tokens


def test_the_start_is_the_base(method, family):
    base = model_of(family)
    if "experts" in method.sits_on and FAMILIES[family].experts and not merges(method):  # computed one by one
        base.set_experts_implementation("eager")
    assert torch.equal(logits(adapted(method, family, moved=False)), logits(base))


@of(lambda family: not (family.experts or family.codes))
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

    one, again, wider, other, elsewhere = (
        starts(1),
        starts(1),
        starts(1, blocks(method, family)),
        starts(2),
        starts(1, scale=2.0),
    )
    assert one
    assert all(torch.equal(one[key], again[key]) and torch.equal(one[key], wider[key]) for key in one)
    random = [k for k in one if one[k].unique().numel() > 1 and torch.equal(one[k], elsewhere[k])]
    assert all(not torch.equal(one[key], other[key]) for key in random), "drawn, but not from the seed"
    assert len({tuple(one[key].flatten()[:4].tolist()) for key in random}) == len(random), "two modules start alike"


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
    if model.config.is_encoder_decoder:  # what the decoder's blocks send to the encoder is added up in another order
        model = double(model)
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
    model = everyone(adapted(method, family)).float()
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
    spec = method(targets=everywhere(method, family))
    calls = iter(range(100))
    last = len(spec.chosen(model)) - 1

    def fails(delta):
        if next(calls) == last:
            raise KeyboardInterrupt

    monkeypatch.setattr("deltalab.deltas.adapt.attach", lambda where, delta: (attach(where, delta), fails(delta)))
    with pytest.raises(KeyboardInterrupt):
        dl.adapt(model, [spec, dl.Train("norms")])
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


@of(lambda family: not family.codes)
def test_save_pretrained_writes_the_base_alone(method, family, tmp_path):
    model = adapted(method, family)
    wants = {"base": (model, model_of(family))} | ({"merged": (dl.merged(model),) * 2} if merges(method) else {})
    for name, (saved, want) in wants.items():
        saved.save_pretrained(tmp_path / name)
        again = type(model).from_pretrained(tmp_path / name, dtype=model.dtype)
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


def test_measures_are_numbers_of_the_modules(method, family):
    model = adapted(method, family)
    logits(model)
    told = dl.measures(model)
    assert told.keys() <= attached(model).keys()
    assert all(isinstance(value, float) and math.isfinite(value) for one in told.values() for value in one.values())
    assert states_equal(dl.unload(model), model_of(family))
