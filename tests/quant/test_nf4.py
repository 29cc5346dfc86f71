"""The NF4 codec against bitsandbytes, bit for bit, and against its definition."""

import subprocess
import sys

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deltalab as dl
from deltalab.quant import nf4
from deltalab.quant.nf4 import BLOCKSIZES, NF4, dequantise, dequantise_plainly, quantise, quantise_scales
from tests.helpers import error_by_norm
from tests.quant.bnb import CODES, bits, dequantised, quantised, same

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONE = torch.tensor(1.0)


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles parts of what it does in torch, anew for each shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def same_codes(W, blocksize, double_quant):
    """Whether the codec agrees with bitsandbytes on W: what is kept, and what it stands for in every dtype."""
    want, got = quantised(W, blocksize, double_quant), quantise(W, blocksize, double_quant)
    assert [type(value) for value in got] == [type(value) for value in want]
    for name, a, b in zip(NF4._fields, got, want, strict=True):
        assert same(a, b) if isinstance(b, torch.Tensor) else a == b, name
    for dtype in DTYPES:
        reference = dequantised(want, dtype)
        assert same(normal(got.weight(dtype)), normal(reference))
        assert same(dequantise_plainly(got.codes, got.scales(), blocksize, got.shape, dtype), reference)
    return got


def normal(W):
    """W without what is below the least normal float: the kernel's bfloat16 is zero there."""
    return torch.where(W.abs() < 2**-126, 0, W) if W.dtype is torch.bfloat16 else W


def neighbours(values, steps=2):
    """The values, and the floats up to `steps` beside each."""
    out, low, high = [values], values, values
    for _ in range(steps):
        low, high = torch.nextafter(low, -9 * ONE), torch.nextafter(high, 9 * ONE)
        out += [low, high]
    return torch.cat(out)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitwise_bitsandbytes(blocksize, double_quant):
    for shape in [(64, 512), (33, 70), (48, 48), (5, 7), (1, 1), (3,), (9, 4096)]:
        for dtype in DTYPES:
            scale = torch.rand(shape[0], *[1] * (len(shape) - 1)) ** 6
            same_codes((torch.randn(shape) * scale).to(dtype), blocksize, double_quant)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_tensor_of_several_chunks_and_nested_blocks(double_quant):
    kept = same_codes(torch.randn(1021, 1031), 64, double_quant)
    assert kept.shape[0] * kept.shape[1] > 4 * nf4.CHUNK


def test_the_code_is_the_nearest_value_and_a_tie_goes_to_the_lower():
    W = torch.randn(40, 64, dtype=torch.float64).float()
    kept = quantise(W, 64, False)
    codes = torch.stack([kept.codes >> 4, kept.codes & 15], -1).view(40, 64)
    scaled = W.double() / W.double().abs().amax(1, keepdim=True)
    distances = (scaled.unsqueeze(-1) - CODES.double()).abs()
    chosen = distances.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert bool((chosen <= distances.amin(-1) + 1e-7).all())
    assert torch.equal(kept.absmax, W.abs().amax(1))
    middles = (CODES[:-1] + CODES[1:]) / 2
    for place, below in ((middles, 0), (torch.nextafter(middles, 9 * ONE), 1)):
        block = torch.cat([place, ONE.view(1)])
        kept = same_codes(block, 32, False)
        codes = torch.stack([kept.codes >> 4, kept.codes & 15], -1).view(-1)[:15]
        assert torch.equal(codes, torch.arange(15, dtype=torch.uint8) + below)


def test_every_float_near_a_middle_at_many_scales():
    middles = neighbours((CODES[:-1] + CODES[1:]) / 2, 4)
    padded = torch.cat([middles, torch.zeros(-len(middles) % 63)]).view(-1, 63)
    for scale in (1.0, 0.3, 7.7e-3, 1e-30, 3e-38, 2e38):
        block = torch.cat([padded * scale, torch.full((len(padded), 1), scale)], 1)
        same_codes(block, 64, False)
        same_codes(block.half() if 1e-4 < scale < 6e4 else block.bfloat16(), 64, False)


