"""Each outcome from numbers made for it."""

import json

import numpy as np
import pytest

from deltalab.core.errors import UserError
from deltalab.core.stats import empirical_p, tost_single
from deltalab.safety.verdicts import drift_verdict

RNG = np.random.default_rng(0)


def null(mean=1.0, sd=0.02, n=99):
    draws = RNG.normal(size=n)
    return (mean + sd * (draws - draws.mean()) / draws.std(ddof=1)).tolist()


NULL = {"l2_per_sqrt": null(1e-3, 2e-5), "cosine_distance": null(1e-5, 4e-7)}


def verdict(l2, cosine, margin=None, nulls=NULL, **more):
    return drift_verdict(
        "safety",
        {"l2_per_sqrt": l2 and l2 * 1e-3, "cosine_distance": cosine and cosine * 1e-5},
        nulls,
        margin=margin,
        **more,
    )


@pytest.mark.parametrize(("l2", "cosine", "margin", "outcome", "words"), [
    (1.2, 1.3, None, "drifts more", "H1"),
    (1.2, 1.02, None, "drifts more", "H1"),
    (0.8, 0.7, None, "drifts less", "less than 99"),
    (1.2, 0.7, None, "measures disagree", "says it drifts more"),
    (0.8, 1.4, None, "measures disagree", "says it drifts less"),
    (1.001, 1.4, None, "measures disagree", "leaves it open"),
    (1.001, 1.001, None, "undecided", "undecided"),
    (1.001, 1.001, 0.15, "alike", "H2"),
    (1.001, 1.001, 0.01, "undecided", "undecided"),
    (1.001, 1.03, 0.045, "undecided", "undecided"),
    (1.2, 1.3, 0.5, "alike", "within 50 %"),
    (1.2, 1.2, 0.15, "measures disagree", "says it drifts more"),
    (1.2, 1.5, 0.15, "drifts more", "H1"),
    (1.2, 1.06, 0.1, "measures disagree", "says it drifts more"),
    (1.001, 1.4, 0.1, "measures disagree", "says it drifts alike"),
    (None, None, 0.1, "undecided", "no drift"),
])  # fmt: skip
def test_outcomes(l2, cosine, margin, outcome, words):
    got = verdict(l2, cosine, margin)
    assert got.outcome == outcome
    assert words in got.sentence
    assert got.numbers["seeds"] == 1
    assert "One seed" in got.sentence or l2 is None
    assert json.loads(json.dumps(got.numbers, allow_nan=False)) == got.numbers


def test_numbers():
    got = verdict(1.1, 1.2, 0.1).numbers["l2_per_sqrt"]
    draws = NULL["l2_per_sqrt"]
    assert got["p"] == empirical_p(1.1e-3, draws, "two-sided") == pytest.approx(0.02)
    assert got["ratio"] == pytest.approx(1.1)
    assert got["standing"] == pytest.approx(5.0)
    assert got["cliff_delta"] == 1
    assert got["p_equivalence"] == tost_single(1.1e-3, draws, 0.1 * np.mean(draws)).p
    assert "1.100 times theirs (p = 0.020, +5.0 sd" in verdict(1.1, 1.2, 0.1).sentence


def test_too_few_draws_can_decide_nothing():
    """20 draws give no two-sided p below .095."""
    few = {"l2_per_sqrt": null(1e-3, 2e-5, 20), "cosine_distance": null(1e-5, 4e-7, 20)}
    got = verdict(5.0, 5.0, nulls=few)
    assert got.outcome == "undecided"
    assert "draw more" in got.sentence
    assert verdict(5.0, 5.0, nulls=few, alpha=0.1).outcome == "drifts more"
    with pytest.raises(UserError, match="random groups"):
        verdict(1.0, 1.0, nulls={"l2_per_sqrt": [1.0], "cosine_distance": [1.0]})


def test_nothing_moved():
    still = {"l2_per_sqrt": [0.0] * 40, "cosine_distance": [0.0] * 40}
    got = drift_verdict("safety", {"l2_per_sqrt": 0.0, "cosine_distance": 0.0}, still, margin=0.1)
    assert got.outcome == "undecided"
    assert "nothing moved" in got.sentence


def test_draws_without_a_cosine_are_left_out():
    nulls = {**NULL, "cosine_distance": [None, *NULL["cosine_distance"]]}
    assert verdict(1.2, 1.3, nulls=nulls).outcome == "drifts more"


def test_false_alarms_are_as_rare_as_said():
    """Under the null either measure alone calls a difference in about 5 of 100 studies."""
    alarms = 0
    for _ in range(150):
        draws = RNG.normal(1, 0.05, 100)
        got = drift_verdict(
            "g",
            {"l2_per_sqrt": draws[0], "cosine_distance": draws[0]},
            {m: draws[1:].tolist() for m in ("l2_per_sqrt", "cosine_distance")},
        )
        alarms += got.outcome != "undecided"
    assert 1 <= alarms <= 17
