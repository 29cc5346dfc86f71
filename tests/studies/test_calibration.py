"""The calibration of the verdicts, small, on a geometry made for it: groups with a drift of their own, seeds, and both."""

import numpy as np
import pytest
import torch

from deltalab.core.stats import student
from deltalab.measure.entry_sums import Listed
from deltalab.safety.group import Group
from deltalab.studies.calibration import simulate as s
from deltalab.studies.calibration.geometry import Shuffled, add_up
from deltalab.studies.calibration.tables import markdown

REPEATS, DRAWS = 300, 199


def geometry(own=0.02, both=0.01, trainings=12, groups=2000):
    """own: what a group moves beyond others in every training; both: in one."""
    rng = np.random.default_rng(0)
    logs = rng.normal(0, 0.2, (trainings, 1)) + rng.normal(0, own, groups) + rng.normal(0, both, (trainings, groups))
    return {"l2_per_sqrt": 1e-3 * np.exp(logs), "cosine_distance": 1e-5 * np.exp(2 * logs)}


DRIFT = geometry()


def by_name(rates):
    return {rate.what: rate for rate in rates}


def test_no_group_is_called_special_too_often():
    for seeds in (1, 3, 5):
        got = by_name(s.drift_claims(DRIFT, seeds, REPEATS, DRAWS))
        for claim in ("drifts more", "drifts less", "a difference, p < .05"):
            assert got[claim].rare, got[claim]


def test_either_test_alone_would_call_it_so():
    """t over seeds where groups have a drift of their own; permutation is right about entries."""
    got = by_name(s.drift_claims(DRIFT, 5, REPEATS, DRAWS))
    assert got["t over seeds alone, p < .05"].interval.low > 0.3
    assert got["permutation alone, p < .05"].rare


def test_a_planted_drift_is_found():
    shares = [
        by_name(s.drift_claims(DRIFT, 5, 100, DRAWS, times, None))["drifts more"].interval.value
        for times in (1.0, 1.05, 1.2)
    ]
    assert shares[0] < 0.08 < shares[1] < shares[2]
    assert shares[2] > 0.95


def test_a_drift_at_the_margin_is_not_called_alike():
    assert by_name(s.drift_claims(DRIFT, 3, REPEATS, DRAWS, 1.1))["alike"].rare
    assert by_name(s.drift_claims(DRIFT, 3, 100, DRAWS))["alike"].interval.value > 0.8


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_intervals_of_drift_cover(seeds):
    assert 0.92 <= s.drift_coverage(DRIFT, seeds, REPEATS, DRAWS).interval.value <= 0.985


def test_a_family_is_kept_by_holm_and_by_nothing_less():
    got = by_name(s.families(DRIFT, 1, 150, 8, 999))
    assert got["any of 8 otherwise, Holm"].rare
    assert got["any of 8 otherwise, unadjusted"].interval.low > 0.15


def test_studies_do_not_compare_a_group_with_itself():
    for study in s.drawn(DRIFT, 3, 50, 1990, 0, groups=8):
        assert not set(study.groups.tolist()) & set(study.nulls.tolist())
        assert len(set(study.nulls.tolist())) == 1990
        assert 0 <= study.nulls.min() <= study.nulls.max() < 2000
        assert len(set(study.trainings.tolist())) == 3


def scores(trainings=12, groups=300, samples=150):
    """Skewed scores of samples, that tunings change by about as much each."""
    rng = np.random.default_rng(1)
    before = rng.gamma(2, 1, samples) * np.exp(rng.normal(0, 0.02, (groups, 1)))
    change = (
        rng.normal(0, 0.02, (trainings, 1, 1))
        + rng.normal(0, 0.01, (trainings, groups, 1))
        + rng.normal(0, 0.05, (trainings, 1, samples))
    )
    return np.concatenate([before[None], before * np.exp(change)])


SCORES = scores()


@pytest.mark.parametrize(
    ("seeds", "samples", "given"), [(1, 64, True), (3, None, False), (3, 64, True), (5, None, False), (5, 64, True)]
)
def test_score_verdicts_at_their_borders(seeds, samples, given):
    for truth, wrong in (
        (-0.1, "representational drift"),
        (-0.1, "falls by 5–10 %"),
        (-0.05, "global redistribution"),
        (0.05, "rises"),
    ):
        got = by_name(s.score_claims(SCORES, seeds, 150, truth, samples, given, draws=39))
        assert got[wrong].rare, got[wrong]
    assert got["interval of the change"].interval.value >= 0.9
    assert (
        by_name(s.score_claims(SCORES, seeds, 60, -0.3, samples, given, draws=39))[
            "representational drift"
        ].interval.value
        > 0.9
    )


