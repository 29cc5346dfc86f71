"""What the tests of the mixture of LoRA experts share: a delta on a linear, and the load-balance loss by its definition."""

import torch
from torch import nn

from deltalab.deltas.adapt import attached
from deltalab.deltas.sites import place
from tests.deltas.perturb import base_of

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


def gradients_of(y, leaves):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    return torch.autograd.grad((weight * y).sum(), leaves)


def definition(router, x, k):
    """E Σ f P of one router, differentiable through P."""
    p = torch.softmax(x @ router.T, -1)
    chosen = p.topk(k).indices
    f = torch.stack([(chosen == e).to(p.dtype).mean() for e in range(len(router))])
    return len(router) * (f * p.mean(0)).sum()


def recorded(model):
    """The inputs of every delta in the last forward, by path."""
    seen = {}
    for path, delta in attached(model).items():
        delta.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0].detach()}))
    return seen


def expected_penalty(model, seen, spec):
    parts = [definition(d.router, seen[path].flatten(0, -2), spec.top_k) for path, d in attached(model).items()]
    return spec.balance * torch.stack(parts).sum()
