"""Batches: padding, and an order that is a pure function of seed and epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltalab.data.chat import IGNORED, Encoded
from deltalab.data.collate import collate, epoch_order

SAMPLES = [Encoded([7, 8, 9], [IGNORED, 8, 9]), Encoded([5], [IGNORED])]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side):
    batch = collate(SAMPLES, 0, side)
    short = {"right": [5, 0, 0], "left": [0, 0, 5]}[side]
    mask = {"right": [1, 0, 0], "left": [0, 0, 1]}[side]
    assert torch.equal(batch["input_ids"], torch.tensor([[7, 8, 9], short]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], mask]))
    assert torch.equal(batch["labels"], torch.tensor([[IGNORED, 8, 9], [IGNORED] * 3]))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3),
    st.booleans(),
)  # fmt: skip
def test_every_sample_once_in_full_batches(lengths, batch, seed, epoch, by_length):
    order = epoch_order(lengths, batch, seed=seed, epoch=epoch, by_length=by_length)
    assert sorted(i for part in order for i in part) == list(range(len(lengths)))
    assert len(order) == -(-len(lengths) // batch)
    assert sum(len(part) != batch for part in order) <= 1
    torch.manual_seed(epoch)
    np.random.seed(epoch)
    assert epoch_order(lengths, batch, seed=seed, epoch=epoch, by_length=by_length) == order


def test_epochs_and_seeds_differ_and_lengths_are_grouped():
    lengths = np.random.default_rng(0).integers(1, 200, 400).tolist()
    orders = [epoch_order(lengths, 8, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]

    def padded(order):
        return sum(len(part) * max(lengths[i] for i in part) for part in order)

    assert padded(orders[0]) < 1.1 * sum(lengths)
    assert padded([list(range(i, i + 8)) for i in range(0, 400, 8)]) > 1.5 * sum(lengths)
    drawn = epoch_order(lengths, 8, seed=0, epoch=0, by_length=False)
    assert padded(drawn) > 1.5 * sum(lengths)  # lengths have no say
    assert drawn != epoch_order(lengths, 8, seed=0, epoch=1, by_length=False)
    firsts = [len(str(lengths[part[0]])) for part in orders[0]]
    assert firsts != sorted(firsts)  # batches are shuffled again: no run from long to short
