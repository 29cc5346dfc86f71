"""The fast part of the suite meets every pair, and is a small part of the product."""

import inspect

import pytest

from deltalab.deltas import methods
from tests.conformance import test_methods, test_weights
from tests.conformance.conftest import fast_cases
from tests.families import FAMILIES, REFUSED

NAMES = list(FAMILIES)


def listed(module):
    """Place in the module, the families that the test is for, and itself."""
    found = [f for name, f in vars(module).items() if name.startswith("test_") and inspect.isfunction(f)]
    for i, test in enumerate(found):
        wanted = getattr(test, "families", lambda _: True)
        yield i, [name for name in NAMES if wanted(FAMILIES[name])], test


def met(takes, module=test_methods):
    """For each test (families that it is for, cases as (method, family), by name)."""
    for i, families, _ in listed(module):
        inside = [[j for j, name in enumerate(families) if name in taken] for taken in takes]
        yield families, {(m, families[j]) for m, j in fast_cases(i, inside, len(families))}


@pytest.mark.parametrize("count", [1, 3, len(methods()), 20])
def test_every_pair_occurs(count):
    pairs, cases, product = set(), 0, 0
    for families, fast in met([NAMES] * count):
        assert {m for m, _ in fast} == set(range(count)), "each method in each test"
        assert {family for _, family in fast} == set(families), "each family in each test"
        pairs |= fast
        cases, product = cases + len(fast), product + count * len(families)
    assert pairs == {(m, family) for m in range(count) for family in NAMES}, "each method with each family"
    assert count == 1 or cases <= len(list(listed(test_methods))) * max(2 * count, len(NAMES) + count)


@pytest.mark.parametrize("module", [test_methods, test_weights], ids=["methods", "weights"])
def test_every_pair_occurs_where_some_are_refused(module):
    """The methods that there are, and one that takes two families alone."""
    takes = [[name for name in NAMES if name not in REFUSED.get(method, ())] for method in methods()]
    takes.append(NAMES[3:5])
    pairs = set()
    for families, fast in met(takes, module):
        possible = {(m, family) for m, taken in enumerate(takes) for family in taken if family in families}
        assert fast <= possible
        assert {m for m, _ in fast} == {m for m, _ in possible}
        assert {family for _, family in fast} == {family for _, family in possible}
        pairs |= fast
    every = {(m, family) for m, taken in enumerate(takes) for family in taken}
    assert module is test_weights or pairs == every


def test_what_a_test_is_for_is_no_accident():
    """No test loses all of its cases: for each there is a method, and a family that it takes."""
    for module in (test_methods, test_weights):
        for _, families, test in listed(module):
            suits = getattr(test, "methods", lambda _: True)
            those = [name for name, method in methods().items() if suits(method)]
            assert any(family not in REFUSED.get(name, ()) for name in those for family in families), test.__name__
