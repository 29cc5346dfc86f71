"""The walks equal torch's, order and names included."""

import pytest
from torch import nn

from deltalab.core.modules import modules, named_parameters


class Odd(nn.Module):
    """A module used twice, a parameter used twice, a child that is None, and a parameter that is."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 3)
        self.blocks = nn.ModuleList([nn.Sequential(self.one, nn.Linear(3, 2, bias=False)), nn.ReLU(), self.one])
        self.nothing: nn.Module | None = None
        self.register_module("none", None)
        self.own = nn.Parameter(self.one.weight.detach().clone())
        self.last = nn.Linear(2, 3)
        self.last.weight = self.one.weight


@pytest.mark.parametrize("model", [Odd(), nn.Linear(2, 2), nn.Sequential(), nn.Sequential(Odd(), nn.Linear(1, 1))])
def test_they_equal_torchs(model: nn.Module) -> None:
    assert list(map(id, modules(model))) == list(map(id, model.modules()))
    found, want = named_parameters(model), dict(model.named_parameters())
    assert list(found) == list(want)
    assert all(found[name] is want[name] for name in want)
