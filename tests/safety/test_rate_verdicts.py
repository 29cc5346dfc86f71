"""Shares before and after over one and several seeds, and the verdicts on them."""

import json

import numpy as np
import pytest

from deltalab.core import stats
from deltalab.core.errors import UserError
from deltalab.safety.verdicts import Comparison, change, family, refusals, skills

RNG = np.random.default_rng(2)


def flags(yes: int, n: int = 100) -> list[bool]:
    return [i < yes for i in range(n)]


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [(99, 61, "fell"), (40, 80, "rose"), (90, 90, "kept"), (90, 89, "kept"), (98, 95, "kept")],
)
def test_a_change_in_a_word(before, after, outcome):
    c = change([flags(before)], [flags(after)], margin=0.1)
    assert c.outcome == outcome
    assert c.difference == pytest.approx((after - before) / 100)
    assert c.low <= c.difference <= c.high
    assert c.p == stats.mcnemar(flags(before), flags(after)).p


def test_too_few_items_are_undecided_and_not_kept():
    assert change([flags(9, 10)], [flags(8, 10)], margin=0.1).outcome == "undecided"


@pytest.mark.parametrize(("before", "after", "outcome"), [
    (99, [61, 63, 58], "fell"), (40, [80, 82, 79], "rose"), (90, [90, 90, 90], "kept"), (90, [89, 90, 91], "kept"),
    (90, [88, 40, 91], "undecided"), (90, [60, 75, 50, 70, 65], "fell"), (90, [60, 95, 50, 80, 70], "undecided"),
])  # fmt: skip
def test_a_change_over_seeds_in_a_word(before, after, outcome):
    c = change([flags(before)], [flags(n) for n in after], margin=0.1)
    assert c.outcome == outcome
    assert c.difference == pytest.approx((np.mean(after) - before) / 100)
    assert c.per_seed == pytest.approx([(n - before) / 100 for n in after])
    assert c.low <= c.difference <= c.high


def test_several_seeds_have_the_error_of_seeds_and_prompts():
    before, after = RNG.random((3, 60)) < 0.8, RNG.random((3, 60)) < [[0.5], [0.6], [0.4]]
    c = change(before.tolist(), after.tolist(), 0.1)
    table = stats.crossed(after.astype(float) - before)
    counts = [round(float(cell.sum()) / 3) for cell in (before & after, after & ~before, before & ~after)]
    of_items = stats.newcombe_paired(*counts, 60 - sum(counts))
    assert (c.low, c.high) == pytest.approx(
        (min(of_items.low, table.interval().low), max(of_items.high, table.interval().high))
    )
    assert c.p == pytest.approx(
        max(
            table.p(),
            stats.mcnemar([True] * counts[2] + [False] * counts[1], [False] * counts[2] + [True] * counts[1]).p,
        )
    )


def test_copies_of_one_seed_say_no_more_than_the_one():
    """Three seeds that answer alike are as sure as the prompts allow, and no surer."""
    before, after = RNG.random(80) < 0.9, RNG.random(80) < 0.7
    one, three = (
        change([before.tolist()], [after.tolist()], 0.1),
        change([before.tolist()] * 3, [after.tolist()] * 3, 0.1),
    )
    assert three.p >= one.p
    assert three.low <= one.low < one.high <= three.high


def test_nothing_flipped_is_not_known_for_sure():
    c = change([flags(20, 20)] * 3, [flags(20, 20)] * 3, 0.1)
    assert (c.difference, c.outcome) == (0, "undecided")
    assert c.high == pytest.approx(stats.newcombe_paired(20, 0, 0, 0).high)


def test_kept_is_judged_by_the_least_alpha():
    c = change([flags(90)], [flags(89)], 0.1)
    at = stats.newcombe_paired(89, 0, 1, 10, 1 - c.p_kept)
    assert c.outcome == "kept"
    assert max(-at.low, at.high) == pytest.approx(0.1, abs=1e-4)
    assert change([flags(90)], [flags(70)], 0.1).p_kept == 1


def test_interval_covers_and_false_alarms_are_rare():
    """Prompts of their own difficulty; tuning shifts each seed by its own amount, zero on average."""
    rng, hits, alarms, runs = np.random.default_rng(6), 0, 0, 300
    for _ in range(runs):
        prompts, shift = rng.normal(1, 1.5, 60), rng.normal(0, 0.4, (3, 1))
        before = rng.random(60) < 1 / (1 + np.exp(-prompts))
        after = rng.random((3, 60)) < 1 / (1 + np.exp(-(prompts + shift)))
        c = change([before.tolist()], after.tolist(), 0.1)
        hits += c.low <= 0.0 <= c.high
        alarms += c.p < 0.05
    assert hits / runs >= 0.92
    assert alarms / runs <= 0.08


def comparison(name, before, *seeds):
    return Comparison(name, name.upper(), {"before": [flags(before)], "free": [flags(n) for n in seeds]})


def test_verdicts_over_seeds():
    got = refusals([comparison("a", 99, 61, 60, 65), comparison("b", 93, 93, 92, 93)], "free", 0.1, {"complied": 90})
    assert got.outcome == "fell"
    assert "Over 3 seeds" in got.sentence
    assert "A 99 % → 62 %" in got.sentence
    assert json.loads(json.dumps(got.plain(), allow_nan=False)) == got.plain()
    raw = [change([flags(b)], [flags(n) for n in s], 0.1).p for b, s in ((99, (61, 60, 65)), (93, (93, 92, 93)))]
    assert [got.numbers["sets"][n]["p"] for n in "ab"] == pytest.approx(stats.holm(raw))


def test_a_family_of_rates_is_adjusted_again():
    alone = skills(comparison("skills", 90, 80), "free", 0.05)
    assert alone.outcome == "fell"
    assert 0.001 < alone.numbers["sets"]["skills"]["p"] < 0.01
    others = [refusals([comparison("a", 50, 50), comparison("b", 50, 49)], "free", 0.1, {}) for _ in range(20)]
    together = family([alone, *others])
    assert together[0].outcome == "undecided"
    assert together[0].numbers["tests"][0]["adjusted"] == pytest.approx(41 * alone.numbers["tests"][0]["p"])
    assert "over the 41 tests" in together[0].sentence


@pytest.mark.parametrize(("before", "after", "match"), [
    ([flags(1, 3)], [flags(1, 4)], "not of the same items"), ([flags(1, 3)] * 2, [flags(1, 3)] * 3, "cannot be paired"), ([], [], "not of the same items"),
])  # fmt: skip
def test_what_cannot_be_compared(before, after, match):
    with pytest.raises(UserError, match=match):
        change(before, after, 0.1)
