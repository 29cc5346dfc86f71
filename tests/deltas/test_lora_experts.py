"""The mixture of LoRA experts: against a loop over tokens and experts, plain LoRA, and autograd through the definitions."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.pytorch_utils import Conv1D

import deltalab as dl
from deltalab.data.chat import IGNORED, Conversation, encode_all
from deltalab.data.collate import collate
from deltalab.deltas.adapt import attached, param_groups
from deltalab.deltas.lora_experts import LoRAExpertsDelta
from deltalab.deltas.quantise import quantise
from deltalab.deltas.sites import linears, place
from deltalab.quant.base import QuantisedLinear
from deltalab.quant.linear import GroupQuantiser
from deltalab.train.loss import nll_sum
from deltalab.train.spec import LoopSpec, OptimSpec
from tests.deltas.perturb import base_of, perturbed
from tests.families import inputs, logits, loss_of, model_of
from tests.helpers import assert_close_by_norm, byte_tokenizer, error_by_norm, tiny_llama, tokens

IN, OUT, T = 12, 10, 9


def delta_for(spec, *, out=OUT, in_=IN, dtype=torch.float64, seed=0):
    """A delta of a linear that does something, and the linear as it sees it."""
    generator = torch.Generator().manual_seed(seed)
    held = nn.Linear(in_, out, dtype=dtype)
    with torch.no_grad():
        for p in held.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype))
    delta = spec.build(place(held_in(held), "linear").site("linear"))
    delta.init(generator)
    with torch.no_grad():
        for p in delta.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator, dtype=dtype)
    return delta, base_of(held.weight.detach(), held.bias.detach())


def held_in(linear):
    model = nn.Module()
    model.linear = linear
    return model


def token_by_token(delta, x, base, spec):
    """The equations of the paper, a token and an expert at a time; x (T, in)."""
    rows = []
    for token in x:
        p = torch.softmax(torch.stack([row @ token for row in delta.router]), 0)
        chosen = sorted(range(spec.experts), key=lambda e: -p[e].item())[: spec.top_k]
        total = sum(p[e] for e in chosen) if spec.renormalise else 1.0
        y = base.W @ token + base.bias
        for e in chosen:
            y = y + spec.alpha / spec.r * p[e] / total * (delta.B[:, e] @ (delta.A[e] @ token))
        rows.append(y)
    return torch.stack(rows)


def gradients_of(y, leaves):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    return torch.autograd.grad((weight * y).sum(), leaves)


@pytest.mark.parametrize(
    ("experts", "top_k", "renormalise"),
    [(4, 2, True), (4, 2, False), (5, 3, True), (3, 3, True), (3, 3, False), (1, 1, True), (1, 1, False), (4, 1, False)],
)
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(experts, top_k, renormalise):
    spec = dl.LoRAExperts(experts=experts, top_k=top_k, r=3, alpha=5, renormalise=renormalise)
    delta, base = delta_for(spec)
    x = torch.randn(T, IN, dtype=torch.float64, requires_grad=True)
    leaves = [x, *delta.parameters()]
    got, want = delta(x, base), token_by_token(delta, x, base, spec)
    assert_close_by_norm(got, want, 1e-10)
    for ours, theirs in zip(gradients_of(got, leaves), gradients_of(want, leaves), strict=True):
        assert torch.equal(ours, theirs) or error_by_norm(ours, theirs) <= 1e-10  # of one expert's router both zero


def test_shapes_of_two_three_and_no_tokens():
    delta, base = delta_for(dl.LoRAExperts(r=2))
    x = torch.randn(2, T, IN, dtype=torch.float64)
    assert_close_by_norm(delta(x, base).flatten(0, 1), delta(x.flatten(0, 1), base), 1e-12)
    before = delta.measures()
    empty = delta(x[:, :0], base)
    assert empty.shape == (2, 0, OUT)
    assert delta(x[:0, 0], base).shape == (0, OUT)
    assert delta.measures() == before
    empty.sum().backward()
    assert all(not p.grad.any() for p in delta.parameters())


def test_only_routed_experts_get_gradients_and_no_other_drifts():
    """An expert that is never routed has a gradient of exactly zero; AdamW then moves it by weight decay alone."""
    delta, base = delta_for(dl.LoRAExperts(experts=4, top_k=2, r=2, balance=0), dtype=torch.float32)
    with torch.no_grad():  # the first two for every x
        delta.router.zero_()
        delta.router[:, 0] = torch.tensor([3.0, 3.0, -3.0, -3.0])
    before = {name: p.detach().clone() for name, p in delta.named_parameters()}
    start = [p.detach().clone() for p in (delta.A[2:], delta.B[:, 2:])]
    for decay in (0.0, 0.1):
        optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2, weight_decay=decay)
        for step in range(3):
            x = torch.randn(T, IN, generator=torch.Generator().manual_seed(step))
            x[:, 0] = 1 + x[:, 0].abs()
            optimizer.zero_grad()
            delta(x, base).square().sum().backward()
            assert torch.count_nonzero(delta.A.grad[2:]) == torch.count_nonzero(delta.B.grad[:, 2:]) == 0
            assert delta.A.grad[:2].ne(0).all()
            assert delta.B.grad[:, :2].ne(0).all()
            assert torch.count_nonzero(delta.router.grad[2:]) == 0, "renormalised gates do not know the others"
            optimizer.step()
        now = (delta.A[2:], delta.B[:, 2:])
        shrunk = (1 - 1e-2 * decay) ** 3
        for value, was in zip(now, start, strict=True):
            if decay:
                assert_close_by_norm(value, shrunk * was, 1e-6)
            else:
                assert torch.equal(value, was)
    assert not torch.equal(delta.A[:2], before["A"][:2])


def test_an_expert_that_is_no_longer_routed_goes_on_by_momentum():
    """The gradient is zero, and Adam's first moment is not: what the card says."""
    delta, base = delta_for(dl.LoRAExperts(experts=2, top_k=1, renormalise=False, r=2, balance=0), dtype=torch.float32)
    with torch.no_grad():
        delta.router.zero_()
        delta.router[0, 0] = 3.0
    optimizer = torch.optim.Adam([delta.A, delta.B], lr=1e-2)
    x = torch.randn(T, IN)
    for sign in (1.0, -1.0):
        x[:, 0] = sign * (1 + x[:, 0].abs())
        optimizer.zero_grad()
        delta(x, base).square().sum().backward()
        before = delta.A[0].detach().clone()
        optimizer.step()
        assert bool(delta.A.grad[0].any()) == (sign > 0)
        assert not torch.equal(delta.A[0], before)


