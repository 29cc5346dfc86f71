"""Comparisons: intervals and tests equal scipy's where it has them, verdicts by Holm, fronts, and error rates by simulation."""

import json

import numpy as np
import pytest
from scipy import stats as sps
from statsmodels.stats.multitest import multipletests

from deltalab.cli.compare import table as shown
from deltalab.core.stats import crossed, wilson
from deltalab.lab.compare import Run, at_most_below, compare, cost_of, measures_of, pareto, parts_of, runs_of, stand_in
from deltalab.lab.trials import create, work
from tests.data.test_tasks import said
from tests.lab.sweeps import spec

ACC = "score.sst2.accuracy"


def runs(group, values, items=None, seeds=None, **more):
    seeds = seeds or range(len(values))
    items = items or [None] * len(values)
    return [
        Run(group, seed, {ACC: float(value), "loss": 1 - float(value), **more}, {} if one is None else {"sst2.accuracy": one})
        for seed, value, one in zip(seeds, values, items, strict=True)
    ]  # fmt: skip


def of_items(group, rows, **more):
    return runs(group, [np.mean(row) for row in rows], [list(map(float, row)) for row in rows], **more)


def test_seeds_alone_are_students():
    a, b = [0.5, 0.6, 0.55], [0.7, 0.72, 0.69]
    base, other = compare([*runs("a", a), *runs("b", b)], [ACC], "a")
    want = sps.ttest_rel(b, a)
    assert other.difference.p == pytest.approx(want.pvalue)
    assert (other.difference.interval.low, other.difference.interval.high) == pytest.approx(
        tuple(want.confidence_interval(0.95))
    )
    assert other.difference.how == "3 seeds, paired"
    interval = sps.t.interval(0.95, 2, np.mean(b), sps.sem(b))
    assert (other.interval.low, other.interval.high) == pytest.approx(interval)
    assert base.difference is None
    assert base.verdict() == ""


def test_other_seeds_are_welchs():
    a, b = [0.5, 0.6, 0.55], [0.7, 0.72, 0.69, 0.9]
    _, other = compare([*runs("a", a), *runs("b", b, seeds=[7, 8, 9, 10])], [ACC], "a")
    want = sps.ttest_ind(b, a, equal_var=False)
    assert other.difference.p == pytest.approx(want.pvalue)
    assert (other.difference.interval.low, other.difference.interval.high) == pytest.approx(
        tuple(want.confidence_interval(0.95))
    )
    assert compare([*runs("a", [0.1]), *runs("b", [0.2], seeds=[5])], [ACC], "a")[1].difference is None


def test_examples_are_paired_within_seeds():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 50)) < 0.6, rng.random((3, 50)) < 0.7
    base, other = compare([*of_items("a", a), *of_items("b", b)], [ACC], "a")
    want = crossed(b.astype(float) - a.astype(float))
    assert other.difference.interval == want.interval()
    assert other.difference.p == want.p()
    assert other.difference.how == "3 seeds × 50 examples, paired"
    one, two = compare([*of_items("a", a[:1]), *of_items("b", b[:1])], [ACC], "a")
    assert two.difference.p == pytest.approx(sps.ttest_rel(b[0].astype(float), a[0].astype(float)).pvalue)
    assert two.difference.how == "1 seed × 50 examples, paired"
    assert one.interval == wilson(int(a[0].sum()), 50)
    assert base.interval.low < base.mean < base.interval.high


def test_holm_is_over_the_whole_table():
    rng = np.random.default_rng(1)
    groups = [run for i in range(5) for run in runs(f"g{i}", 0.5 + 0.05 * i + 0.03 * rng.standard_normal(4))]
    lines = [line for line in compare(groups, [ACC, "loss"], "g0") if line.difference]
    want = multipletests([line.difference.p for line in lines], method="holm")[1]
    assert [line.difference.corrected for line in lines] == pytest.approx(want.tolist())
    assert len(lines) == 8


def test_what_falls_is_better_lower():
    lines = compare([*runs("a", [0.50, 0.51, 0.49]), *runs("b", [0.90, 0.91, 0.895])], [ACC, "loss"], "a")
    assert [line.verdict() for line in lines if line.group == "b"] == ["better", "better"]
    lines = compare([*runs("a", [0.50, 0.51, 0.49]), *runs("b", [0.90, 0.91, 0.895])], [ACC, "loss"], "b")
    assert [line.verdict() for line in lines if line.group == "a"] == ["worse", "worse"]


