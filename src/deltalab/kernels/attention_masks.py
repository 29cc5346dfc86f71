"""A mask that is made when somebody looks at it.

transformers makes the masks of a forward before its layers run, so before an attention function can say whether it needs
one. For a packed batch that is a block of T × T. Here the mask function hands on what it was asked for: an attention
function of ours reads the pattern from it, and whatever else touches it finds the very mask that there would have been.
"""

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from deltalab.core.shapes import Bool, Int


class Pattern(NamedTuple):
    """A causal attention; what it can see beside.

    window: the last `window` keys. keys: False where a row is padded, which is not at its start. ids: the segment of each token.
    """

    window: int | None = None
    keys: Bool[Tensor, "batch keys"] | None = None
    ids: Int[Tensor, "one keys"] | None = None


class Unmade(Tensor):
    """A mask (batch, 1, queries, keys) that `make` makes, once. Any operation on it gets the made one."""

    pattern: Pattern
    _state: dict[str, Any]

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], pattern: Pattern, shape: tuple[int, ...], dtype: torch.dtype,
                device: torch.device, state: dict[str, Any] | None = None) -> "Unmade":  # fmt: skip
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        mask.pattern, mask._state = pattern, {"make": make} if state is None else state
        return mask  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Unmade({tuple(self.shape)}, {self.dtype})"

    @property
    def mask(self) -> Tensor:
        """The mask."""
        if "made" not in self._state:
            self._state["made"] = self._state["make"]()
        return self._state["made"]  # type: ignore[no-any-return]

    @property
    def lengths(self) -> list[int]:
        """The lengths of the segments of a packed batch."""
        if "lengths" not in self._state:
            assert self.pattern.ids is not None
            self._state["lengths"] = torch.unique_consecutive(self.pattern.ids, return_counts=True)[1].tolist()
        return self._state["lengths"]  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # what reentrant checkpointing does with a layer's inputs
            mask = args[0]
            return Unmade(mask._state["make"], mask.pattern, mask.shape, mask.dtype, mask.device, mask._state)
        made = tree_map_only(Unmade, lambda t: t.mask, (args, kwargs or {}))
        return func(*made[0], **made[1])


def mask_or_unmade(make: Callable[..., Tensor | None], needs_causal: bool, options: Mapping[str, Any]) -> Tensor | None:
    """What a mask function gives for `options`: the mask of `make`, or in a training pass one that is not made yet.

    needs_causal: whether `make` gives a mask for a plain causal attention too.
    """
    pattern = None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        pattern = _pattern(options)
    if pattern is None or (pattern == Pattern() and not needs_causal):
        return make(**options)
    dtype = options["dtype"] if needs_causal else torch.bool
    shape = options["batch_size"], 1, options["q_length"], options["kv_length"]
    return Unmade(lambda: make(**options), pattern, shape, dtype, torch.device(options["device"]))  # type: ignore[arg-type, return-value]


def _pattern(options: Mapping[str, Any]) -> Pattern | None:
    """What is asked for, if it is a pattern that an attention function of ours knows."""
    length, device = options["q_length"], torch.device(options["device"])
    offsets = options.get("q_offset", 0), options.get("kv_offset", 0)
    if options.get("use_vmap") or length != options["kv_length"] or any(not isinstance(n, int) or n for n in offsets):
        return None
    packed, inner = _packed(options["mask_function"])
    window, known = _causal(inner)
    if not known or (packed is not None and options["batch_size"] != 1):
        return None
    window = window if window is not None and window < length else None
    keys = options.get("attention_mask")
    if keys is None or (device.type == "cpu" and bool(keys.all())):
        return Pattern(window, None, packed)
    fits = device.type == "cpu" and keys.shape == (options["batch_size"], length) and packed is None and window is None
    if not fits or not keys[:, 0].all():  # a query could see nothing
        return None
    return Pattern(None, keys, None)


def _packed(function: Any) -> tuple[Tensor | None, Any]:
    """The segments' ids that transformers read from the positions, and what holds within a segment."""
    from transformers import masking_utils as theirs

    ids, positions = torch.zeros(1, 1), torch.zeros(1, 1)
    like = theirs.packed_sequence_compatibility_function(theirs.causal_mask_function, positions, ids)
    both = _held(function, like).get("mask_functions", ())
    if len(both) != 2:
        return None, function
    same, within = both
    found = _held(same, theirs.packed_sequence_mask_function(ids)).get("packed_sequence_mask")
    inner = _held(within, theirs.remap_positions_for_packed_sequence(theirs.causal_mask_function, positions))
    return (found, inner["mask_function"]) if found is not None and inner else (None, function)


def _causal(function: Any) -> tuple[int | None, bool]:
    """The window of a causal mask function of transformers, and whether it is one."""
    from transformers import masking_utils as theirs

    if function is theirs.causal_mask_function:
        return None, True
    both = _held(function, theirs.sliding_window_causal_mask_function(1)).get("mask_functions", ())
    if len(both) != 2 or both[1] is not theirs.causal_mask_function:
        return None, False
    window = _held(both[0], theirs.sliding_window_overlay(1)).get("sliding_window")
    return window, isinstance(window, int)


def _held(function: Any, like: Callable[..., Any]) -> dict[str, Any]:
    """What a function holds from where it was defined, if that is where `like` was; else nothing."""
    code = cast(FunctionType, like).__code__
    if getattr(function, "__code__", None) is not code:
        return {}
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
