"""A whole MLP as one step of autograd, gated or not.

    y = down(φ(gate x) ⊙ up x)     or, of one projection in two halves, the same     or     y = down(φ(up x))

Each map may have a low-rank change. Kept for the backward are x, or what makes it (`linear.Recipe`), and what gate and up
gave; φ and its product are made again.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from deltalab.core.shapes import Float
from deltalab.kernels import triton
from deltalab.kernels.linear import Map, Recipe, Saved, ahead, back, computing, maps_of, plain_linears, tensors_of


class Activation(NamedTuple):
    """φ, and the gradient of its input from that of its output and the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _relu_back(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, x, 0)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh")
    ),
    "relu": Activation(F.relu, _relu_back),
    "relu2": Activation(lambda x: F.relu(x).square(), lambda g, x: _relu_back(2 * g * F.relu(x), x)),
}

Form = Literal["gated", "halves", "plain"]
"""Of gate and up; of one projection that gives gate, then up; of one alone."""


def mlp(
    x: Float[Tensor, "*lead hidden"],
    first: Sequence[Map],
    down: Map,
    act: str,
    form: Form,
    recipe: Recipe | None = None,
) -> Float[Tensor, "*lead out"]:
    """first: (gate, up), or the one projection. act: one of `ACTIVATIONS`."""
    maps = [*first, down]
    static = [(m.weight, None if m.low is None else (m.low.s, m.low.p)) for m in maps]
    return _MLP.apply(x, (static, act, form), recipe, *(t for m in maps for t in tensors_of(m)))  # type: ignore


def plain_mlp(
    x: Float[Tensor, "*lead hidden"], first: Sequence[Map], down: Map, act: str, form: Form
) -> Float[Tensor, "*lead out"]:
    """The same by torch's own operations."""
    outputs = plain_linears(x, first)
    outputs = outputs[0].chunk(2, -1) if form == "halves" else outputs
    h = ACTIVATIONS[act].forward(outputs[0])
    return plain_linears(h if form == "plain" else h * outputs[1], [down])[0]


def _split(form: Form, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """φ's input, and the up that its output is multiplied with."""
    if form == "plain":
        return outputs[0], None
    gate, up = outputs if form == "gated" else outputs[0].chunk(2, -1)
    return gate, up


def _at_once(act: Activation, gate: Tensor) -> bool:
    """Whether Triton's kernel does what lies between the maps."""
    return act is ACTIVATIONS["silu"] and triton.available(gate)


def _between(act: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
    """The input of down; a new tensor."""
    if up is not None and _at_once(act, gate):
        from deltalab.kernels.triton.swiglu import swiglu

        return swiglu(gate, up)
    h = act.forward(gate)
    return h if up is None else h.mul_(up)


def _between_back(
    act: Activation, form: Form, gate: Tensor, up: Tensor | None, dh: Tensor, acted: Tensor | None
) -> list[Tensor]:
    """The gradients of what the first maps gave. acted: φ(gate), where it is at hand. dh and acted are used up."""
    if up is None:
        return [act.backward(dh, gate)]
    if _at_once(act, gate):
        from deltalab.kernels.triton.swiglu import swiglu_back

        return swiglu_back(gate, up, dh, halves=form == "halves")
    acted = act.forward(gate) if acted is None else acted
    d_up = acted.mul_(dh)
    d_gate = act.backward(dh.mul_(up), gate)
    return [torch.cat([d_gate, d_up], -1)] if form == "halves" else [d_gate, d_up]


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Any, recipe: Recipe | None, *tensors: Tensor | None) -> Tensor:
        static, act, form = plan
        dtype = computing(x)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            *first, down = maps_of(static, tensors)
            outputs, kept = zip(*(ahead(m, flat) for m in first), strict=True)
            y, last = ahead(down, _between(ACTIVATIONS[act], *_split(form, outputs)))
        ctx.plan, ctx.shape, ctx.dtype, ctx.given = plan, x.shape, dtype, x.dtype
        Saved.of(ctx, flat, recipe, tensors, [*kept, last], *outputs)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        static, name, form = ctx.plan
        act = ACTIVATIONS[name]
        x, tensors, (*kept, last), outputs = Saved.back(ctx)
        *first, down = maps_of(static, tensors)
        with torch.autocast(x.device.type, enabled=False):
            gate, up = _split(form, outputs)
            acted = None if up is None or _at_once(act, gate) else act.forward(gate)
            h = _between(act, gate, up) if acted is None else acted * up
            dy = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
            dh, *of_down = back(down, last, h, dy, None, True)
            assert dh is not None
            del h
            dx: Tensor | None = None
            found: list[Tensor | None] = []
            for m, k, dz in zip(first, kept, _between_back(act, form, gate, up, dh, acted), strict=True):
                dx, *of_low = back(m, k, x, dz, dx, ctx.needs_input_grad[0])
                found += [None, *of_low]
        return None if dx is None else dx.view(ctx.shape).to(ctx.given), None, None, *found, None, *of_down