def test_ties_still_choose_k_experts():
    delta, base = delta_for(dl.LoRAExperts(experts=4, top_k=2, r=2))
    with torch.no_grad():
        delta.router.zero_()
    x = torch.randn(T, IN, dtype=torch.float64)
    gates = delta.gates(x)
    assert torch.equal((gates != 0).sum(-1), torch.full((T,), 2))
    assert torch.equal(gates.max(-1).values, torch.full((T,), 0.5, dtype=torch.float64))
    assert torch.equal(delta.gates(x), gates)
    assert delta(x, base).isfinite().all()


def test_all_experts_are_a_soft_mixture():
    spec = dl.LoRAExperts(experts=4, top_k=4, r=2, renormalise=False)
    delta, base = delta_for(spec)
    x = torch.randn(T, IN, dtype=torch.float64)
    p = torch.softmax(x @ delta.router.T, -1)
    change = torch.einsum("te,oer,eri,ti->to", p, delta.B, delta.A, x)
    assert_close_by_norm(delta(x, base), base(x) + spec.alpha / spec.r * change, 1e-12)
    again, _ = delta_for(spec.model_copy(update={"renormalise": True}))
    assert_close_by_norm(again(x, base), delta(x, base), 1e-12)


@pytest.mark.parametrize("renormalise", [True, False])
def test_one_expert_is_plain_lora(renormalise):
    """The same start, values and gradients, bit for bit."""
    one = dl.adapt(tiny_llama(), dl.LoRAExperts(experts=1, top_k=1, r=3, renormalise=renormalise, targets="all-linear"))
    lora = dl.adapt(tiny_llama(), dl.LoRA(r=3, targets="all-linear"))
    for path, delta in attached(one).items():
        other = attached(lora)[path]
        assert torch.equal(delta.A[0], other.A), "the start is drawn alike"
        with torch.no_grad():
            other.B.normal_()
            delta.B[:, 0] = other.B
    ours, theirs = loss_of(one), loss_of(lora)
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    for path, delta in attached(one).items():
        other = attached(lora)[path]
        assert_close_by_norm(delta.A.grad[0], other.A.grad, 1e-6)
        assert_close_by_norm(delta.B.grad[:, 0], other.B.grad, 1e-6)
        assert not delta.router.grad.any(), "one gate is always 1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_conv1d_and_16_bit_start_as_the_base(dtype):
    linear = Conv1D(OUT, IN).to(dtype)
    model = held_in(linear)
    x = torch.randn(3, 5, IN, dtype=dtype)
    want = model.linear(x)
    dl.adapt(model, dl.LoRAExperts(targets=["linear"]))
    assert torch.equal(model.linear(x), want)
    assert model.linear.delta.A.dtype is torch.float32
    perturbed(model)
    y = model.linear(x)
    assert y.dtype is dtype
    assert not torch.equal(y, want)


