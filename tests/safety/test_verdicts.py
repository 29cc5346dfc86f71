"""Drift verdicts: each outcome from numbers made for it, over one and several seeds; Holm over a family."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats as sps
from statsmodels.stats import multitest

from deltalab.core.errors import UserError
from deltalab.core.stats import empirical_p, tost_single
from deltalab.safety.verdicts import Verdict, drift_verdict, family

RNG = np.random.default_rng(0)
L2, COSINE = "l2_per_sqrt", "cosine_distance"


def null(mean=1.0, sd=0.02, n=99):
    draws = RNG.normal(size=n)
    return (mean + sd * (draws - draws.mean()) / draws.std(ddof=1)).tolist()


NULL = {L2: null(1e-3, 2e-5), COSINE: null(1e-5, 4e-7)}


def run(l2, cosine, nulls=NULL, **kinds):
    values = {L2: l2 and l2 * 1e-3, COSINE: cosine and cosine * 1e-5}
    return {"values": values, "nulls": {"magnitude": nulls, **kinds}}


def verdict(l2, cosine, margin=None, nulls=NULL, **more):
    return drift_verdict("safety", [run(l2, cosine, nulls)], margin=margin, **more)


def by_l2(got: Verdict, kind="magnitude"):
    return got.numbers["nulls"][kind][L2]


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
    got = by_l2(verdict(1.1, 1.2, 0.1))
    draws = NULL[L2]
    logs = np.log(np.array(draws) / np.mean(draws))
    assert got["p"] == empirical_p(1.1e-3, draws, "two-sided") == pytest.approx(0.02)
    assert got["ratio"] == pytest.approx(1.1)
    assert got["cohen_d"] == pytest.approx((math.log(1.1) - logs.mean()) / logs.std(ddof=1))
    assert got["cliff_delta"] == 1
    assert got["p_same"] == pytest.approx(tost_single(math.log(1.1), logs, math.log(1.1)).p)
    assert [got["band"]["low"], got["band"]["high"]] == pytest.approx(np.exp(np.quantile(logs, [0.025, 0.975])))
    assert (got["low"], got["p_seeds"]) == (None, None)
    assert "1.100 times theirs (p = 0.020, +4.8 sd" in verdict(1.1, 1.2, 0.1).sentence


def test_too_few_draws_can_decide_nothing():
    """20 draws give no two-sided p below .095."""
    few = {L2: null(1e-3, 2e-5, 20), COSINE: null(1e-5, 4e-7, 20)}
    got = verdict(5.0, 5.0, nulls=few)
    assert got.outcome == "undecided"
    assert "draw more" in got.sentence
    assert verdict(5.0, 5.0, nulls=few, alpha=0.1).outcome == "drifts more"
    with pytest.raises(UserError, match="random groups"):
        verdict(1.0, 1.0, nulls={L2: [1.0], COSINE: [1.0]})


def test_nothing_moved():
    still = {L2: [0.0] * 40, COSINE: [0.0] * 40}
    got = verdict(0.0, 0.0, 0.1, nulls=still)
    assert got.outcome == "undecided"
    assert "nothing moved" in got.sentence


def test_draws_without_a_cosine_are_left_out():
    nulls = {**NULL, COSINE: [None, *NULL[COSINE]]}
    assert verdict(1.2, 1.3, nulls=nulls).outcome == "drifts more"


def test_false_alarms_are_as_rare_as_said():
    """Under the null the test of one seed calls a difference in about 5 of 100 studies."""
    alarms = 0
    for _ in range(150):
        draws = RNG.normal(1, 0.05, 100)
        measured = {
            "values": dict.fromkeys((L2, COSINE), draws[0]),
            "nulls": {"magnitude": {m: draws[1:].tolist() for m in (L2, COSINE)}},
        }
        alarms += drift_verdict("g", [measured], margin=None).outcome != "undecided"
    assert 1 <= alarms <= 17


# ---- several seeds ------------------------------------------------------------------------------------------------


def seeds(ratios, sd=0.02, n=199, **more):
    """Runs whose group is `ratios` times the nulls' mean; draw i deviates alike in every seed."""
    own = np.random.default_rng(5).normal(0, sd, n)
    draws = {L2: (1e-3 * np.exp(own)).tolist(), COSINE: (1e-5 * np.exp(2 * own)).tolist()}
    return [run(r, r * r, draws, **more) for r in ratios]


@pytest.mark.parametrize(("ratios", "outcome"), [
    ([1.20, 1.22, 1.19], "drifts more"),
    ([0.80, 0.82, 0.79], "drifts less"),
    ([1.00, 1.01, 0.99], "alike"),
    ([1.04, 1.041, 1.039], "alike"),
    ([1.05, 1.30, 0.98], "undecided"),
    ([1.10, 1.60, 1.02, 1.3, 0.9], "undecided"),
])  # fmt: skip
def test_outcomes_over_seeds(ratios, outcome):
    got = drift_verdict("safety", seeds(ratios), margin=0.1)
    assert got.outcome == outcome
    assert f"Over {len(ratios)} seeds" in got.sentence
    assert by_l2(got)["per_seed"] == pytest.approx(
        np.array(ratios) * 1e-3 / np.mean(seeds([1])[0]["nulls"]["magnitude"][L2])
    )


