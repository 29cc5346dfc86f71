"""Packed segments as a GPU gets them, as far as a CPU can tell."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deltalab.kernels import attention_varlen
from deltalab.kernels.attention_blocks import Sight, attend
from deltalab.kernels.attention_varlen import attend_on_gpu, by_flex, by_varlen
from tests.helpers import assert_close_by_norm

LENGTHS = [5, 17, 1, 9]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, sum(LENGTHS), n, 16, dtype=dtype).transpose(1, 2) for n in (4, 2, 2))  # type: ignore[return-value]


def varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, longest: int, longest_k: int, *, scale: float,
           window_size: tuple[int, int], enable_gqa: bool) -> Tensor:  # fmt: skip
    """torch's varlen_attn by its documentation: (seq, heads, d), keys seen to the left and right, −1 for all."""
    assert ends.dtype is torch.int32
    assert torch.equal(ends, ends_k)
    assert longest == longest_k == int(ends.diff().max())
    found = []
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        i = torch.arange(stop - start)
        sees = i[:, None] >= i
        if window_size[0] >= 0:
            sees &= i[:, None] - i <= window_size[0]
        parts = (t[start:stop].transpose(0, 1)[None] for t in (q, k, v))
        found.append(F.scaled_dot_product_attention(*parts, attn_mask=sees, scale=scale, enable_gqa=enable_gqa)[0])
    assert window_size[1] == 0
    return torch.cat(found, 1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 3, 17, 40])
def test_varlen_gets_what_it_asks_for(window: int | None) -> None:
    q, k, v = given()
    want = attend(q, k, v, 0.3, Sight(window=window), LENGTHS)
    assert_close_by_norm(by_varlen(varlen, q, k, v, 0.3, ENDS.long(), 17, window), want, 1e-6)


def test_torchs_varlen_has_these_arguments() -> None:
    """The call is traced on tensors without data, as there is no kernel for a CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention.varlen import varlen_attn

    with FakeTensorMode():
        q, k, v = (torch.empty(1, n, 32, 16, dtype=torch.bfloat16) for n in (4, 2, 2))
        ends = torch.empty(5, dtype=torch.int32)
        assert by_varlen(varlen_attn, q, k, v, 0.3, ends, 17, 3).shape == (1, 32, 4, 16)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 3])
def test_flex_sees_what_the_blocks_see(window: int | None) -> None:
    q, k, v = given()
    want = attend(q, k, v, 0.3, Sight(window=window), LENGTHS)
    got = by_flex(q, k, v, 0.3, ENDS, window, compiled=False)
    assert got is not None
    assert_close_by_norm(got, want, 1e-6)


def test_which_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """varlen in half precision where torch has it, flex elsewhere; the longest segment is asked for if it is not told."""
    ways: list[Any] = []
    monkeypatch.setattr(attention_varlen, "by_varlen", lambda function, *args: ways.append(("varlen", args[5])))
    monkeypatch.setattr(attention_varlen, "by_flex", lambda *args: ways.append("flex"))
    attend_on_gpu(*given(torch.bfloat16), 0.3, ENDS, None, None)
    attend_on_gpu(*given(torch.float16), 0.3, ENDS, 20, None)
    attend_on_gpu(*given(), 0.3, ENDS, 17, None)
    monkeypatch.setattr(attention_varlen, "_varlen", lambda: None)
    attend_on_gpu(*given(torch.bfloat16), 0.3, ENDS, 17, None)
    assert ways == [("varlen", 17), ("varlen", 20), "flex", "flex"]
