"""What capture hands over, when, and that it leaves no trace: on the scores' own path and by itself."""

import functools

import pytest
import torch
from torch import nn

from deltalab.capture import gradients, inputs, per_sample, undisturbed
from deltalab.core.errors import UserError
from deltalab.deltas.select import scored_linears
from deltalab.safety import snip as module
from deltalab.safety.scores import snip, wanda
from tests.helpers import tiny_llama, tokens
from tests.safety.reference import brute_snip, brute_wanda, largest, ragged, samples


def twice(model, path="model.layers.1.mlp.up_proj"):
    """The gate of the MLP becomes its up projection: one linear, called twice in each forward."""
    mlp = model.get_submodule(path.rpartition(".")[0])
    mlp.gate_proj = mlp.up_proj
    return model, {path: model.get_submodule(path), "model.layers.0.mlp.up_proj": model.model.layers[0].mlp.up_proj}


def test_gradients_are_those_of_autograd():
    """Σ δᵀ x of a batch is the weight's gradient, fp64; parameters need no gradient for it."""
    model, ids = tiny_llama(dtype=torch.float64), tokens(3, 9)
    linears = scored_linears(model)
    want = torch.autograd.grad(model(ids).logits.square().mean(), [m.weight for m in linears.values()])
    got = {}

    def take(path, calls):
        assert path not in got
        got[path] = sum(torch.einsum("nto,nti->oi", delta, x) for x, delta in calls)

    with undisturbed(model), gradients(linears, take) as backward:
        assert not any(p.requires_grad for p in model.parameters())
        backward(model(ids).logits.square().mean())
    assert set(got) == set(linears)
    for path, gradient in zip(linears, want, strict=True):
        assert (got[path] - gradient).norm() <= 1e-10 * gradient.norm()


def test_what_was_handed_over_is_not_kept():
    """When a module's turn comes, those that came before it are forgotten; after the backward, all are."""
    model, ids, waiting = tiny_llama(), tokens(2, 7), []
    linears = scored_linears(model)
    with undisturbed(model), gradients(linears, lambda path, calls: waiting.append(len(record.seen))) as backward:
        record = backward.__self__
        backward(model(ids).logits.sum())
        assert waiting == list(range(len(linears) - 1, -1, -1))
        assert record.seen == record.arrived == {}


def test_nothing_below_the_first_observed_module_is_differentiated():
    """The embeddings and the first block are outside the graph: no gradient passes there."""
    model, ids = tiny_llama(layers=3), tokens(2, 7)
    outside, inside = [], []
    model.model.layers[0].register_forward_hook(lambda m, a, y: outside.append(y.requires_grad))
    model.model.layers[1].register_forward_hook(lambda m, a, y: inside.append(y.requires_grad))
    linears = {p: m for p, m in scored_linears(model).items() if ".layers.0." not in p}
    with undisturbed(model), gradients(linears, lambda path, calls: None) as backward:
        backward(model(ids).logits.sum())
    assert outside == [False]
    assert inside == [True]


def test_a_module_that_is_called_twice_is_summed_first():
    """Against autograd, which adds a weight's gradients up before any absolute value."""
    model, modules = twice(tiny_llama(dtype=torch.float64))
    data = ragged()
    assert largest(snip(model, data, modules=modules, batch=3), brute_snip(model, data, modules=modules)) < 1e-10
    assert largest(wanda(model, data, modules=modules, batch=3), brute_wanda(model, data, modules=modules)) < 1e-10
    calls = []
    with undisturbed(model), gradients(modules, lambda path, found: calls.append((path, len(found)))) as backward:
        backward(model(tokens()).logits.sum())
    assert calls == [("model.layers.1.mlp.up_proj", 2), ("model.layers.0.mlp.up_proj", 1)]


def test_a_call_that_the_loss_does_not_use_counts_as_nothing():
    """The second of two calls leads nowhere; the first one still has its gradient."""
    model, data = tiny_llama(dtype=torch.float64), ragged()
    mlp = model.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda m, args: (mlp.up_proj(args[0]), None)[1])
    modules = {"model.layers.1.mlp.up_proj": mlp.up_proj}
    assert largest(snip(model, data, modules=modules, batch=3), brute_snip(model, data, modules=modules)) < 1e-10


class Doubled(nn.Linear):
    """No plain linear: the weight's gradient is twice δᵀ x."""

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight)


