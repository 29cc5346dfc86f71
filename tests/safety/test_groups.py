"""Groups against sorting by brute force, and against what they say of themselves."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.core.errors import UserError
from deltalab.safety.groups import Group, difference, jaccard, matched_random, random_groups, random_like, top, union

SHAPES = {"model.layers.0.q": (24, 40), "model.layers.0.up": (56, 40), "model.layers.1.q": (24, 40)}


def scores(seed=0, levels=None, dtype=torch.float32):
    """Random scores; `levels` makes many ties."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for path, shape in SHAPES.items():
        value = torch.rand(shape, generator=rng, dtype=dtype)
        out[path] = value if levels is None else (value * levels).floor()
    return out


def brute_top(values, k):
    """Positions of the k largest of a list, the first of equal ones, by sorting pairs."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


@pytest.mark.parametrize("levels", [None, 7, 1])
@pytest.mark.parametrize("q", [0.01, 0.0375, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("per", ["row", "matrix", "global"])
def test_top_is_the_sorted_head(per, q, levels):
    s = scores(levels=levels)
    if per == "row" and q == 0.01:
        with pytest.raises(UserError, match="less than one entry"):
            top(s, q, per)
        return
    got = top(s, q, per, "safety")
    if per == "global":
        flat = [v for score in s.values() for v in score.flatten().tolist()]
        chosen, start = brute_top(flat, int(q * len(flat) + 0.5)), 0
        want = {}
        for path, score in s.items():
            want[path] = {i - start for i in chosen if start <= i < start + score.numel()}
            start += score.numel()
    else:
        want = {}
        for path, score in s.items():
            rows = score.tolist() if per == "row" else [score.flatten().tolist()]
            k, width = int(q * len(rows[0]) + 0.5), len(rows[0])
            want[path] = {r * width + i for r, row in enumerate(rows) for i in brute_top(row, k)}
    for path in s:
        assert set(got[path].tolist()) == want[path]
        assert set(got.mask(path).flatten().nonzero()[:, 0].tolist()) == want[path]
        assert got.counts[path] == len(want[path])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
        | st.sampled_from([0.0, -0.0, 1e-45]),
        min_size=2,
        max_size=60,
    ),
    st.floats(0.02, 1),
    st.booleans(),
)
def test_global_top_of_any_floats(values, q, double):
    """The threshold found by the floats' bits is the one found by sorting, for both widths, negatives and zeros."""
    flat = torch.tensor(values, dtype=torch.float64 if double else torch.float32)
    half = len(values) // 2
    s = {"a": flat[:half].reshape(1, -1), "b": flat[half:].reshape(1, -1)}
    k = int(q * len(values) + 0.5)
    if k == 0:
        return
    group = top(s, q, "global")
    assert set(group["a"].tolist()) | {i + half for i in group["b"].tolist()} == brute_top(flat.tolist(), k)


def test_global_and_matrix_counts_are_exact():
    assert top(scores(), 0.0333, "global").count == round(0.0333 * sum(a * b for a, b in SHAPES.values()))
    assert set(top(scores(), 0.25, "row").mask("model.layers.0.q").sum(1).tolist()) == {10}
    group = top(scores(levels=3), 0.0333, "matrix")
    assert all(group.counts[p] == int(0.0333 * a * b + 0.5) for p, (a, b) in SHAPES.items())


def test_set_difference_is_safety_without_utility():
    safety, utility = scores(1), scores(2)
    group = difference(safety, utility, p=0.2, q=0.4, per="matrix")
    for path in SHAPES:
        want = top(safety, 0.4, "matrix").mask(path) & ~top(utility, 0.2, "matrix").mask(path)
        assert torch.equal(group.mask(path), want)
    assert not any((group.mask(path) & top(utility, 0.2, "matrix").mask(path)).any() for path in SHAPES)
    assert group.info["p"] == 0.2
    assert group.info["q"] == 0.4


def test_set_difference_of_one_score_is_empty_and_says_so():
    with pytest.raises(UserError, match="lies within the top"):
        difference(scores(), scores(), p=0.1, q=0.05)


def test_set_difference_of_other_matrices():
    with pytest.raises(UserError, match="different matrices"):
        difference(scores(), {"a": torch.rand(2, 2)}, p=0.1, q=0.05)


@pytest.mark.parametrize("q", [0.0, 1.5, -0.1])
def test_a_share_must_be_one(q):
    with pytest.raises(UserError, match="share"):
        top(scores(), q)


@pytest.mark.parametrize("per", ["row", "matrix", "global"])
def test_scores_that_are_not_finite(per):
    broken = scores()
    broken["model.layers.0.up"][3, 3] = torch.nan
    with pytest.raises(UserError, match=r"layers\.0\.up"):
        top(broken, 0.1, per)


def test_random_has_the_count_of_each_matrix():
    group = top(scores(), 0.1, "global")
    a, b = random_like(group, 1), random_like(group, 2)
    assert a.counts == b.counts == group.counts
    assert any(a[path].tolist() != b[path].tolist() for path in group)
    for path in group:
        assert len(set(a[path].tolist())) == group.counts[path]
        assert torch.equal(a[path], random_like(group, 1)[path])


