"""The fast part of the suite meets every pair, and is a small part of the product."""

import inspect

import pytest

from deltalab.deltas import methods
from tests.conformance import test_methods as suite
from tests.conformance.conftest import chosen
from tests.families import FAMILIES


def suite_tests():
    found = [f for name, f in vars(suite).items() if name.startswith("test_") and inspect.isfunction(f)]
    return [(i, f) for i, f in enumerate(found) if "family" in inspect.signature(f).parameters]


@pytest.mark.parametrize("count", [1, 3, len(methods()), 20])
def test_every_pair_occurs(count):
    names, pairs, cases, product = list(FAMILIES), set(), 0, 0
    for index, test in suite_tests():
        those = [i for i, name in enumerate(names) if getattr(test, "families", lambda _: True)(FAMILIES[name])]
        fast = [(m, j) for m in range(count) for j in range(len(those)) if chosen(m, j, count, len(those), index)]
        assert {m for m, _ in fast} == set(range(count)), "each method in each test"
        assert {j for _, j in fast} == set(range(len(those))), "each family in each test"
        pairs |= {(m, those[j]) for m, j in fast}
        cases, product = cases + len(fast), product + count * len(those)
    assert pairs == {(m, j) for m in range(count) for j in range(len(names))}, "each method with each family"
    assert count == 1 or cases * min(count, len(names)) < 2 * product
