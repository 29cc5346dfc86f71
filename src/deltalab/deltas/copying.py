"""`copy.deepcopy` of a model, fast: most of what that copies are the empty tables of hooks that every module has."""

import copy
from typing import Any

from torch import nn

OWN = frozenset(nn.Module().__dict__)
"""What every module has."""
VALUES = (type(None), bool, int, float, str)


def copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy(module, memo)`. memo: id of an object -> what stands for it in the copy."""
    if id(module) in memo:
        return memo[id(module)]
    made = None if hasattr(type(module), "__deepcopy__") else module.__reduce_ex__(4)
    if not isinstance(made, tuple) or not isinstance(made[2], dict) or any(part is not None for part in made[3:]):
        return copy.deepcopy(module, memo)
    make, arguments, state = made[:3]
    blank = memo[id(module)] = make(*arguments)
    state = {
        key: value
        if type(value) in VALUES
        else type(value)()
        if key in OWN and not value
        else _copied(key, value, memo)
        for key, value in state.items()
    }
    blank.__setstate__(state)
    return blank


def _copied(key: str, value: Any, memo: dict[int, Any]) -> Any:
    if key == "_modules":
        return {name: child if child is None else copied(child, memo) for name, child in value.items()}
    if key in ("_parameters", "_buffers"):
        return {name: memo[id(t)] if id(t) in memo else copy.deepcopy(t, memo) for name, t in value.items()}
    return copy.deepcopy(value, memo)