def test_a_claim_needs_both_the_entries_and_the_seeds():
    """p is the larger of the permutation test's and of t over the seeds, two-sided, direction by direction."""
    for ratios, sd in (([1.02, 1.021, 1.019], 0.05), ([1.3, 1.02, 1.2], 0.02)):
        got, runs = by_l2(drift_verdict("g", seeds(ratios, sd))), seeds(ratios, sd)
        draws = np.array(runs[0]["nulls"]["magnitude"][L2])
        logs = np.log(np.array(ratios) * 1e-3 / draws.mean())
        by_entries = empirical_p(logs.mean(), np.log(draws / draws.mean()), "two-sided")
        # the mean of so many draws is itself known so well only
        se = math.hypot(
            logs.std(ddof=1) / math.sqrt(3), np.log(draws / draws.mean()).std(ddof=1) / math.sqrt(len(draws))
        )
        by_seeds = 2 * sps.t.sf(abs(logs.mean()) / se, 2)
        assert (got["p_choice"], got["p_seeds"]) == pytest.approx((by_entries, by_seeds))
        assert got["p"] == pytest.approx(max(by_entries, by_seeds))
        half = sps.t.ppf(0.975, 2) * se
        assert (got["low"], got["high"]) == pytest.approx((math.exp(logs.mean() - half), math.exp(logs.mean() + half)))
        margin = math.log(1.1)
        over = sps.t.sf((margin - abs(logs.mean())) / se, 2)
        assert got["p_same"] == pytest.approx(
            max(over, tost_single(logs.mean(), np.log(draws / draws.mean()), margin).p)
        )


def test_opposite_sides_are_not_added_up():
    """Beyond the draws on one side while the seeds lean, unsurely, to it: two-sided p, and never below either."""
    got = by_l2(drift_verdict("g", seeds([0.93, 0.90, 0.99])))
    assert got["p"] >= max(got["p_choice"], got["p_seeds"]) - 1e-12
    assert not got["more"]


def test_seeds_need_the_same_random_groups():
    first, second = seeds([1.0, 1.0])
    second["nulls"]["magnitude"] = {m: draws[:50] for m, draws in second["nulls"]["magnitude"].items()}
    with pytest.raises(UserError, match="different numbers of random groups"):
        drift_verdict("g", [first, second])
    del second["nulls"]["magnitude"]
    with pytest.raises(UserError, match="different nulls"):
        drift_verdict("g", [first, second])
    with pytest.raises(UserError, match="no training"):
        drift_verdict("g", [])


def test_a_second_null_may_stop_a_claim_and_not_make_one():
    higher = {L2: null(1.4e-3, 2e-5), COSINE: null(2e-5, 4e-7)}
    got = drift_verdict("safety", [run(1.2, 1.44, NULL, utility=higher)])
    assert got.outcome == "undecided"
    assert got.numbers["says_by_null"] == {"magnitude": "more", "utility": "less"}
    assert "matched on the utility score" in got.sentence
    assert "contradicts" in got.sentence
    lower = {L2: null(0.8e-3, 2e-5), COSINE: null(0.6e-5, 4e-7)}
    assert drift_verdict("safety", [run(1.2, 1.44, NULL, utility=lower)]).outcome == "drifts more"
    assert drift_verdict("safety", [run(1.001, 1.001, NULL, utility=lower)], margin=None).outcome == "undecided"


# ---- families -----------------------------------------------------------------------------------------------------


def test_a_family_is_adjusted_by_holm():
    found = [
        verdict(r, r * r, 0.1, nulls={L2: null(1e-3, 2e-5, 999), COSINE: null(1e-5, 4e-7, 999)})
        for r in (1.2, 1.042, 1.001, 0.955)
    ]
    together = family(found)
    for asks in ("change", "same"):
        raw = [t["p"] for v in found for t in v.numbers["tests"] if t["asks"] == asks]
        new = [t["adjusted"] for v in together for t in v.numbers["tests"] if t["asks"] == asks]
        assert new == pytest.approx(multitest.multipletests(raw, method="holm")[1])
    assert [v.outcome for v in together] == ["drifts more", "alike", "alike", "alike"]
    assert "Adjusted by Holm" in together[0].sentence
    assert "over the 4 tests" in together[0].sentence
    assert "Adjusted" not in found[0].sentence
    assert json.loads(json.dumps([v.plain() for v in together], allow_nan=False)) == [v.plain() for v in together]


def test_outcomes_are_decided_by_adjusted_p():
    """One of forty at p = .02 is a claim alone and none in the family."""
    alone = verdict(1.2, 1.44)
    others = [verdict(1.001, 1.001) for _ in range(39)]
    assert alone.outcome == "drifts more"
    together = family([alone, *others])[0]
    assert together.outcome == "undecided"
    assert together.numbers["tests"][0]["p"] == pytest.approx(0.02)
    assert together.numbers["tests"][0]["adjusted"] == pytest.approx(0.8)
    assert [v.outcome for v in family([alone])] == ["drifts more"]


def test_a_familys_order_does_not_matter():
    found = [verdict(r, r * r, 0.1) for r in (1.2, 1.06, 1.001)]
    outcomes = {
        tuple(sorted((v.numbers["nulls"]["magnitude"][L2]["ratio"], v.outcome) for v in family(list(order))))
        for order in itertools.permutations(found)
    }
    assert len(outcomes) == 1