# The load-balance loss


def definition(router, x, k):
    """E Σ f P of one router, differentiable through P."""
    p = torch.softmax(x @ router.T, -1)
    chosen = p.topk(k).indices
    f = torch.stack([(chosen == e).to(p.dtype).mean() for e in range(len(router))])
    return len(router) * (f * p.mean(0)).sum()


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


def recorded(model):
    """The inputs of every delta in the last forward, by path."""
    seen = {}
    for path, delta in attached(model).items():
        delta.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0].detach()}))
    return seen


def expected_penalty(model, seen, spec):
    parts = [definition(d.router, seen[path].flatten(0, -2), spec.top_k) for path, d in attached(model).items()]
    return spec.balance * torch.stack(parts).sum()


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


def test_training_is_that_of_a_loop_with_the_definitions_penalty():
    spec = dl.LoRAExperts(r=2, balance=3.0)
    optim = OptimSpec(lr=1e-3, steps=3, batch=4, clip=None, warmup=0, schedule="constant")
    data = [Conversation.of(f"say {word}", word) for word in ("one", "two", "three", "four")]
    results = []
    for balance in (0.0, 3.0):
        model = perturbed(dl.adapt(tiny_llama(), spec.model_copy(update={"balance": balance})))
        dl.train(model, byte_tokenizer(), data, spec=LoopSpec(optim=optim, eval={"fraction": 0.0}), progress=False)
        results.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    without, got = results

    model = perturbed(dl.adapt(tiny_llama(), spec)).train()
    batch = collate(list(encode_all(byte_tokenizer(), data, 128)), 0)
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


# Measures


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


# Experts of a model that is a mixture itself

STACKS = ["mixtral", "mixtral-bf16", "qwen3_moe", "gpt_oss"]


@pytest.mark.parametrize("family", STACKS)
def test_on_experts_the_start_is_the_eager_base_bitwise(family):
    model = model_of(family)
    others = logits(model)  # of the implementation that transformers chose
    model.set_experts_implementation("eager")
    want = logits(model)
    dl.adapt(model, dl.LoRAExperts(r=2, targets=["gate_up_proj", "down_proj"]))
    assert torch.equal(logits(model), want)
    assert_close_by_norm(others, want, 1e-2 if "bf16" in family else 1e-5)
    ours = dl.adapt(model_of(family), dl.LoRAExperts(r=2, targets=["down_proj"]))
    assert torch.equal(logits(ours), want), "whichever the model is set to"


