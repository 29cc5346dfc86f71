"""The harness: ratios and their spread, turns, what autograd keeps, peak memory, rows."""

import math
import statistics
import time

import pytest
import torch
from benchmarks.harness import Asked, Check, Ratio, Row

from benchmarks import harness


def test_a_ratio_is_the_median_of_the_rounds_own():
    above, below = [2.0, 30.0, 4.0, 9.0, 6.0], [1.0, 10.0, 4.0, 3.0, 5.0]
    each = sorted(a / b for a, b in zip(above, below, strict=True))
    found = harness.ratio(above, below)
    assert found.median == statistics.median(each) != statistics.median(above) / statistics.median(below)
    assert (found.low, found.high) == (each[1], each[3])
    assert harness.ratio([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)


def test_sides_take_turns_and_another_begins_each_round():
    seen = []
    sides = {name: lambda name=name: seen.append(name) for name in "abc"}
    before = []
    seconds = harness.timed(sides, rounds=3, warm_up=1, before=before.append)
    assert "".join(seen) == "abcbcacababc"
    assert before == seen
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_time_is_that_of_the_side_alone():
    seconds = harness.timed({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 2, 0, before=lambda _: time.sleep(0.01))  # fmt: skip
    assert min(seconds["slow"]) >= 0.02
    assert max(seconds["fast"]) < 0.01


def peak_of(mib):
    """In a child: what a tensor takes that is let go before the end."""

    def work():
        held = torch.ones(mib, 2**18)
        del held

    return [harness.peak_above(work), torch.get_num_threads()]


def test_the_peak_of_a_process_of_its_own():
    found, threads = harness.in_child(peak_of, 48, threads=1)
    assert 48 * 2**20 <= found < 56 * 2**20
    assert threads == 1


def test_a_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match="TypeError"):
        harness.in_child(peak_of, "many")


def test_memory_is_sampled_where_its_peak_cannot_be_reset(monkeypatch):
    class Forbidden(type(harness.Path())):
        def write_text(self, *args, **kwargs):
            raise PermissionError

    monkeypatch.setattr(harness, "Path", Forbidden)

    def work():
        held = torch.ones(64, 2**18)
        time.sleep(0.05)
        del held

    assert harness.peak_above(work) >= 60 * 2**20


def test_apart_is_by_norm_over_all_tensors():
    want = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    got = [torch.tensor([3.0, 0.3]), torch.tensor([0.4, 4.0])]
    assert math.isclose(harness.apart(got, want), 0.5 / 5, rel_tol=1e-6)
    assert harness.apart(torch.zeros(2), torch.zeros(2)) == 0
    assert harness.apart(torch.ones(2), torch.zeros(2)) == math.inf
    with pytest.raises(ValueError):
        harness.apart(got, want[:1])


@pytest.mark.parametrize(
    ("median", "target", "direction", "error", "reached"),
    [
        (1.4, 1.4, "at least", 0.0, True),
        (1.39, 1.4, "at least", 0.0, False),
        (0.34, 0.34, "at most", 0.0, True),
        (0.35, 0.34, "at most", 0.0, False),
        (9.0, 1.4, "at least", 2e-3, False),  # fast, and something else
        (9.0, 1.4, "at least", math.nan, False),
        (9.0, None, "at least", 0.0, None),
    ],
)
def test_a_target_is_reached_with_the_same_mathematics_only(median, target, direction, error, reached):
    row = Row("work", "here", "peft / ours", Ratio(median, median, median), target=target, direction=direction,
              checks=[Check("loss", 0.0, 1e-3), Check("gradients", error, 1e-3)])  # fmt: skip
    assert row.reached is reached
    assert ("NOT THE SAME" in str(row)) == (not row.same)


def test_rows_are_chosen_by_their_names():
    asked = Asked(only="bf16, all.*dropout")
    assert asked.wants("LoRA step", "hidden 512, bf16, all-linear, dropout 0.05")
    assert not asked.wants("LoRA step", "hidden 512, bf16, q,v")
    assert Asked().wants("anything")
    assert (Asked().turns(15), Asked(quick=True).turns(15), Asked(rounds=7, quick=True).turns(15)) == (15, 3, 7)
