"""Groups against sorting by brute force, and against what they say of themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.core.errors import UserError
from deltalab.safety.groups import (
    Group,
    complement,
    difference,
    intersection,
    jaccard,
    minus,
    top,
    union,
)

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
    assert "416 of 4160 entries, asked 10 %, actual 10.000 %" in str(group)
    assert [" ".join(line.split()) for line in group.table().splitlines()[1:]] == [
        "layer 0 320 10.000 %", "layer 1 96 10.000 %", "q 192 10.000 %", "up 224 10.000 %",
    ]  # fmt: skip
    assert (sizes["asked"], sizes["unit"]) == (0.1, "entry")
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


def entries(group):
    return {(path, i) for path in group for i in group[path].tolist()}


def test_the_algebra_of_groups_is_that_of_sets():
    a, b, c = (top(scores(seed), 0.3, "matrix", f"g{seed}") for seed in (1, 2, 3))
    x, y, z = entries(a), entries(b), entries(c)
    everything = {(path, i) for path, (out, in_) in SHAPES.items() for i in range(out * in_)}
    for got, want, kind in (
        (union([a, b, c]), x | y | z, "union"),
        (intersection([a, b, c]), x & y & z, "intersection"),
        (minus(a, b), x - y, "minus"),
        (complement(a), everything - x, "complement"),
    ):
        assert entries(got) == want
        assert got.count == len(want)
        assert got.info["kind"] == kind
        assert got.asked is None
        assert list(got.shapes) == list(SHAPES)
    assert minus(a, b).info["of"] == ["g1", "g2"]
    assert jaccard(a, b) == pytest.approx(len(x & y) / len(x | y))
    assert jaccard(a, a) == 1


def test_groups_of_other_matrices_are_not_combined():
    other = Group.of_masks("other", {"a": torch.ones(2, 2, dtype=torch.bool)})
    for combine in (lambda g: union([g, other]), lambda g: intersection([g, other]), lambda g: minus(g, other)):
        with pytest.raises(UserError, match="cover different matrices"):
            combine(top(scores(), 0.1))
