"""Overlaps against arithmetic on sets."""

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.safety.groups import Group, top
from deltalab.safety.overlap import overlap

SHAPES = {"m.layers.0.q": (24, 40), "m.layers.0.up": (56, 40), "m.layers.1.q": (24, 40), "head": (10, 40)}
LEVELS = {
    ("overall", ""): list(SHAPES),
    ("layer", "0"): ["m.layers.0.q", "m.layers.0.up"], ("layer", "1"): ["m.layers.1.q"], ("layer", "other"): ["head"],
    ("kind", "q"): ["m.layers.0.q", "m.layers.1.q"], ("kind", "up"): ["m.layers.0.up"], ("kind", "head"): ["head"],
    **{("matrix", path): [path] for path in SHAPES},
}  # fmt: skip


def group(seed, q=0.1, name="g"):
    rng = torch.Generator().manual_seed(seed)
    return top({path: torch.rand(shape, generator=rng) for path, shape in SHAPES.items()}, q, "global", name)


def inside(group, paths):
    return {(path, i) for path in paths for i in group[path].tolist()}


def test_jaccard_floor_and_ceilings_are_those_of_sets():
    a, b = group(1, 0.3, "a"), group(2, 0.2, "b")
    halves_a, halves_b = (group(3, 0.3), group(4, 0.3)), (group(5, 0.2), group(6, 0.2))
    made = overlap(a, b, halves_a, halves_b)
    rows = {(row["level"], row["name"]): row for row in made.table()}
    assert set(rows) == set(LEVELS)
    for level, paths in LEVELS.items():
        x, y = inside(a, paths), inside(b, paths)
        n = sum(SHAPES[path][0] * SHAPES[path][1] for path in paths)
        f, g = len(x) / n, len(y) / n
        row = rows[level]
        assert row["entries"] == n
        assert (row["a"], row["b"]) == (f, g)
        assert row["jaccard"] == len(x & y) / len(x | y)
        assert row["floor"] == pytest.approx(f * g / (f + g - f * g))
        for key, (first, second) in (("ceiling_a", halves_a), ("ceiling_b", halves_b)):
            x, y = inside(first, paths), inside(second, paths)
            assert row[key] == len(x & y) / len(x | y)
    assert made.jaccard == rows["overall", ""]["jaccard"]
    assert made.floor == rows["overall", ""]["floor"]
    assert [row["name"] for row in made.table("layer")] == ["0", "1", "other"]


def test_the_floor_at_equal_shares():
    made = overlap(group(1), group(2))
    assert made.floor == pytest.approx(0.05 / 0.95, rel=1e-3)
    assert made.table()[0]["ceiling_a"] is None


def test_it_prints_without_single_matrices():
    lines = str(overlap(group(1, name="safety"), group(2, name="utility"), (group(3), group(4)))).splitlines()
    assert lines[0].split() == ["safety", "utility", "Jaccard", "floor", "halves", "of", "safety"]
    assert [line.split()[0] for line in lines[1:]] == ["overall", *["layer"] * 3, *["kind"] * 3]
    assert "m.layers" not in "\n".join(lines)


def test_empty_groups_and_groups_of_two_models():
    nothing = Group.of_masks("nothing", {path: torch.zeros(shape, dtype=torch.bool) for path, shape in SHAPES.items()})
    made = overlap(nothing, nothing)
    assert made.jaccard is None
    assert made.floor is None
    assert "—" in str(made)
    assert overlap(nothing, group(1)).jaccard == 0
    with pytest.raises(UserError, match="share no matrix"):
        overlap(group(1), Group.of_masks("b", {"x": torch.ones(2, 2, dtype=torch.bool)}))
    with pytest.raises(UserError, match="two shapes"):
        overlap(group(1), Group.of_masks("b", {"head": torch.ones(2, 2, dtype=torch.bool)}))
