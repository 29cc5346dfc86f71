"""The optimizer's step is AdamW's in each form it takes, and its state comes back bit for bit."""

import sys

import pytest
import torch
from torch import nn

from deltalab.core.errors import UserError
from deltalab.train import OptimSpec, optim
from deltalab.train.optim import load_optimizer_state, make_optimizer, optimizer_state
from tests.helpers import assert_close_by_norm

STEPS = 50
CUDA = torch.device("cuda")


class Adapter(nn.Module):
    """Parameters of an adapter: matrices, vectors, one that hardly gets a gradient, and one that is empty."""

    def __init__(self, dtype=torch.float32, turned=False):
        super().__init__()
        torch.manual_seed(0)
        shapes = {"A": (4, 33), "B": (65, 4), "long": (8, 1024), "rare": (3, 5), "m": (65,), "empty": (0, 33)}
        for name, shape in shapes.items():
            value = torch.randn(shape, dtype=dtype)
            setattr(self, name, nn.Parameter(value.mT.contiguous().mT if turned and value.ndim > 1 else value))


def give_gradients(model, step):
    """Some are missing, and some are laid out as no gradient of the parameter's own layout would be."""
    torch.manual_seed(step)
    for i, (name, p) in enumerate(model.named_parameters()):
        value = torch.randn(p.shape, dtype=p.dtype)
        p.grad = None
        if (step + i) % 4 and (name != "rare" or step % 9 == 0):
            turned = value.mT.contiguous().mT if p.ndim > 1 else value
            (p * turned).sum().backward()


def stepped(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - step / STEPS)
        give_gradients(model, step)
        optimizer.step()
    return model


def reference(model, spec):
    """torch's plain loop over the same groups."""
    wide = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": ps, "weight_decay": decay, "base_lr": spec.lr}
        for ps, decay in ((wide, spec.weight_decay), (rest, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, foreach=False)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-15)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_fifty_steps_are_those_of_torchs_plain_adamw(dtype, bound, turned):
    """turned: parameters whose memory runs the other way, which the fused step would read wrongly."""
    spec = OptimSpec(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98))
    ours, plain = Adapter(dtype, turned), Adapter(dtype, turned)
    optimizer = make_optimizer(ours, spec)
    assert bool(optimizer.defaults["fused"]) is not turned
    stepped(ours, optimizer, STEPS)
    stepped(plain, reference(plain, spec), STEPS)
    for name, p in plain.named_parameters():
        assert_close_by_norm(dict(ours.named_parameters())[name].detach(), p.detach(), bound)
    assert not torch.equal(ours.A, Adapter(dtype).A)


def test_the_fused_step_is_for_devices_that_have_it():
    model = Adapter()
    model.extra = nn.Parameter(torch.empty(2, 2, device="meta"))
    assert not make_optimizer(model, OptimSpec()).defaults["fused"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bits", [None, 32, 8])
def test_the_state_comes_back_bit_for_bit(bits, turned, monkeypatch):
    """Through a dictionary of tensors as a checkpoint holds it. The paged ones are bitsandbytes' own, which run on the
    CPU too: there they page nothing."""
    if bits:
        pytest.importorskip("bitsandbytes")
    spec = OptimSpec(lr=1e-2, weight_decay=0.1, paged=bits)
    through, stopped, again = (Adapter(turned=turned) for _ in range(3))
    stepped(through, make_optimizer(through, spec, CUDA), 12)
    first = make_optimizer(stopped, spec, CUDA)
    stepped(stopped, first, 6)
    kept = optimizer_state(first, {p: name for name, p in stopped.named_parameters()})
    kept = {name: tensor.clone() for name, tensor in kept.items()}
    again.load_state_dict(stopped.state_dict())
    second = make_optimizer(again, spec, CUDA)
    load_optimizer_state(second, kept, again)
    stepped(again, second, 6, first=6)
    for name, p in through.named_parameters():
        assert torch.equal(p, dict(again.named_parameters())[name]), name
    storages = [tensor.untyped_storage().data_ptr() for tensor in kept.values() if tensor.numel()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize(("bits", "bound"), [(32, 1e-6), (8, 0.05)])
def test_paged_moments_are_adamws(bits, bound):
    """bitsandbytes' step beside torch's; 8-bit moments round."""
    pytest.importorskip("bitsandbytes")
    spec = OptimSpec(lr=1e-2, weight_decay=0.1)
    ours, plain = Adapter(), Adapter()
    optimizer = make_optimizer(ours, spec.model_copy(update={"paged": bits}), CUDA)
    assert type(optimizer).__name__ == f"PagedAdamW{bits}bit"
    stepped(ours, optimizer, STEPS)
    stepped(plain, reference(plain, spec), STEPS)
    start = Adapter()
    for name in ("A", "B", "long", "m"):
        moved = getattr(plain, name).detach() - getattr(start, name).detach()
        assert_close_by_norm(getattr(ours, name).detach() - getattr(start, name).detach(), moved, bound)


def test_paged_moments_that_cannot_be_had(monkeypatch):
    with pytest.raises(UserError, match="no such device") as error:
        make_optimizer(Adapter(), OptimSpec(paged=8))
    assert "device cpu" in error.value.found
    assert "optim.paged" in error.value.next
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="bitsandbytes is not installed") as error:
        make_optimizer(Adapter(), OptimSpec(paged=32), CUDA)
    assert "pip install" in error.value.next


def test_a_step_is_seen_by_what_goes_by_versions():
    model = Adapter()
    trained = {name: p for name, p in model.named_parameters() if p.numel()}
    optimizer = make_optimizer(model, OptimSpec(), torch.device("cpu"))
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    before = {name: p._version for name, p in trained.items()}
    optimizer.step()
    assert all(p._version > before[name] for name, p in trained.items())
