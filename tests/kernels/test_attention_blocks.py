"""Attention in blocks against torch's sdpa: values, gradients, masks, segments, rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deltalab.kernels import attention_blocks
from deltalab.kernels.attention_blocks import Sight, attend
from tests.helpers import assert_close_by_norm, error_by_norm

Given = tuple[Tensor, Tensor, Tensor, Tensor]


def given(batch: int, heads: int, kv: int, length: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> Given:
    """q, k, v as an attention hands them on, (batch, heads, seq, d), not contiguous; and a gradient of the heads."""
    q, k, v, g = (torch.randn(batch, length, n, d, dtype=torch.float64) for n in (heads, kv, kv, heads))
    return *(t.to(dtype).transpose(1, 2) for t in (q * scale, k, v)), g.to(dtype)  # type: ignore[return-value]


def with_gradients(function: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    y = function(q, k, v)
    y.backward(g.to(y.dtype))
    return [y.detach(), q.grad, k.grad, v.grad]  # type: ignore[list-item]


def sdpa(mask: Tensor | None = None, scale: float | None = None) -> Any:
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    ).transpose(1, 2)


def allowed(length: int, window: int | None = None, segments: list[int] | None = None) -> Tensor:
    """What each token sees, (length, length)."""
    i = torch.arange(length)
    sees = i[:, None] >= i
    if window:
        sees &= i[:, None] - i < window
    if segments:
        ids = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
        sees &= ids[:, None] == ids
    return sees


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four queries in fp64 and a few heads, so that short sequences take many."""
    monkeypatch.setattr(attention_blocks, "QUERIES", 16)
    monkeypatch.setattr(attention_blocks, "STEP", 400)
    attention_blocks._later.cache_clear()


CASES: dict[str, tuple[int, int, int, int, Sight, list[int] | None]] = {
    "causal": (2, 2, 2, 9, Sight(), None),
    "grouped heads": (2, 6, 2, 7, Sight(), None),
    "one key-value head": (1, 3, 1, 6, Sight(), None),
    "window": (1, 2, 2, 11, Sight(window=3), None),
    "both ways": (1, 2, 1, 5, Sight(False), None),
    "padded": (2, 2, 2, 6, Sight(keys=torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()), None),
    "mask": (2, 4, 2, 6, Sight(False, mask=allowed(6, 2).expand(2, 1, 6, 6)), None),
    "a query that sees nothing": (1, 2, 2, 6, Sight(False, mask=(allowed(6) & (torch.arange(6) > 1))[None, None]), None),
    "added": (1, 2, 2, 5, Sight(False, mask=torch.linspace(-3, 2, 25, dtype=torch.float64).view(1, 1, 5, 5)), None),
    "segments": (1, 4, 2, 15, Sight(), [2, 5, 1, 0, 4, 3]),
    "segments, window": (1, 2, 2, 12, Sight(window=2), [5, 1, 6]),
    "one token": (2, 2, 2, 1, Sight(), None),
    "no token": (2, 2, 2, 0, Sight(), None),
    "no row": (0, 2, 2, 3, Sight(), None),
}  # fmt: skip


def full_mask(name: str) -> Tensor:
    """The mask that a case comes to, for torch."""
    _, _, _, length, sight, segments = CASES[name]
    if sight.mask is not None:
        return sight.mask
    sees = allowed(length, sight.window, segments) if sight.causal else torch.ones(length, length, dtype=torch.bool)
    return sees[None, None] if sight.keys is None else sees & sight.keys[:, None, None]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_sdpa(name: str, dtype: torch.dtype, small_blocks: None) -> None:
    batch, heads, kv, length, sight, segments = CASES[name]
    tensors = given(batch, heads, kv, length, 8, dtype)
    mask = full_mask(name)
    got = with_gradients(lambda q, k, v: attend(q, k, v, 0.3, sight, segments), *tensors)
    want = with_gradients(sdpa(mask if mask.dtype is torch.bool else mask.to(dtype), 0.3), *tensors)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13 if dtype is torch.float64 else 2e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "no " not in name])
def test_gradients_are_finite_differences(name: str, small_blocks: None) -> None:
    batch, heads, kv, length, sight, segments = CASES[name]
    q, k, v, _ = given(batch, heads, kv, length, 3, torch.float64)
    given_to = tuple(t.requires_grad_() for t in (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, 0.7, sight, segments), given_to, fast_mode=True)


