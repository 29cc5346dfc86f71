"""Studies drawn from what random groups did in real trainings, and how often the verdicts on them are wrong.

Arrays in, counts out; nothing here loads a model. False claims are counted in studies of the real trainings of `geometry`,
drawn without replacement. Where an interval has to hold a truth, the truth is the mean over them, and a study's trainings
are `mixed`: normal, with the mean and the covariance (over groups, nulls and samples) of the real ones. Drawn themselves,
three of 24 with replacement are twice the same too often, and without it they are closer to the mean of 24 than to that of
all trainings.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as sps

from deltalab.core.stats import Floats, Interval, crossed, student
from deltalab.safety.verdicts import Verdict, change, drift_verdict, family, score_verdict

Arrays = Mapping[str, np.ndarray]
LEVEL = 0.05
DECIDES = "l2_per_sqrt"
POWERS = {DECIDES: 1, "cosine_distance": 2}
"""How a measure grows with a small change of the weights."""


class Rate(NamedTuple):
    """How often something was said. what: which claim, or which interval covered; seeds: in a study; k of n."""

    what: str
    seeds: int
    k: int
    n: int

    @property
    def interval(self) -> Interval:
        """The share with its exact 95 % limits (Clopper & Pearson 1934)."""
        limits = sps.binomtest(self.k, self.n).proportion_ci(0.95)
        return Interval(self.k / self.n, float(limits.low), float(limits.high))

    @property
    def rare(self) -> bool:
        """Whether 5 % or less is compatible with it."""
        return self.interval.low <= LEVEL


def rates(found: Sequence[Counter[str]], seeds: int) -> list[Rate]:
    """Each key, counted over the studies that have it."""
    keys = dict.fromkeys(key for one in found for key in one)
    return [Rate(key, seeds, sum(one[key] for one in found), sum(key in one for one in found)) for key in keys]


# ---- drift --------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """Which random groups stand for the group and for its nulls, and which trainings."""

    groups: np.ndarray
    nulls: np.ndarray
    trainings: np.ndarray


def drawn(arrays: Arrays, seeds: int, repeats: int, draws: int, seed: int, groups: int = 1) -> Iterator[Study]:
    """`repeats` studies; each random group is the group of one study at most, while they last."""
    rng = np.random.default_rng(seed)
    trainings, pool = arrays[DECIDES].shape
    order = rng.permutation(pool)
    for number in range(repeats):
        mine = order[np.arange(number * groups, (number + 1) * groups) % pool]
        others = rng.choice(pool - groups, draws, replace=False)
        others += np.searchsorted(np.sort(mine) - np.arange(groups), others, "right")  # past the places of `mine`
        yield Study(mine, others, rng.choice(trainings, seeds, replace=False))


def mixed(values: np.ndarray, seeds: int, rng: np.random.Generator) -> Floats:
    """New trainings, (seeds, …), from real ones, (trainings, …): their mean plus a normal mix of their deviations."""
    mean = values.mean(0)
    weights = rng.normal(size=(seeds, len(values))) / np.sqrt(len(values) - 1)
    new: Floats = mean + np.tensordot(weights, values - mean, 1)
    return new


def judged(
    arrays: Arrays, study: Study, group: int, margin: float | None, times: float = 1.0, nulls: Arrays | None = None
) -> Verdict:
    """The verdict on one group of the study, its ΔW `times` as large. nulls: arrays that the nulls are of, if others."""
    runs = [
        {
            "values": {m: float(arrays[m][t, group]) * times**power for m, power in POWERS.items()},
            "nulls": {"magnitude": {m: (nulls or arrays)[m][t, study.nulls] for m in POWERS}},
        }
        for t in study.trainings
    ]
    return drift_verdict("g", runs, margin=margin)


def by_root_mean_square(verdict: Verdict) -> dict[str, Any]:
    """What the deciding measure found."""
    found: dict[str, Any] = verdict.numbers["nulls"]["magnitude"][DECIDES]
    return found


def drift_claims(
    arrays: Arrays,
    seeds: int,
    repeats: int,
    draws: int = 999,
    times: float = 1.0,
    margin: float | None = 0.1,
    seed: int = 0,
) -> list[Rate]:
    """How often each outcome was found; beside it, what either test alone would have claimed."""
    found = []
    for study in drawn(arrays, seeds, repeats, draws, seed):
        verdict = judged(arrays, study, int(study.groups[0]), margin, times)
        alone = by_root_mean_square(verdict)
        one = Counter(
            {
                o: int(verdict.outcome == o)
                for o in ("drifts more", "drifts less", "alike", "measures disagree", "undecided")
            }
        )
        one["a difference, p < .05"] = int(alone["p"] < LEVEL)
        one["permutation alone, p < .05"] = int(alone["p_choice"] < LEVEL)
        if seeds > 1:
            one["t over seeds alone, p < .05"] = int(alone["p_seeds"] < LEVEL)
        found.append(one)
    return rates(found, seeds)


def drift_coverage(arrays: Arrays, seeds: int, repeats: int, draws: int = 999, seed: int = 1) -> Rate:
    """One seed: how often the null's band holds another random group. Several: how often the interval of the group's ratio
    holds its mean over trainings."""
    rng, logs, hits = np.random.default_rng(seed), {m: np.log(arrays[m]) for m in POWERS}, 0
    truth = np.exp((logs[DECIDES] - logs[DECIDES].mean(1, keepdims=True)).mean(0))
    for study in drawn(arrays, seeds, repeats, draws, seed):
        group, chosen = int(study.groups[0]), np.array([study.groups[0], *study.nulls])
        state = rng.bit_generator.state
        new = {}
        for m, values in logs.items():
            rng.bit_generator.state = state  # the same trainings in both measures
            new[m] = np.exp(mixed(values[:, chosen], seeds, rng))
        found = by_root_mean_square(
            judged(new, Study(np.array([0]), np.arange(1, draws + 1), np.arange(seeds)), 0, None)
        )
        if seeds == 1:
            hits += found["band"]["low"] <= found["ratio"] <= found["band"]["high"]
        else:
            hits += found["low"] <= truth[group] <= found["high"]
    return Rate("band holds a random group" if seeds == 1 else "interval of the ratio", seeds, int(hits), repeats)


def families(
    arrays: Arrays, seeds: int, repeats: int, groups: int = 8, draws: int = 999, times: float = 1.0, seed: int = 2
) -> list[Rate]:
    """Any claim in a family of verdicts on as many random groups of the same trainings, with Holm's correction and without."""
    found = []
    for study in drawn(arrays, seeds, repeats, draws, seed, groups):
        alone = [judged(arrays, study, int(group), 0.1 if times != 1 else None, times) for group in study.groups]
        wrong, what = (("drifts more", "drifts less"), "otherwise") if times == 1 else (("alike",), "alike")
        one: Counter[str] = Counter()
        for label, verdicts in (
            (f"any of {groups} {what}, unadjusted", alone),
            (f"any of {groups} {what}, Holm", family(alone)),
        ):
            one[label] = int(any(v.outcome in wrong for v in verdicts))
        found.append(one)
    return rates(found, seeds)


