"""Freezing through the training loop: what is held while it trains, what is put back, and all of it after a kill."""

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.deltas.adapt import attached, base_weight, delta_weight, merged_weight
from deltalab.deltas.freeze import freeze
from deltalab.deltas.peft_format import trained_state
from deltalab.deltas.select import scored_linears
from deltalab.train import EvalSpec, RunSpec, train
from deltalab.train.checkpoint import Checkpoints
from tests.helpers import byte_tokenizer
from tests.train.runs import At, adapted, conversations, interrupt, spec

WAYS = [("full", v) for v in ("none", "grad_mask", "exact", "rewind")]
WAYS += [("lora", v) for v in ("none", "grad_mask", "rewind", "delta_mask")]


def masks_of(model, seed=0, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {p: torch.rand(base_weight(model, p).shape, generator=generator) < share for p in scored_linears(model)}


class Largest:
    """A probe: the largest change of a frozen entry so far, by the merged weights themselves."""

    name, every = "largest", 1

    def __init__(self, model, masks):
        self.start = {path: merged_weight(model, path)[mask] for path, mask in masks.items()}
        self.masks = masks

    def measure(self, model, step):
        now = {path: merged_weight(model, path)[mask] for path, mask in self.masks.items()}
        return {"change": max(float((now[path] - start).abs().max()) for path, start in self.start.items())}


def frozen(kind, variant, folder=None, probes=(), seed=0, fields=None):
    """(model, freezer, result) of a run with weight decay; the freezer is None where `variant` is."""
    model = adapted(kind)
    masks = masks_of(model, seed)
    freezer = None if variant is None else freeze(model, masks, variant)
    probes = [Largest(model, masks), *probes]
    result = train(
        model, byte_tokenizer(), conversations(), spec(12, **(fields or {})), folder=folder, probes=probes, freezer=freezer,
        progress=False,
    )  # fmt: skip
    return model, freezer, result


def states(model):
    return {name: tensor.clone() for name, tensor in trained_state(model).items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("kind", "variant"), WAYS)
def test_what_moves_while_it_trains(kind, variant):
    """`rewind` is not `exact`: its entries move all along, and only the end is right."""
    model, freezer, result = frozen(kind, variant)
    changes = [row["change"] for row in result.curves["largest"]]
    assert len(changes) == 13
    assert changes[0] == 0.0
    if variant in ("exact", "delta_mask"):
        assert set(changes) == {0.0}
    else:
        assert all(change > 0 for change in changes[2:])
    assert freezer.proof()["held"] is (variant in ("exact", "delta_mask", "rewind"))
    if variant == "rewind":
        assert freezer.proof()["max_change_before_rewind"] == pytest.approx(changes[-1], rel=1e-3)
    assert all(not p._backward_hooks for p in model.parameters()) is (
        variant not in ("grad_mask", "exact") or kind == "lora"
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_rewinding_trains_as_if_nothing_were_frozen(kind):
    free, _, curves = frozen(kind, None)
    rewound, _, rewound_curves = frozen(kind, "rewind")
    assert rewound_curves.losses == curves.losses
    base = adapted(kind)
    for path, mask in masks_of(base).items():
        if kind == "full":
            want = torch.where(mask, base_weight(base, path), free.get_submodule(path).weight)
            assert torch.equal(rewound.get_submodule(path).weight, want)
        else:
            assert torch.equal(delta_weight(rewound, path), delta_weight(free, path) * ~mask)
    exact, _, exact_curves = frozen(kind, "exact" if kind == "full" else "delta_mask")
    assert exact_curves.losses != curves.losses
    assert any(not torch.equal(t, trained_state(rewound)[name]) for name, t in trained_state(exact).items())


def test_a_gradient_hook_changes_no_step_under_a_delta():
    plain, _, curves = frozen("lora", None)
    hooked, freezer, hooked_curves = frozen("lora", "grad_mask")
    assert hooked_curves.losses == curves.losses
    assert_same(states(hooked), states(plain))
    assert "never fires" in freezer.proof()["note"]


@pytest.mark.parametrize(("kind", "variant"), WAYS)
def test_stopped_and_continued_is_bitwise_the_same(tmp_path, kind, variant):
    whole, freezer, _ = frozen(kind, variant, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        frozen(kind, variant, tmp_path / "b", [At(5, interrupt)])
    again, resumed, _ = frozen(kind, variant, tmp_path / "b", [At(-1, interrupt)])
    assert_same(states(again), states(whole))
    assert resumed.proof() == freezer.proof()
    curves = [(tmp_path / name / "curves/largest.jsonl").read_bytes() for name in "ab"]
    assert curves[0] == curves[1]
    finished, third, _ = frozen(kind, variant, tmp_path / "b", [At(-1, interrupt)])  # killed after the last step
    assert_same(states(finished), states(whole))
    assert third.proof() == freezer.proof()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_best_weights_are_rewound_too(kind):
    best = {"eval": EvalSpec(every=2, fraction=0.2, best=True)}
    free, _, result = frozen(kind, None, fields=best)
    model, freezer, _ = frozen(kind, "rewind", fields=best)
    assert freezer.proof()["held"]
    assert result.best["step"] > 0
    for path, mask in masks_of(model).items():
        assert torch.equal(merged_weight(model, path)[~mask], merged_weight(free, path)[~mask])


def test_other_masks_and_variants_are_refused_by_name(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        frozen("full", "exact", tmp_path, [At(4, interrupt)])
    masks = masks_of(adapted("full"))
    path = next(iter(masks))
    rolled = {**masks, path: masks[path].roll(1, 1)}
    for variant, these, said in (
        ("exact", rolled, "changed: the frozen entries"),
        ("rewind", masks, "changed: the freezing"),
        (None, masks, "changed: the freezing; the frozen entries"),
    ):
        model = adapted("full")
        freezer = variant and freeze(model, these, variant)
        arguments = {"folder": tmp_path, "probes": [Largest(model, masks)], "freezer": freezer, "progress": False}
        with pytest.raises(UserError) as error:
            train(model, byte_tokenizer(), conversations(), spec(12), **arguments)
        assert str(error.value).splitlines()[1].endswith(said)
    assert Checkpoints(tmp_path, 2).last().step == 4


def test_checkpoints_of_a_rewind_are_of_the_free_run(tmp_path):
    """What is put back at the end is not in them, so a run can go on from any of them."""
    frozen("lora", "rewind", tmp_path, fields={"run": RunSpec(checkpoint_every=6)})
    last = Checkpoints(tmp_path, 2).last()
    assert last.step == 12
    assert not [name for name in last.tensors["trained"] if name.endswith(".keep")]
    model, _, _ = frozen("lora", "rewind")
    assert all(delta.keep is not None for delta in attached(model).values())
