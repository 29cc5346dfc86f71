"""Zero-init attention against its paper written out, in every architecture that it goes on, and against itself."""

import copy
import threading

import pytest
import torch
import transformers
from torch import nn

import deltalab as dl
from deltalab.capture import inputs as watched
from deltalab.deltas.adapt import attached
from deltalab.deltas.attention import gated
from tests.deltas.perturb import perturbed, states_equal
from tests.deltas.zero_init import ARCHITECTURES, LONG, NARROW, by_the_paper, causal
from tests.families import MLP, SIZE, model_of
from tests.helpers import assert_close_by_norm, tiny_gpt2, tiny_llama, tokens

architectures = pytest.mark.parametrize("name", ARCHITECTURES)
VARIANTS = [("tanh", "head"), ("linear", "head"), ("tanh", "layer"), ("linear", "layer")]


def logits(model, ids=None, **more):
    with torch.no_grad():
        return model(input_ids=tokens(length=9) if ids is None else ids, **more).logits


def adapted(name, size=0.5, **fields):
    """A model in fp64 whose prompts and gates do something."""
    return perturbed(dl.adapt(ARCHITECTURES[name].make().double(), dl.ZeroInitPrefix(**{"length": 3, **fields})), size)


def parts(model):
    """Prompts and gates, as they are, layer by layer."""
    deltas = attached(model).values()
    return [delta.P for delta in deltas], [delta.g for delta in deltas]


def opened(gate, kind, heads):
    return (torch.tanh(gate) if kind == "tanh" else gate).expand(heads)


def paper(name, prompts, gates, kind="tanh", shown=None):
    model = ARCHITECTURES[name].make().double()
    heads = model.config.num_attention_heads
    return by_the_paper(model, ARCHITECTURES[name], prompts, [opened(g, kind, heads) for g in gates], shown)


def check(name, **fields):
    """Logits, and the gradients of prompts and gates, against the paper written out."""
    model = adapted(name, **fields)
    prompts, gates = ([p.detach().clone().requires_grad_() for p in group] for group in parts(model))
    ids = tokens(length=9)
    want = paper(name, prompts, gates, fields.get("gate", "tanh"))(input_ids=ids).logits
    got = model(input_ids=ids).logits
    assert_close_by_norm(got, want, 1e-10)
    assert (got - logits(ARCHITECTURES[name].make().double())).norm() / got.norm() > 1e-3
    coefficients = torch.randn(got.shape, dtype=torch.float64)
    (got * coefficients).sum().backward()
    (want * coefficients).sum().backward()
    for ours, theirs in zip([*parts(model)[0], *parts(model)[1]], [*prompts, *gates], strict=True):
        assert_close_by_norm(ours.grad, theirs.grad, 1e-9)
    return model


@architectures
def test_logits_and_gradients_are_the_papers(name):
    check(name)


@pytest.mark.parametrize(("gate", "gate_per"), VARIANTS)
@pytest.mark.parametrize("name", ["llama-head_dim", "gpt_neox"])
def test_the_variants_of_the_gate(name, gate, gate_per):
    model = check(name, gate=gate, gate_per=gate_per)
    assert {len(g) for g in parts(model)[1]} == {4 if gate_per == "head" else 1}
