"""What an evaluation prefers is found again: two specs of which one is known to be better, and two that are one with its data in another order."""

import pytest

from deltalab.core.spec import build
from deltalab.lab.compare import compare, runs_of
from deltalab.lab.spec import SweepSpec
from deltalab.lab.trials import create, work

pytestmark = pytest.mark.slow

PAST = {"task": "skills", "families": ["past_tense"], "n": 300, "n_test": 60, "new_tokens": 8}
ONE, OTHER = PAST, {**PAST, "seed": 1}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Three seeds each of: the method that learns, the same that hardly moves, the same with its two data sets the other way round."""
    spec = build(SweepSpec, {
        "base": {"model": "organism", "adapt": [{"method": "lora", "targets": "q,v"}], "data": [ONE, OTHER], "costs": False,
                 "optim": {"steps": 60, "batch": 12, "lr": 0.004}},
        "cases": [{"name": "learns"}, {"name": "hardly moves", "optim.lr": 1e-5}, {"name": "other order", "data": [OTHER, ONE]}],
        "seeds": [1, 2, 3],
    })  # fmt: skip
    sweep = create(spec, tmp_path_factory.mktemp("planted") / "s")
    work(sweep, sweep.trials)
    return {line.group: line for line in compare(runs_of([sweep.folder]), ["held_out"], "learns")}


def test_the_better_one_is_found(lines: dict):
    assert lines["hardly moves"].verdict() == "worse"
    assert lines["hardly moves"].mean > lines["learns"].mean + 0.5


def test_no_difference_is_called_noise(lines: dict):
    other = lines["other order"]
    assert other.difference.interval.value != 0  # other runs indeed
    assert other.verdict() == "within noise"
