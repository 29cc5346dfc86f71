"""A model's modules and parameters as torch lists them, by one stack.

torch has a generator for every level of a model, which for a thousand modules costs more than what is done with them here.
"""

from torch import nn


def modules(model: nn.Module) -> list[nn.Module]:
    """As `list(model.modules())`."""
    seen: set[nn.Module] = set()
    found: list[nn.Module] = []
    stack = [model]
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append(module)
        if module._modules:
            stack += [child for child in reversed(module._modules.values()) if child is not None]
    return found


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """As `dict(model.named_parameters())`."""
    seen: set[nn.Module | nn.Parameter] = set()
    found: dict[str, nn.Parameter] = {}
    stack = [("", model)]
    while stack:
        before, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                found[before + key] = parameter
        if module._modules:
            stack += [(f"{before}{key}.", m) for key, m in reversed(module._modules.items()) if m is not None]
    return found