def test_nothing_different_is_noise():
    same = [[1, 0, 1, 1]] * 3
    _, other = compare([*of_items("a", same), *of_items("b", same)], [ACC], "a")
    assert other.difference.interval.value == 0
    assert other.difference.corrected == 1
    assert other.verdict() == "within noise"


def test_the_front():
    lines = compare([*runs("small", [0.7]), *runs("big", [0.9]), *runs("waste", [0.8]), *runs("twin", [0.9])], [ACC])
    costs = {"small": 1.0, "big": 10.0, "waste": 20.0, "twin": 10.0}
    assert pareto(lines, costs) == ["small", "big", "twin"]
    more = [
        *runs("small", [0.7]),
        *runs("big", [0.9]),
        *runs("dearer", [0.9]),
        *runs("poorer", [0.8]),
    ]  # alike in one of both
    assert pareto(compare(more, [ACC]), {"small": 1.0, "big": 10.0, "dearer": 11.0, "poorer": 10.0}) == ["small", "big"]
    falling = compare([*runs("small", [0.7]), *runs("big", [0.9]), *runs("waste", [0.8])], ["loss"])
    assert pareto(falling, {"small": 1.0, "big": 10.0, "waste": 20.0}) == ["small", "big"]


def on(task, group, values):
    return [
        Run(group, seed, {f"score.{task}.accuracy": value, "loss": 2 - value}, {}) for seed, value in enumerate(values)
    ]


def test_groups_of_different_tasks_are_compared_each_with_their_own_baseline():
    """The losses of two tasks are of different text; and all p-values are corrected together."""
    a, b = {"full": [0.5, 0.6, 0.55], "r=2": [0.7, 0.72, 0.69]}, {"full": [0.1, 0.2, 0.3], "r=2": [0.3, 0.3, 0.4]}
    found = [
        run for name in a for task, of in (("a", a), ("b", b)) for run in on(task, f"{name}, data={task}", of[name])
    ]
    assert parts_of(found) == [["full, data=a", "r=2, data=a"], ["full, data=b", "r=2, data=b"]]
    lines = compare(found, ["score.a.accuracy", "loss"], "full, data=a")
    assert [(line.measure, line.group, line.baseline) for line in lines] == [
        ("score.a.accuracy", "full, data=a", "full, data=a"), ("score.a.accuracy", "r=2, data=a", "full, data=a"),
        ("loss", "full, data=a", "full, data=a"), ("loss", "r=2, data=a", "full, data=a"),
        ("loss", "full, data=b", "full, data=b"), ("loss", "r=2, data=b", "full, data=b"),
    ]  # fmt: skip
    tested = [line.difference for line in lines if line.difference]
    raw = [sps.ttest_rel(a["r=2"], a["full"]).pvalue] * 2 + [sps.ttest_rel(b["r=2"], b["full"]).pvalue]
    assert [one.p for one in tested] == pytest.approx(raw)
    assert [one.corrected for one in tested] == pytest.approx(multipletests(raw, method="holm")[1])
    assert [line.difference for line in compare(found, ["loss"])] == 4 * [None]


def test_a_score_in_common_joins_tasks_and_groups_without_one_stand_apart():
    both = [Run("both", 1, {"score.a.accuracy": 0.5, "score.b.f1": 0.5}, {})]
    bare = [Run(name, 1, {"loss": 1.0}, {}) for name in ("x", "y")]
    assert parts_of([*on("a", "one", [0.5]), *bare, *on("b", "two", [0.5])]) == [["one"], ["x", "y"], ["two"]]
    f1 = [Run("two", 1, {"score.b.f1": 0.5}, {})]
    assert parts_of([*on("a", "one", [0.5]), *bare, *f1, *both]) == [["one", "two", "both"], ["x", "y"]]
    assert stand_in("r=2, lr=1, data=a", ["r=4, lr=1, data=b", "r=2, lr=1, data=b"]) == "r=2, lr=1, data=b"
    assert stand_in("x", ["y", "x"]) == "x"


def test_a_seed_that_diverged_is_left_out():
    _, other = compare([*runs("a", [0.5, 0.6, 0.55]), *runs("b", [0.7, float("nan"), 0.69])], [ACC], "a")
    assert (other.seeds, other.mean) == ((0, 2), pytest.approx(0.695))
    assert other.difference.p == pytest.approx(sps.ttest_rel([0.7, 0.69], [0.5, 0.55]).pvalue)


