"""What varies in a sweep, and what each trial is then."""

import itertools

import pytest

from deltalab.core.errors import UserError
from deltalab.core.spec import build
from deltalab.lab.spec import SweepSpec, trials
from tests.data.test_tasks import said

BASE = {
    "model": "organism",
    "adapt": [{"method": "lora", "r": 8, "targets": "q,v"}],
    "data": [{"task": "skills", "n": 8}],
}


def sweep(**fields):
    return build(SweepSpec, {"base": BASE, "seeds": [1], **fields})


def values(found, *keys):
    def of(spec, key):
        node = spec.plain()
        for part in key.split("."):
            node = node[0][part] if isinstance(node, list) else node[part]
        return node

    return [tuple(of(trial.spec, key) for key in keys) for trial in found]


def test_a_product_is_every_one_with_every_other():
    found = trials(sweep(product={"adapt.r": [1, 2], "optim.lr": [0.1, 0.2, 0.3]}))
    assert values(found, "adapt.r", "optim.lr") == list(itertools.product((1, 2), (0.1, 0.2, 0.3)))
    assert found[1].group == "r=1, lr=0.2"
    assert found[1].label == "r=1, lr=0.2, seed=1"


def test_what_goes_together_is_zipped_and_groups_are_multiplied():
    found = trials(sweep(zip=[{"adapt.r": [1, 2], "adapt.alpha": [2, 4]}, {"optim.lr": [0.1, 0.2]}]))
    assert values(found, "adapt.r", "adapt.alpha", "optim.lr") == [(1, 2, 0.1), (1, 2, 0.2), (2, 4, 0.1), (2, 4, 0.2)]


def test_cases_go_by_their_names_and_keys_within_go_last():
    cases = [{"name": "LoRA", "adapt": [{"method": "lora", "targets": "q,v"}]}, {"name": "DoRA", "adapt": [{"method": "dora", "targets": "q,v"}]}]  # fmt: skip
    found = trials(sweep(product={"adapt.r": [2, 4]}, cases=cases))
    assert [trial.group for trial in found] == ["LoRA, r=2", "LoRA, r=4", "DoRA, r=2", "DoRA, r=4"]
    assert values(found, "adapt.method", "adapt.r") == [("lora", 2), ("lora", 4), ("dora", 2), ("dora", 4)]
    unnamed = trials(sweep(cases=[{"adapt": [{"method": "ia3"}]}, {"optim.lr": 0.5}]))
    assert [trial.group for trial in unnamed] == ["adapt=ia3", "lr=0.5"]


def test_every_trial_runs_with_each_seed_and_none_twice():
    found = trials(sweep(product={"adapt.r": [2, 4]}, seeds=[7, 8, 9]))
    assert values(found, "seed") == [(7,), (8,), (9,)] * 2
    assert len({trial.id for trial in found}) == 6
    same = trials(sweep(product={"adapt.r": [2, 2]}, cases=[{"name": "a"}, {"name": "b"}]))
    assert len(same) == 1
    assert len(trials(sweep())) == 1
    assert trials(sweep())[0].group == "base"


def test_a_trial_is_the_same_in_another_sweep():
    one = trials(sweep(product={"adapt.r": [2, 4]}))[1]
    other = trials(sweep(product={"adapt.r": [4, 16]}, seeds=[1, 2]))[0]
    assert one.id == other.id
    assert one.spec == other.spec


def test_what_would_be_called_alike_is_told_apart_by_what_differs():
    adapt = [
        {"method": "lora", "r": 8, "targets": "q,v"},
        {"method": "lora", "r": 4, "targets": "q,v"},
        {"method": "dora", "targets": "q,v"},
    ]
    found = trials(
        sweep(product={"adapt": [[one] for one in adapt], "data": [[{"task": "skills", "n": 8}], [{"task": "skills"}]]})
    )
    assert [trial.group for trial in found] == [
        "adapt=lora (r=8), data=skills (n=8)", "adapt=lora (r=8), data=skills",
        "adapt=lora (r=4), data=skills (n=8)", "adapt=lora (r=4), data=skills",
        "adapt=dora, data=skills (n=8)", "adapt=dora, data=skills",
    ]  # fmt: skip
    cases = [
        {"name": "A", "adapt.r": 2},
        {"name": "A", "adapt.r": 4},
        {"name": "B", "adapt.r": 2},
        {"name": "A", "adapt.r": 2},
    ]
    assert [trial.group for trial in trials(sweep(cases=cases))] == ["A (r=2)", "A (r=4)"]
    close = [trial.group for trial in trials(sweep(product={"optim.lr": [0.001, 0.00100000001]}))]
    assert close == ["lr=0.001 (lr=0.001)", "lr=0.001 (lr=0.00100000001)"]


def test_the_base_is_left_as_it_is():
    spec = sweep(product={"adapt.r": [1, 2]})
    trials(spec)
    assert spec.base == BASE


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"product": {"adapt.rr": [1]}}, ("the trial 'rr=1'", "adapt.0", "rr: unknown key", "did you mean r")),
        ({"product": {"adapt.r": [8, 0]}}, ("the trial 'r=0'",)),
        ({"product": {"optim.lr.x": [1]}}, ("has no key 'x'",)),
        ({"cases": [{"name": "bad", "adapt": [{"method": "lorra"}]}]}, ("the trial 'bad'", "'lorra' is unknown", "lora")),
    ],
)  # fmt: skip
def test_a_trial_that_is_no_run(fields, parts):
    base = {**BASE, "optim": {"lr": 0.1}}
    said(lambda: trials(sweep(base=base, **fields)), *parts)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"zip": [{"adapt.r": [1, 2], "adapt.alpha": [1]}]}, "adapt.r has 2, adapt.alpha has 1"),
        ({"product": {"adapt.r": [1]}, "cases": [{"adapt.r": 2}]}, "adapt.r varies in two places"),
        ({"seeds": [1, 1]}, "one stands there twice"),
        ({"seeds": []}, "seeds"),
        ({"product": {"adapt.r": []}}, "product.adapt.r"),
        ({"base": {**BASE, "seed": 1}}, "the sweep sets seed and output"),
        ({"grid": {}}, "grid: unknown key"),
    ],
)
def test_faults_of_a_sweep(fields, part):
    with pytest.raises(UserError) as error:
        sweep(**fields)
    assert part in str(error.value)
