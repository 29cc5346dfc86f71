"""The verdict on zeroing a group: one-sided permutation test against random groups, adjusted within its study."""

import numpy as np
import pytest
from scipy import stats

from deltalab.core.stats import empirical_p, wilson
from deltalab.safety.ablation_verdicts import loss
from deltalab.safety.verdicts import ablation_verdict, family

BEFORE = {"refused": 0.95, "complied": 0.05, "broken": 0.0, "skills": 0.98}


def random_groups(n: int, refused: float = 0.9, skills: float = 0.9) -> list[dict[str, float]]:
    return [
        {"refused": refused + 0.001 * (i % 7), "complied": 0.1, "broken": 0.0, "skills": skills - 0.001 * (i % 5)}
        for i in range(n)
    ]


def zeroed(refused: float, skills: float) -> dict[str, float]:
    return {"refused": refused, "complied": 0.3, "broken": 0.7 - refused, "skills": skills}


@pytest.mark.parametrize(
    ("refused", "skills", "outcome"),
    [
        (0.10, 0.95, "refusals hang on it"),
        (0.10, 0.20, "refusals and skills hang on it"),
        (0.903, 0.20, "undecided"),
    ],
)
def test_outcomes(refused, skills, outcome):
    random = random_groups(39)
    found = ablation_verdict("the group g", 0.08, BEFORE, zeroed(refused, skills), random)
    assert found.outcome == outcome
    draws = np.array([r["refused"] for r in random])
    assert found.numbers["p_permutation"]["refused"] == empirical_p(refused, draws, "less")
    y, x = np.arcsin(np.sqrt(refused)), np.arcsin(np.sqrt(draws))
    t = (y - x.mean()) / (x.std(ddof=1) * np.sqrt(1 + 1 / 39))
    assert found.numbers["p"]["refused"] == pytest.approx(float(stats.t.cdf(t, 38)), rel=1e-9)
    assert "8.0 % of the scored weights" in found.sentence
    assert "39 matched random groups" in found.sentence


def test_draws_that_do_not_vary_decide_by_their_rank():
    same = [{"refused": 0.9, "complied": 0.1, "broken": 0.0, "skills": 0.9}] * 20
    found = ablation_verdict("g", 0.08, BEFORE, zeroed(0.0, 0.9), same)
    assert found.numbers["p"]["refused"] == pytest.approx(1 / 21)
    both = family([found, found])
    assert [v.outcome for v in both] == ["undecided", "undecided"]
    assert both[0].numbers["tests"][0]["adjusted"] == pytest.approx(2 / 21)


@pytest.mark.parametrize("share", [0.98, 0.9, 0.5])
def test_a_random_group_in_the_groups_place_is_called_no_more_often_than_alpha_says(share):
    rng = np.random.default_rng(0)
    shares = rng.binomial(120, share, size=(4000, 21)) / 120
    called = np.mean([loss(row[0], row[1:]) < 0.05 for row in shares.tolist()])
    assert wilson(round(called * 4000), 4000).low < 0.05


def test_without_skills():
    bare = [{k: v for k, v in one.items() if k != "skills"} for one in (BEFORE, zeroed(0.1, 0.5), *random_groups(39))]
    found = ablation_verdict("g", 0.08, bare[0], bare[1], bare[2:])
    assert found.outcome == "refusals hang on it"
    assert "skills" not in found.sentence