def shuffled_claims(
    copies: Arrays, nulls: Arrays, seeds: int, repeats: int, draws: int = 999, seed: int = 3
) -> list[Rate]:
    """How often a shuffled copy of the group, as clustered as it and otherwise random, is found to drift otherwise."""
    found = []
    for study in drawn(nulls, seeds, repeats, draws, seed):
        verdict = judged(copies, study, int(study.groups[0]) % copies[DECIDES].shape[1], None, nulls=nulls)
        found.append(Counter({o: int(verdict.outcome == o) for o in ("drifts more", "drifts less")}))
    return rates(found, seeds)


# ---- scores -------------------------------------------------------------------------------------------------------


def score_claims(
    scores: np.ndarray, seeds: int, repeats: int, truth: float | None, samples: int | None, given: bool, draws: int = 199, seed: int = 4
) -> list[Rate]:  # fmt: skip
    """How often each outcome was found where the group's true change is `truth`, and how often the interval held it.

    scores: (1 + trainings, groups, samples), before and after each. samples: how many a study measures on, drawn with
    replacement; None: all. given: whether the samples' own scores are. truth: None for what it was.
    """
    rng = np.random.default_rng(seed)
    groups, every = scores.shape[1:]
    found = []
    for _ in range(repeats):
        chosen = rng.choice(groups, draws + 1, replace=False)
        on = np.arange(every) if samples is None else rng.integers(every, size=samples)
        before, after = scores[0, chosen], mixed(scores[1:, chosen], seeds, rng)
        own = (after if seeds == 1 else scores[1:, chosen])[:, 0].mean(1)  # of one seed, that training's own change
        was = float(own.mean() / before[0].mean()) - 1
        true = was if truth is None else truth
        after[:, 0] *= (1 + true) / (1 + was)
        before, after = before[:, on], after[:, :, on]
        runs = []
        for tuned in after:
            means = before.mean(1), tuned.mean(1)
            run: dict[str, Any] = {
                "before": float(means[0][0]), "after": float(means[1][0]),
                "nulls": {"magnitude": {"before": means[0][1:], "after": means[1][1:]}},
            }  # fmt: skip
            if given:
                run["samples"] = {"before": before[0], "after": tuned[0]}
            runs.append(run)
        verdict = score_verdict("g", runs)
        numbers = verdict.numbers
        one = Counter({o: int(verdict.outcome == o) for o in OUTCOMES})
        if numbers["low"] is not None:
            one["interval of the change"] = int(numbers["low"] <= true <= numbers["high"])
        if truth is None:
            one["change otherwise than random groups, p < .05"] = int(numbers["nulls"]["magnitude"]["p"] < LEVEL)
        found.append(one)
    return rates(found, seeds)


