"""The checker that tests/conftest.py lays over every function of the package: beartype, with two allowances.

An `int` passes where a `float` is written, as type checkers have it. A hint that beartype cannot express outside a
decorated class (`Self`) leaves its function unchecked.
"""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException

_CONF = BeartypeConf(is_pep484_tower=True)


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with its arguments and result checked against its annotations at each call."""
    try:
        return beartype(conf=_CONF)(function)
    except BeartypeDecorHintException:
        return function
