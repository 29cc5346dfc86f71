"""Which kernels run where in a model: found by its structure, confirmed by trying, undone without a trace.

A norm or an MLP is taken over if it computes, on a few random rows, what one of the kernels' formulas says; so it is the
arithmetic that decides, and not the name of a class. One of each class is tried. Adapted linears always have their
kernel. What a pass then really does depends on what is there at that time, see `deltalab.deltas.fused`; `told` says
what ran.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltalab.core.modules import modules
from deltalab.deltas.attach import Adapted, AdaptedSublayer
from deltalab.deltas.base import LINEARS, weight_of
from deltalab.deltas.fused import Beside, Fused, FusedMLP, FusedNorm, Parts, Switch, fused_class, watched
from deltalab.kernels import attention
from deltalab.kernels.linear import Map
from deltalab.kernels.mlp import ACTIVATIONS, Form, plain_mlp
from deltalab.kernels.norm import Norm, plain_norm

BESIDE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"),
          ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))  # fmt: skip
"""Linears that read one input, by their names in a module."""
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
HALVES = (("gate_up_proj", "down_proj"),)
PLAIN = (("c_fc", "c_proj"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"),
         ("fc_in", "fc_out"), ("lin1", "lin2"))  # fmt: skip
MLPS: tuple[tuple[Form, tuple[tuple[str, ...], ...]], ...] = (("gated", GATED), ("halves", HALVES), ("plain", PLAIN))
OTHER_STATES = ("encoder", "key_value_states", "cross")
"""Parts of the names of arguments by which an attention gets keys and values from elsewhere."""
OWN = ("_switch", "_beside", "_kind", "_parts")
"""What is left at a module while its kernel is there."""


def fuse(model: nn.Module, switch: Switch) -> None:
    """Let kernels run in the training passes of an adapted model, where there are ones and the switch is on; in place."""
    tried: dict[Any, Any] = {}
    for module in modules(model):
        if isinstance(module, Adapted) and not isinstance(module, AdaptedSublayer):
            module.__dict__["_switch"] = switch
        elif isinstance(module, Fused) or "forward" in module.__dict__:
            continue
        elif _may_be_norm(module):
            kind = _once(tried, _norm_key(module), lambda module=module: norm_kind(module))
            if kind is not None:
                _take_over(module, FusedNorm, switch, "_kind", kind)
        elif not isinstance(module, AdaptedSublayer) and (names := _mlp_names(module)) is not None:
            parts = _once(tried, type(module), lambda module=module, names=names: mlp_parts(module, *names))
            if parts is not None:
                _take_over(module, FusedMLP, switch, "_parts", parts)
        _set_beside(module)
    switch.attention = attention.install(model)


def pause(model: nn.Module, switch: Switch | None, *, on: bool) -> None:
    """No kernel runs until it is called again with `on`: the base is to be exactly itself."""
    if switch is not None:
        switch.on = on
        if switch.attention:
            (attention.install if on else attention.remove)(model)


def unfuse(model: nn.Module) -> None:
    """Every module is of its own class again."""
    attention.remove(model)
    for module in modules(model):
        if isinstance(module, Fused):
            module.__class__ = type(module).fuses  # type: ignore[assignment]
        for name in OWN:
            module.__dict__.pop(name, None)


def _take_over(module: nn.Module, how: type[Fused], switch: Switch, name: str, value: Any) -> None:
    module.__dict__.update({"_switch": switch, name: value})
    module.__class__ = fused_class(type(module), how)


def _once(tried: dict[Any, Any], key: Any, find: Callable[[], Any]) -> Any:
    if key not in tried:
        tried[key] = find()
    return tried[key]


def _set_beside(module: nn.Module) -> None:
    """Tell the adapted linears of a module that read one input of each other."""
    for names in BESIDE if len(module._modules) > 1 else ():
        linears = [m for name in names if isinstance(m := module._modules.get(name), Adapted)]
        if len(linears) > 1 and not _sees_others(type(module)):  # type: ignore[arg-type]
            beside = Beside(cast("list[nn.Module]", linears))
            for linear in linears:
                linear.__dict__["_beside"] = beside


@functools.cache
def _sees_others(cls: type[nn.Module]) -> bool:
    names = inspect.signature(getattr(cls, "adapts", cls).forward).parameters
    return any(part in name for name in names for part in OTHER_STATES)


def _may_be_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        "Norm" in type(module).__name__
        and not module._modules
        and weight is not None
        and weight.ndim == 1
        and {name for name, p in module._parameters.items() if p is not None} <= {"weight", "bias"}
        and weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        and weight.device.type != "meta"
    )


def _norm_key(module: nn.Module) -> Any:
    return type(module), _eps(module), module._parameters.get("bias") is not None


def _eps(module: nn.Module) -> float | None:
    found = [getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)]
    return float(found[0]) if found and isinstance(found[0], float) else None


@torch.no_grad()
def norm_kind(module: nn.Module) -> Norm | None:
    """Which norm a module computes, None if no known one; also of inputs so small that ε matters."""
    eps, w, b = _eps(module), cast(Tensor, module._parameters["weight"]), module._parameters.get("bias")
    if eps is None or watched(module):
        return None
    x = _probe((2, 3, len(w)), w)
    for kind in (Norm(eps), Norm(eps, plus=1.0), Norm(eps, centred=True)):
        if all(_alike(_tried(module, rows), plain_norm(rows, w, b, kind)) for rows in (x, x * eps**0.5)):
            return kind
    return None


def _mlp_names(module: nn.Module) -> tuple[tuple[str, ...], Form] | None:
    if len(module._modules) < 2:
        return None
    linears = {name for name, m in module._modules.items() if isinstance(m, LINEARS)}
    return next(((names, form) for form, table in MLPS for names in table if linears == set(names)), None)


@torch.no_grad()
def mlp_parts(module: nn.Module, names: tuple[str, ...], form: Form) -> Parts | None:
    """How an MLP is made of its linears and an activation that the kernel has; None if it computes something else."""
    act = activation(module, names)
    if act is None or any(watched(m) for m in module.modules() if m is not module):
        return None
    # of a quantised MLP in the dtype of its biases: bitsandbytes casts them, for good, to that of what they are given
    floats = [p for p in module.parameters() if p.dtype.is_floating_point]
    like: Tensor = floats[0] if floats else weight_of(cast(nn.Module, module._modules[names[0]]))
    asked = _small(module, names, form, like) if all(_usual(module._modules[name]) for name in names) else module
    deltas = [m.delta for m in asked.modules() if isinstance(m, Adapted)]
    before, training = [d.enabled for d in deltas], module.training
    maps = [_plain_map(asked._modules[name]) for name in names]
    x = _probe((1, 3, maps[0].weight(like.dtype).shape[1]), like)
    try:
        for delta in deltas:
            delta.enabled = False
        asked.eval()
        got = _tried(asked, x)
    finally:
        module.train(training)
        for delta, was in zip(deltas, before, strict=True):
            delta.enabled = was
    fits = _alike(got, plain_mlp(x, maps[:-1], maps[-1], act, form))
    return Parts(names[:-1], names[-1], act, form) if fits else None


def _usual(linear: Any) -> bool:
    """Whether a linear, what is on it aside, computes W x + b and no more."""
    return getattr(type(linear), "adapts", type(linear)) in (nn.Linear, Conv1D)


def _small(module: nn.Module, names: tuple[str, ...], form: Form, like: Tensor) -> nn.Module:
    """The MLP with linears of a few rows and columns in place of its own: its arithmetic shows in them as well, and sooner."""
    small = copy.copy(module)
    small.__dict__["_modules"] = dict(module._modules)
    width, inner = 8, 12
    for i, name in enumerate(names):
        last = i == len(names) - 1
        shape = (width, inner) if last else (2 * inner if form == "halves" else inner, width)
        own: Any = module._modules[name]
        linear: Any = nn.Linear(shape[1], shape[0], device="meta")
        linear.weight = nn.Parameter(0.3 * _probe(shape, like) * (1 + i))  # no two alike
        linear.bias = None if own._parameters.get("bias") is None else nn.Parameter(_probe(shape[:1], like))
        small._modules[name] = linear
    return small


def activation(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The activation of an MLP, by its values; None if it is none of the kernel's."""
    own = [m for name, m in module._modules.items() if name not in names and not isinstance(m, nn.Dropout)]
    own += [f for f in module.__dict__.values() if inspect.isfunction(f)]
    if len(own) != 1 or own[0] is None or any(True for _ in getattr(own[0], "parameters", tuple)()):
        return None
    x = torch.linspace(-6, 6, 97)
    try:
        y = own[0](x)
    except Exception:  # whatever it is, it is no activation
        return None
    return next((name for name, act in ACTIVATIONS.items() if _alike(y, act.forward(x), 1e-5)), None)