def test_a_random_group_is_not_said_to_change_otherwise_than_random_ones():
    assert by_name(s.score_claims(SCORES, 3, REPEATS, None, None, False, draws=99))[
        "change otherwise than random groups, p < .05"
    ].rare


def test_the_selection_trap():
    """What is selected and measured on one split falls on another; what is measured on others does not."""
    rng = np.random.default_rng(2)
    worth = rng.gamma(2, 1, 20000)
    splits = np.stack([worth * rng.gamma(50, 1 / 50, 20000) for _ in range(5)])
    tuned = splits * 0.9
    top = [np.argsort(-split)[:200] for split in splits]
    chosen = np.array([[[at[top_of].mean() for at in model] for top_of in top] for model in (splits, tuned)])
    found = s.trap(chosen, np.stack([splits.mean(1), tuned.mean(1)]))
    assert found.untouched_same.high < -0.02
    assert found.winners.low > 0.02
    assert found.untouched_fresh.low < 0 < found.untouched_fresh.high
    assert abs(found.untouched_fresh.value) < 0.01
    assert (found.tuned_same.value, found.tuned_fresh.value) == pytest.approx((-0.1, -0.1))
    by_hand = [chosen[0, i, i] / np.mean([chosen[0, j, i] for j in range(5) if j != i]) - 1 for i in range(5)]
    assert found.winners == pytest.approx(student(by_hand).interval())
    share = chosen[0] / splits.mean(1)
    by_hand = [np.mean([share[i, j] / share[i, i] - 1 for j in range(5) if j != i]) for i in range(5)]
    assert found.untouched_same == pytest.approx(student(by_hand).interval())


def test_shares_and_means():
    assert by_name(s.share_claims(3, 150))["fell or rose"].rare
    got = by_name(s.nested_coverage(3, 300, resamples=200))
    assert got["nested items: bootstrap over two levels"].interval.high < 0.9
    assert (
        got["nested items: t over seeds' means"].interval.low
        <= 0.95
        <= got["nested items: t over seeds' means"].interval.high
    )
    got = by_name(s.nested_coverage(5, 300, resamples=20))
    assert got["shared items: t over seeds' means"].interval.high < 0.93
    assert got["shared items: seeds × items, Satterthwaite"].interval.value >= 0.93


def test_rates_have_exact_limits():
    assert s.Rate("x", 1, 0, 100).interval == pytest.approx((0, 0, 1 - 0.025 ** (1 / 100)))
    assert s.Rate("x", 1, 60, 1000).rare
    assert not s.Rate("x", 1, 80, 1000).rare


# ---- what the geometry is made of ---------------------------------------------------------------------------------


def test_sums_of_draws_are_those_of_their_entries():
    rng = np.random.default_rng(3)
    table, draws = rng.normal(size=(60, 3)), [torch.tensor(rng.choice(60, 7, replace=False)) for _ in range(5)]
    draws = [*draws, *(torch.tensor(rng.choice(60, 4, replace=False)) for _ in range(100))]
    sums = np.ones((105, 3))
    add_up(torch.from_numpy(table), Listed([{"a": d} for d in draws]).indices("a"), sums)
    np.testing.assert_allclose(sums - 1, np.stack([table[d.numpy()].sum(0) for d in draws]), rtol=1e-5, atol=1e-5)


def test_shuffled_copies_keep_how_entries_share_rows_and_columns():
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[1, [0, 3, 4]] = mask[5, 3] = mask[2, 3] = True
    copies = list(Shuffled(Group.of_masks("g", {"a": mask}), 20).indices("a"))
    for copy in copies:
        rows, columns = np.divmod(copy.numpy(), 9)
        assert sorted(np.bincount(rows, minlength=6)) == sorted(mask.sum(1).tolist())
        assert sorted(np.bincount(columns, minlength=9)) == sorted(mask.sum(0).tolist())
    assert len({tuple(sorted(copy.tolist())) for copy in copies}) > 15


def test_tables():
    rates = [s.Rate("drifts more", 3, 40, 2000), s.Rate("alike", 1, 60, 2000)]
    trap = s.trap(np.ones((2, 3, 3)), np.ones((2, 3)))
    assert "| | 1 seed | 3 seeds |\n|---|---|---|\n| drifts more | – | 2.0 % [1.4, 2.7] |\n| alike | 3.0 %" in markdown(
        {"drift": rates}, trap
    )


def test_mixed_trainings_have_the_mean_and_the_covariance_of_the_real_ones():
    real = np.random.default_rng(4).normal(size=(6, 3)) + np.arange(3)
    new = s.mixed(real, 200_000, np.random.default_rng(5))
    np.testing.assert_allclose(new.mean(0), real.mean(0), atol=0.02)
    np.testing.assert_allclose(np.cov(new.T), np.cov(real.T), atol=0.03)
