"""Summaries of scores in groups, against plain numpy over all entries at once."""

import numpy as np
import pytest
import torch

from deltalab.safety.dynamics import BINS, summary
from deltalab.safety.group import Group
from deltalab.safety.nulls import Nulls


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    shapes = {"m.layers.0.a": (6, 10), "m.layers.0.b": (4, 5), "m.layers.1.a": (6, 10)}
    found = {path: torch.rand(shape, generator=generator).pow(6) for path, shape in shapes.items()}
    found["m.layers.1.a"][0, :4] = 0.0
    return found


@pytest.fixture
def group(scores):
    generator = torch.Generator().manual_seed(1)
    return Group.of_masks("g", {path: torch.rand(s.shape, generator=generator) < 0.4 for path, s in scores.items()})


def flat(scores, group=None):
    parts = [scores[p].flatten() if group is None else scores[p][group.mask(p)] for p in scores]
    return torch.cat(parts).double().numpy()


@pytest.mark.parametrize("whole", [False, True], ids=["group", "all"])
def test_moments_quartiles_and_histogram(scores, group, whole):
    out = summary(scores, {"g": group}, {})
    found, values = (out["all"], flat(scores)) if whole else (out["groups"]["g"], flat(scores, group))
    assert found["n"] == len(values)
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert found["sd"] == pytest.approx(values.std(), rel=1e-9)
    ordered = np.sort(values)
    assert found["quartiles"] == [ordered[int(q * (len(values) - 1))] for q in (0.25, 0.5, 0.75)]
    positive = values[values > 1e-12]
    assert found["zeros"] == len(values) - len(positive)
    edges = out["edges"]
    assert len(edges) == BINS + 1
    assert found["counts"] == np.histogram(np.log10(positive).clip(edges[0], edges[-1]), edges)[0].tolist()
    assert sum(found["counts"]) + found["zeros"] == len(values)


def test_layers_are_means_of_their_entries(scores, group):
    out = summary(scores, {"g": group}, {})["groups"]["g"]["layers"]
    zero = torch.cat([scores[p][group.mask(p)] for p in ("m.layers.0.a", "m.layers.0.b")]).double()
    assert out == pytest.approx(
        {"0": float(zero.mean()), "1": float(scores["m.layers.1.a"][group.mask("m.layers.1.a")].double().mean())}
    )


def test_means_of_random_groups_are_those_of_their_draws(scores, group):
    nulls = Nulls(group, 7, 3)
    out = summary(scores, {"g": group}, {"random": nulls})["nulls"]["random"]
    assert out == pytest.approx([flat(scores, nulls.draw(i)).mean() for i in range(7)], rel=1e-12)


def test_another_summary_keeps_the_edges(scores, group):
    edges = summary(scores, {"g": group}, {})["edges"]
    again = summary({path: 3 * s for path, s in scores.items()}, {"g": group}, {}, edges)
    assert again["edges"] == edges
    assert (
        sum(again["all"]["counts"]) + again["all"]["zeros"] == again["all"]["n"]
    )  # what lies outside is in the end bins


def test_an_empty_group_has_no_mean(scores):
    nothing = Group.of_masks("none", {path: torch.zeros(s.shape, dtype=torch.bool) for path, s in scores.items()})
    found = summary(scores, {"none": nothing}, {})["groups"]["none"]
    assert (found["n"], found["mean"], found["quartiles"], found["layers"]) == (0, None, None, {})
