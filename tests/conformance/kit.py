"""What the conformance suite is made of: whom a test is for, and a model that a method is put on."""

import functools

import torch
from torch.func import functional_call

import deltalab as dl
from deltalab.deltas.base import Delta
from deltalab.deltas.sites import Place
from deltalab.deltas.spec import DeltaSpec
from tests.deltas.perturb import perturbed
from tests.families import FAMILIES, WIDTH, loss_of, model_of
from tests.helpers import tokens


def of(wanted):
    """A test for some families alone."""

    def mark(function):
        function.families = wanted
        return function

    return mark


def where_it_sits(test):
    """For each method only the kinds of weight that it sits on."""
    test.where_it_sits = True
    return test


def with_experts(test):
    """For the methods that sit on experts."""
    test.methods = lambda method: "experts" in method.sits_on
    return test


def everywhere(method, family):
    """Targets: each weight of the blocks that the method can sit on, and the embedding."""
    about = FAMILIES[family]
    blocks = "all-linear" if "experts" in method.sits_on or not about.experts else "attention"
    return [blocks, about.embedding] if "embedding" in method.sits_on and about.embedding else [blocks]


def adapted(method, family, *, moved=True):
    """A model with the method wherever it can be; moved: away from its start, and its schedule gone through."""
    model = dl.adapt(model_of(family), method(targets=everywhere(method, family)))
    return driven(perturbed(model), method) if moved else model


def driven(model, method, steps=3):
    """Each step's gradients, and what the method does with them."""
    if method.after_step is DeltaSpec.after_step:
        return model
    for t in range(1, steps + 1):
        loss_of(model, seed=t).backward()
        dl.step(model, t, steps)
        model.zero_grad()
    return model


def gradients(model):
    """Copies, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def double(model):
    """In fp64, which of the experts' implementations the plain one alone takes."""
    model = model.double()
    model.config._experts_implementation = "eager"
    return model


def run(held: Place, kept=None, seed=0):
    """The output of the module that holds a weight, for random input; kept: other values of its parameters."""
    generator = torch.Generator().manual_seed(seed)
    if held.kind == "embedding":
        args = (tokens(2, 5, held.W.shape[1]),)
    elif held.kind == "linear":
        args = (torch.randn(3, 5, held.W.shape[1], generator=generator, dtype=held.W.dtype),)
    else:
        x = torch.randn(7, WIDTH, generator=generator, dtype=held.W.dtype)
        weight, expert = torch.rand(7, held.W.shape[0], generator=generator).topk(2)
        args = (x, expert, weight.to(x.dtype))
    return functional_call(held.module, kept or {}, args)


def parameters(model):
    """Of the deltas, by name."""
    return {name: p for name, p in model.named_parameters() if ".delta." in name}


def holding_constants(module):
    """What a method's backward takes for a constant stays what it first is: finite differences have to hold it too."""
    for delta in module.modules():
        if isinstance(delta, Delta):
            delta.constant = functools.partial(lambda first, value: first.setdefault("value", value.detach()), {})