@pytest.mark.parametrize("special", [
    [0.0], [-0.0], [0.0, -0.0, 0.0], [1e-45, -1e-45, 0.0], [1e-38, 5e-39, -1e-38], [9.9e-39, 1e-40], [3.4e38, -3.4e38, 1e38],
    [3.4e38, 1e-45], [65504.0, -1.0], [1.0, 1.0], [-1.0, -1.0, -1.0], [2**-126, 2**-149],
], ids=str)  # fmt: skip
def test_special_values(special):
    """Alone in a block that is not full, and in full blocks beside ordinary ones."""
    alone = torch.tensor(special)
    ordinary = torch.randn(4, 32)
    ordinary[1, : len(special)] = alone
    ordinary[2] = alone[0]
    for W in (alone, ordinary, torch.cat([ordinary.view(-1), alone])):
        same_codes(W, 32, False)
        if bool(quantised(W, 32, True).offset.isfinite()):
            same_codes(W, 32, True)
    assert bits(quantise(alone * 0, 32, False).weight(torch.float32)).count_nonzero() == 0


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(floats | st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 1.0]), min_size=1, max_size=150),
    st.sampled_from(BLOCKSIZES[:3]),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_bitwise_on_any_floats(values, blocksize, double_quant, dtype):
    W = torch.tensor(values).to(dtype)
    if not bool(W.isfinite().all()):
        with pytest.raises(dl.UserError, match="not finite"):
            quantise(W, blocksize, double_quant)
    elif double_quant and not bool(quantised(W, blocksize, True).offset.isfinite()):
        with pytest.raises(dl.UserError, match=r"too large[\s\S]*double_quant=False"):
            quantise(W, blocksize, True)
    else:
        same_codes(W, blocksize, double_quant)


@settings(max_examples=100, deadline=None)
@given(st.lists(floats.filter(lambda v: abs(v) < 1e38), min_size=1, max_size=600))
def test_the_codes_of_the_scales_are_bitwise_on_any_floats(values):
    values = torch.tensor(values)
    codes, state = bitsandbytes.functional.quantize_blockwise(values, blocksize=256)
    got, absmax = quantise_scales(values)
    assert torch.equal(got, codes)
    assert same(absmax, state.absmax)


def test_the_nested_map_and_every_step_of_it():
    cpu = torch.device("cpu")
    assert same(nf4.nested_map(cpu), bitsandbytes.functional.create_dynamic_map())
    steps = 2 * torch.arange(65536) / 65535 - 1
    values = neighbours(torch.cat([steps, (steps[:-1] + steps[1:]) / 2]), 1).clamp(-1, 1)
    values = torch.cat([values, torch.zeros(-len(values) % 255)]).view(-1, 255)
    values = torch.cat([values, torch.ones(len(values), 1)], 1).view(-1)  # each block divides by one
    codes, _ = bitsandbytes.functional.quantize_blockwise(values, blocksize=256)
    assert torch.equal(quantise_scales(values)[0], codes)


