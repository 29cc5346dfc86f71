"""The verdict on zeroing a group: one-sided permutation test against random groups, adjusted within its study."""

import pytest

from deltalab.core.stats import empirical_p
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
    assert found.numbers["p"]["refused"] == empirical_p(refused, [r["refused"] for r in random], "less")
    assert "8.0 % of the scored weights" in found.sentence
    assert "39 matched random groups" in found.sentence


def test_few_draws_say_how_little_they_can_show():
    found = ablation_verdict("g", 0.08, BEFORE, zeroed(0.0, 0.9), random_groups(20))
    assert found.outcome == "refusals hang on it"
    assert "With 20 draws no p is below 0.048" in found.sentence


def test_in_a_family_its_p_is_adjusted():
    one = ablation_verdict("g", 0.08, BEFORE, zeroed(0.0, 0.9), random_groups(20))
    both = family([one, one])
    assert [v.outcome for v in both] == ["undecided", "undecided"]
    assert both[0].numbers["tests"][0]["adjusted"] == pytest.approx(2 / 21)


def test_without_skills():
    bare = [{k: v for k, v in one.items() if k != "skills"} for one in (BEFORE, zeroed(0.1, 0.5), *random_groups(39))]
    found = ablation_verdict("g", 0.08, bare[0], bare[1], bare[2:])
    assert found.outcome == "refusals hang on it"
    assert "skills" not in found.sentence
