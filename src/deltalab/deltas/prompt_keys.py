"""The keys and values of a prompt, kept from one forward to the next while nothing that they are made of changes.

They are made by an attention's projections from a prompt that is the same in every forward, so decoding a token would run
the projections a second time, on the prompt. What they depend on is compared at each use: the prompt and every tensor of
the attention and of the deltas in it, by identity, storage, version and dtype; the modules, their classes and their plain
settings; the dtypes and shapes of the call. An optimizer's step, a load, another adapter, a move or an edit in place makes
them anew.

Kept only where no gradient is asked for, in evaluation, and where no hook looks on. An edit through `.data` in place is not
seen, as autograd does not see it either.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module

Made = tuple[Tensor, Tensor]
PLAIN = (bool, int, float, str, torch.dtype)


class _Kept(NamedTuple):
    """state: of when it was made. alive: what the numbers in it are of, so that none is given to another object."""

    state: list[object]
    alive: list[Callable[[], object]]
    storages: list[StorageWeakRef]
    made: Made


_ALL: "weakref.WeakKeyDictionary[nn.Module, _Kept]" = weakref.WeakKeyDictionary()
"""By attention."""


def kept(attention: nn.Module, prompt: Tensor, call: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """What `make` gives, or gave before and would give again. call: what else it depends on, to be compared."""
    seen = None if torch.is_grad_enabled() else _parts(attention, prompt)
    if seen is None:
        _ALL.pop(attention, None)  # a fused optimizer's step changes values and no version, and comes after such a pass
        return make()
    modules, tensors = seen
    where = prompt.device.type
    state = [call, torch.is_autocast_enabled(where), torch.get_autocast_dtype(where)]
    state += [*map(_settings, modules), *map(_mark, tensors)]
    found = _ALL.get(attention)
    if found is not None and found.state == state and all(here() is not None for here in found.alive):
        return found.made
    alive: list[Callable[[], object]] = [weakref.ref(thing) for thing in (*modules, *tensors)]
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
    made = make()
    _ALL[attention] = _Kept(state, alive, storages, made)
    return made


def _parts(attention: nn.Module, prompt: Tensor) -> tuple[list[nn.Module], list[Tensor]] | None:
    """All modules and tensors that the prompt may go through; None where something may change and not be seen."""
    own = getattr(attention, "delta", None)  # lends the prompt, and takes no part
    modules = [module for module in attention.modules() if module is not own]
    tensors = [prompt, *(tensor for module in modules for tensor in _tensors(module))]
    everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    if any(everywhere) or any(map(_moving, modules)) or not all(map(_usual, tensors)):
        return None
    return modules, tensors


def _moving(module: nn.Module) -> bool:
    """Whether a module draws at random, counts, is looked at, or runs a forward that is not its class's."""
    counts = bool(module.__dict__.get("gathers"))
    return module.training or counts or bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__  # fmt: skip


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for held in (module._parameters, module._buffers, module.__dict__):
        yield from (value for value in held.values() if isinstance(value, Tensor))


def _usual(tensor: Tensor) -> bool:
    """Whether a tensor tells of its changes: no subclass with a state of its own, none of inference mode."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()


def _settings(module: nn.Module) -> object:
    plain = {name: value for name, value in module.__dict__.items() if type(value) in PLAIN}
    return id(module), type(module), plain


def _mark(tensor: Tensor) -> object:
    storage = tensor.untyped_storage()._cdata
    return id(tensor), tensor._version, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
