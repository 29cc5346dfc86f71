"""The mixture of LoRA experts on the experts of a model that is a mixture itself."""

import pytest
import torch

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.lora_experts import LoRAExpertsDelta
from deltalab.deltas.sites import place
from tests.deltas.perturb import perturbed
from tests.deltas.routed import definition, gradients_of, recorded
from tests.families import inputs, logits, model_of
from tests.helpers import assert_close_by_norm

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
