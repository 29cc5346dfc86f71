"""The load-balance loss of the mixture of LoRA experts, in every loop that adds it; and what is told of the experts' use."""

import copy
import pickle

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import deltalab as dl
from deltalab.data.chat import IGNORED, Conversation, encode_all
from deltalab.data.collate import collate
from deltalab.data.packing import pack
from deltalab.deltas.adapt import attached, param_groups
from deltalab.train.loss import nll_sum
from deltalab.train.spec import LoopSpec, OptimSpec
from tests.deltas.perturb import base_of, perturbed
from tests.deltas.routed import IN, T, definition, delta_for, expected_penalty, recorded
from tests.families import loss_of
from tests.helpers import assert_close_by_norm, byte_tokenizer, error_by_norm, tiny_llama, tokens


def test_the_balance_loss_and_its_gradient_are_the_definitions():
    delta, base = delta_for(dl.LoRAExperts(experts=5, top_k=2, r=2))
    assert delta.imbalance() is None
    x = torch.randn(3, T, IN, dtype=torch.float64)
    delta.train()(x, base)
    got = delta.imbalance()
    want = definition(delta.router, x.flatten(0, 1), 2)
    theirs = load_balancing_loss_func((x.flatten(0, 1) @ delta.router.T,), 5, 2) / 2  # theirs counts k for each token
    assert_close_by_norm(got, want, 1e-10)
    assert_close_by_norm(got, theirs, 1e-6)  # which counts in fp32
    ours = torch.autograd.grad(got, [*delta.parameters()], allow_unused=True)
    assert [g is None for g in ours] == [False, True, True], "the routers alone"
    assert_close_by_norm(ours[0], torch.autograd.grad(want, delta.router)[0], 1e-10)
    with torch.no_grad():
        delta.router.zero_()
    delta(x, base)
    assert_close_by_norm(delta.imbalance(), torch.ones((), dtype=torch.float64), 1e-12)  # an even router gives 1


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not-reentrant"])
def test_the_penalty_is_the_sum_over_routers(checkpointing):
    spec = dl.LoRAExperts(r=2, balance=0.3, targets="all-linear")
    model = perturbed(dl.adapt(tiny_llama(), spec)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    assert dl.penalty(model) is None
    seen = recorded(model)
    loss = loss_of(model)
    want = expected_penalty(model, seen, spec)
    routers = [d.router for d in attached(model).values()]
    grads = torch.autograd.grad(want, routers)
    got = dl.penalty(model)
    assert_close_by_norm(got, want, 1e-5)
    for ours, theirs in zip(torch.autograd.grad(got, routers), grads, strict=True):
        assert_close_by_norm(ours, theirs, 1e-4)
    (loss + dl.penalty(model)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert_close_by_norm(dl.penalty(model), want, 1e-5)  # the second forward of a checkpoint leaves it


def test_balance_zero_and_eval_mode_keep_nothing():
    model = dl.adapt(tiny_llama(), dl.LoRAExperts(balance=0.0))
    loss_of(model.train())
    assert dl.penalty(model) is None
    assert all(d.pull is None for d in attached(model).values())
    model = dl.adapt(tiny_llama(), dl.LoRAExperts())
    loss_of(model.eval())
    assert dl.penalty(model) is None
    x = torch.randn(4, 50, 32)
    delta = next(iter(attached(model).values())).train()
    delta(x, base_of(torch.randn(32, 32)))
    kept = [*delta.pull, *delta.routed[:2]]
    assert sum(t.numel() for t in kept) < 200, "no input is kept"
    assert all(t.grad_fn is None for t in kept)


def test_what_a_forward_left_stays_out_of_copies_and_states():
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRAExperts())).train()
    loss_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert dl.penalty(twin) is None
        assert dl.measures(twin) == {}
        loss_of(twin)
        assert dl.penalty(twin) is not None
    assert dl.penalty(model) is not None
    keys = {key.rpartition(".")[2] for key in model.state_dict() if ".delta." in key}
    assert keys == {"router", "A", "B"}


class Noted(transformers.TrainerCallback):
    """The routers' gradients before the first piece of a batch adds its own."""

    def __init__(self):
        self.found = []

    def on_step_begin(self, args, state, control, **given):
        deltas = attached(given["model"]).values()
        self.found.append([None if d.router.grad is None else d.router.grad.clone() for d in deltas])


