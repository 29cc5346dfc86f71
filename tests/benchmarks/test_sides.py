"""What the training benchmarks compare: the same work on both sides, which is seen where it is not; growth; instructions."""

from dataclasses import replace

import pytest
import torch
from benchmarks.growth import Curve
from benchmarks.sides import Case
from scipy import stats

from benchmarks import growth, instructions, sides
from deltalab.data.chat import Encoded

SMALL = Case("S", torch.float32, layers=1, sequences=2, tokens=16, vocabulary=64)
CASES = [
    SMALL,
    replace(SMALL, dtype=torch.bfloat16, masked=0.6),
    replace(SMALL, targets="q,v"),
    replace(SMALL, method="dora"),
    replace(SMALL, quantised=True, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=["fp32", "bf16, masked", "q,v", "dora", "nf4"])
def test_both_sides_do_the_same(case):
    found = {check.name: check for check in sides.checks(case)}
    assert found.keys() == {"loss", "gradients", "ours to fp64", "peft's to fp64"}
    assert all(check.passed for check in found.values()), found


def test_another_model_is_seen():
    other = sides.theirs(SMALL)
    with torch.no_grad():
        next(p for p in other.model.parameters() if p.requires_grad).mul_(1.01)
    failed = {check.name for check in sides.checks(SMALL, sides.ours(SMALL), other) if not check.passed}
    assert "gradients" in failed


def test_the_masked_part_does_not_count():
    case = replace(SMALL, masked=0.75)
    labels = sides.batch(case)["labels"]
    assert (labels[:, :12] == -100).all()
    assert torch.equal(labels[:, 12:], sides.batch(case)["input_ids"][:, 12:])
    assert "75 % of labels masked" in str(case)


def test_the_limit_is_the_base_alone():
    made = sides.limit(SMALL)
    assert not any(p.requires_grad for p in made.model.parameters())
    data = sides.batch(SMALL)
    assert torch.equal(made.loss(), made.model(**data).loss)
    made.step()
    assert all(p.grad is None for p in made.model.parameters())


def test_a_step_moves_both_sides_alike():
    mine, other = sides.ours(SMALL), sides.theirs(SMALL)
    for side in (mine, other):
        side.step()
    moved = [{sides.place(n): p.detach() for n, p in s.model.named_parameters() if p.requires_grad} for s in (mine, other)]  # fmt: skip
    start = {sides.place(n): p.detach() for n, p in sides.ours(SMALL).model.named_parameters() if p.requires_grad}
    assert moved[0].keys() == moved[1].keys() == start.keys()
    for name, got in moved[0].items():
        assert (got - moved[1][name]).abs().max() <= 2e-6
        assert (got - start[name]).abs().max() > 5e-5


def test_the_exponent_is_that_of_a_power():
    assert growth.slope({4: 5 * 4**1.5, 16: 5 * 16**1.5, 64: 5 * 64**1.5}) == pytest.approx(1.5)
    found = growth.of_times("tokens", "ours", {1: [1.0, 1.0, 2.0], 10: [10.0, 100.0, 20.0]})
    assert found.points == {1: 1000.0, 10: 20000.0}
    assert found.slopes == pytest.approx([1.0, 2.0, 1.0])
    assert found.exponent().median == pytest.approx(1.0)


def test_growth_is_drawn(tmp_path):
    curves = [Curve("tokens", what, side, {256: 1.0, 512: 2.5}) for what in (growth.TIME, growth.PEAK) for side in growth.SIDES]  # fmt: skip
    growth.draw(curves, tmp_path / "growth.svg")
    first = (tmp_path / "growth.svg").read_text()
    assert first.count("exponent 1.32") == 4
    growth.draw(curves, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text() == first


@pytest.fixture
def rows(monkeypatch):
    made = [{"instruction": f"Name {n} things.", "input": "of wood" * (n % 2), "output": "a chair " * n} for n in range(1, 9)]  # fmt: skip
    monkeypatch.setattr(instructions, "rows_of_alpaca", lambda: made)
    instructions.tokenizer.cache_clear()
    yield made
    instructions.tokenizer.cache_clear()


def test_what_is_learnt_are_the_outputs(rows):
    data, held_out = instructions.samples(5, 3)
    assert (len(data), len(held_out)) == (5, 3)
    known = instructions.tokenizer()
    seen = []
    for sample in [*data, *held_out]:
        text = known.decode(sample.input_ids)
        learnt = known.decode([label for label in sample.labels if label != -100])
        row = next(row for row in rows if "".join(instructions.texts(row)) + instructions.END == text)
        assert learnt == row["output"] + instructions.END
        seen.append(row["instruction"])
    assert len(set(seen)) == 8


def test_the_losses_of_the_programs_are_of_the_same_batch(rows):
    data, _ = instructions.samples(8, 0)
    for check in instructions.same_batch(torch.float32, data):
        assert check.passed, check


def test_the_held_out_loss_is_the_mean_over_counted_tokens(rows):
    data, _ = instructions.samples(8, 0)
    model = instructions.base(torch.float32)
    total = counted = 0
    for sample in data:
        logits = model.eval()(torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
        for i, label in enumerate(sample.labels[1:]):
            if label != -100:
                total, counted = total - float(logits[i, label].detach()), counted + 1
    assert instructions.held_out_loss(model, data) == pytest.approx(total / counted, rel=1e-5)
    assert counted == sum(sum(label != -100 for label in Encoded(s.input_ids, s.labels).labels[1:]) for s in data)


def test_what_seeds_make_between_two_means():
    """Of two sides it is the half width of the interval of a t test with equal variances."""
    first, second = [1.0, 1.4, 1.1], [2.0, 1.7, 2.3]
    interval = stats.ttest_ind(first, second).confidence_interval(0.95)
    assert instructions.of_seeds([first, second]) == pytest.approx((interval.high - interval.low) / 2)
