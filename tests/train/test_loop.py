"""One step is what it says: against plain torch, whatever the pieces."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from deltalab.core.errors import UserError
from deltalab.data.chat import IGNORED, Encoded, encode_all
from deltalab.data.collate import collate, epoch_order
from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt
from deltalab.deltas.freeze import freeze
from deltalab.deltas.peft_format import trained_state
from deltalab.models import precision
from deltalab.train import EvalSpec, LoopSpec, OptimSpec, RunSpec, train
from deltalab.train.checkpoint import Checkpoints
from deltalab.train.loss import nll_sum
from deltalab.train.optim import factor, make_optimizer
from tests.helpers import assert_close_by_norm, byte_tokenizer, tiny_llama
from tests.train.runs import At, adapted, conversations, run, spec

TOKENIZER = byte_tokenizer()
SAMPLES = encode_all(TOKENIZER, conversations(), 128)


def steps(n, *, batch=4, **fields):
    return LoopSpec(optim=OptimSpec(lr=5e-3, steps=n, batch=batch, **fields), eval=EvalSpec(fraction=0), seed=7)


def flat(model):
    return torch.cat([t.flatten() for t in trained_state(model).values()])


def no_dropout(seed=0):
    return adapt(tiny_llama(hidden=16, layers=1, mlp=24, seed=seed), LoRA(r=4, targets="all-linear"), seed=1)


def test_loss_is_the_negative_log_likelihood_of_the_counted_tokens():
    model = tiny_llama()
    batch = collate(SAMPLES[:3], 0)
    want = 0.0
    model.requires_grad_(False)
    for sample in SAMPLES[:3]:
        logits = model(torch.tensor([sample.input_ids])).logits[0].double().log_softmax(-1)
        for position in range(1, len(sample.input_ids)):
            if sample.labels[position] != IGNORED:
                want -= float(logits[position - 1, sample.input_ids[position]])
    assert float(nll_sum(model, batch)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_loop_is_plain_torch(schedule):
    """The same five steps written out: AdamW, mean over counted tokens, clipping, warm-up and schedule."""
    options = {"schedule": schedule, "warmup": 0.3, "weight_decay": 0.1, "clip": 0.5}
    model, reference = no_dropout(), no_dropout()
    result = train(model, TOKENIZER, SAMPLES, steps(5, **options), progress=False)

    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, betas=(0.9, 0.999), weight_decay=0.1)
    order = epoch_order([len(s.input_ids) for s in SAMPLES], 4, seed=7, epoch=0, by_length=False)
    losses = []
    for step in range(5):
        batch = collate([SAMPLES[i] for i in order[step]], 0)
        logits = reference(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        warmup, left = 2, 3
        scale = (
            (step + 1) / 3
            if step < warmup
            else {
                "cosine": (1 + math.cos(math.pi * (step - 2) / left)) / 2,
                "linear": 1 - (step - 2) / left,
                "constant": 1.0,
            }[schedule]
        )
        optimizer.param_groups[0]["lr"] = 5e-3 * scale
        optimizer.step()
        losses.append(loss.item())
        row = result.curves["train"][step]
        assert row["lr"] == pytest.approx(5e-3 * scale)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert_close_by_norm(flat(model), flat(reference), 1e-5)


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulation_does_not_change_the_step(accumulate):
    """Pieces have different numbers of counted tokens; the mean is over the whole batch."""
    whole, pieces = no_dropout(), no_dropout()
    a = train(whole, TOKENIZER, SAMPLES, steps(4), progress=False)
    b = train(pieces, TOKENIZER, SAMPLES, steps(4, accumulate=accumulate), progress=False)
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    assert_close_by_norm(flat(pieces), flat(whole), 1e-5)


def test_a_last_small_batch_is_accumulated_too():
    whole, pieces = no_dropout(), no_dropout()
    data = SAMPLES[:5]
    train(whole, TOKENIZER, data, steps(2), progress=False)
    train(pieces, TOKENIZER, data, steps(2, accumulate=4), progress=False)
    assert_close_by_norm(flat(pieces), flat(whole), 1e-5)


def test_epochs_see_every_sample():
    result = train(
        no_dropout(),
        TOKENIZER,
        SAMPLES,
        LoopSpec(optim=OptimSpec(epochs=2, batch=5), eval=EvalSpec(fraction=0)),
        progress=False,
    )
    assert result.steps == 2 * 5
    assert result.tokens == 2 * SAMPLES.tokens
    assert sum(row["counted"] for row in result.curves["train"]) == 2 * SAMPLES.counted
    assert "eval" not in result.curves
    assert result.best is None


def test_weight_decay_spares_vectors():
    model = adapted("both")
    groups = make_optimizer(model, OptimSpec(weight_decay=0.1)).param_groups
    assert {(p.ndim > 1, g["weight_decay"]) for g in groups for p in g["params"]} == {(True, 0.1), (False, 0.0)}
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())


def test_schedule_ends():
    assert [factor(OptimSpec(warmup=0.5, schedule="linear"), s, 4) for s in range(4)] == [1 / 3, 2 / 3, 1.0, 0.5]
    assert factor(OptimSpec(warmup=0, schedule="cosine"), 0, 10) == 1.0
    assert factor(OptimSpec(warmup=0.06), 0, 100) == pytest.approx(1 / 7)


def test_held_out_data_best_weights_and_patience():
    model = adapted()
    data, test = SAMPLES[:12], SAMPLES[12:]
    fields = {
        "optim": OptimSpec(lr=0.05, steps=40, batch=4, schedule="constant"),
        "eval": EvalSpec(every=2, patience=3),
    }
    result = train(model, TOKENIZER, data, LoopSpec(**fields), test=test, progress=False)
    losses = {row["step"]: row["loss"] for row in result.curves["eval"]}
    assert result.stopped_early
    assert result.steps < 40
    assert result.best["step"] == min(losses, key=losses.get) == result.steps - 6
    now = nll_sum(model, collate(test, 0)).item() / sum(s.counted for s in test)
    assert now == pytest.approx(result.best["loss"], rel=1e-4)


def test_best_weights_from_a_folder_also_after_an_interrupt(tmp_path):
    evaluation = EvalSpec(every=2, best=True, fraction=0.3)
    fields = {"optim": OptimSpec(lr=0.05, steps=20, batch=4), "eval": evaluation}
    memory = adapted()
    want = train(memory, TOKENIZER, conversations(), spec(**fields), progress=False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, probes=[At(9, lambda m: __import__("signal").raise_signal(2))], **fields)
    model = adapted()
    got = train(model, TOKENIZER, conversations(), spec(**fields), folder=tmp_path, progress=False)
    assert got.best == want.best
    assert got.best["step"] < 20
    assert torch.equal(flat(model), flat(memory))
    assert (tmp_path / "checkpoints/best/trained.safetensors").is_file()


def test_checkpoints_are_limited(tmp_path):
    run(tmp_path, run=RunSpec(checkpoint_every=2, keep=3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000008", "step-000010", "step-000012"]


def poison(value):
    def do(model):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(value)

    return do


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, value):
    with pytest.raises(UserError) as error:
        run(tmp_path, probes=[At(6, poison(value))])
    said = str(error.value)
    assert "broke down in step 7" in said
    assert "the last good checkpoint is kept: step 3" in said
    assert "lower optim.lr" in said
    last = Checkpoints(tmp_path, 2).last()
    assert last.step == 3
    assert all(t.isfinite().all() for t in last.tensors["trained"].values())
    assert [json.loads(line)["step"] for line in (tmp_path / "curves/train.jsonl").read_text().splitlines()] == list(
        range(1, 7)
    )
    with pytest.raises(UserError, match="no checkpoint was written before it"):
        run(None, probes=[At(1, poison(value))])


def test_bfloat16_is_tried_in_a_child_first(monkeypatch):
    import os
    import signal

    precision.cpu_multiplies_bfloat16.cache_clear()
    assert isinstance(precision.cpu_multiplies_bfloat16(), bool)
    precision.cpu_multiplies_bfloat16.cache_clear()
    monkeypatch.setattr(torch, "mm", lambda *a: os.kill(os.getpid(), signal.SIGILL))
    with pytest.raises(UserError, match="ONEDNN_MAX_CPU_ISA"):
        train(no_dropout(), TOKENIZER, SAMPLES, LoopSpec(run=RunSpec(dtype="bfloat16")), progress=False)
    precision.cpu_multiplies_bfloat16.cache_clear()


@pytest.mark.skipif(
    not precision.cpu_multiplies_bfloat16(), reason="the system blocks this CPU's bfloat16 instructions"
)
def test_mixed_precision_every_time_and_the_model_left_as_it_was():
    tiny = no_dropout()
    seen = []
    tiny.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for dtype in ("bfloat16", "float32", "bfloat16"):
        seen.clear()
        mixed = LoopSpec(optim=OptimSpec(steps=1, batch=4), run=RunSpec(dtype=dtype), eval=EvalSpec(fraction=0))
        train(tiny, TOKENIZER, SAMPLES, mixed, progress=False)
        assert set(seen) == {getattr(torch, dtype)}
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & tiny.__dict__.keys()
        assert not tiny.training
        assert {p.dtype for p in tiny.parameters()} == {torch.float32}
        assert all(p.grad is None for p in tiny.parameters())


def test_frozen_entries_hold_through_weight_decay_and_momentum():
    model = adapted("full")
    path = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(path).weight
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    before = weight.detach().clone()
    freezer = freeze(model, {path: mask}, "exact")
    train(model, TOKENIZER, SAMPLES, steps(6, weight_decay=0.5), freezer=freezer, progress=False)
    assert freezer.proof()["held"]
    assert torch.equal(weight[mask], before[mask])
    assert (weight[~mask] != before[~mask]).all()


def test_probes_run_at_the_start_every_so_often_and_at_the_end():
    class Probe:
        name, every = "probe", 4

        def measure(self, model, step):
            return {
                "training": model.training,
                "nan": float("nan"),
                "tensor": torch.arange(2),
                "nested": [{"a": (1, 2)}],
            }

    result = train(no_dropout(), TOKENIZER, SAMPLES, steps(10), probes=[Probe()], progress=False)
    assert [row["step"] for row in result.curves["probe"]] == [0, 4, 8, 10]
    assert result.curves["probe"][0] == {
        "step": 0,
        "training": False,
        "nan": None,
        "tensor": [0, 1],
        "nested": [{"a": [1, 2]}],
    }


def test_mistakes():
    with pytest.raises(UserError, match="no parameter to train"):
        train(tiny_llama().requires_grad_(False), TOKENIZER, SAMPLES, progress=False)
    with pytest.raises(UserError, match="run.context is 500, and the model has 128 positions"):
        train(no_dropout(), TOKENIZER, conversations(), LoopSpec(run=RunSpec(context=500)), progress=False)
    with pytest.raises(UserError, match="a sample has 200 tokens"):
        train(no_dropout(), TOKENIZER, [Encoded([5] * 200, [5] * 200)], progress=False)
    with pytest.raises(UserError, match="data set is empty"):
        train(no_dropout(), TOKENIZER, [], progress=False)


def test_result_says_what_happened():
    result = run(None)
    assert str(result).startswith(f"12 steps, {result.tokens:,} tokens in")
    assert "held-out" in str(result)
    assert result.data["samples"] + result.data["held_out"] == 24


def test_kernels_are_a_choice_and_told():
    auto, plain = run(None), run(None, run=RunSpec(checkpoint_every=3, kernels="plain"))
    assert auto.data["kernels"]["MLP"] >= auto.steps
    assert auto.data["kernels"]["attention"]
    assert plain.data["kernels"] == {}
    assert auto.losses == pytest.approx(plain.losses, rel=1e-4)