def test_a_trainer_adds_the_penalty_of_the_step_before(tmp_path):
    """transformers' Trainer asks nobody between a step's forward and its backward."""
    spec = dl.LoRAExperts(r=2, balance=0.3)
    model = perturbed(dl.adapt(tiny_llama(), spec))
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    noted, seen = Noted(), recorded(model)
    wants = []

    class Before(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **given):
            wants.append(torch.autograd.grad(expected_penalty(model, seen, spec), [d.router for d in attached(model).values()]))  # fmt: skip

    args = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, learning_rate=1e-4,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(
        model=model, args=args, train_dataset=data, callbacks=[dl.TrainerCallback(), noted, Before()]
    ).train()
    first, *rest = noted.found
    assert all(g is None for g in first), "there has been no forward yet"
    assert len(rest) == 2
    for got, want in zip(rest, wants, strict=False):
        for ours, theirs in zip(got, want, strict=True):
            assert_close_by_norm(ours, theirs, 1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_training_is_that_of_a_loop_with_the_definitions_penalty(packed):
    """Padding is routed too, so the penalty is another one where there is none."""
    spec = dl.LoRAExperts(r=2, balance=3.0)
    optim = OptimSpec(lr=1e-3, steps=3, batch=4, clip=None, warmup=0, schedule="constant")
    data = [Conversation.of(f"say {word}", word) for word in ("one", "two", "three", "four")]
    results = []
    for balance in (0.0, 3.0):
        model = perturbed(dl.adapt(tiny_llama(), spec.model_copy(update={"balance": balance})))
        run = LoopSpec(optim=optim, run={"pack": packed}, eval={"fraction": 0.0})
        dl.train(model, byte_tokenizer(), data, spec=run, progress=False)
        results.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    without, got = results

    model = perturbed(dl.adapt(tiny_llama(), spec)).train()
    samples = list(encode_all(byte_tokenizer(), data, 128))
    batch = pack(samples) if packed else collate(samples, 0)
    seen, optimizer = recorded(model), torch.optim.AdamW(param_groups(model, 1e-3), weight_decay=0.0)
    for _ in range(3):
        loss = nll_sum(model, batch) / (batch["labels"][:, 1:] != IGNORED).sum()
        (loss + expected_penalty(model, seen, spec)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, want in model.named_parameters():
        if want.requires_grad:
            assert_close_by_norm(got[name], want, 1e-4)
    routers = [n for n in got if n.endswith("router")]
    assert routers
    assert all(error_by_norm(without[n], got[n]) > 1e-3 for n in routers)


def test_the_penalty_alone_evens_the_routers_out():
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRAExperts(r=2, balance=1.0)), 0.3).train()
    losses = []
    optimizer = torch.optim.SGD(param_groups(model, 1.0))
    for _ in range(40):
        loss_of(model)
        losses.append(dl.penalty(model))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    first, *_, last = [float(loss.detach()) for loss in losses]
    assert first > 4.3, "four routers, each 1 where it is even"
    assert last < 4.05


def test_utilisation_by_hand():
    delta, base = delta_for(dl.LoRAExperts(experts=3, top_k=2, r=2), in_=3)
    with torch.no_grad():
        delta.router.copy_(torch.eye(3))
    assert delta.measures() == {}
    x = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 0.0, 2.0]], dtype=torch.float64)  # 01, 01, 02
    delta.eval()(x, base)
    told = delta.measures()
    assert [told[f"share_{e}"] for e in range(3)] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert told["smallest_share"] == pytest.approx(1 / 6)
    mean = torch.softmax(x, -1).mean(0)
    assert told["entropy"] == pytest.approx(float(-(mean * mean.log()).sum() / torch.tensor(3.0).log()))
    delta.gather(True)
    assert delta.measures() == {}
    delta(x[:1], base)
    delta(x[2:], base)
    told = delta.measures()
    assert [told[f"share_{e}"] for e in range(3)] == pytest.approx([2 / 4, 1 / 4, 1 / 4])
    delta.gather(False)
    assert delta.measures() == told
    delta(x[:1], base)
    assert delta.measures()["share_2"] == 0


def test_measures_gathered_over_an_evaluation_are_those_of_one_forward():
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRAExperts(r=2))).eval()
    ids = tokens(6)
    with torch.no_grad():
        model(ids)
        want = dl.measures(model)
        with dl.gathered(model):
            for part in ids.split(2):
                model(part)
        got = dl.measures(model)
    assert got.keys() == want.keys() == attached(model).keys()
    for path, told in want.items():
        assert got[path] == pytest.approx(told, abs=1e-6)
        assert sum(v for n, v in told.items() if n.startswith("share_")) == pytest.approx(1)
