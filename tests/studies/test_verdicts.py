"""Verdicts in words from flags and numbers."""

import pytest

from deltalab.core.stats import holm, mcnemar
from deltalab.studies.verdicts import Comparison, change, drift, false_refusals, freezing, refusals, skills

HELD = {"variant": "delta_mask", "entries": 1234, "max_change": 0.0, "held": True}


def flags(yes: int, n: int = 100) -> list[bool]:
    return [i < yes for i in range(n)]


def comparison(name: str, **arms: int) -> Comparison:
    return Comparison(name, name.upper(), {arm: flags(yes) for arm, yes in arms.items()})


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [(99, 61, "fell"), (40, 80, "rose"), (90, 90, "kept"), (90, 89, "kept"), (98, 95, "kept")],
)
def test_a_change_in_a_word(before, after, outcome):
    c = change(flags(before), flags(after), margin=0.1)
    assert c.outcome == outcome
    assert c.difference == pytest.approx((after - before) / 100)
    assert c.low <= c.difference <= c.high
    assert c.p == mcnemar(flags(before), flags(after)).p


def test_too_few_items_are_undecided_and_not_kept():
    assert change(flags(9, 10), flags(8, 10), margin=0.1).outcome == "undecided"


def test_refusals_name_every_set_and_what_was_lost():
    sets = [comparison("a", before=99, free=61), comparison("b", before=93, free=93)]
    verdict = refusals(sets, "free", 0.1, {"complied": 30, "broken": 8})
    assert verdict["outcome"] == "fell"
    assert "A 99 % → 61 % (difference −38 [" in verdict["sentence"]
    assert "B 93 % → 93 %" in verdict["sentence"]
    assert "Of 38 lost refusals, 30 became compliance and 8 broken text." in verdict["sentence"]
    adjusted = holm([mcnemar(s.flags["before"], s.flags["free"]).p for s in sets])
    assert verdict["numbers"]["sets"]["b"]["p"] == adjusted[1]


def test_sets_that_move_apart_are_undecided():
    assert (
        refusals([comparison("a", before=90, free=50), comparison("b", before=50, free=90)], "free", 0.1, {})["outcome"]
        == "undecided"
    )
    assert refusals([comparison("a", before=90, free=90)], "free", 0.1, {})["outcome"] == "kept"


def test_false_refusals_and_skills_have_their_own_words():
    assert false_refusals([comparison("x", before=40, free=10)], "free", 0.1)["outcome"] == "fewer"
    assert false_refusals([comparison("x", before=10, free=40)], "free", 0.1)["outcome"] == "more"
    verdict = skills(comparison("skills", before=90, free=90), "free", 0.1)
    assert verdict["outcome"] == "kept"
    assert verdict["sentence"].startswith("Tuning kept the skills: exact match 90 % → 90 %")


@pytest.mark.parametrize(
    ("free", "frozen", "control", "outcome"),
    [(30, 80, 30, "protects"), (30, 38, 30, "protects a little"), (30, 80, 80, "no better than random"), (30, 60, 85, "no better than random"),
     (30, 30, 30, "no effect"), (80, 30, 80, "harms"), (30, 80, None, "protects")],
)  # fmt: skip
def test_freezing_is_judged_against_its_control(free, frozen, control, outcome):
    arms = {"before": 90, "free": free, "frozen": frozen} | ({"control": control} if control is not None else {})
    verdict = freezing(
        "safety-only",
        HELD,
        [comparison("a", **arms)],
        "free",
        "frozen",
        "control" if control is not None else None,
        0.1,
    )
    assert verdict["outcome"] == outcome
    assert "held (1,234 entries, largest change 0)" in verdict["sentence"]
    assert ("of what tuning took" in verdict["sentence"]) == (frozen > free)
    if frozen > free:
        assert verdict["numbers"]["averted"] == pytest.approx((frozen - free) / (90 - free))
    assert ("matched random" in verdict["sentence"]) == (control is not None)


def test_freezing_that_did_not_hold_is_said_first():
    verdict = freezing(
        "safety",
        {**HELD, "max_change": 0.01, "held": False},
        [comparison("a", before=90, free=30, frozen=80)],
        "free",
        "frozen",
        None,
        0.1,
    )
    assert verdict["outcome"] == "broken"
    assert verdict["sentence"].startswith("Freezing safety did NOT hold: a frozen entry moved by 0.01")


def test_drift_is_judged_by_its_nulls():
    null = {
        "l2_per_sqrt": [1 + 0.001 * (i % 20) for i in range(99)],
        "cosine_distance": [1e-3 * (1 + 0.001 * (i % 20)) for i in range(99)],
    }
    assert drift("G", {"l2_per_sqrt": 1.5, "cosine_distance": 2.25e-3}, null, 0.1)["outcome"] == "drifts more"
    assert drift("G", {"l2_per_sqrt": 1.01, "cosine_distance": 1.01e-3}, null, 0.1)["outcome"] == "alike"