def _plain_map(linear: Any) -> Map:
    return Map(lambda dtype: weight_of(linear).to(dtype), linear._parameters.get("bias"), None)


def _probe(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random rows that are neither centred nor of unit length, in the dtype of the model."""
    dtype = like.dtype if like.dtype.is_floating_point else torch.float32
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (1.7 * rows + 0.6).to(like.device, dtype)


def _tried(module: nn.Module, x: Tensor) -> Any:
    """What the module makes of x; None if it wants to be called otherwise."""
    try:
        return module(x)
    except Exception:  # another signature, another shape
        return None


def _alike(got: Any, want: Tensor, tolerance: float | None = None) -> bool:
    """Equal by norm, relative, to the rounding of the dtype."""
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype is not want.dtype:
        return False
    allowed = tolerance or {torch.float64: 1e-10, torch.float32: 1e-5}.get(want.dtype, 2e-2)
    return bool((got.double() - want.double()).norm() <= allowed * want.double().norm())


def told(switch: Switch | None) -> dict[str, int | str]:
    """Kernel -> how often it ran; of attentions, through which function they go. Empty where all went the plain way."""
    if switch is None or not switch.used:
        return {}
    return {**dict(sorted(switch.used.items())), **({"attention": "deltalab's"} if switch.attention else {})}