def test_random_is_uniform():
    """Every entry is drawn about equally often."""
    group = top(scores(), 0.25, "matrix")
    hits = sum(draw.mask("model.layers.0.q").double() for draw in random_groups(group, 400))
    assert abs(hits.mean() - 100) < 1e-9
    assert hits.std() == pytest.approx(np.sqrt(400 * 0.25 * 0.75), rel=0.15)


def test_matched_random_has_the_count_of_each_quantile():
    weights = {path: torch.randn(shape, generator=torch.Generator().manual_seed(5)) for path, shape in SHAPES.items()}
    group = top({path: w.abs() + 0.3 * torch.rand(w.shape) for path, w in weights.items()}, 0.1, "matrix")
    draws = random_groups(group, 5, seed=7, weights=weights)
    plain = random_like(group, 7)

    def histogram(g, path, bins=20):
        rank = weights[path].abs().flatten().argsort(stable=True).argsort()
        return torch.bincount(rank[g[path]] * bins // rank.numel(), minlength=bins).tolist()

    for path in group:
        for draw in draws:
            assert draw.counts[path] == group.counts[path]
            assert histogram(draw, path) == histogram(group, path)
        assert histogram(plain, path) != histogram(group, path)
    assert torch.equal(matched_random(group, weights, 9)["model.layers.0.q"], draws[2]["model.layers.0.q"])
    assert any(draws[0][p].tolist() != draws[1][p].tolist() for p in group)


def test_matched_random_where_bins_do_not_divide():
    """Odd sizes: every quantile part is as large as the ranks that fall into it."""
    weights = {"a": torch.randn(7, 9)}
    group = Group.of_masks("g", {"a": torch.rand(7, 9) < 0.5})
    for bins in (2, 10, 20, 63, 64, 100):
        draw = matched_random(group, weights, 0, bins)
        rank = weights["a"].abs().flatten().argsort(stable=True).argsort()
        want = torch.bincount(rank[group["a"]] * bins // 63, minlength=bins)
        assert torch.equal(torch.bincount(rank[draw["a"]] * bins // 63, minlength=bins), want)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.03, 0.04, 0.5, 1.0])
def test_storage_is_the_smaller_one_and_comes_back(tmp_path, density):
    mask = torch.rand(40, 53) < density
    group = Group.of_masks("g", {"a": mask, "b": ~mask})
    assert torch.equal(group.mask("a"), mask)
    assert torch.equal(group["a"], mask.flatten().nonzero()[:, 0])
    assert group["a"].dtype == torch.int64
    assert group.nbytes <= 2 * -(-mask.numel() // 8)
    assert group.counts == {"a": int(mask.sum()), "b": int((~mask).sum())}
    group.save(tmp_path / "g")
    back = Group.load(tmp_path / "g")
    assert (back.name, back.info, back.shapes, back.counts) == (group.name, group.info, group.shapes, group.counts)
    assert all(torch.equal(back.mask(path), group.mask(path)) for path in group)
    assert all(torch.equal(back.masks()[path], group.mask(path)) for path in group)
    group.save(tmp_path / "g")  # again, over the old one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g"]


def test_a_group_prints_and_counts():
    group = top(scores(), 0.1, "row", "safety")
    sizes = group.sizes()
    assert sizes["entries"] == group.count == sum(4 * rows for rows, _ in SHAPES.values())
    assert sizes["fraction"] == pytest.approx(0.1)
    assert sizes["per_matrix"]["model.layers.0.q"] == pytest.approx(0.1)
    assert sizes["q"] == 0.1
    assert "416 of 4160 entries, 10.000 %" in str(group)
    assert len(group) == 3
    assert list(group) == list(SHAPES)


def test_damaged_groups_are_refused(tmp_path):
    top(scores(), 0.1).save(tmp_path / "g")
    with pytest.raises(UserError, match="does not exist"):
        Group.load(tmp_path / "missing")
    tensors = tmp_path / "g/entries.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:100])
    with pytest.raises(UserError, match="damaged"):
        Group.load(tmp_path / "g")
    flipped = bytearray(whole)
    flipped[-1] ^= 0x81
    flipped[-2] ^= 0x01
    tensors.write_bytes(bytes(flipped))
    with pytest.raises(UserError, match="damaged"):
        Group.load(tmp_path / "g")


def test_unknown_matrices_are_named():
    with pytest.raises(UserError, match="does not cover"):
        top(scores(), 0.1).mask("model.layers.0.k")


def test_overlap_and_union():
    a, b = top(scores(1), 0.3, "matrix"), top(scores(2), 0.3, "matrix")
    inside = {path: (set(a[path].tolist()), set(b[path].tolist())) for path in a}
    want = sum(len(x & y) for x, y in inside.values()) / sum(len(x | y) for x, y in inside.values())
    assert jaccard(a, b) == pytest.approx(want)
    assert jaccard(a, a) == 1
    both = union([a, b], "both")
    assert all(set(both[path].tolist()) == x | y for path, (x, y) in inside.items())
    assert all(c == len(x | y) for c, (x, y) in zip(both.counts.values(), inside.values(), strict=True))
    assert list(itertools.islice(both, 1)) == ["model.layers.0.q"]