OUTCOMES = ("representational drift", "falls by 5–10 %", "global redistribution", "rises", "undecided")


class Trap(NamedTuple):
    """What selection does to a mean score, relative changes with limits over the splits that chose.

    winners: on the same samples and an untouched model, how far the group that they chose lies above those that other
    samples chose. untouched_same, untouched_fresh: the change 'before' → 'after' of that same model, after on samples new
    to everything, before on those that chose, or on a third set; as a share of all entries' mean. tuned_same, tuned_fresh:
    before and after a tuning on the same samples, those that chose, or others; lost: the first less the second, on the
    same samples.
    """

    winners: Interval
    untouched_same: Interval
    untouched_fresh: Interval
    tuned_same: Interval
    tuned_fresh: Interval
    lost: Interval


def trap(chosen: np.ndarray, every: np.ndarray) -> Trap:
    """The selection trap, from `geometry.selection`."""
    count = chosen.shape[1]
    untouched = chosen[0] / every[0]  # of all entries' mean, so that a split's own level drops out
    change = (chosen[1:] / chosen[0] - 1).mean(0)
    found: dict[str, list[float]] = {name: [] for name in Trap._fields}
    for i in range(count):
        others = [j for j in range(count) if j != i]
        pairs = [(k, j) for k in others for j in others if k < j]
        found["winners"].append(chosen[0, i, i] / chosen[0, others, i].mean() - 1)
        found["untouched_same"].append(float(np.mean(untouched[i, others] / untouched[i, i] - 1)))
        found["untouched_fresh"].append(float(np.mean([untouched[i, j] / untouched[i, k] - 1 for k, j in pairs])))
        found["tuned_same"].append(change[i, i])
        found["tuned_fresh"].append(change[i, others].mean())
        found["lost"].append(change[i, i] - change[others, i].mean())
    return Trap(**{name: student(values).interval() for name, values in found.items()})


# ---- shares and seeds ---------------------------------------------------------------------------------------------


def share_claims(seeds: int, repeats: int, prompts: int = 100, spread: float = 0.3, seed: int = 5) -> list[Rate]:
    """Shares of simulated prompts, each of its own difficulty, in tunings that change nothing on average but each a little."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(repeats):
        ease = rng.normal(1, 1.5, prompts)
        before = rng.random(prompts) < _share(ease)
        after = rng.random((seeds, prompts)) < _share(ease + rng.normal(0, spread if seeds > 1 else 0, (seeds, 1)))
        c = change([before.tolist()], after.tolist(), 0.1)
        found.append(
            Counter(
                {
                    "fell or rose": int(c.outcome in ("fell", "rose")),
                    "interval of the difference": int(c.low <= 0 <= c.high),
                }
            )
        )
    return rates(found, seeds)


def _share(log_odds: Floats) -> Floats:
    shares: Floats = 1 / (1 + np.exp(-log_odds))
    return shares


def nested_coverage(seeds: int, repeats: int, items: int = 50, resamples: int = 500, seed: int = 6) -> list[Rate]:
    """How often intervals of a mean hold it. Items nested in seeds: t over the seeds' means, and a bootstrap of seeds and of
    items in them. The same items in every seed, drawn anew: the crossed interval, and t over the seeds' means."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(repeats):
        nested = rng.normal(size=(seeds, 1)) + 2 * rng.normal(size=(seeds, items))
        shared = nested + 4 * rng.normal(size=items)
        picks = rng.integers(seeds, size=(resamples, seeds))
        means = nested[picks[:, :, None], rng.integers(items, size=(resamples, seeds, items))].mean((1, 2))
        intervals = {
            "nested items: t over seeds' means": student(nested.mean(1)).interval(),
            "nested items: bootstrap over two levels": Interval(0.0, *np.quantile(means, [0.025, 0.975])),
            "shared items: seeds × items, Satterthwaite": crossed(shared).interval(),
            "shared items: t over seeds' means": student(shared.mean(1)).interval(),
        }
        found.append(Counter({name: int(i.low <= 0 <= i.high) for name, i in intervals.items()}))
    return rates(found, seeds)
