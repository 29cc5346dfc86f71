"""Methods with a schedule and a penalty in our loop: AdaLoRA."""

import pytest
import torch

import deltalab as dl
from deltalab.deltas.adapt import adapt, attached
from deltalab.deltas.peft_format import trained_state
from deltalab.train import EvalSpec, LoopSpec, OptimSpec, train
from tests.helpers import assert_close_by_norm, byte_tokenizer, tiny_llama, tokens
from tests.train.runs import conversations

STEPS = 10


def adapted(**fields):
    spec = dl.AdaLoRA(**{"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "targets": "attention", **fields})
    return adapt(tiny_llama(hidden=16, layers=1, mlp=24), spec, seed=1)


def trained(model, optim=None, **fields):
    spec = LoopSpec(**{
        "optim": OptimSpec(**{"lr": 5e-3, "steps": STEPS, "batch": 4, **(optim or {})}), "eval": EvalSpec(fraction=0.2, every=2), "seed": 7, **fields,
    })  # fmt: skip
    return train(model, byte_tokenizer(), conversations(), spec, progress=False)


def test_the_schedule_runs_by_the_loops_count(tmp_path):
    model = adapted()
    trained(model)
    for delta in attached(model).values():
        assert delta.clock.tolist() == [STEPS, STEPS - 3, STEPS]
    assert sum(int((delta.E != 0).sum()) for delta in attached(model).values()) == 2 * len(attached(model))
    dl.save_adapter(model, tmp_path)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_the_penalty_counts_once_a_step_and_is_not_noted(accumulate):
    """Weights as with the whole batch at once; the gradient is that of NLL and penalty, the noted loss the NLL's."""
    whole, pieces, without = adapted(orth_reg_weight=3.0), adapted(orth_reg_weight=3.0), adapted(orth_reg_weight=0.0)
    a = trained(whole)
    b = trained(pieces, {"accumulate": accumulate})
    for name, tensor in trained_state(whole).items():
        assert_close_by_norm(trained_state(pieces)[name].double(), tensor.double(), 1e-5)
    assert b.losses == pytest.approx(a.losses, rel=1e-5)
    c = trained(without)
    first = [result.curves["train"][0] for result in (b, c)]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)
    fresh = adapted(orth_reg_weight=3.0)
    parts = [p for d in attached(fresh).values() for p in (d.A, d.B)]
    penalty = torch.stack([g.norm() for g in torch.autograd.grad(dl.penalty(fresh), parts)]).norm()
    # at the start Λ is zero: A and B have no gradient but the penalty's, and Λ none of it
    assert first[0]["grad_norm"] ** 2 - first[1]["grad_norm"] ** 2 == pytest.approx(float(penalty) ** 2, rel=1e-4)


def test_the_best_weights_are_of_a_finished_schedule(tmp_path):
    """A high rate, so that the loss grows: the lowest is halfway through the schedule, and no weights to end with."""
    model = adapted()
    result = trained(model, {"lr": 0.3, "steps": 20}, eval=EvalSpec(fraction=0.2, every=2, best=True, patience=1))
    losses = {row["step"]: row["loss"] for row in result.curves["eval"]}
    assert min(losses[step] for step in (2, 4, 6)) < losses[0], "nothing in the schedule tempts"
    assert result.best["step"] == 0 or result.best["step"] >= 17
    assert result.steps >= 17, "patience ran out in the schedule"
    dl.save_adapter(model, tmp_path)


def test_a_schedule_longer_than_the_run_is_refused_at_once():
    model = adapted(total_step=50)
    with pytest.raises(dl.UserError, match="50 steps long, and this training has 10"):
        trained(model)


def test_a_model_without_adapter_trains_as_before():
    model = tiny_llama(hidden=16, layers=1, mlp=24)
    before = model(tokens()).logits
    trained(model)
    assert not torch.equal(model(tokens()).logits, before)
