"""A delta that does something: the start of every method computes what the base does, so tests move it first."""

import torch
from torch import nn

from deltalab.deltas.adapt import attached, param_groups
from deltalab.deltas.base import Base, Dropout
from tests.helpers import tokens


def perturbed(model: nn.Module, size: float = 0.1, seed: int = 0) -> nn.Module:
    """Add noise to every parameter of every delta, and to the model's own parameters that train."""
    generator = torch.Generator().manual_seed(seed)
    moved = [p for delta in attached(model).values() for p in delta.parameters()]
    moved += [p for name, p in model.named_parameters() if p.requires_grad and ".delta." not in name]
    with torch.no_grad():
        for parameter in moved:
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    """The same keys in the same order, every tensor bitwise the same, the same classes and the same trainability."""
    first, second = a.state_dict(), b.state_dict()
    return (
        list(first) == list(second)
        and all(torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (first[key], second[key]))) for key in first)
        and [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
        and [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
    )


def base_of(W: torch.Tensor, bias: torch.Tensor | None = None) -> Base:
    """A linear with this weight, as a delta sees it."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None, dtype=W.dtype)
    linear.weight = nn.Parameter(W, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return Base(linear, linear)


def drawing_as_we_do(theirs: nn.Module) -> nn.Module:
    """A model of peft whose dropout draws its entries as ours does, in place: the same seed then drops the same ones."""
    for module in list(theirs.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                module.register_module(name, Dropout(child.p).train(child.training))
    return theirs


def trained_alike(ours: nn.Module, theirs: nn.Module) -> None:
    """Ten AdamW steps of our model and of peft's on the same batches, in place."""
    drawing_as_we_do(theirs)
    for model, parameters in (
        (ours, param_groups(ours, 1e-2)),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for step in range(10):
            torch.manual_seed(step)  # of the dropout
            model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
