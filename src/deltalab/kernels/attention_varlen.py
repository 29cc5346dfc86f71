"""Packed segments on a GPU: torch's variable-length flash attention, or flex attention with a mask of blocks."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from deltalab.core.shapes import Float, Int


def attend_on_gpu(
    q: Float[Tensor, "one heads seq d"], k: Float[Tensor, "one kv seq d"], v: Float[Tensor, "one kv seq d"], scale: float,
    ends: Int[Tensor, " more"], longest: int | None, window: int | None,
) -> Float[Tensor, "one seq heads d"] | None:  # fmt: skip
    """Causal attention of each segment to itself; None where torch has neither way.

    ends: 0 and where each segment ends, int32. longest: the longest segment's length; None asks the GPU. window: keys seen.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    function = _varlen() if half and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 else None
    if function is None:
        return by_flex(q, k, v, scale, ends, window)
    return by_varlen(
        function, q, k, v, scale, ends, int(ends.diff().max()) if longest is None else int(longest), window
    )


def by_varlen(
    function: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, ends: Tensor, longest: int, window: int | None
) -> Tensor:
    """Through `torch.nn.attention.varlen.varlen_attn`, which takes (seq, heads, d) and keys seen to the left and right."""
    tokens = (t[0].transpose(0, 1) for t in (q, k, v))
    left = -1 if window is None or window >= longest else window - 1
    ends = ends.to(torch.int32)
    return function(  # type: ignore[no-any-return]
        *tokens, ends, ends, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1]
    )[None]


@cache
def _varlen() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def by_flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float, ends: Tensor, window: int | None, compiled: bool = True
) -> Tensor | None:
    """Through flex attention; compiled: without that it forms all scores, which is for tests."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return None
    length = q.shape[2]
    ids = torch.bucketize(torch.arange(length, device=q.device), ends[1:].to(q.device), right=True)

    back = length if window is None else window
    mask = create_block_mask(
        lambda _, __, i, j: (ids[i] == ids[j]) & (j <= i) & (j > i - back),
        None, None, length, length, device=q.device, _compile=compiled,
    )  # fmt: skip
    function = _compiled_flex() if compiled else flex_attention
    return function(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)  # type: ignore[no-any-return]


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
