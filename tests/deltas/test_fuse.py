"""Kernels in whole models: where they run, that nothing but rounding depends on them, and what makes them step aside."""

import copy
import pickle

import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.deltas.fuse import told
from deltalab.deltas.fused import FusedMLP, FusedNorm
from deltalab.deltas.weights import adaptation, attached
from tests.deltas.perturb import perturbed, states_equal
from tests.families import FAMILIES, loss_of
from tests.helpers import tiny_gpt2, tiny_llama, tokens

ALL = {"targets": "all-linear"}
SPECS = [dl.LoRA(r=3, **ALL), dl.LoRA(r=3, dropout=0.2, **ALL), dl.DoRA(r=3, **ALL), dl.AdaLoRA(init_r=4, target_r=2, **ALL),
         dl.LoRA(r=3, init="pissa", **ALL), dl.LoRA(r=2, targets="q,v"), [dl.LoRA(r=2, **ALL), dl.Train("norms")]]  # fmt: skip


def told_of(model):
    return told(adaptation(model).switch)


def adapted(model, spec, kernels="auto"):
    model = perturbed(dl.adapt(copy.deepcopy(model), spec, kernels=kernels))
    for module in model.modules():  # of the models that drop something themselves
        if isinstance(module, nn.Dropout) and "Delta" not in type(module).__name__ and type(module) is nn.Dropout:
            module.p = 0.0
    return model.train()


def step(model, seed=0, **batch):
    """The loss and the gradients of one training pass."""
    torch.manual_seed(seed)
    model.zero_grad()
    batch = batch or {"input_ids": tokens(), "labels": tokens()}
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got, want, tolerance):
    assert abs(got[0] - want[0]) <= tolerance * abs(want[0])
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        assert (got[1][name] - grad).double().norm() <= tolerance * grad.double().norm() + 1e-14, name


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_a_step_is_the_plain_one(make, spec):
    """In fp64 to 1e-10, with the same entries dropped."""
    if make is tiny_gpt2 and getattr(spec, "targets", None) == "q,v":
        spec = dl.LoRA(r=2, targets="c_attn")
    model = make().double()
    got, want = (step(adapted(model, spec, kernels)) for kernels in ("auto", "plain"))
    assert_same_step(got, want, 1e-10)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt_oss",)])
def test_a_step_of_every_family_is_the_plain_one(family):
    model = FAMILIES[family].make()
    tolerance = 5e-2 if model.dtype is torch.bfloat16 else 2e-5
    results = []
    for kernels in ("auto", "plain"):
        made = adapted(model, dl.LoRA(r=3, targets="attention"), kernels)
        torch.manual_seed(0)
        loss = loss_of(made)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in made.named_parameters() if p.grad is not None}))
    assert_same_step(*results, tolerance)


def test_a_step_in_bf16_and_under_autocast():
    for dtype, autocast in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
        model = tiny_llama(dtype=dtype)
        exact = step(adapted(tiny_llama().to(dtype).double(), dl.LoRA(r=3, **ALL), "plain"))
        errors = []
        for kernels in ("auto", "plain"):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got = step(adapted(model, dl.LoRA(r=3, **ALL), kernels))
            errors.append(sum(float((got[1][n].double() - g).norm() ** 2) for n, g in exact[1].items()) ** 0.5)
        size = sum(float(g.norm() ** 2) for g in exact[1].values()) ** 0.5
        assert errors[0] < max(1.2 * errors[1], 1e-2 * size)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    spec = dl.LoRA(r=3, dropout=0.2, **ALL)
    model = tiny_llama().double()
    want = step(adapted(model, spec))
    made = adapted(model, spec)
    made.gradient_checkpointing_enable({"use_reentrant": reentrant})
    made.enable_input_require_grads()
    assert_same_step(step(made), want, 1e-10)
    ran = told_of(made)
    assert ran["MLP"] == 2 * len(made.model.layers)  # once more in the backward


def test_what_runs_where_is_told():
    made = adapted(tiny_llama(), dl.LoRA(r=3, **ALL))
    step(made)
    layers = len(made.model.layers)
    assert told_of(made) == {
        "3 low-rank linears of one input": layers, "MLP": layers, "low-rank linear": layers, "norm": 2 * layers + 1,
        "attention": "deltalab's",
    }  # fmt: skip
    plain = adapted(tiny_llama(), dl.LoRA(r=3, **ALL), "plain")
    step(plain)
    assert told_of(plain) == {}


def test_two_linears_of_one_input_beside_one_that_is_not_adapted():
    made = adapted(tiny_llama(), dl.LoRA(r=3, targets="q,v"))
    step(made)
    assert told_of(made)["2 low-rank linears of one input"] == len(made.model.layers)


def test_outside_of_training_and_disabled_the_model_is_bitwise_what_it_was():
    base = tiny_llama(dtype=torch.bfloat16)
    made = dl.adapt(copy.deepcopy(base), dl.LoRA(r=3, **ALL))
    ids = tokens()
    assert torch.equal(made(ids).logits, base(ids).logits)
    perturbed(made)
    with dl.disabled(made.train()):
        assert torch.equal(made(ids).logits, base.train()(ids).logits)
    assert told_of(made) == {}
    step(made)
    assert told_of(made)