class Beside(nn.Linear):
    """A plain linear with something beside it, as a low-rank delta has."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize(("kind", "refused"), [(Doubled, True), (Beside, False)])
def test_a_linear_whose_gradient_is_no_product_is_refused_by_name(kind, refused):
    model, data = tiny_llama(dtype=torch.float64), samples(2)
    model.model.layers[0].mlp.up_proj.__class__ = kind
    if refused:
        with pytest.raises(
            UserError, match=r"'model\.layers\.0\.mlp\.up_proj' is not that of a plain linear"
        ) as caught:
            snip(model, data)
        assert "a Doubled; by norm 0.5 off" in str(caught.value)
        assert all(not p.requires_grad or p.grad is None for p in model.parameters())
    else:
        assert largest(snip(model, data), brute_snip(model, data)) < 1e-10


def test_a_weight_that_is_used_elsewhere_too_is_refused():
    """The output layer is tied to it: part of its gradient does not pass the observed module."""
    model = tiny_llama(mlp=270, dtype=torch.float64)
    up = model.model.layers[0].mlp.up_proj
    model.lm_head.weight = up.weight
    with pytest.raises(UserError, match="'up' is not that of a plain linear"):
        snip(model, samples(2), modules={"up": up})


def test_a_module_that_the_loss_does_not_reach_is_named():
    model = tiny_llama()
    apart = nn.Linear(4, 4)
    q = model.model.layers[0].self_attn.q_proj
    with pytest.raises(UserError, match="'apart' got no gradient"):
        snip(model, samples(2), modules={"q": q, "apart": apart})
    with pytest.raises(UserError, match="'apart' was called on no sample"):
        wanda(model, samples(2), modules={"q": q, "apart": apart})
    with pytest.raises(UserError, match="none of the observed modules"):
        snip(model, samples(2), modules={"apart": apart})


def test_flattened_samples_are_told_apart_or_refused():
    x = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(per_sample("a", x, 2), x)
    assert torch.equal(per_sample("a", x.view(6, 4), 2), x)
    assert per_sample("a", x, 1).shape == (1, 6, 4)
    for wrong, n in ((x, 3), (x.view(6, 4), 4)):
        with pytest.raises(UserError, match="samples of a batch cannot be told apart in 'a'"):
            per_sample("a", wrong, n)


class Flat(nn.Linear):
    """Flattens batch and tokens around itself, as some decoders do."""

    inner: nn.Linear

    def forward(self, x):
        return self.inner(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("make", [snip, wanda])
def test_a_linear_that_gets_flattened_samples(make):
    model, data = tiny_llama(dtype=torch.float64), ragged()
    want = make(tiny_llama(dtype=torch.float64), data, batch=3)["model.layers.0.mlp.up_proj"]
    outer = Flat(1, 1)
    outer.inner = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = outer
    got = make(model, data, batch=3, modules={"up": outer.inner})["up"]
    assert (got - want).abs().max() <= 1e-12 * want.max()


def test_a_linear_that_misses_tokens_has_no_positions():
    model = tiny_llama()
    up = model.model.layers[0].mlp.up_proj
    up.register_forward_pre_hook(lambda m, args: (args[0][:, 1:],), prepend=True)
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, y: args[0])
    model.model.layers[0].mlp.forward = functools.partial(lambda up, x: (up(x), x)[1], up)
    with pytest.raises(UserError, match="'up' does not see every token"):
        wanda(model, ragged(), modules={"up": up}, batch=3)


def test_inputs_come_as_they_are():
    model, ids, seen = tiny_llama(), tokens(2, 7), {}
    q = model.model.layers[0].self_attn.q_proj
    with inputs({"q": q}, seen.__setitem__):
        hidden = model(ids, output_hidden_states=True).hidden_states[0]
    assert torch.equal(seen["q"], model.model.layers[0].input_layernorm(hidden))
    assert not seen["q"].requires_grad
    assert not q._forward_pre_hooks


@pytest.mark.parametrize("make", [snip, wanda])
def test_the_model_is_left_as_it_was(make):
    model = tiny_llama()
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    q = model.model.layers[0].self_attn.q_proj.weight
    q.grad = torch.ones_like(q)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]

    def check():
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == needs
        assert torch.equal(q.grad, torch.ones_like(q))
        assert sum(p.grad is not None for p in model.parameters()) == 1
        assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())

    make(model, samples())
    check()

    def stop(done):
        raise KeyboardInterrupt

    for broken in ({"progress": stop}, {"batch": 2, "progress": stop}):
        with pytest.raises(KeyboardInterrupt):
            make(model, samples(), **broken)
        check()
    torch.set_grad_enabled(False)
    try:
        assert float(make(model, samples(1))["model.layers.0.self_attn.q_proj"].sum()) > 0
    finally:
        torch.set_grad_enabled(True)


def test_no_second_set_of_gradients(monkeypatch):
    """At most one weight holds a gradient, and only in the first batch, where it is compared with ours."""
    model, held, batches = tiny_llama(), [], []
    weights = [m.weight for m in scored_linears(model).values()]
    take, run = module._Sums.take, module._Sums.run

    def watched(self, path, calls):
        held.append(sum(w.grad is not None for w in weights))
        return take(self, path, calls)

    def counted(self, *args):
        batches.append(self.unsigned is not None)
        return run(self, *args)

    monkeypatch.setattr(module._Sums, "take", watched)
    monkeypatch.setattr(module._Sums, "run", counted)
    snip(model, samples(4), batch=2)
    assert batches == [True, False]
    assert len(held) == 2 * len(weights)
    assert max(held) <= 1
