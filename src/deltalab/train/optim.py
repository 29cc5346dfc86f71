"""The optimizer and its schedule; the learning rate is a pure function of the step."""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.deltas.adapt import param_groups
from deltalab.train.spec import OptimSpec

FUSED = ("cpu", "cuda")
"""Devices where torch has a fused AdamW; on others its own choice is left to it."""
TABLES = ("qmap1", "qmap2")
"""Of bitsandbytes' state: what its 8-bit codes stand for, one table for all parameters."""


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


def make_optimizer(model: nn.Module, spec: OptimSpec, device: torch.device | None = None) -> torch.optim.Optimizer:
    """AdamW over what trains; a delta may want several rates. Each group keeps its rate as `base_lr`.

    Weight decay is for tensors of two or more dimensions. device: where the parameters will be, None for where they are.
    An adapter is many small tensors, so torch's fused step, one call for all of them, takes a third of the time. It goes
    through memory in order and takes a gradient of another layout for what it is not: it is left where a parameter is
    not contiguous.
    Raises: UserError if `spec.paged` cannot be had.
    """
    trained = trained_parameters(model)
    groups = []
    for group in param_groups(model, spec.lr):
        common = {"lr": group["lr"], "base_lr": group["lr"]}
        for wide, decay in ((True, spec.weight_decay), (False, 0.0)):
            if params := [p for p in group["params"] if (p.ndim > 1) == wide]:
                groups.append({**common, "params": params, "weight_decay": decay})
    if spec.paged is not None:
        return paged(spec.paged, device or next(iter(trained.values())).device)(groups, lr=spec.lr, betas=spec.betas)
    fuses = all(p.is_floating_point() and p.is_contiguous() and p.device.type in FUSED for p in trained.values())
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, fused=True if fuses else None)
    if fuses:  # torch's fused step leaves versions as they are, and what is kept from values goes by them
        moved = list(trained.values())

        def tell(*_: object) -> None:
            torch.autograd.graph.increment_version(moved)

        optimizer.register_step_post_hook(tell)
    return optimizer


def paged(bits: int, device: torch.device) -> Any:
    """bitsandbytes' AdamW whose moments, of so many bits, CUDA moves to CPU memory while the GPU has none left.

    Raises: UserError where there is no CUDA device, or no bitsandbytes.
    """
    if device.type != "cuda":
        raise UserError(
            f"optim.paged={bits} moves moments between a CUDA device and the CPU, and this run has no such device.",
            found=f"device {device}",
            next="leave optim.paged out (null): here the moments are in CPU memory anyway",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"optim.paged={bits} is bitsandbytes' optimizer, and bitsandbytes is not installed.",
            found=f"device {device}, torch {torch.__version__}",
            next="pip install 'deltalab[quant]', or leave optim.paged out (null)",
        )
    from bitsandbytes.optim import adamw

    return adamw.PagedAdamW8bit if bits == 8 else adamw.PagedAdamW32bit


def set_rate(optimizer: torch.optim.Optimizer, spec: OptimSpec, step: int, steps: int) -> float:
    """Set every group's learning rate for `step` and return that of a plain parameter."""
    scale = factor(spec, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
    return spec.lr * scale


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's tensors by `<parameter>|<kind>`, step counts among them; tables that never change are left out."""
    return {
        f"{names[parameter]}|{kind}": torch.as_tensor(value).detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
        if kind not in TABLES
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Tensor], model: nn.Module) -> None:
    """Put back what `optimizer_state` gave.

    AdamW keeps the moments with the parameter, and its step count too if it is fused, else on the CPU. A paged optimizer
    makes its own buffers (`init_state`), which are filled.
    """
    parameters = dict(model.named_parameters())
    fused = all(group.get("fused") for group in optimizer.param_groups)
    pages = hasattr(optimizer, "init_state")
    if pages:
        _make_buffers(optimizer, {parameters[key.rsplit("|", 1)[0]] for key in state})
    for key, value in state.items():
        name, kind = key.rsplit("|", 1)
        parameter = parameters[name]
        kept = optimizer.state[parameter]
        if not pages:
            kept[kind] = value.to("cpu" if kind == "step" and not fused else parameter.device)
        elif kind == "step":
            kept[kind] = int(value)
        else:
            kept[kind].copy_(value)


def _make_buffers(optimizer: Any, parameters: set[Tensor]) -> None:
    """What bitsandbytes does for each of them at its first step."""
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if parameter in parameters:
                optimizer.init_state(group, parameter, i, j)