@pytest.mark.parametrize("length", [128, 129, 300])
def test_equals_sdpa_at_the_blocks_of_training(length: int) -> None:
    tensors = given(2, 4, 2, length, 16, torch.float32)
    got = with_gradients(lambda q, k, v: attend(q, k, v, 0.25, Sight()), *tensors)
    for ours, theirs in zip(got, with_gradients(sdpa(), *tensors), strict=True):
        assert_close_by_norm(ours, theirs, 1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("length", [64, 256])
def test_rounds_in_bf16_about_as_sdpa_does(length: int, scale: float) -> None:
    """Scores of up to about 60; the sum of the four relative errors, and each of them."""
    tensors = given(1, 4, 2, length, 64, torch.bfloat16, scale)
    exact = with_gradients(sdpa(), *(t.double() for t in tensors))
    ours = with_gradients(lambda q, k, v: attend(q, k, v, 0.125, Sight()), *tensors)
    theirs = with_gradients(sdpa(), *tensors)
    errors = [[error_by_norm(t, e) for t, e in zip(found, exact, strict=True)] for found in (ours, theirs)]
    assert sum(errors[0]) <= 1.15 * sum(errors[1]), errors
    assert all(a <= 1.5 * b for a, b in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("name", [name for name in CASES if "no " not in name])
def test_masks_in_bf16(name: str) -> None:
    """Padding, windows, masks and segments are the same to bf16 as to fp64."""
    batch, heads, kv, length, sight, segments = CASES[name]
    tensors = given(batch, heads, kv, length, 16, torch.bfloat16)
    got = with_gradients(lambda q, k, v: attend(q, k, v, 0.25, sight, segments), *tensors)
    want = with_gradients(sdpa(full_mask(name), 0.25), *(t.double() for t in tensors))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02)


def test_a_lowest_number_is_as_good_as_minus_infinity() -> None:
    """transformers' eager masks hold the dtype's lowest number."""
    tensors = given(1, 2, 2, 6, 16, torch.bfloat16)
    sees = allowed(6)[None, None]
    lowest = torch.zeros(1, 1, 6, 6, dtype=torch.bfloat16).masked_fill_(~sees, torch.finfo(torch.bfloat16).min)
    by_sight = [lambda q, k, v, sight=Sight(False, mask=m): attend(q, k, v, 0.25, sight) for m in (sees, lowest)]
    got = [with_gradients(function, *tensors) for function in by_sight]
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def test_segments_do_not_see_each_other() -> None:
    lengths = [30, 200, 31, 5, 150]
    q, k, v, g = given(1, 4, 2, sum(lengths), 16, torch.bfloat16)
    before = with_gradients(lambda q, k, v: attend(q, k, v, 0.25, Sight(), lengths), q, k, v, g)
    other = [t.clone() for t in (q, k, v)]
    for t in other:
        t[:, :, 30:230] = torch.randn_like(t[:, :, 30:230])
    after = with_gradients(lambda q, k, v: attend(q, k, v, 0.25, Sight(), lengths), *other, g)
    outside = torch.cat([torch.arange(30), torch.arange(230, sum(lengths))])
    assert torch.equal(before[0][:, outside], after[0][:, outside])
    for a, b in zip(before[1:], after[1:], strict=True):
        assert torch.equal(a[:, :, outside], b[:, :, outside])
        assert not torch.equal(a, b)


def test_what_is_given_is_not_written_to_and_what_is_kept() -> None:
    """q, k and v; these and the gradient stay as they are."""
    q, k, v, g = (t.contiguous() for t in given(2, 4, 2, 40, 16, torch.bfloat16))
    copies = [t.clone() for t in (q, k, v, g)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = attend(*(t.requires_grad_() for t in (q, k, v)), 0.25, Sight())
    y.backward(g)
    y2 = attend(q, k, v, 0.25, Sight())
    y2.backward(g)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, g), copies, strict=True))
    sizes = sum(t.numel() * t.element_size() for t in kept)
    assert sizes == sum(t.numel() * 2 for t in (q, k, v))


def test_a_second_derivative_is_refused() -> None:
    q, k, v, _ = (t.requires_grad_() for t in given(1, 2, 2, 5, 4, torch.float64))
    (dq,) = torch.autograd.grad(attend(q, k, v, 0.5, Sight()).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()
