"""GroupLinear is the linear with its dequantised weight, in everything that a module does."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltalab as dl
from deltalab.quant.groups import dequantise, quantise
from deltalab.quant.linear import GroupLinear, GroupQuantiser, quantiser
from tests.helpers import assert_close_by_norm

bits = pytest.mark.parametrize("bits", [4, 8])


def made(bits=4, out=6, in_=48, group=16, dtype=torch.float32, bias=True):
    linear = nn.Linear(in_, out, bias=bias, dtype=dtype)
    return linear, GroupLinear(linear.weight, linear.bias, bits, group, dtype)


@bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_linear_with_the_dequantised_weight(bits, dtype, bias):
    linear, group = made(bits, dtype=dtype, bias=bias)
    W = dequantise(*quantise(linear.weight.detach(), bits, 16))
    assert group.weight.dtype is dtype
    assert torch.equal(group.weight, W.to(dtype))
    for x in (torch.randn(48, dtype=dtype), torch.randn(2, 3, 48, dtype=dtype)):
        assert torch.equal(group(x), F.linear(x, W.to(dtype), linear.bias))
    assert (group.out_features, group.in_features) == (6, 48)
    assert group.codes.numel() == 6 * 48 * bits // 8
    assert group.scale.dtype is torch.promote_types(dtype, torch.float32)
    assert ("weight" in dict(group.named_parameters())) is False
    assert [name for name, _ in group.named_parameters()] == ["bias"] * bias


@bits
def test_gradients(bits):
    _, group = made(bits, dtype=torch.float64)
    x = torch.randn(2, 3, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(group, (x,))
    assert torch.autograd.gradgradcheck(group, (x,))
    twin = group.plain(group.weight)
    for shape in ((48,), (5, 48), (2, 3, 48)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = torch.randn(shape, dtype=torch.float64) @ torch.ones(48, 6, dtype=torch.float64)
        got = torch.autograd.grad((group(x) * y).sum(), (x, group.bias))
        want = torch.autograd.grad((twin(x) * y).sum(), (x, twin.bias))
        for a, b in zip(got, want, strict=True):
            assert_close_by_norm(a, b, 1e-12)


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass():
    _, group = made(out=64, in_=64)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.dtype, t.numel())) or t, lambda t: t):
        group(torch.randn(2, 64, requires_grad=True)).sum()
    assert sizes
    assert all(n < 64 * 64 for _, n in sizes), sizes


def test_a_vector_map_and_autocast():
    linear, group = made()
    x = torch.randn(4, 48)
    assert_close_by_norm(torch.func.vmap(group)(x), group(x), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x.requires_grad_()
        y = group(x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype is torch.float32
    assert_close_by_norm(x.grad, group.weight.sum(0).expand_as(x), 2e-2)
    assert linear.bias.grad.dtype is torch.float32


def test_casting_keeps_scales_in_fp32_or_wider():
    _, group = made()
    before = group.state_dict()
    there = copy.deepcopy(group).to(torch.bfloat16)
    assert there.weight.dtype is there.bias.dtype is there(torch.randn(2, 48, dtype=torch.bfloat16)).dtype
    assert torch.equal(there.scale, before["scale"])
    assert torch.equal(there.offset, before["offset"])
    back = there.float()
    assert torch.equal(back.weight, group.weight)
    wide = copy.deepcopy(group).double()
    assert wide.weight.dtype is wide.scale.dtype is torch.float64
    assert_close_by_norm(wide.weight, group.weight, 1e-6)
    nowhere = copy.deepcopy(group).to("meta")
    assert nowhere.codes.device.type == nowhere.scale.device.type == nowhere.weight.device.type == "meta"
    assert nowhere.to_empty(device="cpu").scale.shape == group.scale.shape


def test_state_dict_copy_and_pickle():
    _, group = made()
    _, other = made()
    assert list(group.state_dict()) == ["bias", "codes", "scale", "offset"]
    assert not torch.equal(other.weight, group.weight)
    other.load_state_dict(group.state_dict())
    x = torch.randn(3, 48)
    for twin in (other, copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert torch.equal(twin(x), group(x))
        assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), group.buffers(), strict=True))
        twin.offset += 1
        assert not torch.equal(twin(x), group(x))
    assert "bits=4, group_size=16" in repr(group)


@bits
def test_a_change_within_groups_goes_into_the_offsets(bits):
    _, group = made(bits)
    W, codes, scale = group.weight, group.codes.clone(), group.scale.clone()
    change = torch.randn(6, 3).repeat_interleave(16, 1)
    assert group.absorb(change)
    assert_close_by_norm(group.weight, W + change, 1e-6)
    assert torch.equal(group.codes, codes)
    assert torch.equal(group.scale, scale)
    there = group.offset.clone()
    change[2, 20] = torch.nextafter(change[2, 20], torch.tensor(9.0))
    assert not group.absorb(change)
    assert torch.equal(group.offset, there)


def test_quantisers_by_name():
    assert quantiser("int4-group") == GroupQuantiser(4)
    assert quantiser("int8", 16) == GroupQuantiser(8, 16)
    with pytest.raises(dl.UserError, match="'int5' is no quantisation") as raised:
        quantiser("int5")
    assert "int4-group" in str(raised.value)
    W = torch.randn(4, 48)
    assert GroupQuantiser(4).linear(W, None, torch.float32).group_size == 24
    assert torch.equal(GroupQuantiser(4).round_trip(W), GroupQuantiser(4).linear(W, None, torch.float32).weight)
    with pytest.raises(dl.UserError, match="groups of 32 do not divide 48"):
        GroupQuantiser(4, 32).round_trip(W)