@pytest.mark.parametrize("blocksize", [64, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_and_torch_alone_give_the_same_bits(blocksize, dtype, monkeypatch):
    """Also where the kernel would be wrong, which therefore is not asked: rows that a block goes over the end of."""
    asked = []
    ops = torch.ops.bitsandbytes.dequantize_4bit
    monkeypatch.setattr(nf4, "_kernel", lambda: type("Ops", (), {"dequantize_4bit": Spy(ops, asked)}))
    for shape in [(16, 4096), (2, 1024), (64, 192), (8, 48), (4, 7)]:
        kept = quantise(torch.randn(shape), blocksize)
        before = len(asked)
        got = dequantise(kept.codes, kept.scales(), blocksize, shape, dtype)
        assert same(got, dequantised(kept, dtype))
        assert (len(asked) > before) is (shape[1] % blocksize == 0 and blocksize <= 1024)


class Spy:
    """An operator that counts its calls."""

    def __init__(self, operator, calls):
        self.operator, self.calls = operator, calls

    def default(self, *args):
        self.calls.append(args)
        return self.operator.default(*args)


def test_the_error_of_a_round_trip_is_bitsandbytes_error():
    """On normal weights, by three measures; in blocks of 64 they are those of QLoRA's code on the standard normal."""
    W = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    found = {}
    for blocksize in (64, 256, 4096):
        for double_quant in (False, True):
            ours = quantise(W, blocksize, double_quant).weight(torch.float32)
            theirs = dequantised(quantised(W, blocksize, double_quant), torch.float32)
            errors = [(V - W).abs() for V in (ours, theirs)]
            for statistic in (lambda e: e.mean(), lambda e: e.max(), lambda e: e.norm() / W.norm()):
                assert same(statistic(errors[0]), statistic(errors[1]))
            found[blocksize, double_quant] = float(errors[0].mean()), error_by_norm(ours, W)
    assert found[64, False] == pytest.approx((0.0728, 0.0916), rel=0.01)
    assert found[64, True] == pytest.approx(found[64, False], rel=0.01)
    assert found[64, True][0] > found[64, False][0]
    assert found[64, False] < found[256, False] < found[4096, False]


def test_what_cannot_be_quantised_is_refused_by_name():
    for blocksize in (0, 48, 8192):
        with pytest.raises(dl.UserError, match=f"no blocks of {blocksize}[\\s\\S]*4096"):
            quantise(torch.randn(4, 4), blocksize)
    for value in (torch.inf, -torch.inf, torch.nan):
        for place in (0, 100, 129):  # in a full block, and in the one that is not
            W = torch.randn(130)
            W[place] = value
            with pytest.raises(dl.UserError, match="not finite"):
                quantise(W, 64)


def test_wider_and_transposed_weights():
    W = torch.randn(24, 40, dtype=torch.float64)
    wide, narrow = quantise(W), quantise(W.float())
    assert torch.equal(wide.codes, narrow.codes)
    assert torch.equal(wide.weight(torch.float64), narrow.weight(torch.float32).double())
    assert torch.equal(quantise(W.float().mT).codes, quantise(W.float().mT.contiguous()).codes)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_meta_device_knows_the_shapes(double_quant):
    for shape in [(64, 512), (5, 7), (1000, 999)]:
        there, nowhere = quantise(torch.randn(shape), 64, double_quant), quantise(torch.empty(shape, device="meta"), 64, double_quant)  # fmt: skip
        for a, b in zip(there, nowhere, strict=True):
            if isinstance(a, torch.Tensor):
                assert (a.shape, a.dtype, b.device.type) == (b.shape, b.dtype, "meta")
            else:
                assert a == b


PROGRAM = """
import deltalab as dl, torch
from deltalab.deltas.quantise import quantise
from deltalab.quant.linear import quantiser
from tests.helpers import tiny_llama, tokens
model = quantise(tiny_llama(hidden=64, mlp=64), quantiser("nf4"), dl.LoRA(r=4, init="loftq", targets="all-linear"))
model(input_ids=tokens(), labels=tokens()).loss.backward()
torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
logits = dl.merged(model)(tokens()).logits.double()
told = f"{logits.sum().item().hex()} {logits.norm().item().hex()}"
"""


def test_everything_works_without_bitsandbytes():
    """And gives the same bits: a model is quantised, adapted, trained and merged with its import blocked."""
    blocked = f'import sys; sys.modules["bitsandbytes"] = None\n{PROGRAM}\nprint(told)'
    there = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=True).stdout
    here = {}
    exec(PROGRAM, here)
    assert nf4._kernel() is not None
    assert there.strip() == here["told"]
