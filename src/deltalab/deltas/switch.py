"""Several adapters in one model: one is active, the others are parked beside it, off the model.

A parked adapter keeps its modules and the values of the model's own weights that it trained; to make it active is to put
them back. Everything else in the package speaks of the active adapter alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.modules import named_parameters
from deltalab.deltas.attach import adapted_modules, attach, attached_to, detach
from deltalab.deltas.base import Delta
from deltalab.deltas.fuse import fuse, told, unfuse
from deltalab.deltas.fused import Switch
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import place
from deltalab.deltas.weights import STATE, Adaptation, adaptation, attached, is_adapted


@dataclass
class Parked:
    """An adapter that is not active: its state, its modules, and the own weights that it trained, on the CPU."""

    state: Adaptation
    deltas: dict[str, Delta]
    own: dict[str, Tensor]


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that `model` holds, the active one first."""
    state = adaptation(model)
    return [state.name, *state.parked] if is_adapted(model) else []


def set_active(model: nn.Module, adapter: str) -> nn.Module:
    """Make another adapter of `model` the one that acts, trains and is saved, in place; returns the model.

    Its tensors, an own weight that it trained included, are bitwise what they were when it was last active.
    Raises: UserError for an unknown name.
    """
    there = adapters(model)
    if adapter not in there:
        raise UserError(
            f"{model_name(model)} has no adapter '{adapter}'.",
            found=f"adapters: {', '.join(there) or 'none'}",
            nearest=nearest(adapter, there),
            next=f"deltalab.load_adapter(model, folder, adapter='{adapter}')",
        )
    if adapter != there[0]:
        park(model)
        bring_back(model, adapter)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take every adapter off, in place: bitwise the model that was loaded, trainable what was trainable then."""
    take_off(model)
    forget(model)
    return model


def park(model: nn.Module) -> None:
    """Take the active adapter off and keep it; the model is the base until `bring_back`."""
    state = adaptation(model)
    own = {n: p.detach().to("cpu", copy=True) for n, p in named_parameters(model).items() if n in state.start}
    deltas = attached(model)
    take_off(model)
    ignore_on_save(model, undo=True)
    state.parked[state.name] = Parked(state, deltas, own)


def bring_back(model: nn.Module, adapter: str) -> None:
    """Make a parked adapter active; none is when this is called."""
    others = adaptation(model).parked
    parked: Parked = others.pop(adapter)
    state = parked.state
    state.parked = others
    setattr(model, STATE, state)
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            parameter.requires_grad_(name in state.start)
            if name in parked.own:
                parameter.copy_(parked.own[name])
    for path, delta in parked.deltas.items():
        where = place(model, path)
        device = where.parameter.device
        moved = any(t.device != device for t in (*delta.parameters(), *delta.buffers()))
        attach(where, delta.to(device) if moved else delta)
    set_kernels(model)
    ignore_on_save(model)


def set_kernels(model: nn.Module, kernels: str | None = None) -> None:
    """Kernels where the active adapter asks for them, or as said from now on: `auto` or `plain`."""
    state = adaptation(model)
    state.kernels = kernels or state.kernels
    if state.switch is not None:
        unfuse(model)
    state.switch = Switch() if state.kernels == "auto" else None
    if state.switch is not None:
        fuse(model, state.switch)


def kernels_of(model: nn.Module) -> dict[str, int | str]:
    """What ran in the training passes of an adapted model: kernel -> how often. Empty where all went the plain way."""
    return told(adaptation(model).switch)


def drop(model: nn.Module, active: list[str]) -> None:
    """Take the active adapter off for good; `active`, the one to be active again, if any."""
    take_off(model)
    if active:
        ignore_on_save(model, undo=True)
        bring_back(model, active[0])
    else:
        forget(model)


def take_off(model: nn.Module) -> None:
    """The active adapter's modules off, and the model's own weights to what was loaded."""
    state = adaptation(model)
    originals, state.switch = state.start, None
    unfuse(model)
    for module in adapted_modules(model):
        detach(module)
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            if name in originals:
                parameter.copy_(originals[name])
                parameter.grad = None  # an optimizer that still holds it would step the base


def forget(model: nn.Module, state: Adaptation | None = None) -> None:
    """No trace of `state` (the model's own) is left: parameters train that did before, none has a gradient."""
    state = state or adaptation(model)
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(state.was_trainable.get(name, parameter.requires_grad))
        parameter.grad = None
    ignore_on_save(model, state, undo=True)
    if STATE in model.__dict__:
        delattr(model, STATE)


def ignore_on_save(model: nn.Module, state: Adaptation | None = None, *, undo: bool = False) -> None:
    """`save_pretrained` writes the base alone."""
    state = state or adaptation(model)
    ignored = getattr(model, "_keys_to_ignore_on_save", None)
    if ignored is None:
        return
    if not undo:
        state.not_saved = {f"{name}.{key}" for _, name, delta in attached_to(model) for key in _saved_keys(delta)}
        state.not_saved -= set(ignored)
    model._keys_to_ignore_on_save = set(ignored) - state.not_saved if undo else set(ignored) | state.not_saved


def _saved_keys(delta: nn.Module) -> list[str]:
    """The keys of a delta's state dict, and its mask's if it has none now."""
    keys = ["keep"]
    for path, module in delta.named_modules() if delta._modules else [("", delta)]:
        before = path + "." if path else ""
        own = {**module._parameters, **module._buffers}
        keys += [before + k for k, t in own.items() if t is not None and k not in module._non_persistent_buffers_set]
    return keys
