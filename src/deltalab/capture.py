"""What flows through a model's linears: the one place that observes a model through hooks.

Streaming: what a module saw is handed on as soon as it is complete, and not kept. Hooks are gone when the `with` ends,
whatever ended it.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float

Call = tuple[Tensor, Tensor]
"""One call of a module: its input (..., in), and the gradient of the loss in its output (..., out)."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, gradients enabled, no parameter that requires one.

    Modes, `requires_grad` and `.grad` are afterwards what they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad


_UNSEEN = contextvars.ContextVar("unseen", default=False)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Inside, `inputs` takes nothing: what modules are given here are no tokens of the batch."""
    before = _UNSEEN.set(True)
    try:
        yield
    finally:
        _UNSEEN.reset(before)


@contextlib.contextmanager
def inputs(modules: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `take(path, x)` at each call of a module; x is its input as it came, (..., in), detached."""

    def watch(path: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if not _UNSEEN.get():
            take(path, _input(path, args).detach())

    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(functools.partial(watch, path)).remove)
        yield


@contextlib.contextmanager
def gradients(
    modules: Mapping[str, nn.Module], take: Callable[[str, Sequence[Call]], None]
) -> Iterator[Callable[[Tensor], None]]:
    """Yields `backward(loss)`, which runs the backward and calls `take(path, calls)` when a module's is complete.

    calls: every call of the module in this forward that the loss depends on, in order. The gradient of a linear's
    weight, (out, in), is the sum over calls and tokens of δᵀx; whoever takes an absolute value takes it of that sum.
    No parameter needs to require gradients: the graph begins at the inputs of the first observed modules, and nothing
    below them is differentiated. Inputs are held from the forward until they are handed over.
    Raises: UserError from `backward` if the loss depends on no observed module.
    """
    record = _Record(take)
    with contextlib.ExitStack() as stack:
        stack.callback(record.clear)
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(functools.partial(record.before, path)).remove)
            stack.callback(module.register_forward_hook(functools.partial(record.after, path)).remove)
        yield record.backward


def per_sample(path: str, x: Tensor, samples: int) -> Float[Tensor, "samples tokens features"]:
    """A module's input or gradient as (samples, tokens, features).

    Some models flatten (samples, tokens) before a linear; the order is the same, so the view is too.
    Raises: UserError if the samples cannot be told apart.
    """
    flat = x.dim() == 2 and x.shape[0] % samples == 0
    if samples != 1 and not flat and (x.dim() != 3 or x.shape[0] != samples):
        raise UserError(f"the samples of a batch cannot be told apart in '{path}'.", found=f"an input of shape {tuple(x.shape)} for {samples} samples",
                        next="score with batch=1")  # fmt: skip
    return x.reshape(samples, -1, x.shape[-1])


class _Record:
    """The calls of one forward: their inputs, and the gradients of their outputs as these arrive."""

    def __init__(self, take: Callable[[str, Sequence[Call]], None]) -> None:
        self.take = take
        self.seen: dict[str, list[Tensor]] = {}
        self.arrived: dict[str, dict[int, Tensor]] = {}

    def before(self, path: str, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = _input(path, args)
        if not torch.is_grad_enabled() or x.requires_grad:
            return None
        return (x.detach().requires_grad_(True), *args[1:])  # the graph begins here

    def after(self, path: str, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            calls = self.seen.setdefault(path, [])
            output.register_hook(functools.partial(self.gradient, path, len(calls)))
            calls.append(args[0].detach())

    def gradient(self, path: str, call: int, gradient: Tensor) -> None:
        arrived = self.arrived.setdefault(path, {})
        arrived[call] = gradient.detach()
        if len(arrived) == len(self.seen[path]):
            self.complete(path)

    def complete(self, path: str) -> None:
        seen, arrived = self.seen.pop(path), self.arrived.pop(path)
        self.take(path, [(seen[call], arrived[call]) for call in sorted(arrived)])

    def backward(self, loss: Tensor) -> None:
        try:
            if not loss.requires_grad:
                raise UserError("the loss depends on none of the observed modules.", next="name modules that the model's forward calls")  # fmt: skip
            loss.backward()
            for path in list(self.arrived):  # a call whose output the loss does not use gets no gradient
                self.complete(path)
        finally:
            self.clear()

    def clear(self) -> None:
        self.seen.clear()
        self.arrived.clear()


def _input(path: str, args: tuple[Any, ...]) -> Tensor:
    if not args or not isinstance(args[0], Tensor):
        raise UserError(f"'{path}' was called without a tensor as its first argument, so its input is not known.")
    return args[0]
