"""The largest scores against a stable sort, whatever the values: ties, signs, NaN, and every way of narrowing bounds."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.safety import topk
from deltalab.safety.topk import kth_largest, ordered_keys, top_of_all, top_of_rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = {
    "spread": lambda n: torch.randn(n, dtype=torch.float64).exp(),
    "signed": lambda n: torch.randn(n, dtype=torch.float64),
    "ties": lambda n: torch.randint(-3, 4, (n,)).double(),
    "zeros": lambda n: torch.randn(n, dtype=torch.float64).clamp(min=0) * torch.tensor([1.0, -1.0]).repeat(n // 2),
    "equal": lambda n: torch.full((n,), -2.5, dtype=torch.float64),
    "clustered": lambda n: 1 + torch.randint(0, 3, (n,)) * 2.0**-20 + torch.rand(n, dtype=torch.float64) * 2.0**-24,
    "sorted": lambda n: torch.arange(n).double(),
}


def stable(flat, k):
    """The first k of a stable sort from the largest, as a mask; fp32 holds every bf16 and fp16."""
    mask = np.zeros(len(flat), dtype=bool)
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32)).numpy()
    mask[np.argsort(-wide, kind="stable")[:k]] = True
    return mask


def several(flat, cuts=(0, 7000, 7040, 24_000)):
    """Matrices of unequal sizes, one of them transposed, that hold the numbers of `flat` in order."""
    parts = {f"m{i}": flat[a:b] for i, (a, b) in enumerate(itertools.pairwise(cuts))}
    return {
        name: part.view(20, -1) if i != 1 else part.view(10, 4).T.contiguous().T
        for i, (name, part) in enumerate(parts.items())
    }


def joined(masks):
    return np.concatenate([mask.numpy().ravel() for mask in masks.values()])


@pytest.mark.parametrize("kept", [1 << 22, 50, 3], ids=["kept", "sampled", "histograms"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_masks_are_those_of_a_stable_sort(monkeypatch, dtype, kind, kept):
    """kept: everything is kept; bounds come from a sample; what lies between is more than may be kept."""
    monkeypatch.setattr(topk, "KEPT", kept)
    monkeypatch.setattr(topk, "FEW", kept)
    monkeypatch.setattr(topk, "CHUNK", 1000)
    torch.manual_seed(0)
    flat = KINDS[kind](24_000).to(dtype)
    for share in (1e-5, 0.0003, 0.05, 0.5, 0.9999, 1.0):
        masks = dict(top_of_all(several(flat), share))
        assert np.array_equal(joined(masks), stable(flat, int(share * 24_000 + 0.5)))
        assert all(masks[name].shape == part.shape for name, part in several(flat).items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_rows_are_those_of_a_stable_sort(dtype, kind):
    torch.manual_seed(0)
    score = KINDS[kind](2000).to(dtype).view(20, 100)
    for k in (1, 2, 7, 50, 99, 100):
        want = np.stack([stable(row, k) for row in score])
        assert np.array_equal(top_of_rows(score, k).numpy(), want)
    assert not top_of_rows(score, 0).any()
    assert torch.equal(top_of_rows(score.T.contiguous().T, 7), top_of_rows(score, 7))


def test_a_sample_that_misleads_costs_passes_only(monkeypatch):
    """Bounds that lie above the k-th largest, and below it: found all the same."""
    monkeypatch.setattr(topk, "KEPT", 100)
    monkeypatch.setattr(topk, "FEW", 100)
    flat = torch.randn(24_000)
    for low, high in ((3.0, 4.0), (-4.0, -3.0), (9.0, 9.5)):
        keys = [int(key) for key in ordered_keys(torch.tensor([low, high]))]
        monkeypatch.setattr(topk._Survey, "bounds", lambda self, k, keys=keys: keys)
        assert np.array_equal(joined(dict(top_of_all(several(flat), 0.3))), stable(flat, 7200))


def test_widths_are_mixed():
    """fp32 beside fp64: compared as fp64."""
    torch.manual_seed(0)
    scores = {"a": torch.rand(30, 10), "b": torch.rand(30, 10, dtype=torch.float64)}
    flat = torch.cat([score.double().flatten() for score in scores.values()])
    assert np.array_equal(joined(dict(top_of_all(scores, 0.25))), stable(flat, 150))


@pytest.mark.parametrize("double", [False, True])
def test_keys_order_like_values(double):
    values = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, torch.inf, torch.nan])
    keys = ordered_keys(values, double)
    assert (np.diff(keys) > 0).all()
    assert keys.dtype == (np.int64 if double else np.int32)
    assert ordered_keys(torch.tensor([-0.0]), double) == ordered_keys(torch.tensor([0.0]), double) == 0
    assert ordered_keys(-values[-1:], double) < keys[0]
    positive = torch.rand(10)
    assert np.shares_memory(ordered_keys(positive), positive.numpy())  # nothing is copied
    assert np.array_equal(ordered_keys(positive).view(np.float32), positive.numpy())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.data())
def test_the_kth_largest_and_its_equals(values, data):
    k = data.draw(st.integers(1, len(values)))
    flat = torch.tensor(values, dtype=torch.float32)
    cut = data.draw(st.integers(0, len(values)))
    found = kth_largest({"a": flat[None, :cut], "b": flat[None, cut:]}, k)
    want = sorted(flat.tolist(), reverse=True)[k - 1]
    assert found.key == int(ordered_keys(torch.tensor([want]))[0])
    assert found.equals == sum(value == want for value in flat.tolist())
    assert found.ties == k - sum(value > want for value in flat.tolist())


def test_nan_lies_beyond_infinity_and_empties_its_row():
    flat = torch.tensor([1.0, torch.nan, torch.inf, -torch.nan, 2.0])
    (mask,) = dict(top_of_all({"a": flat[None]}, 0.4)).values()
    assert mask.tolist() == [[False, True, True, False, False]]
    assert top_of_rows(torch.stack([flat, torch.arange(5.0)]), 2).tolist() == [[False] * 5, [False] * 3 + [True] * 2]


def test_passes_over_the_matrices(monkeypatch):
    """Of distinct scores one, sampled or not; of many equal ones another for the masks."""
    read, chunks = [], topk._chunks
    monkeypatch.setattr(topk, "_chunks", lambda score, double: (read.append(len(score)), chunks(score, double))[1])
    for few in (topk.FEW, 9000):
        read.clear()
        monkeypatch.setattr(topk, "FEW", few)
        list(top_of_all(several(torch.rand(24_000)), 0.1))
        assert len(read) == 3
    monkeypatch.setattr(topk, "KEPT", 100)
    read.clear()
    list(top_of_all(several(torch.ones(24_000)), 0.5))
    assert len(read) == 2 * 3
