"""The optimizer and its schedule; the learning rate is a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.deltas.adapt import param_groups
from deltalab.train.spec import OptimSpec


def factor(spec: OptimSpec, step: int, steps: int) -> float:
    """What the learning rate is multiplied with in step 0 … steps − 1: warm-up from zero, then the schedule to zero."""
    warmup = math.ceil(spec.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)
    if spec.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if spec.schedule == "linear" else 1.0


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that trains, by name.

    Raises: UserError if there is none.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UserError("the model has no parameter to train.", next="adapt it first: dl.adapt(model, dl.LoRA())")
    return trained


def make_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.AdamW:
    """AdamW over what trains; a delta may want several rates. Each group keeps its rate as `base_lr`.

    Weight decay is for tensors of two or more dimensions.
    """
    trained_parameters(model)
    groups = []
    for group in param_groups(model, spec.lr):
        common = {"lr": group["lr"], "base_lr": group["lr"]}
        for wide, decay in ((True, spec.weight_decay), (False, 0.0)):
            if params := [p for p in group["params"] if (p.ndim > 1) == wide]:
                groups.append({**common, "params": params, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas)


def set_rate(optimizer: torch.optim.Optimizer, spec: OptimSpec, step: int, steps: int) -> float:
    """Set every group's learning rate for `step` and return that of a plain parameter."""
    scale = factor(spec, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
    return spec.lr * scale


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's tensors by `<parameter>|<kind>`."""
    return {
        f"{names[parameter]}|{kind}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Tensor], model: nn.Module) -> None:
    """Put back what `optimizer_state` gave; AdamW keeps its step count on the CPU, the moments with the parameter."""
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, kind = key.rsplit("|", 1)
        parameter = parameters[name]
        device = "cpu" if kind == "step" else parameter.device
        optimizer.state[parameter][kind] = value.to(device)
