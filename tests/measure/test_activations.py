"""Bytes that autograd keeps, against a count by hand."""

import torch
from torch import nn

from deltalab.measure.activations import saved_bytes


def test_saved_activations_are_those_counted_by_hand():
    first, second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4)
    model = nn.Sequential(first, nn.Tanh(), second)
    x = torch.randn(5, 8)
    # the first linear keeps x, tanh its output, the second the same output again; weights are the model's own
    assert saved_bytes(model, lambda: model(x)) == 4 * (5 * 8 + 5 * 16)
    assert saved_bytes(model, lambda: model(x).sum()) == 4 * (5 * 8 + 5 * 16)
    # a view keeps the storage that it is of
    wide = torch.randn(10, 8)
    assert saved_bytes(model, lambda: model(wide[:5])) == 4 * (10 * 8 + 5 * 16)
    # a buffer is the model's own as well, and what a frozen linear would need for its weight is not kept
    model.register_buffer("gain", torch.randn(5, 4))
    assert saved_bytes(model, lambda: model(x) * model.gain) == 4 * (5 * 8 + 5 * 16)
    first.requires_grad_(False)
    assert saved_bytes(model, lambda: model(x)) == 4 * (5 * 16)
