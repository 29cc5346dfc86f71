"""Random groups: exact counts, exact uniformity by χ², bins by ranking, and one pass against single draws."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from deltalab.core.errors import UserError
from deltalab.safety.bins import Bins, bins_of
from deltalab.safety.groups import Group, top
from deltalab.safety.nulls import Nulls, matched_random, random_like
from deltalab.safety.sampling import Sampler
from deltalab.safety.units import units_of
from tests.helpers import tiny_llama

SHAPES = {"model.layers.0.q": (24, 40), "model.layers.0.up": (56, 40), "model.layers.1.q": (24, 40)}


def weights(seed=5):
    rng = torch.Generator().manual_seed(seed)
    return {path: torch.randn(shape, generator=rng) for path, shape in SHAPES.items()}


def large(w):
    """A group of mostly large weights, so that a null that is not matched differs."""
    noise = torch.Generator().manual_seed(1)
    return top({path: v.abs() + 0.3 * torch.rand(v.shape, generator=noise) for path, v in w.items()}, 0.1, "matrix")


def histogram(group, w, path, bins=20):
    """How many of the group's entries lie in each quantile part of |w|, by ranking."""
    ranked = sorted(range(w[path].numel()), key=lambda i: (w[path].abs().flatten()[i].item(), i))
    part = {entry: rank * bins // len(ranked) for rank, entry in enumerate(ranked)}
    found = [0] * bins
    for entry in group[path].tolist():
        found[part[entry]] += 1
    return found


def test_bins_are_the_ranks_parted():
    w = {"a": torch.tensor([[3.0, -1.0, 1.0], [0.5, -9.0, 1.0]])}
    assert bins_of(w, 3)["a"].tolist() == [[2, 0, 1], [0, 2, 1]]
    assert bins_of(w, 6)["a"].tolist() == [[4, 1, 2], [0, 5, 3]]
    w["a"] += 100  # weights may train afterwards
    assert bins_of(w, 1)["a"].unique().tolist() == [0]
    for wrong in (0, 257):
        with pytest.raises(UserError, match="bins cannot be made"):
            bins_of(w, wrong)


def test_bins_as_a_file(tmp_path):
    made = bins_of(weights(), 20, of="utility")
    made.save(tmp_path / "bins.safetensors")
    back = Bins.load(tmp_path / "bins.safetensors")
    assert (back.of, back.unit, list(back)) == ("utility", "entry", sorted(made))
    assert all(torch.equal(back[path], made[path]) and back[path].dtype == torch.uint8 for path in made)
    entries = sum(out * in_ for out, in_ in SHAPES.values())
    assert (tmp_path / "bins.safetensors").stat().st_size < entries + 1000
    group = large(weights())
    assert torch.equal(
        Nulls(group, 1, 3, back).draw(0)["model.layers.0.q"], Nulls(group, 1, 3, made).draw(0)["model.layers.0.q"]
    )
    (tmp_path / "bins.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        Bins.load(tmp_path / "bins.safetensors")
    with pytest.raises(UserError, match="damaged"):
        Bins.load(tmp_path / "missing")


@pytest.mark.parametrize("matched", [False, True])
def test_counts_are_exact_in_each_matrix_and_each_bin(matched):
    w = weights()
    group = large(w)
    nulls = Nulls(group, 12, 7, bins_of(w) if matched else None)
    assert len(nulls) == 12
    alike = 0
    for i in range(12):
        draw = nulls.draw(i)
        assert draw.counts == group.counts
        assert draw.info["seed"] == 7 + i
        assert draw.unit == "entry"
        for path in group:
            assert len(set(draw[path].tolist())) == group.counts[path]
            same = histogram(draw, w, path) == histogram(group, w, path)
            assert same or not matched
            alike += same
    assert matched or alike == 0


@pytest.mark.parametrize("bins", [2, 10, 20, 63, 64, 100])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_bins_that_do_not_divide_and_any_share(bins, share):
    w = {"a": torch.randn(7, 9)}
    group = Group.of_masks("g", {"a": torch.rand(7, 9) < share})
    for i in range(10):
        assert histogram(matched_random(group, w, i, bins), w, "a", bins) == histogram(group, w, "a", bins)


def test_a_draw_depends_on_its_seed_and_the_matrix_alone():
    w = weights()
    group, bins = large(w), bins_of(w)
    nulls = Nulls(group, 5, 7, bins)
    path = "model.layers.0.up"
    assert torch.equal(Nulls(group, 1, 9, bins).draw(0)[path], nulls.draw(2)[path])
    assert torch.equal(matched_random(group, w, 9)[path], nulls.draw(2)[path])
    alone = Group.of_masks("alone", {path: group.mask(path)})
    assert torch.equal(Nulls(alone, 1, 9, bins).draw(0)[path], nulls.draw(2)[path])
    assert torch.equal(random_like(group, 8)[path], Nulls(group, 3, 7).draw(1)[path])
    assert not torch.equal(nulls.draw(0)[path], nulls.draw(1)[path])
    same_shape = Group.of_masks("two", {name: group.mask("model.layers.0.q") for name in ("a", "b")})
    assert not torch.equal(random_like(same_shape, 0)["a"], random_like(same_shape, 0)["b"])


@pytest.mark.parametrize("matched", [False, True])
def test_one_pass_gives_the_single_draws(matched):
    w = weights()
    group = large(w)
    nulls = Nulls(group, 30, 3, bins_of(w) if matched else None)
    for path in nulls.paths:
        passed = list(nulls.indices(path))
        assert len(passed) == 30
        for i, index in enumerate(passed):
            assert torch.equal(index.sort().values.long(), nulls.draw(i)[path])


def sampler(bins, counts):
    bins = np.array(bins, dtype=np.uint8)
    own = np.concatenate([np.flatnonzero(bins == b)[:c] for b, c in enumerate(counts)])
    return Sampler(bins, own)


@pytest.mark.parametrize("counts", [(1, 2), (2, 3), (3, 5), (0, 4), (4, 1), (4, 6)])
def test_every_set_comes_equally_often(counts):
    """χ² over all sets with these counts in bins of 4 and 6, whose members lie mixed: no joint pattern is preferred."""
    bins = [0, 1, 1, 0, 1, 0, 1, 1, 0, 1]
    made, seen = sampler(bins, counts), {}
    zeros, ones = [i for i, b in enumerate(bins) if b == 0], [i for i, b in enumerate(bins) if b == 1]
    sets = [(*x, *y) for x in itertools.combinations(zeros, counts[0]) for y in itertools.combinations(ones, counts[1])]
    rng, n = np.random.default_rng(0), 60 * len(sets)
    for _ in range(n):
        key = tuple(sorted(made.draw(rng).tolist()))
        seen[key] = seen.get(key, 0) + 1
    assert set(seen) == {tuple(sorted(s)) for s in sets}
    if len(sets) > 1:
        assert stats.chisquare(list(seen.values())).pvalue > 1e-3


@pytest.mark.parametrize("below", [2.0, -1.0], ids=["coins and proposals", "coins with a surplus"])
@pytest.mark.parametrize("share", [0.005, 0.05, 0.3, 0.7, 0.98])
def test_every_member_and_every_pair_of_a_large_bin_comes_equally_often(monkeypatch, share, below):
    """The coins' part, which small bins do not reach: χ² over members, and over how many of a block are drawn."""
    import deltalab.safety.sampling as module

    monkeypatch.setattr(module, "BELOW", below)
    size, n = 2000, 1500
    count = round(share * size)
    made = sampler([0] * size, (count,))
    assert (len(made.thresholds) > 0) == (share > 1 / 32)
    rng = np.random.default_rng(1)
    hits, inside = np.zeros(size), []
    for _ in range(n):
        drawn = made.draw(rng)
        assert len(drawn) == count
        hits[drawn] += 1
        inside.append((drawn < size // 4).sum())
    expected = n * share
    statistic = ((hits - expected) ** 2).sum() / (expected * (1 - share)) * (size - 1) / size
    assert 1e-3 < stats.chi2.cdf(statistic, size - 1) < 1 - 1e-3
    hypergeometric = stats.hypergeom(size, count, size // 4)
    assert np.mean(inside) == pytest.approx(hypergeometric.mean(), abs=4 * hypergeometric.std() / np.sqrt(n))
    assert np.var(inside) == pytest.approx(hypergeometric.var(), rel=4 * np.sqrt(2 / n))


@pytest.mark.parametrize("unit", ["row", "column", "mlp-unit", "head"])
@pytest.mark.parametrize("matched", [False, True])
def test_units_are_drawn_as_units(unit, matched):
    model = tiny_llama(hidden=64, heads=8, kv_heads=8)
    units = units_of(model, unit)
    w = {path: model.get_submodule(path).weight.detach() for path in units.shapes}
    group = top({path: v.abs() * torch.rand_like(v) ** 9 for path, v in w.items()}, 0.25, units=units)
    bins = bins_of(w, units=units) if matched else None
    nulls = Nulls(group, 6, 1, bins, units)
    own = units.of_group(group)
    for i in range(6):
        draw = nulls.draw(i)
        taken = units.of_group(draw)  # refuses parts of units
        assert draw.unit == unit
        for family in own:
            assert len(taken[family]) == len(own[family])
            if bins is not None:
                counts = [
                    torch.bincount(bins[family][u].long(), minlength=20).tolist() for u in (taken[family], own[family])
                ]
                assert counts[0] == counts[1]
    for path in nulls.paths:
        for i, index in enumerate(nulls.indices(path)):
            assert torch.equal(index.sort().values, nulls.draw(i)[path])
    family = next(iter(own))
    assert len({tuple(units.of_group(nulls.draw(i))[family].tolist()) for i in range(6)}) > 1


def test_few_units_have_fewer_bins():
    model = tiny_llama(hidden=64, heads=8, kv_heads=8)
    w = {path: model.get_submodule(path).weight.detach() for path in units_of(model, "head").shapes}
    assert bins_of(w, units=units_of(model, "head"))["model.layers.0.self_attn"].max() == 1  # 8 heads
    assert bins_of(w, units=units_of(model, "row"))["model.layers.0.self_attn.q_proj"].max() == 15  # 64 rows


def test_what_does_not_fit_is_refused():
    model = tiny_llama()
    units = units_of(model, "row")
    w = {path: model.get_submodule(path).weight.detach() for path in units.shapes}
    entries, rows = top(w, 0.1, "row"), top(w, 0.1, units=units)
    with pytest.raises(UserError, match="not made of whole row units"):
        Nulls(entries, units=units)
    with pytest.raises(UserError, match="cannot be matched on bins of entry"):
        Nulls(rows, match=bins_of(w), units=units)
    with pytest.raises(UserError, match="cannot be matched on bins of row"):
        Nulls(entries, match=bins_of(w, units=units))
    w.pop("model.layers.1.mlp.up_proj")
    with pytest.raises(UserError, match=r"do not cover 'model\.layers\.1\.mlp\.up_proj'"):
        Nulls(entries, match=bins_of(w))