def expert_by_expert(module, x, index, weights, deltas, spec):
    """The experts' forward, a token and a choice at a time, with the mixture's equations in both linears."""

    def linear(name, e, token):
        W, bias = module._parameters[name][e], module._parameters.get(f"{name}_bias")
        y = (W.T if module.is_transposed else W) @ token + (0 if bias is None else bias[e])
        delta = deltas[name]
        p = torch.softmax(delta.router @ token, 0)
        chosen = p.topk(spec.top_k).indices.tolist()
        for i in chosen:
            gate = p[i] / sum(p[j] for j in chosen)
            y = y + spec.alpha / spec.r * gate * (delta.B[e][:, i] @ (delta.A[e][i] @ token))
        return y

    rows = []
    for token, experts, share in zip(x, index.tolist(), weights, strict=True):
        parts = []
        for e, w in zip(experts, share, strict=True):
            h = module._apply_gate(linear("gate_up_proj", e, token)[None])[0]
            parts.append(w * linear("down_proj", e, h))
        rows.append(sum(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_on_experts_outputs_and_gradients_are_those_of_a_loop(family):
    spec = dl.LoRAExperts(r=2, alpha=3, experts=3, top_k=2, targets=["gate_up_proj", "down_proj"], layers=[0])
    model = perturbed(dl.adapt(model_of(family).double(), spec), 0.3).eval()
    deltas = {path.rpartition(".")[2]: delta for path, delta in attached(model).items()}
    module = place(model, next(iter(attached(model)))).module
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    weights, index = torch.rand(7, 4, dtype=torch.float64).topk(2)
    index[index == 3] = 0  # nothing for the last expert
    index[:, 1] = (index[:, 0] + 1) % 3
    leaves = [x, *(p for d in deltas.values() for p in d.parameters())]
    got, want = module(x, index, weights), expert_by_expert(module, x, index, weights, deltas, spec)
    assert_close_by_norm(got, want, 1e-10)
    for ours, theirs in zip(gradients_of(got, leaves), gradients_of(want, leaves), strict=True):
        assert_close_by_norm(ours, theirs, 1e-10)
    module(x, index, weights).sum().backward()
    assert all(not d.A.grad[3].any() and not d.B.grad[3].any() for d in deltas.values())
    assert module(x[:0], index[:0], weights[:0]).shape == (0, 32)


def test_on_experts_with_a_weight_delta_beside_it():
    """One parameter of a module is shown adapted, the other's delta sees the tokens."""
    specs = [dl.LoRA(r=2, targets=["gate_up_proj"]), dl.LoRAExperts(experts=1, top_k=1, r=2, targets=["down_proj"])]
    both = perturbed(dl.adapt(model_of("mixtral"), specs))
    plain = dl.adapt(model_of("mixtral"), dl.LoRA(r=2, targets=["gate_up_proj", "down_proj"]))
    for path, delta in attached(both).items():
        other = attached(plain)[path]
        with torch.no_grad():
            one = isinstance(delta, LoRAExpertsDelta)
            other.A.copy_(delta.A[:, 0] if one else delta.A)
            other.B.copy_(delta.B[:, :, 0] if one else delta.B)
    assert_close_by_norm(logits(both), logits(plain), 1e-5)
    with dl.disabled(both):
        assert torch.equal(logits(both), logits(model_of("mixtral")))


def test_on_experts_the_balance_loss_counts_what_each_expert_was_sent():
    spec = dl.LoRAExperts(r=2, balance=0.3, targets=["down_proj"], layers=[0])
    model = perturbed(dl.adapt(model_of("mixtral"), spec)).train()
    seen = recorded(model)
    model(**inputs(model))
    (x,) = seen.values()
    assert x.shape == (2 * 12 * 2, 64), "each token at both of its experts"
    (delta,) = attached(model).values()
    want = definition(delta.router, x, 2)
    assert_close_by_norm(dl.penalty(model), 0.3 * want, 1e-5)
    got = torch.autograd.grad(dl.penalty(model), delta.router)[0]
    assert_close_by_norm(got, 0.3 * torch.autograd.grad(want, delta.router)[0], 1e-5)


def test_on_experts_of_another_build_it_is_refused():
    model = model_of("mixtral")
    del model.model.layers[1].mlp.experts.has_gate
    with pytest.raises(dl.UserError, match="not built as transformers builds experts"):
        dl.adapt(model, dl.LoRAExperts(targets=["down_proj"]))
    assert not attached(model)
    assert "delta" not in dict(model.model.layers[0].mlp.experts.named_children())


# Edges


def test_faults_are_named():
    with pytest.raises(dl.UserError, match="top_k=5 of 4 experts"):
        dl.LoRAExperts(top_k=5)
    with pytest.raises(dl.UserError, match="renormalise=False"):
        dl.LoRAExperts(top_k=1)
    model = dl.adapt(tiny_llama(), dl.LoRAExperts())
    with pytest.raises(dl.UserError, match="depends on the input"):
        dl.merged(model)


def test_save_and_load_are_bitwise_and_peft_refuses(tmp_path):
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRAExperts(r=2, experts=3, targets="all-linear")))
    dl.save_adapter(model, tmp_path / "a")
    other = dl.load_adapter(tiny_llama(), tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    assert '"DELTALAB"' in (tmp_path / "a" / "adapter_config.json").read_text()


def test_dropout_is_of_the_experts_input_and_not_the_routers():
    delta, base = delta_for(dl.LoRAExperts(r=2, dropout=0.5))
    x = torch.randn(200, IN, dtype=torch.float64)
    gates = delta.eval().gates(x)
    assert torch.equal(delta.train().gates(x), gates)
    torch.manual_seed(0)
    one = delta(x, base)
    torch.manual_seed(1)
    assert not torch.equal(delta(x, base), one)
    torch.manual_seed(0)
    assert torch.equal(delta(x, base), one)


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantised_base(bits):
    """The base's codes and the experts: the same sum as on the plain linear of what the codes stand for."""
    model = quantise(tiny_llama(), GroupQuantiser(bits, 8))
    plain = tiny_llama()
    with torch.no_grad():
        for path, linear in linears(plain).items():
            if isinstance(model.get_submodule(path), QuantisedLinear):
                linear.weight.copy_(model.get_submodule(path).weight)
    spec = dl.LoRAExperts(r=2, targets="all-linear")
    for each in (model, plain):
        perturbed(dl.adapt(each, spec))
    assert_close_by_norm(logits(model), logits(plain), 1e-5)
    loss_of(model.train()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
