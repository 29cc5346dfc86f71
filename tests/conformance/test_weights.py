"""What a change of the weight keeps to, and what refuses where a delta is none: merging, ΔW, entries, masks.

Bounds are relative errors by norm, `Family.merged` and `Family.double`: 1e-5 in fp32 and 1e-10 in fp64. In bf16 the merged
weight itself is rounded to 8 bits, about 4e-3 an entry, so the merged model is held to 3e-2 of the adapted one's logits.
bitsandbytes' linears compute in fp32 whatever the model is cast to, so theirs is 1e-5 in fp64 too.

A quantised linear under such a delta is merged with what its codes stand for, and becomes a plain linear with the sum: the
merged model is held to the same bounds there as elsewhere, as what the codes cost is in both models.
"""

import re

import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import attached, merged_weight
from deltalab.deltas.base import WeightDelta
from deltalab.deltas.freeze import freeze
from deltalab.deltas.own_format import load_trained_state, trained_state
from deltalab.deltas.select import layers_of
from deltalab.deltas.sites import linears, place
from deltalab.deltas.weights import delta_entries
from tests.conformance.kit import adapted, blocks, double, merging, not_merging, of, run
from tests.deltas.perturb import perturbed
from tests.families import FAMILIES, logits, model_of
from tests.helpers import assert_close_by_norm


@merging
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
        assert_close_by_norm(run(held), run(place(plain, path), kept), FAMILIES[family].double)
        changed.append(not torch.equal(held.W, deltas[path].adapted(held.W)))
    assert any(changed)  # a budget may leave nothing to some
    kinds = {held.kind for held in found.values()}
    about = FAMILIES[family]
    possible = {"linear"} | ({"experts"} if about.experts else set()) | ({"embedding"} if about.embedding else set())
    assert kinds == possible & method.sits_on


@merging
def test_merged_model_computes_what_the_adapted_one_does(method, family):
    model = adapted(method, family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    plain = dl.merged(model)
    assert_close_by_norm(logits(plain), logits(model), FAMILIES[family].merged)
    assert not torch.equal(logits(plain), logits(model_of(family)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "merging changed the model"
    assert [type(m) for m in model.modules()] == classes
    base = model_of(family)
    coded = {path for path in attached(model) if FAMILIES[family].codes and place(model, path).kind == "linear"}
    now, then = ({p: type(m) for p, m in one.named_modules() if p not in coded} for one in (plain, base))
    assert now == then
    now, then = ([k for k in one.state_dict() if not k.startswith(tuple(coded))] for one in (plain, base))
    assert now == then
    assert all(type(plain.get_submodule(p)) in (nn.Linear, type(base.get_submodule(p))) for p in coded)


@merging
@of(lambda family: not family.codes)
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


@merging
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


@merging
def test_masked_delta_computes_its_masked_weight(method, family):
    model, plain = double(adapted(method, family)), double(model_of(family))
    for path, delta in attached(model).items():
        held = place(model, path)
        delta.keep = torch.rand(held.W.shape) < 0.5
        if held.kind != "experts":  # those hold two: see the whole model below
            kept = {held.name: held.oriented(held.W + dl.delta_weight(model, path))}
            assert_close_by_norm(run(held), run(place(plain, path), kept), FAMILIES[family].double)
    assert_close_by_norm(logits(dl.merged(model)), logits(model), FAMILIES[family].double)


@not_merging
def test_what_depends_on_the_input_is_no_change_of_the_weight(method, family):
    """Merging, ΔW, its entries and its masks refuse, saying which module and why; the model stays as it is."""
    model = adapted(method, family)
    want, path = logits(model), next(iter(attached(model)))
    for refused in (
        lambda: dl.merged(model),
        lambda: dl.delta_weight(model, path),
        lambda: merged_weight(model, path),
        lambda: delta_entries(model, path, torch.tensor([0])),
    ):
        with pytest.raises(dl.UserError, match=rf"delta on '{re.escape(path)}' depends on the input") as error:
            refused()
        assert type(attached(model)[path]).__name__ in str(error.value)
    delta = attached(model)[path]
    assert not isinstance(delta, WeightDelta)
    assert not any(hasattr(delta, name) for name in ("change", "adapted", "factors", "entries", "masked"))
    inside = next(name for name in linears(model) if name.startswith(path) or place(model, path).kind == "experts")
    masks = {inside: torch.zeros(place(model, inside).site(inside).shape, dtype=torch.bool)}
    with pytest.raises(dl.UserError, match="masks the change of a weight delta, and none of these matrices has one"):
        freeze(model, masks, "delta_mask")
    keep = next(name for name in trained_state(model)).rpartition(".")[0] + ".keep"
    with pytest.raises(dl.UserError, match="1 not expected"):
        load_trained_state(model, trained_state(model) | {keep: torch.ones(1, dtype=torch.bool)})
    assert torch.equal(logits(model), want)


@not_merging
def test_beside_a_delta_that_does_not_merge_nothing_does(method, family):
    """A change of another weight, in the same adapter, is told apart: its ΔW is there, and the whole refuses."""
    layer = blocks(method, family)
    model = model_of(family)
    free = [path for path in linears(model) if path not in method(targets=layer, layers=[0]).chosen(model)]
    other = next(path for path in free if layers_of(model, [path])[path] == 1)
    dl.adapt(model, [method(targets=layer, layers=[0]), dl.LoRA(r=2, targets=[other])])
    perturbed(model)
    assert bool(dl.delta_weight(model, other).any())
    with pytest.raises(dl.UserError, match="depends on the input"):
        dl.merged(model)
