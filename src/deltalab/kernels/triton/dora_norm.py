"""‖W + s B A‖² of each row, W read once and in its own dtype.

    ‖W‖² + 2 s · rowsum(W Aᵀ ⊙ B) + s² · rowsum(B (A Aᵀ) ⊙ B)      (deltalab.deltas.dora)

torch needs W in fp32 for the same accuracy, which writes it out once more.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltalab.core.shapes import Float
from deltalab.kernels.triton import RANK, on, tile

OUT, IN = 64, 64
"""Rows and columns of a tile of W."""


@triton.jit
@no_type_check
def _squares(W, A, B, G, found, out, n, r, s, w_row, w_col,
             OUT: tl.constexpr, IN: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """OUT rows a program. A (r, n), B (out, r) and G = A Aᵀ (r, r) are in fp32 and contiguous."""
    row = tl.program_id(0) * OUT + tl.arange(0, OUT)
    k = tl.arange(0, R)
    start_of_row = W + row.to(tl.int64)[:, None] * w_row
    down = tl.zeros([OUT, R], dtype=tl.float32)  # W Aᵀ
    square = tl.zeros([OUT], dtype=tl.float32)
    for start in range(0, n, IN):
        i = start + tl.arange(0, IN)
        inside = (row[:, None] < out) & (i[None, :] < n)
        w = tl.load(start_of_row + i.to(tl.int64)[None, :] * w_col, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(A + k[None, :] * n + i[:, None], mask=(k[None, :] < r) & (i[:, None] < n), other=0.0)
        down = tl.dot(w, a, down, input_precision="ieee")
        square += tl.sum(w * w, 1)
    b = tl.load(B + row[:, None] * r + k[None, :], mask=(row[:, None] < out) & (k[None, :] < r), other=0.0)
    g = tl.load(G + k[:, None] * r + k[None, :], mask=(k[:, None] < r) & (k[None, :] < r), other=0.0)
    turned = tl.dot(b, g, input_precision="ieee")
    tl.store(found + row, square + 2 * s * tl.sum(down * b, 1) + s * s * tl.sum(turned * b, 1), mask=row < out)


def row_squares(
    W: Float[Tensor, "out in"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], s: float
) -> Float[Tensor, " out"]:
    """In fp32; not clamped: rounding may make a sum of almost nothing negative. r: at most `RANK`."""
    out, n = W.shape
    A, B = A.to(torch.float32).contiguous(), B.to(torch.float32).contiguous()
    found = torch.empty(out, dtype=torch.float32, device=W.device)
    if out:
        rank = max(16, tile(len(A), RANK))
        with on(W):
            _squares[(triton.cdiv(out, OUT),)](
                W, A, B, A @ A.mT, found, out, n, len(A), float(s), W.stride(0), W.stride(1), OUT=OUT, IN=IN, R=rank
            )  # fmt: skip
    return found
