"""What a block takes in memory is seen, and what was freed before it is not counted."""

import pytest
import torch

from deltalab.core.machine import Memory

MIB = 2**20


@pytest.mark.parametrize("mib", [64, 256])
def test_the_most_in_a_block(mib):
    earlier = [torch.ones(MIB // 4) for _ in range(400)]  # small enough that the allocator keeps them
    del earlier
    memory = Memory()
    some = torch.ones(mib * MIB // 4)
    del some
    assert 0.9 * mib * MIB <= memory.above() <= mib * MIB + 40 * MIB
    assert memory.before > 50 * MIB


def test_a_block_that_takes_nothing():
    assert 0 <= Memory().above() < 20 * MIB
