"""Group quantisation against loops over single entries."""

import pytest
import torch

import deltalab as dl
from deltalab.quant.groups import default_group, dequantise, pack, quantise, unpack

bits = pytest.mark.parametrize("bits", [4, 8])


def weight(out=6, in_=48, dtype=torch.float64):
    W = torch.randn(out, in_, dtype=dtype) * torch.rand(out, 1, dtype=dtype).exp()
    W[1] = 0.0  # a constant row, and one that is all on one side of zero
    W[2] = W[2].abs() + 1
    W[3, :16] = -0.37
    return W


@bits
def test_against_single_entries_in_fp64(bits):
    W, g = weight(), 16
    codes, scale, offset = quantise(W, bits, g)
    back = dequantise(codes, scale, offset)
    for i in range(W.shape[0]):
        for k in range(W.shape[1] // g):
            group = [float(w) for w in W[i, k * g : (k + 1) * g]]
            low, step = min(group), (max(group) - min(group)) / (2**bits - 1)
            assert float(scale[i, k]) == step
            assert float(offset[i, k]) == low
            for j, w in enumerate(group):
                code = round((w - low) / step) if step else 0
                assert int(codes[i, k * g + j]) == code
                assert float(back[i, k * g + j]) == step * code + low


@bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_entry_is_at_most_half_a_step_away(bits, dtype):
    W = weight(dtype=dtype)
    codes, scale, offset = quantise(W, bits, 16)
    assert scale.dtype is torch.promote_types(dtype, torch.float32)
    error = (dequantise(codes, scale, offset).double() - W.double()).abs().unflatten(1, (-1, 16))
    rounding = torch.finfo(scale.dtype).eps * 8 * W.double().abs().max()
    assert bool((error <= scale.double()[..., None] / 2 + rounding).all())
    assert float(error.amax()) > 0.9 * float(scale.max()) / 2, "the bound is nowhere near: the test sees nothing"
    assert torch.equal(dequantise(codes, scale, offset)[1], torch.zeros(48, dtype=scale.dtype))


@bits
def test_what_was_quantised_quantises_to_itself(bits):
    for _ in range(20):
        codes, scale, offset = quantise(torch.randn(8, 64), bits, 32)
        again = quantise(dequantise(codes, scale, offset), bits, 32)
        assert torch.equal(again.codes, codes)
        torch.testing.assert_close(again.scale, scale, rtol=1e-5, atol=0)


@bits
@pytest.mark.parametrize("in_", [1, 6, 7, 33])
def test_packed_codes_come_back_bitwise(bits, in_):
    codes = torch.randint(0, 2**bits, (5, in_), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.shape == (5, in_ if bits == 8 else (in_ + 1) // 2)
    assert torch.equal(unpack(packed, bits, in_), codes)
    if bits == 4:
        for i in range(5):
            for j in range(in_):
                assert int(packed[i, j // 2]) >> 4 * (j % 2) & 15 == int(codes[i, j])


def test_mistakes():
    with pytest.raises(dl.UserError, match="groups of 32 do not divide 48 inputs"):
        quantise(torch.randn(2, 48), 4, 32)
    with pytest.raises(dl.UserError, match="not finite"):
        quantise(torch.tensor([[1.0, float("nan")]]), 4, 2)
    assert [default_group(n) for n in (4096, 11008, 48, 4, 34, 64, 32, 1)] == [32, 32, 24, 2, 17, 32, 16, 1]
    with pytest.raises(dl.UserError, match="74 inputs") as raised:
        default_group(74)
    assert "37" in str(raised.value)
