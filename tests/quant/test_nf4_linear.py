"""NF4Linear is the linear with its dequantised weight, in everything that a module does, and bitsandbytes' in a file."""

import copy
import json
import pickle

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltalab as dl
from deltalab.quant.linear import quantiser
from deltalab.quant.nf4 import CODES, empty, quantise
from deltalab.quant.nf4_linear import STATE, NF4Linear, NF4Quantiser
from tests.helpers import assert_close_by_norm, error_by_norm
from tests.quant.bnb import same

double = pytest.mark.parametrize("double_quant", [True, False])
OUT, IN = 96, 128


def made(out=OUT, in_=IN, double_quant=True, dtype=torch.float32, bias=True, blocksize=64):
    linear = nn.Linear(in_, out, bias=bias, dtype=dtype)
    return linear, NF4Quantiser(blocksize, double_quant).linear(linear.weight, linear.bias, dtype)


def theirs(linear, double_quant=True, blocksize=64, dtype=torch.float32):
    """bitsandbytes' linear of the same weight."""
    four = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4",
                             compress_statistics=double_quant, compute_dtype=dtype)  # fmt: skip
    four.weight.blocksize = blocksize
    four.load_state_dict(linear.state_dict())
    return four.to(dtype).to("cpu").train()  # in evaluation it rounds its scales to bf16


@double
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_linear_with_the_dequantised_weight(double_quant, dtype, bias):
    for out, in_ in ((OUT, IN), (7, 33)):
        linear, four = made(out, in_, double_quant, dtype, bias)
        W = quantise(linear.weight, 64, double_quant).weight(dtype)
        assert same(four.weight, W)
        for x in (torch.randn(in_, dtype=dtype), torch.randn(2, 3, in_, dtype=dtype)):
            assert torch.equal(four(x), F.linear(x, W, linear.bias))
        assert (four.out_features, four.in_features, four.group_size) == (out, in_, None)
        assert [name for name, _ in four.named_parameters()] == ["bias"] * bias
        assert error_by_norm(W, linear.weight) < 0.12
    kept = sum(b.numel() * b.element_size() for name, b in made(4096, 64)[1].named_buffers() if name != "nested_map")
    bits = kept * 8 / (4096 * 64)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)  # QLoRA, section 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_the_linear_of_bitsandbytes_does(dtype):
    linear, four = made(dtype=dtype)
    x = torch.randn(5, IN, dtype=dtype, requires_grad=True)
    g = torch.randn(5, OUT, dtype=dtype)
    other = theirs(linear, dtype=dtype)
    assert torch.equal(four(x), other(x))
    got, want = (torch.autograd.grad((model(x) * g).sum(), x)[0] for model in (four, other))
    assert_close_by_norm(got, want, 1e-6 if dtype is torch.float32 else 1e-2)


