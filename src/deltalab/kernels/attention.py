"""The attention function of training passes, under names of ours in transformers' registries.

`install` writes 'deltalab_sdpa' or 'deltalab_eager' into a model's configs in place of 'sdpa' or 'eager'. What is there
under these names computes what it knows a faster way for, and hands all else, with the mask that it would have had, to the
function of the name that was there:

    a batch on a CPU            our backward in blocks (`attention_blocks`) for rows of the lengths of FASTER
    a packed batch on a CPU     the same, by the length of the segments; others by torch's sdpa, segment by segment
    a packed batch on a GPU     torch's varlen attention in half precision, else flex attention (`attention_varlen`)

Segments are those that transformers reads from the positions, or else the caller's `cu_seq_lens_q`. Outside of training
passes, without gradients, with dropout on the weights, soft caps, sinks, weights asked for, a cache, or any option that is
not known here, nothing changes by a bit.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.modules import modules
from deltalab.kernels.attention_blocks import Sight, attend
from deltalab.kernels.attention_masks import Pattern, Unmade, mask_or_unmade
from deltalab.kernels.attention_varlen import attend_on_gpu

NAMES = {"sdpa": "deltalab_sdpa", "eager": "deltalab_eager"}
"""Our name for each implementation that is switched."""
FASTER = {torch.bfloat16: (0, 512), torch.float32: (256, 1024)}
"""Tokens of a row from and up to which our backward beats that of torch's kernel on a CPU."""
REGISTRY, EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
"""The names by which transformers' model files know the registry, and their own plain function."""
HARMLESS = {
    *("scaling", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "num_items_in_batch"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    *("output_hidden_states", "output_router_logits"),
}
"""Options of an attention function that change nothing here, or that are read here."""


class _Name(str):
    """A name of ours, which registers the functions where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, (str(self),)


def install(model: nn.Module) -> bool:
    """Lets training passes of a model's attentions go through ours, where they go through sdpa or eager; whether any does."""
    names = {id(config): (config, _name(config, users)) for config, users in _users(model)}
    for config, name in names.values():
        if name:
            config._attn_implementation_internal = _registered(name)
    return any(name for _, name in names.values())


def remove(model: nn.Module) -> None:
    """Puts back what `install` found, on this model or a copy of one."""
    before = {ours: theirs for theirs, ours in NAMES.items()}
    for config, _ in _users(model):
        name = config._attn_implementation
        if name in before:
            config._attn_implementation_internal = before[name]


def installed(model: nn.Module) -> bool:
    """Whether any of a model's attentions goes through ours."""
    return any(config._attn_implementation in NAMES.values() for config, _ in _users(model))


def _users(model: nn.Module) -> Iterator[tuple[Any, list[nn.Module]]]:
    """Each config in a model, with the modules that read it."""
    from transformers import PreTrainedConfig

    found: dict[int, tuple[Any, list[nn.Module]]] = {}
    for module in modules(model):
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            found.setdefault(id(config), (config, []))[1].append(module)
    yield from found.values()


def _name(config: Any, users: list[nn.Module]) -> str | None:
    """Our name for what a config names, if all who read it would go on as before under it."""
    base = config._attn_implementation
    asking = [module for module in users if _asks(_class(module))]
    if base not in NAMES or not asking or config.output_attentions:
        return None
    if any(_compares(_class(module), base) for module in users):
        return None
    if base == "eager" and any(_theirs(_class(module))[1] is None for module in asking):
        return None
    return NAMES[base]


def _class(module: nn.Module) -> Any:
    return type(module)


@cache
def _asks(cls: Any) -> bool:
    """Whether a module's code asks the registry for its attention function."""
    return any({REGISTRY, "get_interface"} <= set(code.co_names) for code in _codes(cls))


@cache
def _compares(cls: Any, name: str) -> bool:
    """Whether a module's code has a use for the name itself."""
    return any("_attn_implementation" in code.co_names and name in code.co_consts for code in _codes(cls))


def _codes(cls: type[nn.Module]) -> Iterator[CodeType]:
    for parent in cls.__mro__:
        if parent.__module__.startswith(("torch.", "transformers.")) and ".models." not in parent.__module__:
            continue  # what all models have
        for value in vars(parent).values():
            while getattr(value, "__wrapped__", None) is not None:
                value = value.__wrapped__
            if isinstance(value, FunctionType):
                yield value.__code__


@cache
def _theirs(cls: Any) -> tuple[Any, Callable[..., Any] | None]:
    """The registry that a module's file asks, and the file's plain attention function."""
    for parent in cls.__mro__:
        names = vars(sys.modules[parent.__module__])
        if REGISTRY in names:
            return names[REGISTRY], names.get(EAGER)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS, None


def _registered(name: str) -> str:
    """A name of ours, after its functions are in transformers' registries."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for base, ours in NAMES.items():
        if ours not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(ours, partial(attention, base))
            ALL_MASK_ATTENTION_FUNCTIONS.register(ours, partial(_mask, base))
    return _Name(name)


def _mask(base: str, **options: Any) -> Tensor | None:
    """The mask function under our name for `base`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return mask_or_unmade(ALL_MASK_ATTENTION_FUNCTIONS[base], base == "eager", options)


def attention(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention function under our name for `base`: heads (batch, seq, heads, d), and weights or None."""
    # reentrant checkpointing has no gradients at first, but a mask that was left unmade
    training = torch.is_grad_enabled() or isinstance(attention_mask, Unmade)
    if training and _in_training(module, query, key, value, options):
        given = query, key, value
        dtype = _computing(query)
        seen = _seen(base, module, query, attention_mask, options)
        if seen is not None and all(t.dtype is dtype or t.dtype.itemsize > dtype.itemsize for t in given):
            scale = options.get("scaling")
            q, k, v = (t.to(dtype) for t in given)
            y = _attend(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, *seen, options)
            if y is not None:
                return y, None
    registry, eager = _theirs(_class(module))
    mask = attention_mask.mask if isinstance(attention_mask, Unmade) else attention_mask
    return registry.get_interface(base, eager)(module, query, key, value, mask, **options)  # type: ignore[no-any-return]


def _in_training(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether this is a training pass over a whole sequence, with nothing asked for that is not known here."""
    if not module.training or torch.compiler.is_compiling():
        return False
    asked = {name for name, value in options.items() if value is not None and value is not False}
    if options.get("dropout") == 0:
        asked.discard("dropout")
    whole = q.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape == v.shape
    return asked <= HARMLESS and whole and q.shape[1] % k.shape[1] == 0


def _computing(q: Tensor) -> torch.dtype:
    """The dtype that torch's sdpa would compute in."""
    device = q.device.type
    autocast = torch.is_autocast_enabled(device) and q.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if autocast else q.dtype


def _seen(
    base: str, module: nn.Module, q: Tensor, mask: Tensor | None, options: Mapping[str, Any]
) -> tuple[Sight, Unmade | list[int] | None] | None:
    """What queries see, and the segments; None where neither a pattern nor a mask that is known here says so."""
    if isinstance(mask, Unmade):
        pattern: Pattern = mask.pattern
        return Sight(True, pattern.window, pattern.keys), mask if pattern.ids is not None else None
    if mask is not None:
        fits = mask.ndim == 4 and mask.shape[0] in (1, len(q)) and mask.shape[1:] == (1, q.shape[2], q.shape[2])
        known = mask.dtype is torch.bool or (mask.is_floating_point() and not mask.requires_grad)
        return (Sight(False, mask=mask), None) if fits and known else None
    asked = options.get("is_causal")
    causal = base == "sdpa" and bool(getattr(module, "is_causal", True) if asked is None else asked)
    ends = options.get("cu_seq_lens_q")
    if ends is None or len(ends) <= 2 or len(q) != 1 or not causal:
        return Sight(causal), None
    return Sight(causal), ends.diff().tolist() if q.device.type == "cpu" else []


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight, packed: Unmade | list[int] | None, options: Mapping[str, Any]
) -> Tensor | None:  # fmt: skip
    """The heads by what is fastest of ours; None where that is what there was before."""
    if q.device.type == "cuda" and packed is not None:
        ends, most = options.get("cu_seq_lens_q"), options.get("max_length_q")
        if ends is None:
            lengths = packed.lengths if isinstance(packed, Unmade) else packed
            ends, most = torch.tensor([0, *lengths]).cumsum(0).to(q.device, torch.int32), max(lengths)
        return attend_on_gpu(q, k, v, scale, ends, most, sight.window)
    if q.device.type != "cpu":
        return None
    if packed is None:
        return attend(q, k, v, scale, sight) if ours_is_faster(q.dtype, q.shape[2]) else None
    lengths = packed.lengths if isinstance(packed, Unmade) else packed
    length = sum(n * n for n in lengths) / max(1, sum(lengths))  # of the segment that a token is in, in the mean
    if ours_is_faster(q.dtype, length) or (sight.window and sight.window < max(lengths)):
        return attend(q, k, v, scale, sight, lengths)
    return by_segment(q, k, v, scale, lengths)


def ours_is_faster(dtype: torch.dtype, tokens: float) -> bool:
    """Whether rows of so many tokens go through our backward on a CPU."""
    least, most = FASTER.get(dtype, (1, 0))
    return least <= tokens <= most


def by_segment(q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: list[int]) -> Tensor:
    """Causal attention of each segment to itself by torch's sdpa, (1, seq, heads, d); q, k, v (1, heads, seq, d)."""
    parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    shared = q.shape[1] != k.shape[1]
    heads = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=shared) for part in parts]
    return torch.cat([y.transpose(1, 2) for y in heads], 1)
