"""Which method meets which family of models in which test.

Every test is asked of every method and every family, but not of all pairs of them in the fast suite: there each pair
(method, test), (family, test) and (method, family) occurs, and what is left of the product is marked `slow`. A method
that refuses a family says so in `tests.families.REFUSED`, where a test of its own holds it to that. The table of methods
is read when the tests are collected, so a method that a plugin puts there first is tested like the others.
"""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # some virtual machines announce AMX and do not run it

import inspect
import math
from collections.abc import Collection, Sequence

import pytest

KINDS = ("linear", "embedding", "experts", "attention", "mlp")


def fast_cases(test: int, takes: Sequence[Collection[int]], families: int) -> set[tuple[int, int]]:
    """The cases (method, family) of a test that the fast suite has. takes: of each method the families that it goes on.

    Each method meets two families, or as many as it takes for all of them to be met, evenly spaced and one further on with
    each test. Where it refuses one, it and the family each meet the next other, if they would meet none.
    """
    methods = len(takes)
    each = max(2, math.ceil(families / methods))
    walk = [(m, (m + test + i * families // each) % families) for m in range(methods) for i in range(each)]
    cases = {(m, family) for m, family in walk if family in takes[m]}
    for m, family in walk:
        if all(m != other for other, _ in cases):
            further = [f % families for f in range(family, family + families)]
            cases |= {(m, f) for f in [f for f in further if f in takes[m]][:1]}
        if all(family != other for _, other in cases):
            others = [other % methods for other in range(m, m + methods)]
            cases |= {(other, family) for other in [other for other in others if family in takes[other]][:1]}
    return cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from deltalab.deltas import methods
    from tests.families import FAMILIES, REFUSED

    if "method" not in metafunc.fixturenames:
        return
    if "kind" in metafunc.fixturenames:
        sitting = getattr(metafunc.function, "where_it_sits", False)
        named = [(n, cls, kind) for n, cls in methods().items() for kind in KINDS if not sitting or kind in cls.sits_on]
        ids = [f"{name}-{kind}" for name, _, kind in named]
        metafunc.parametrize(("method", "kind"), [(cls, kind) for _, cls, kind in named], ids=ids)
        return
    function = metafunc.function
    meets, suits = getattr(function, "families", _any), getattr(function, "methods", _any)
    families = [name for name, family in FAMILIES.items() if meets(family)]
    those = {name: cls for name, cls in methods().items() if suits(cls)}
    every = getattr(function, "every_pair", False)
    takes = [[j for j, f in enumerate(families) if every or f not in REFUSED.get(name, ())] for name in those]
    tests = [name for name, f in vars(metafunc.module).items() if name.startswith("test_") and inspect.isfunction(f)]
    fast = fast_cases(tests.index(function.__name__), takes, len(families))
    cases = [
        pytest.param(
            cls, families[j], id=f"{name}-{families[j]}", marks=[] if every or (i, j) in fast else pytest.mark.slow
        )
        for i, (name, cls) in enumerate(those.items())
        for j in takes[i]
    ]
    metafunc.parametrize(("method", "family"), cases)


def _any(of: object) -> bool:
    return True