def test_gradients():
    _, four = made(6, 32, dtype=torch.float64)
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(four, (x,))
    assert torch.autograd.gradgradcheck(four, (x,))
    twin = four.plain(four.weight)
    for shape in ((32,), (5, 32), (2, 3, 32)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        g = torch.randn(*shape[:-1], 6, dtype=torch.float64)
        got = torch.autograd.grad((four(x) * g).sum(), (x, four.bias))
        want = torch.autograd.grad((twin(x) * g).sum(), (x, twin.bias))
        for a, b in zip(got, want, strict=True):
            assert_close_by_norm(a, b, 1e-12)


@double
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(double_quant):
    _, four = made(double_quant=double_quant)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        four(torch.randn(2, IN, requires_grad=True)).sum()
    assert OUT * IN // 2 in sizes
    assert max(sizes) == OUT * IN // 2, sizes


def test_a_vector_map_and_autocast():
    linear, four = made()
    x = torch.randn(4, IN)
    assert_close_by_norm(torch.func.vmap(four)(x), four(x), 1e-6)
    per_row = torch.func.vmap(torch.func.grad(lambda row: four(row).square().sum()))(x)
    assert_close_by_norm(per_row, 2 * four(x) @ four.weight, 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x.requires_grad_()
        y = four(x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype is torch.float32
    assert_close_by_norm(x.grad, four.weight.sum(0).expand_as(x), 2e-2)
    assert linear.bias.grad.dtype is torch.float32


@double
def test_casting_keeps_the_scales(double_quant):
    _, four = made(double_quant=double_quant)
    before = {name: buffer.clone() for name, buffer in four.named_buffers()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        there = copy.deepcopy(four).to(dtype)
        assert there.weight.dtype is there.bias.dtype is there(torch.randn(2, IN, dtype=dtype)).dtype is dtype
        assert all(same(buffer, before[name]) for name, buffer in there.named_buffers())
        assert same(there.weight, four.kept().weight(dtype))
        assert same(there.float().weight, four.weight)
    nowhere = copy.deepcopy(four).to("meta", torch.bfloat16)
    assert {b.device.type for b in nowhere.buffers()} == {"meta"} == {nowhere.weight.device.type}
    assert nowhere.to_empty(device="cpu").absmax.shape == four.absmax.shape


@double
def test_state_dict_copy_and_pickle(double_quant):
    _, four = made(double_quant=double_quant)
    nested = ["nested_absmax", "nested_map", "offset"] if double_quant else []
    assert list(four.state_dict()) == ["bias", "codes", "absmax", *nested]
    blank = NF4Linear(
        empty((OUT, IN), 64, double_quant, torch.device("cpu")), nn.Parameter(torch.empty(OUT)), torch.float32
    )
    blank.load_state_dict(four.state_dict())
    skeleton = NF4Linear(quantise(torch.empty(OUT, IN, device="meta"), 64, double_quant), None, torch.float32)
    skeleton.load_state_dict({k: v for k, v in four.state_dict().items() if k != "bias"}, assign=True)
    x = torch.randn(3, IN)
    assert torch.equal(skeleton(x) + four.bias, F.linear(x, four.weight) + four.bias)
    for twin in (blank, copy.deepcopy(four), pickle.loads(pickle.dumps(four))):
        assert torch.equal(twin(x), four(x))
        assert all(same(a, b) for a, b in zip(twin.buffers(), four.buffers(), strict=True))
        twin.codes.fill_(0)
        assert not torch.equal(twin(x), four(x))
    assert f"blocksize=64, double_quant={double_quant}" in repr(four)


@double
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_is_what_bitsandbytes_writes_and_both_ways(double_quant, dtype):
    for blocksize in (64, 256):
        linear, four = made(OUT, 256, double_quant, dtype, blocksize=blocksize)
        other = theirs(linear, double_quant, blocksize, dtype)
        written, ours = other.state_dict(), four.to_bnb()
        written.pop("bias")
        assert list(written) == list(ours)
        assert all(same(ours[name], tensor) for name, tensor in written.items())
        again = NF4Linear.from_bnb(written, linear.bias)
        assert (again.blocksize, again.double_quant, again.dtype) == (blocksize, double_quant, dtype)
        assert all(same(a, b) for a, b in zip(again.buffers(), four.buffers(), strict=True))
        stats = {name.removeprefix("weight."): t for name, t in ours.items() if name != "weight"}
        read = bnb.nn.Params4bit.from_prequantized(ours["weight"], stats, device="cpu")
        assert same(bnb.functional.dequantize_4bit(read.data, read.quant_state), four.weight)
    assert NF4Linear.from_bnb(written, None, torch.float32).dtype is torch.float32
    seen_as = written | {"weight": written["weight"].view(-1).view(torch.bfloat16).view(-1, 1)}  # as FSDP wants it
    assert same(NF4Linear.from_bnb(seen_as, None).weight, four.weight)


def test_what_is_no_weight_in_nf4_is_refused_by_name():
    tensors = made()[1].to_bnb()
    said = json.loads(bytes(tensors[STATE].tolist()))

    def state(**other):
        return {STATE: torch.tensor(list(json.dumps(said | other).encode()), dtype=torch.uint8)}

    for change, match in (
        ({STATE: None}, "no weight in NF4"),
        ({STATE: torch.tensor([1, 2, 255], dtype=torch.uint8)}, "does not say"),
        (state(quant_type="fp4"), "does not say"),
        (state(dtype="complex64"), "does not say"),
        (state(blocksize=48), "no blocks of 48"),
        (state(blocksize=128), "absmax .* does not fit"),
        (state(shape=[OUT, IN // 2]), "codes .* does not fit"),
        (state(nested_blocksize=64), "nested in blocks of 64"),
        ({"weight.absmax": None}, "'weight.absmax' is missing"),
        ({"weight.nested_absmax": None}, "'weight.nested_absmax' is missing"),
        ({"weight.absmax": torch.ones(OUT * IN // 64)}, "absmax .* does not fit"),
        ({"weight.quant_map": torch.tensor(CODES).flip(0)}, "not the table"),
    ):
        broken = {name: t for name, t in (tensors | change).items() if t is not None}
        with pytest.raises(dl.UserError, match=match):
            NF4Linear.from_bnb(broken, None)


@double
def test_quantising_again(double_quant):
    linear, four = made(double_quant=double_quant, blocksize=128)
    W = torch.randn(OUT, IN)
    again = four.requantised(W)
    assert (again.blocksize, again.double_quant, again.bias) == (128, double_quant, linear.bias)
    assert same(again.weight, NF4Quantiser(128, double_quant).round_trip(W))
    assert not four.absorb(torch.zeros(OUT, IN))
    plain = four.plain(W)
    assert torch.equal(plain.weight, W)
    assert plain.bias is four.bias


def test_quantisers_by_name():
    assert quantiser("nf4") == NF4Quantiser(64, True)
    assert quantiser("nf4", 256) == NF4Quantiser(256, True)
    assert quantiser("nf4").group(48) is None
    with pytest.raises(dl.UserError, match=r"no blocks of 20[\s\S]*64"):
        quantiser("nf4", 20)
    with pytest.raises(dl.UserError, match="'nf5' is no quantisation") as raised:
        quantiser("nf5")
    assert "nf4" in str(raised.value)
    wide = torch.randn(4, 64, dtype=torch.float64)
    assert NF4Quantiser().round_trip(wide).dtype is torch.float64
    assert NF4Quantiser().round_trip(wide.bfloat16()).dtype is torch.float32
