"""Zeroing a group: the same as a model whose weights are zero there, and nothing left of it afterwards."""

import copy

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt
from deltalab.deltas.base import weight_of
from deltalab.deltas.select import scored_linears
from deltalab.safety.groups import Group
from deltalab.safety.interventions import zeroed
from tests.helpers import assert_close_by_norm, tiny_gpt2, tiny_llama, tokens


def some_group(model, share: float = 0.3) -> Group:
    generator = torch.Generator().manual_seed(0)
    shapes = {path: weight_of(module).shape for path, module in scored_linears(model).items()}
    return Group.of_masks(
        "some", {path: torch.rand(shape, generator=generator) < share for path, shape in shapes.items()}
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_zeroed_weights_compute_what_zeros_in_the_weights_do(make):
    model, ids = make(), tokens()
    group, before = some_group(model), model(ids).logits
    written = copy.deepcopy(model)
    with torch.no_grad():
        for path, module in scored_linears(written).items():
            weight_of(module)[group.mask(path)] = 0.0
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with zeroed(model, group), torch.no_grad():
        assert_close_by_norm(model(ids).logits, written(ids).logits, 1e-5)
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert set(model.state_dict()) == set(state)


def test_the_model_is_whole_again_after_an_error():
    model = tiny_llama()
    with pytest.raises(RuntimeError), zeroed(model, some_group(model)):
        raise RuntimeError
    assert not any("delta" in name for name, _ in model.named_modules())


def test_an_adapted_model_and_another_models_group_are_refused():
    model = tiny_llama()
    group = some_group(tiny_gpt2())
    with pytest.raises(UserError, match="of another model"), zeroed(model, group):
        pass
    adapt(model, LoRA(r=2))
    with pytest.raises(UserError, match="is adapted"), zeroed(model, some_group(model)):
        pass
