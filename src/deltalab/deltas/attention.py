"""Inside an attention's own forward: what it hands to its attention function, and what it gets back.

In transformers 5 the forward of an attention projects, normalises, rotates and caches, then looks up in a registry by
the config's name (sdpa, eager, …) the function that turns queries, keys and values into heads. Here the same code runs
with another registry in that one name's place: it finds the same functions, each handed to `around`. Nothing is
registered, and neither model nor config changes, so masks stay those of the implementation that runs.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from deltalab import capture
from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.heads import softmax_over
from deltalab.deltas.prompt_keys import kept

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""The name by which transformers' model files know the registry of attention functions."""
KNOWN = {
    *("self", "hidden_states", "attention_mask", "position_embeddings", "position_ids"),
    *("past_key_values", "layer_past", "use_cache", "output_attentions", "cache_position", "kwargs"),
    *("encoder_hidden_states", "encoder_attention_mask"),  # GPT-2's class, which is told at the start what it is
}
"""Arguments of an attention that reads keys and values from the hidden states alone."""
GATES = {"sigmoid", "softplus"}
"""What an attention calls that weighs its heads by the hidden states, after the attention function."""

Function = Callable[..., tuple[Tensor, Any]]
"""An attention function: (module, query, key, value, mask, **options) -> (heads, weights).

query (batch, heads, seq, d); key, value (batch, key-value heads, all, d), cached positions included; heads (batch, seq, heads, d).
"""
Around = Callable[..., tuple[Tensor, Any]]
"""Called in place of an attention function: with it, then with its arguments."""


def routed(forward: Callable[..., Any], around: Around) -> Callable[..., Any]:
    """An attention's forward, bound, in which `around` is called in place of the attention function."""
    bound = cast(MethodType, forward)
    plain = cast(FunctionType, bound.__func__)
    names = plain.__globals__ | {REGISTRY: _Registry(plain.__globals__[REGISTRY], around)}
    twin = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    twin.__kwdefaults__ = plain.__kwdefaults__
    return MethodType(twin, bound.__self__)


@_disable_dynamo  # torch.compile looks a function's names up in its module; this says so without an import of dynamo
def beside_tokens(
    forward: Callable[..., Any], prompt: Float[Tensor, "k hidden"], add: Callable[[Tensor, Tensor], Tensor], *args: Any, **kwargs: Any
) -> Any:  # fmt: skip
    """An attention's own forward on its arguments, its queries attending to a prompt too, apart from the tokens.

    add: from the heads y and the prompt's term softmax(c·q K_pᵀ) V_p, both (batch, seq, heads, d), the heads to go on with.
    Raises: UserError if the attention function gives something else, or is not asked, or more than once.
    """
    x = args[0] if args else kwargs["hidden_states"]
    positions = argument(forward, "position_embeddings", args, kwargs)
    made = functools.partial(keys_and_values, forward, prompt.to(x.dtype), positions)
    keys, values = kept(_module(forward), prompt, (x.dtype, x.device, *_shapes(positions)), made)
    asked: list[Function] = []

    def around(function: Function, module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Any]:
        asked.append(function)
        if len(asked) > 1:
            raise _not_asked(forward, "asks more than once")
        y, *beside = function(module, query, *rest, **options)
        _require_heads(y, query, module)
        term = softmax_over(query, keys, values, options.get("scaling"), options.get("softcap"))
        return add(y, term.transpose(1, 2)), *beside

    result = routed(forward, around)(*args, **kwargs)
    if not asked:
        raise _not_asked(forward, "does not ask")
    return result