def test_unload_switch_copy_pickle_and_merge_leave_no_kernel_behind():
    base = tiny_llama()
    made = adapted(base, dl.LoRA(r=3, **ALL))
    want = step(made)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_same_step(step(other), want, 1e-6)
        assert told_of(other)["MLP"] > told_of(made)["MLP"] - 1
        assert any(isinstance(m, FusedNorm) for m in other.modules())
    plain = dl.merged(made)
    assert not any(isinstance(m, (FusedNorm, FusedMLP)) or "_switch" in m.__dict__ for m in plain.modules())
    dl.adapt(made, dl.LoRA(r=2, targets="q,v"), adapter="second", kernels="plain")
    assert not any(isinstance(m, FusedNorm) for m in made.modules())
    dl.set_active(made, "default")
    assert_same_step(step(made.train()), want, 1e-6)
    assert states_equal(dl.unload(made).eval(), base)


@pytest.mark.parametrize("name", ["q_proj", "gate_proj", "down_proj", "act_fn", "mlp", "input_layernorm"])
@pytest.mark.parametrize("change", [False, True], ids=["looks", "changes"])
def test_a_hook_is_called_and_what_it_returns_counts(name, change):
    results = []
    for kernels in ("auto", "plain"):
        made = adapted(tiny_llama().double(), dl.LoRA(r=3, **ALL), kernels)
        seen = []

        def hook(module, args, output, seen=seen):
            seen.append(output.detach().clone())
            return 2 * output if change else None

        modules = [m for n, m in made.named_modules() if n.endswith(name)]
        for module in modules:
            module.register_forward_hook(hook)
        results.append((step(made), seen, len(modules)))
    (got, seen, count), (want, theirs, _) = results
    assert_same_step(got, want, 1e-10)
    assert len(seen) == len(theirs) == count
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(seen, theirs, strict=True))


def test_an_input_that_is_changed_after_the_norm_is_not_made_again_from_it():
    def pre(module, args):
        return (args[0] * 3,)

    def in_place(module, args, output):
        output.mul_(3)

    for register, target in ((nn.Module.register_forward_pre_hook, "q_proj"), (nn.Module.register_forward_hook, "post_attention_layernorm")):  # fmt: skip
        results = []
        for kernels in ("auto", "plain"):
            made = adapted(
                tiny_llama(), dl.LoRA(r=3, **ALL), kernels
            )  # llama's norm is fp32 in fp64 too, so no kernel's there
            for name, module in made.named_modules():
                if name.endswith(target):
                    register(module, pre if target == "q_proj" else in_place)
            results.append(step(made))
            assert ("norm" in told_of(made)) is (kernels == "auto")
        assert_same_step(*results, 1e-5)


def test_weights_that_train_and_masked_changes_go_the_plain_way():
    results, kept = [], []
    for kernels in ("auto", "plain"):
        made = adapted(tiny_llama().double(), [dl.LoRA(r=2, targets="q,v"), dl.Train("mlp")], kernels)
        for i, delta in enumerate(attached(made).values()):
            if i % 2:
                shape = delta.change(torch.zeros(delta.B.shape[0], delta.A.shape[1])).shape
                delta.keep = torch.rand(shape, generator=torch.Generator().manual_seed(i)) < 0.5
        results.append(step(made))
        kept.append(told_of(made))
    assert_same_step(*results, 1e-10)
    assert kept[0]["low-rank linear"]
    assert "MLP" not in kept[0]


def test_an_mlp_that_computes_something_else_is_left_alone():
    model = tiny_llama()

    class Other(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return 1.01 * super().forward(x)

    for layer in model.model.layers:
        layer.mlp.__class__ = Other
    made = adapted(model, dl.LoRA(r=3, **ALL))
    step(made)
    assert "MLP" not in told_of(made)
    assert told_of(made)["norm"]


def test_accumulated_gradients_are_the_sum():
    made = adapted(tiny_llama().double(), dl.LoRA(r=3, **ALL))
    (_, a), (_, b) = step(made, input_ids=tokens(seed=1), labels=tokens(seed=1)), step(made, input_ids=tokens(seed=2), labels=tokens(seed=2))  # fmt: skip
    made.zero_grad()
    for seed in (1, 2):
        made(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
    for name, p in made.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, a[name] + b[name], rtol=1e-9, atol=1e-15)


def test_a_name_that_is_none_is_refused():
    with pytest.raises(UserError, match="kernels"):
        dl.adapt(tiny_llama(), dl.LoRA(r=2), kernels="fast")


def test_an_input_changed_between_linears_that_read_it_is_read_again():
    """By a hook on the first of them, in place: what was computed ahead for the others is of another input."""
    results = []
    for kernels in ("auto", "plain"):
        made = adapted(tiny_llama().double(), dl.LoRA(r=3, **ALL), kernels)

        def hook(module, args, output):
            args[0].mul_(1.5)

        for layer in made.model.layers:
            layer.self_attn.q_proj.register_forward_hook(hook)
        with torch.no_grad():
            results.append(made(tokens()).logits)
    assert torch.allclose(*results, rtol=1e-9)


def test_a_base_shown_within_a_base_shown_stays_exact():
    base = tiny_llama(dtype=torch.bfloat16).train()
    made = perturbed(dl.adapt(copy.deepcopy(base), dl.LoRA(r=3, **ALL))).train()
    with dl.disabled(made):
        with dl.disabled(made):
            pass
        assert torch.equal(made(tokens()).logits, base(tokens()).logits)
        assert told_of(made) == {}  # weights of 1 round alike with kernels, so the equality alone would not tell
    step(made)
    assert told_of(made)["norm"]


def test_a_norm_kept_wider_than_its_input_gives_what_it_gave():
    """transformers' then gives the wider dtype; so does ours."""
    made = adapted(tiny_llama(dtype=torch.bfloat16), dl.LoRA(r=3, **ALL))
    norm = made.model.norm.float()
    assert norm(torch.ones(1, 2, 32, dtype=torch.bfloat16)).dtype is torch.float32