def test_mistakes():
    there = runs("one", [0.5])
    said(lambda: compare(there, [ACC], "on"), "no group is called 'on'", "one")
    said(lambda: compare(there, ["score.sst2.acc"]), "no run has the measure", ACC)
    assert measures_of(there) == [ACC, "loss"]


def test_of_a_sweep(tmp_path):
    sweep = create(spec(product={"adapt.r": [1, 8]}, seeds=[1, 2]), tmp_path / "s")
    work(sweep, sweep.trials)
    found = runs_of([tmp_path / "s"])
    assert [(run.group, run.seed) for run in found] == [("r=1", 1), ("r=1", 2), ("r=8", 1), ("r=8", 2)]
    lines = compare(found, ["held_out"], "r=1")
    records = [json.loads((sweep.place(t) / "record.json").read_text())["result"]["held_out"][-1] for t in sweep.trials]
    assert [line.mean for line in lines] == pytest.approx([np.mean(records[:2]), np.mean(records[2:])])
    assert cost_of(found, "trained")["r=8"] == 8 * cost_of(found, "trained")["r=1"]
    text = shown("held_out", lines)
    assert "held_out (less is better)" in text
    assert "2 seeds, paired" in text
    single = runs_of([sweep.place(trial) for trial in sweep.trials])
    assert len({run.group for run in single}) == 2  # seeds of one spec are one group
    (tmp_path / "s" / "trials").rename(tmp_path / "gone")
    said(lambda: runs_of([tmp_path / "s"]), "no finished run is there", "--status")


def planted(rng, effect, seeds=3, n=200):
    """Two groups' answers, seeds × examples: examples differ in difficulty, seeds in quality, `effect` on the logit."""
    difficulty, luck = rng.normal(0.8, 1.5, n), 0.3 * rng.standard_normal((2, seeds, 1))
    logits = difficulty + luck + np.array([0.0, effect])[:, None, None]
    return rng.random((2, seeds, n)) < 1 / (1 + np.exp(-logits))


@pytest.mark.slow
def test_error_rates_and_coverage_by_simulation():
    """2000 comparisons without a difference, and with a planted one: alarms, found, and how often the interval has the truth.

    Three seeds say little of how far seeds scatter: where they scatter about as much as examples do, 7 of 100 are alarms, not 5.
    """
    rng = np.random.default_rng(0)
    truth = np.mean(np.diff([planted(rng, 1.0, 400, 400).mean((1, 2))], axis=1))  # what the effect is worth in accuracy
    alarms = found = covered = 0
    for _ in range(2000):
        a, b = planted(rng, 0.0)
        alarms += compare([*of_items("a", a), *of_items("b", b)], [ACC], "a")[1].verdict() != "within noise"
        a, b = planted(rng, 1.0)
        line = compare([*of_items("a", a), *of_items("b", b)], [ACC], "a")[1]
        found += line.verdict() == "better"
        covered += line.difference.interval.low <= truth <= line.difference.interval.high
    assert alarms <= 0.08 * 2000
    assert found >= 0.5 * 2000
    assert covered >= 0.9 * 2000


@pytest.mark.parametrize(("a", "b", "measure", "want"), [
    ([0.80, 0.80, 0.80], [0.79, 0.795, 0.79], ACC, "shown"),     # −.0083 ± .007, and 3 % of .8 is .024
    ([0.80, 0.80, 0.80], [0.70, 0.705, 0.70], ACC, "refuted"),
    ([0.80, 0.80, 0.80], [0.77, 0.79, 0.76], ACC, "open"),
    ([0.80, 0.80, 0.80], [0.90, 0.91, 0.92], ACC, "shown"),      # better is not worse
    ([0.80, 0.80, 0.80], [0.90, 0.91, 0.92], "loss", "shown"),   # 1 − the value: it fell
    ([0.80, 0.80, 0.80], [0.70, 0.705, 0.70], "loss", "refuted"),
])  # fmt: skip
def test_at_most_a_share_worse(a, b, measure, want):
    base, other = compare([*runs("a", a), *runs("b", b)], [measure], "a")
    assert at_most_below(other, base, 0.03) == want
    assert at_most_below(base, base, 0.03) == ""
