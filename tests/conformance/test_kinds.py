"""Where a method sits: which kinds of place and which families it takes, what it refuses by name, and its gradients there."""

import pytest
import torch
from torch.func import functional_call

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.sites import SUBLAYERS, place
from tests.conformance.kit import arguments, double, every_pair, everywhere, holding_constants, run, where_it_sits
from tests.deltas.perturb import perturbed, states_equal
from tests.families import FAMILIES, REFUSED, model_of

PATHS = {
    "linear": "model.layers.0.self_attn.q_proj",
    "embedding": "model.embed_tokens",
    "experts": "model.layers.0.mlp.experts.down_proj",
    "attention": "model.layers.0.self_attn",
    "mlp": "model.layers.0.mlp",
}
"""A place of each kind in a mixtral."""


def test_a_kind_of_place_is_taken_or_refused_by_name(method, kind):
    model = model_of("mixtral")
    path = PATHS[kind]
    assert place(model, path).kind == kind
    if kind in method.sits_on:
        assert list(attached(dl.adapt(model, method(targets=[path])))) == [path]
        return
    said = rf"{method.__name__} does not go on '{path}'|target '{path}' matches no linear[\s\S]*a delta sits on linears"
    with pytest.raises(dl.UserError, match=said):
        dl.adapt(model, method(targets=[path]))
    assert states_equal(model, model_of("mixtral"))


@every_pair
def test_a_family_is_taken_or_refused_by_name(method, family):
    """What a method refuses stands in `REFUSED` with the reason; it takes all others."""
    model = model_of(family)
    if family not in REFUSED.get(method.__name__, ()):
        assert attached(dl.adapt(model, method(targets=everywhere(method, family))))
        return
    with pytest.raises(dl.UserError, match=rf"{method.__name__}[\s\S]*{REFUSED[method.__name__][family]}"):
        dl.adapt(model, method(targets=everywhere(method, family)))
    assert states_equal(model, model_of(family))


def test_what_is_refused_is_known():
    assert all(family in FAMILIES for families in REFUSED.values() for family in families)


@where_it_sits
def test_gradients_against_finite_differences(method, kind):
    family = "llama" if kind in SUBLAYERS else "mixtral"  # whose router rounds to fp32
    model = double(perturbed(dl.adapt(model_of(family), method(targets=[PATHS[kind]])), 0.3))
    held = place(model, PATHS[kind])
    holding_constants(held.module)
    values = {f"delta.{n}": p for n, p in held.module.delta.named_parameters()}
    leaves = [p.detach()[..., :40].clone().requires_grad_() for p in values.values()]  # enough of a long row

    args, kwargs = arguments(model, held.module) if kind in SUBLAYERS else ((), {})

    def forward(*leaves):
        whole = [torch.cat([leaf, p.detach()[..., 40:]], -1) for leaf, p in zip(leaves, values.values(), strict=True)]
        kept = dict(zip(values, whole, strict=True))
        return _first(functional_call(held.module, kept, args, kwargs)) if kind in SUBLAYERS else run(held, kept)

    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)
    if kind == "linear":
        x = torch.randn(2, held.W.shape[-1], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(held.module, x)
    if kind in SUBLAYERS:  # with all that it is given beside the hidden states
        x = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        by_name = {key: value for key, value in kwargs.items() if key != "hidden_states"}

        def through(x):
            return _first(held.module(x, *args[1:], **by_name))

        assert torch.autograd.gradcheck(through, x, atol=1e-7, fast_mode=True)


def _first(result):
    return result[0] if isinstance(result, tuple) else result
