"""The mixture of LoRA experts on linears: against a loop over tokens and experts, and plain LoRA."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.quantise import quantise
from deltalab.deltas.sites import linears
from deltalab.quant.base import QuantisedLinear
from deltalab.quant.linear import GroupQuantiser
from tests.deltas.perturb import perturbed
from tests.deltas.routed import IN, OUT, T, delta_for, gradients_of, held_in
from tests.families import logits, loss_of
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_llama


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


@pytest.mark.parametrize(
    ("experts", "top_k", "renormalise"),
    [
        (4, 2, True),
        (4, 2, False),
        (5, 3, True),
        (3, 3, True),
        (3, 3, False),
        (1, 1, True),
        (1, 1, False),
        (4, 1, False),
    ],
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
