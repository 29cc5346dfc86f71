"""Score dynamics: each outcome from numbers made for it; where the error comes from; the comparison with random groups."""

import json
import math

import numpy as np
import pytest
import scipy.stats as sps

from deltalab.core import stats
from deltalab.core.errors import UserError
from deltalab.safety.verdicts import family, score_verdict

RNG = np.random.default_rng(1)
DRAWS = np.exp(RNG.normal(0, 0.01, 199))


def run(change, **more):
    return {"before": 2.0, "after": 2.0 * (1 + change), **more}


def nulls(change=0.0, draws=DRAWS):
    return {"nulls": {"magnitude": {"before": [2.0] * len(draws), "after": (2 * (1 + change) * draws).tolist()}}}


def with_samples(change, n=100, spread=0.05, seed=0):
    rng = np.random.default_rng(seed)
    before = rng.gamma(2, 1, n)
    after = before * (1 + change) * (1 + spread * rng.normal(size=n))
    return {
        "before": before.mean(),
        "after": after.mean(),
        "samples": {"before": before.tolist(), "after": after.tolist()},
    }


@pytest.mark.parametrize(("changes", "outcome", "words"), [
    ([-0.20, -0.21, -0.19], "representational drift", "A, representational drift"),
    ([-0.070, -0.075, -0.072], "falls by 5–10 %", "5 to 10 %"),
    ([0.01, -0.01, 0.005], "global redistribution", "B, global"),
    ([0.10, 0.11, 0.12], "rises", "more than 5 %"),
    ([-0.20, -0.02, -0.10], "undecided", "undecided"),
    ([-0.10, -0.101, -0.099], "undecided", "undecided"),
    ([-0.11, -0.10, -0.14, -0.11, -0.13], "undecided", "undecided"),
    ([-0.12, -0.115, -0.125, -0.12, -0.121], "representational drift", "A"),
])  # fmt: skip
def test_outcomes_over_seeds(changes, outcome, words):
    got = score_verdict("safety", [run(c) for c in changes])
    assert got.outcome == outcome
    assert words in got.sentence
    want = sps.ttest_1samp(changes, 0).confidence_interval(0.95)
    assert (got.numbers["low"], got.numbers["high"]) == pytest.approx((want.low, want.high))
    assert got.numbers["per_seed"] == pytest.approx(changes)
    assert json.loads(json.dumps(got.plain(), allow_nan=False)) == got.plain()


def test_p_is_that_of_the_borders_of_the_region():
    def p(changes):
        return score_verdict("g", [run(c) for c in changes]).numbers["tests"][0]["p"]

    fell = [-0.13, -0.12, -0.15]
    assert p(fell) == pytest.approx(sps.ttest_1samp(fell, -0.10).pvalue)  # two-sided
    rose = [0.07, 0.09, 0.06]
    assert p(rose) == pytest.approx(sps.ttest_1samp(rose, 0.05).pvalue)
    for changes, low, high in (([0.01, -0.02, 0.02], -0.05, 0.05), ([-0.07, -0.08, -0.071], -0.10, -0.05)):
        one_sided = (
            sps.ttest_1samp(changes, low, alternative="greater").pvalue,
            sps.ttest_1samp(changes, high, alternative="less").pvalue,
        )
        assert p(changes) == pytest.approx(max(one_sided))


def test_sameness_is_asked_by_b_alone():
    assert [
        score_verdict("g", [run(c), run(c + 0.001)]).numbers["tests"][0]["asks"] for c in (-0.2, -0.07, 0.0, 0.2)
    ] == ["change", "change", "same", "change"]


def test_one_seed_without_samples_is_undecided_whatever_the_random_groups_say():
    got = score_verdict("safety", [run(-0.4, **nulls())])
    assert got.outcome == "undecided"
    assert "nothing tells how sure" in got.sentence
    assert "differs from that of 199 matched random groups" in got.sentence
    assert got.numbers["nulls"]["magnitude"]["p"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [(-0.2, "representational drift"), (0.0, "global redistribution"), (-0.1, "undecided"), (0.2, "rises")],
)
def test_one_seed_with_samples(change, outcome):
    one = with_samples(change, seed=2)
    got = score_verdict("safety", [one])
    assert got.outcome == outcome
    want = stats.ratio(one["samples"]["after"], one["samples"]["before"]).interval()
    assert (got.numbers["change"], got.numbers["low"], got.numbers["high"]) == pytest.approx(tuple(want))
    assert "over samples" in got.sentence
    assert "One seed" in got.sentence


def test_seeds_that_share_samples_have_the_error_of_both():
    runs = [with_samples(-0.15 + 0.001 * k) for k in range(3)]
    got = score_verdict("g", runs)
    want = stats.crossed([stats.influences(r["samples"]["after"], r["samples"]["before"]) for r in runs]).interval()
    assert (got.numbers["change"], got.numbers["low"], got.numbers["high"]) == pytest.approx(tuple(want))
    assert got.numbers["error"] == "over seeds and samples"
    over_seeds = stats.student(got.numbers["per_seed"]).interval()
    assert want.high - want.low > over_seeds.high - over_seeds.low
    apart = score_verdict("g", [with_samples(-0.15, seed=k) for k in range(3)])
    assert apart.numbers["error"] == "over seeds, each with its own samples"
    assert score_verdict("g", [run(-0.2), run(-0.21)]).numbers["error"] == "over seeds, on these samples"


@pytest.mark.parametrize(
    ("change", "theirs", "says"), [(-0.2, -0.2, "is not shown"), (-0.2, 0.0, "differs"), (0.0, 0.1, "differs")]
)
def test_the_change_beside_that_of_random_groups(change, theirs, says):
    got = score_verdict("g", [run(change + 0.001 * k, **nulls(theirs)) for k in range(3)])
    assert says in got.sentence
    found = got.numbers["nulls"]["magnitude"]
    assert found["null_change"] == pytest.approx((1 + theirs) * math.exp(np.log(DRAWS).mean()) - 1)
    assert found["ratio"] == pytest.approx((1 + change + 0.001) / (1 + found["null_change"]), rel=1e-4)


def test_a_random_group_without_a_score_is_left_out_in_both():
    one = nulls()
    one["nulls"]["magnitude"]["before"][3] = None
    one["nulls"]["magnitude"]["after"][7] = None
    assert score_verdict("g", [run(-0.2, **one), run(-0.2, **nulls())]).numbers["nulls"]["magnitude"]["draws"] == 197


def test_in_a_family():
    found = [
        score_verdict(f"g{k}", [run(c), run(c + 0.002), run(c - 0.002)]) for k, c in enumerate((-0.2, -0.106, 0.01))
    ]
    assert [v.outcome for v in found] == ["representational drift", "representational drift", "global redistribution"]
    assert [v.outcome for v in family(found)] == [
        "representational drift",
        "representational drift",
        "global redistribution",
    ]
    many = family([*found, *[score_verdict("h", [run(-0.1), run(-0.101), run(-0.098)])] * 9])
    assert [v.outcome for v in many[:3]] == ["representational drift", "undecided", "global redistribution"]


@pytest.mark.parametrize(("runs", "borders", "match"), [
    ([], {}, "no training"), ([run(-1.0)], {}, "not above zero"), ([run(0.1)], {"fall": 0.05, "stable": 0.1}, "no borders"),
])  # fmt: skip
def test_what_is_refused(runs, borders, match):
    with pytest.raises(UserError, match=match):
        score_verdict("g", runs, **borders)
