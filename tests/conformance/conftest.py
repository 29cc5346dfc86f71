"""Which method meets which family of models in which test.

Every test is asked of every method and every family, but not of all pairs of them in the fast suite: there each pair
(method, test), (family, test) and (method, family) occurs, and what is left of the product is marked `slow`. The table
of methods is read when the tests are collected, so a method that a plugin puts there first is tested like the others.
"""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # some virtual machines announce AMX and do not run it

import inspect

import pytest

KINDS = ("linear", "embedding", "experts")


def chosen(method: int, family: int, methods: int, families: int, test: int) -> bool:
    """Whether the fast suite has this case.

    Methods and families walk side by side, the families starting one further on with each test. In a test each of them
    is met, as the longer list is walked through once; a method meets a family once the tests have shifted it there.
    """
    return any(k % methods == method and (k + test) % families == family for k in range(max(methods, families)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from deltalab.deltas import methods
    from tests.families import FAMILIES

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
    tests = [name for name, f in vars(metafunc.module).items() if name.startswith("test_") and inspect.isfunction(f)]
    test = tests.index(function.__name__)
    cases = [
        pytest.param(
            cls,
            family,
            id=f"{name}-{family}",
            marks=[] if chosen(i, j, len(those), len(families), test) else pytest.mark.slow,
        )
        for i, (name, cls) in enumerate(those.items())
        for j, family in enumerate(families)
    ]
    metafunc.parametrize(("method", "family"), cases)


def _any(of: object) -> bool:
    return True
