"""Freezing `exact` and `delta_mask`: bitwise over any optimizer, and refused where they would hold nothing."""

import pytest
import torch

import deltalab as dl
from deltalab.deltas.adapt import attached, base_weight, merged_weight, param_groups
from deltalab.deltas.freeze import freeze
from deltalab.deltas.peft_format import load_trained_state, trained_state
from deltalab.deltas.select import scored_linears
from tests.deltas.perturb import perturbed
from tests.helpers import tiny_gpt2, tiny_llama, tokens

OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1),
    "Adam, amsgrad": lambda groups: torch.optim.Adam(groups, weight_decay=0.1, amsgrad=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, weight_decay=0.1),
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1, foreach=True),
}


def masks_of(model, share=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.rand(base_weight(model, path).shape, generator=generator) < share for path in scored_linears(model)
    }


def steps(model, optimizer, count):
    for step in range(count):
        model(input_ids=tokens(seed=step % 5), labels=tokens(seed=step % 5)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        ("AdamW", torch.float32, 50),
        ("AdamW", torch.bfloat16, 50),
        *((name, torch.float32, 10) for name in OPTIMIZERS if name != "AdamW"),
    ],
)
def test_exact_is_bitwise(name, dtype, count):
    model = dl.adapt(tiny_llama(dtype=dtype), dl.Train("full"))
    masks = masks_of(model)
    before = {path: base_weight(model, path).clone() for path in masks}
    optimizer = OPTIMIZERS[name](param_groups(model, 1e-2))
    steps(model, optimizer, 5)  # momentum from before the freeze
    now = {path: merged_weight(model, path).to(dtype) for path in masks}
    freezer = freeze(model, masks, "exact")
    freezer.install(optimizer)
    steps(model, optimizer, count)
    for path, mask in masks.items():
        W = model.get_submodule(path).weight.detach()
        assert torch.equal(W[mask].view(torch.uint8), now[path][mask].view(torch.uint8))
        assert (W[~mask] != before[path][~mask]).float().mean() > 0.5
    assert freezer.proof() == {
        "variant": "exact",
        "entries": sum(int(m.sum()) for m in masks.values()),
        "max_change": 0.0,
        "held": True,
    }
    freezer.remove()
    steps(model, optimizer, 3)
    assert not freezer.proof()["held"]


def test_exact_through_accelerate():
    from accelerate import Accelerator

    model = dl.adapt(tiny_llama(), dl.Train("full"))
    freezer = freeze(model, masks_of(model), "exact")
    optimizer = Accelerator(cpu=True).prepare(torch.optim.AdamW(param_groups(model, 1e-2), weight_decay=0.1))
    freezer.install(optimizer)
    steps(model, optimizer, 3)
    assert freezer.proof()["held"]


def test_exact_of_part_of_the_trained_weights():
    model = dl.adapt(tiny_llama(), dl.Train("last-1"))
    freezer = freeze(model, masks_of(model), "exact")  # the first block does not train at all
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2), weight_decay=0.1)
    freezer.install(optimizer)
    steps(model, optimizer, 3)
    assert freezer.proof()["held"]


@pytest.mark.parametrize("optimizer", [OPTIMIZERS["AdamW"], OPTIMIZERS["SGD"]])
def test_delta_mask_holds_in_training_and_in_the_merged_model(optimizer):
    model = dl.adapt(tiny_llama(), dl.LoRA(r=4, targets="attention"))
    masks = masks_of(model)
    freezer = freeze(model, masks, "delta_mask")
    optimizer = optimizer(param_groups(model, 1e-2))
    freezer.install(optimizer)
    steps(model, optimizer, 4)
    assert freezer.proof() == {
        "variant": "delta_mask",
        "entries": sum(int(m.sum()) for m in masks.values()),
        "max_change": 0.0,
        "held": True,
    }
    plain = dl.merged(model)
    for path, mask in masks.items():
        W = plain.get_submodule(path).weight
        assert torch.equal(W[mask], tiny_llama().get_submodule(path).weight[mask])
        if path in attached(model):
            assert (W[~mask] != tiny_llama().get_submodule(path).weight[~mask]).float().mean() > 0.9
    freezer.remove()
    assert not freezer.proof()["held"]