def keys_and_values(
    forward: Callable[..., Any], prompt: Float[Tensor, "k hidden"], positions: Any
) -> tuple[Float[Tensor, "1 kv k d"], Float[Tensor, "1 kv k d"]]:
    """The keys and values that an attention makes of a prompt, by its own forward up to the attention function.

    So they go through its projections (fused, quantised, under a delta of their own), biases and norms as those of any
    input do. positions: what the forward gets as `position_embeddings` in this call; the prompt gets a rotation by nothing.
    """
    seen: list[Tensor] = []

    def stop(
        function: Function, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> Any:
        seen[:] = key, value
        raise _Stop

    still = {"attention_mask": None, "position_embeddings": _still(positions, len(prompt), forward),
             "position_ids": torch.zeros(1, len(prompt), dtype=torch.long, device=prompt.device)}  # fmt: skip
    try:
        with capture.unseen():  # the prompt's rows are no tokens of the batch
            routed(forward, stop)(prompt[None], **{key: t for key, t in still.items() if key in _parameters(forward)})
    except _Stop:
        return seen[0], seen[1]
    raise _not_asked(forward, "does not ask")


def argument(forward: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a call of an attention's forward gives for a parameter; None if nothing."""
    return kwargs[name] if name in kwargs else dict(zip(_parameters(forward), args, strict=False)).get(name)


def heads_of(module: nn.Module) -> int:
    """The number of query heads."""
    return int(module.config.num_attention_heads)  # type: ignore[union-attr, arg-type]


def require_routed(path: str, module: nn.Module, method: str) -> None:
    """Raises: UserError, with the reason, for an attention whose heads `routed` does not reach or would not add up."""
    why = _why_not(module)
    if why:
        kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
        raise UserError(
            f"{method} does not go on '{path}', the attention of a {kind}: {why}.",
            found=_class_of(module).__name__,
            next="take a method that goes on linears, see deltalab methods; this one goes on llama, mistral, qwen2, qwen3,\n"
            "  gemma3, phi, phi3, gpt_neox, gpt2, olmo2, cohere, opt and what is built like them",
        )


def _require_heads(y: Tensor, query: Float[Tensor, "batch heads seq d"], module: nn.Module) -> None:
    """Raises: UserError if an attention function gave something else than heads (batch, seq, heads, ·)."""
    batch, heads, seq, _ = query.shape
    if y.ndim != 4 or y.shape[:3] != (batch, seq, heads):
        name = getattr(module.config, "_attn_implementation", None)
        raise UserError(
            f"the attention function '{name}' does not give its heads one by one, so nothing can be added to them.",
            found=f"a result of shape {tuple(y.shape)} for {batch} × {seq} queries of {heads} heads",
            next="load the model with attn_implementation='sdpa'",
        )


def _why_not(module: nn.Module) -> str:
    forward = _class_of(module).forward
    code = getattr(forward, "__code__", None)
    used = set(code.co_names) if code is not None else set()
    if not {REGISTRY, "get_interface"} <= used:
        return "its attention does not go through transformers' registry of attention functions"
    other = sorted(inspect.signature(forward).parameters.keys() - KNOWN)
    if other or getattr(module, "is_cross_attention", False):
        return f"it can attend to other states than its own ({', '.join(other) or 'cross-attention'})"
    if used & GATES:
        return "its heads go through a gate of its own before the output projection"
    query, d = getattr(module, "q_proj", None), getattr(module, "head_dim", None)
    if query is not None and isinstance(d, int) and query.out_features != heads_of(module) * d:
        return f"its query is {query.out_features} wide, and {heads_of(module)} heads of {d} are not"
    return ""


class _Registry:
    """The registry as `routed` shows it: every function is there, and calls `around`."""

    def __init__(self, real: Any, around: Around) -> None:
        self.real, self.around = real, around

    def get_interface(self, name: str | None, default: Function) -> Function:
        function = self.real.get_interface(name, default)
        return lambda *args, **options: self.around(function, *args, **options)


class _Stop(Exception):
    """The keys and values are there; the rest of the forward is not needed."""


def _still(positions: Any, length: int, forward: Callable[..., Any]) -> Any:
    """cos = 1 and sin = 0 for `length` positions of one row, shaped as in this call: (…, batch, seq, d)."""
    if positions is None:
        return None
    if not (isinstance(positions, tuple) and len(positions) == 2 and all(isinstance(t, Tensor) for t in positions)):
        raise UserError(
            "the positions of this attention are no pair (cos, sin), so a prompt without one cannot be given to it.",
            found=f"{_class_of(_module(forward)).__name__}: {type(positions).__name__}",
        )
    cos = positions[0]
    shape = (*cos.shape[:-3], *(1 for _ in cos.shape[-3:-2]), length, cos.shape[-1])
    return cos.new_ones(shape), cos.new_zeros(shape)


def _shapes(positions: Any) -> tuple[object, ...]:
    """What of a call's positions a prompt without one depends on."""
    if not isinstance(positions, tuple):
        return (type(positions),)
    return tuple((t.dtype, t.device, t.shape[:-3], t.shape[-1]) if isinstance(t, Tensor) else t for t in positions)


def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a bound method's parameters, in order."""
    code = cast(FunctionType, cast(MethodType, forward).__func__).__code__
    return code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]


def _not_asked(forward: Callable[..., Any], how: str) -> UserError:
    return UserError(
        f"a {_class_of(_module(forward)).__name__} {how} for its attention function, so its heads are not all there is to add to.",
        found="by its class, or by an option of the model's config",
        next="load the model with attn_implementation='sdpa', or take a method that goes on linears",
    )


def _module(forward: Callable[..., Any]) -> nn.Module:
    return cast(nn.Module, cast(MethodType, forward).__self__)


def _class_of(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "adapts", type(module))
