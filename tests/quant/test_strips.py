"""Few tokens through a quantised linear: the product with Ŵ, and never all of Ŵ."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deltalab.deltas.quantise import quantise
from deltalab.quant import nf4, strips
from deltalab.quant.linear import FEW, GroupQuantiser
from deltalab.quant.nf4_linear import NF4Quantiser
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_llama, tokens

WAYS = {
    "nf4": (NF4Quantiser(32), 96), "nf4, plain scales": (NF4Quantiser(32, double_quant=False), 96),
    "nf4, blocks over the ends of rows": (NF4Quantiser(64), 96), "nf4, odd": (NF4Quantiser(32), 45),
    "int4": (GroupQuantiser(4, 16), 96), "int4, odd groups": (GroupQuantiser(4, 15), 45),
    "int8": (GroupQuantiser(8, 16), 96), "int8, odd groups": (GroupQuantiser(8, 15), 45),
}  # fmt: skip
BOUNDS = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""NF4 keeps fp32 scales and values, so its fp64 is no closer."""
ways = pytest.mark.parametrize("way", WAYS)


def made(way, dtype=torch.float32, out=50, bias=True):
    quantiser, in_ = WAYS[way]
    linear = nn.Linear(in_, out, bias=bias, dtype=dtype)
    return quantiser.linear(linear.weight, linear.bias, dtype)


@pytest.fixture
def low(monkeypatch):
    """Strips of few rows, the last one shorter."""
    monkeypatch.setattr(strips, "BYTES", 7 * 96 * 4)


@ways
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_with_the_weight(way, dtype, bias, low):
    linear = made(way, dtype, bias=bias)
    exact = linear.kept().weight(torch.float32 if dtype is not torch.float64 else dtype).double()
    for lead in ((), (1,), (2, 3), (FEW + 1,), (0,), (strips.MOST,), (strips.MOST + 1,)):
        x = torch.randn(*lead, linear.in_features, dtype=dtype)
        with torch.no_grad():
            got = linear(x)
        assert (got.shape, got.dtype) == ((*lead, 50), dtype)
        want = F.linear(x.double(), exact, None if linear.bias is None else linear.bias.double())
        if got.numel():
            assert_close_by_norm(got, want, BOUNDS[dtype])
            assert error_by_norm(got, want) <= 1.2 * error_by_norm(linear(x), want) + 2e-7
    x = torch.randn(linear.in_features, 5, dtype=dtype).mT  # not contiguous
    with torch.no_grad():
        assert_close_by_norm(linear(x), F.linear(x, exact.to(dtype), linear.bias), 2 * BOUNDS[dtype])


@ways
def test_a_gradient_goes_the_way_that_it_went(way, monkeypatch):
    linear = made(way)
    monkeypatch.setattr(strips, "product", None)
    monkeypatch.setattr(type(linear.kept()), "product", None)
    x = torch.randn(3, linear.in_features, requires_grad=True)
    linear(x).sum().backward()
    assert_close_by_norm(x.grad, linear.weight.sum(0).expand(3, -1), 1e-6)
    with torch.no_grad(), pytest.raises(TypeError):
        linear(x)


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self.known:
            self.entries = max(self.entries, made.numel())
        return made


@pytest.mark.parametrize("way", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("kernel", [True, False])
@torch.no_grad()
def test_no_tensor_of_the_weights_size_is_made(way, kernel, low, monkeypatch):
    if not kernel:
        monkeypatch.setattr(nf4, "_kernel", lambda: None)
    linear = made(way, out=400)
    for count in (1, FEW + 1):
        seen = Largest()
        seen.known = {t.untyped_storage().data_ptr() for t in linear.buffers()}
        with seen:
            linear(torch.randn(count, 96))
        assert 0 < seen.entries <= 400 * max(count, 6)  # the product, the scales


@ways
@torch.no_grad()
def test_under_autocast_and_vmap(way, low):
    linear = made(way)
    x = torch.randn(4, linear.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = linear(x), F.linear(x, linear.weight, linear.bias)
    assert got.dtype is plain.dtype is torch.bfloat16
    assert_close_by_norm(got, plain, 1e-2)
    assert_close_by_norm(torch.vmap(linear)(x), linear(x), 1e-6)


@pytest.mark.parametrize("quantiser", [NF4Quantiser(32), GroupQuantiser(4, 16), GroupQuantiser(8, 16)], ids=str)
@torch.no_grad()
def test_a_model_decodes_what_it_computes_at_once(quantiser, low):
    """Prompt and replies by strips, token after token, against one pass with all of Ŵ."""
    model = quantise(tiny_llama(), quantiser)
    ids = tokens(2, 12)
    with torch.enable_grad():
        want = copy.deepcopy(model)(input_ids=ids).logits
    cache, got = None, []
    for t in range(12):
        made = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = made.past_key_values
        got.append(made.logits)
    assert_close_by_norm(torch.cat(got, 1), want, 1e-5)