def test_none_measures_what_moved():
    model = dl.adapt(tiny_llama(), dl.LoRA(r=4, targets="attention"))
    masks = masks_of(model)
    freezer = freeze(model, masks, "none")
    assert freezer.proof()["held"]
    perturbed(model)
    want = max(float(dl.delta_weight(model, path)[mask].abs().max()) for path, mask in masks.items())
    proof = freezer.proof()
    assert proof["max_change"] == pytest.approx(want, rel=1e-4)
    assert not proof["held"]
    freezer.remove()


def test_nan_is_no_proof():
    model = dl.adapt(tiny_llama(), dl.LoRA(r=4, targets="attention"))
    freezer = freeze(model, masks_of(model), "none")
    with torch.no_grad():
        next(iter(attached(model).values())).B.fill_(float("nan"))
    assert freezer.proof()["max_change"] == float("inf")


def test_gpt2_masks_are_out_by_in():
    model = dl.adapt(tiny_gpt2(), dl.Train("full"))
    path = "transformer.h.0.attn.c_attn"
    mask = torch.zeros(96, 32, dtype=torch.bool)
    mask[:48] = True
    before = base_weight(model, path).clone()
    freezer = freeze(model, {path: mask}, "exact")
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2), weight_decay=0.1)
    freezer.install(optimizer)
    steps(model, optimizer, 3)
    W = model.get_submodule(path).weight.T
    assert torch.equal(W[:48], before[:48])
    assert (W[48:] != before[48:]).all()
    assert freezer.proof()["held"]


def test_variants_that_would_hold_nothing_say_why():
    lora, full = dl.adapt(tiny_llama(), dl.LoRA()), dl.adapt(tiny_llama(), dl.Train("full"))
    with pytest.raises(dl.UserError, match="would do nothing.*\n.*\n.*delta_mask"):
        freeze(lora, masks_of(lora), "exact")
    with pytest.raises(dl.UserError, match="train too.*\n.*\n.*exact"):
        freeze(full, masks_of(full), "delta_mask")
    both = dl.adapt(tiny_llama(), [dl.LoRA(), dl.Train("full")])
    for variant in ("exact", "delta_mask"):
        with pytest.raises(dl.UserError):
            freeze(both, masks_of(both), variant)
    norms = dl.adapt(tiny_llama(), dl.Train("norms"))
    for variant in ("exact", "delta_mask", "rewind"):
        with pytest.raises(dl.UserError):
            freeze(norms, masks_of(norms), variant)
    for variant in ("none", "grad_mask"):  # these promise nothing
        assert freeze(norms, masks_of(norms), variant).proof()["held"]


def test_faulty_masks_are_refused_by_name():
    model = dl.adapt(tiny_llama(), dl.Train("full"))
    path = "model.layers.0.self_attn.k_proj"
    with pytest.raises(dl.UserError, match=r"nearest: model\.layers\.0\.self_attn\.k_proj"):
        freeze(model, {path[:-2]: torch.zeros(16, 32, dtype=torch.bool)}, "exact")
    for mask in (torch.zeros(32, 16, dtype=torch.bool), torch.zeros(16, 32)):
        with pytest.raises(dl.UserError, match=r"must be bool \(16, 32\)"):
            freeze(model, {path: mask}, "exact")
    with pytest.raises(dl.UserError, match="no way of freezing"):
        freeze(model, {path: torch.zeros(16, 32, dtype=torch.bool)}, "exakt")


def test_a_masked_state_comes_back_from_a_checkpoint():
    def masked():
        model = dl.adapt(tiny_llama(), dl.LoRA(r=4, targets="attention"))
        freeze(model, masks_of(model), "delta_mask")
        return model

    model, other = perturbed(masked()), dl.adapt(tiny_llama(), dl.LoRA(r=4, targets="attention"))
    load_trained_state(other, trained_state(model))
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)
    assert all(torch.equal(attached(other)[path].keep, delta.keep) for path, delta in attached(model).items())
