"""What the conformance suite is made of: whom a test is for, and a model that a method is put on."""

import functools

import torch
from torch.func import functional_call
from torch.nn import functional as F

import deltalab as dl
from deltalab.cli.methods import row_of
from deltalab.deltas.adapt import attached
from deltalab.deltas.base import Delta
from deltalab.deltas.sites import SUBLAYERS, Place, is_quantised
from deltalab.deltas.spec import DeltaSpec
from tests.deltas.perturb import perturbed
from tests.families import FAMILIES, WIDTH, inputs, loss_of, model_of
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


def every_pair(test):
    """Of all methods and all families, in the fast suite too, and also where a method refuses the family."""
    test.every_pair = True
    return test


def with_experts(test):
    """For the methods that sit on experts."""
    return _also(test, lambda method: "experts" in method.sits_on)


def merging(test):
    """For the methods that are a change of the weight."""
    return _also(test, merges)


def not_merging(test):
    """For the methods that depend on the input."""
    return _also(test, lambda method: not merges(method))


def _also(test, wanted):
    before = getattr(test, "methods", lambda method: True)
    test.methods = lambda method: before(method) and wanted(method)
    return test


@functools.cache
def merges(method):
    """Whether a method's delta is a `WeightDelta`, as `deltalab methods` tells it."""
    return row_of(method.__name__, method).merges == "yes"


def blocks(method, family):
    """Targets: each place of the blocks that the method can sit on."""
    whole = [kind for kind in SUBLAYERS if kind in method.sits_on]
    return whole or ["all-linear" if "experts" in method.sits_on or not FAMILIES[family].experts else "attention"]


def everywhere(method, family):
    """The same, and the embedding."""
    embedding = FAMILIES[family].embedding if "embedding" in method.sits_on else None
    return [*blocks(method, family), embedding] if embedding else blocks(method, family)


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
        if kept and "weight" in kept and is_quantised(held.module):  # there is no parameter to put it in place of
            return F.linear(*args, kept["weight"].to(held.W.dtype), kept.get("bias", held.module.bias))
    else:
        x = torch.randn(7, WIDTH, generator=generator, dtype=held.W.dtype)
        weight, expert = torch.rand(7, held.W.shape[0], generator=generator).topk(2)
        args = (x, expert, weight.to(x.dtype))
    return functional_call(held.module, kept or {}, args)


def arguments(model, module):
    """What the module is given while the model computes: its arguments by place and by name."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs(model), use_cache=False)
    handle.remove()
    return seen[0]


def parameters(model):
    """Of the deltas, by name."""
    return {name: p for name, p in model.named_parameters() if ".delta." in name}


def everyone(model):
    """Deltas with experts send each token to all of them: rounding changes how much each counts, and not where it goes."""
    for delta in attached(model).values():
        if hasattr(delta, "top_k"):
            delta.top_k = len(delta.router)
    return model


def holding_constants(module):
    """What a method's backward takes for a constant stays what it first is: finite differences have to hold it too."""
    for delta in module.modules():
        if isinstance(delta, Delta):
            delta.constant = functools.partial(lambda first, value: first.setdefault("value", value.detach()), {})
