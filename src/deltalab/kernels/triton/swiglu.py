"""h = silu(g) ⊙ u, what goes into the down projection of a gated MLP, and the gradients of g and u from that of h.

    σ = 1 / (1 + exp −g)
    ∂g = ∂h ⊙ u ⊙ σ (1 + g (1 − σ)),    ∂u = ∂h ⊙ g σ

Neither σ nor h is kept between forward and backward: h is made again where its low-rank product is needed.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltalab.core.shapes import Float
from deltalab.kernels.triton import on, tile

MOST = 1024
"""Entries of a row that a program takes."""


@triton.jit
@no_type_check
def _ahead(g, u, h, n, g_row, u_row, h_row, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(g + row * g_row + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(u + row * u_row + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(h + row * h_row + i, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=i < n)


@triton.jit
@no_type_check
def _back(g, u, dh, dg, du, n, g_row, u_row, h_row, dg_row, du_row, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(g + row * g_row + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(u + row * u_row + i, mask=i < n, other=0.0).to(tl.float32)
    grad = tl.load(dh + row * h_row + i, mask=i < n, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    tl.store(dg + row * dg_row + i, (grad * up * open_ * (1 + gate * (1 - open_))).to(dg.dtype.element_ty), mask=i < n)
    tl.store(du + row * du_row + i, (grad * gate * open_).to(du.dtype.element_ty), mask=i < n)


def swiglu(gate: Float[Tensor, "m n"], up: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """h, of gate's dtype. gate and up may be halves of one tensor: rows without gaps, however far apart."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if h.numel():
        grid, size = _grid(gate)
        with on(gate):
            _ahead[grid](gate, up, h, gate.shape[1], gate.stride(0), up.stride(0), h.stride(0), TILE=size)
    return h


def swiglu_back(
    gate: Float[Tensor, "m n"], up: Float[Tensor, "m n"], dh: Float[Tensor, "m n"], halves: bool = False
) -> list[Tensor]:
    """[∂g, ∂u], (m, n) each; halves: [(∂g, ∂u) as one (m, 2n)]."""
    m, n = gate.shape
    both = torch.empty((m, 2, n) if halves else (2, m, n), dtype=gate.dtype, device=gate.device)
    d_gate, d_up = both.unbind(1 if halves else 0)
    if both.numel():
        grid, size = _grid(gate)
        with on(gate):
            _back[grid](
                gate, up, dh, d_gate, d_up, n, gate.stride(0), up.stride(0), dh.stride(0), d_gate.stride(0), d_up.stride(0), TILE=size
            )  # fmt: skip
    return [both.view(m, 2 * n)] if halves else [d_gate, d_up]


def _grid(x: Tensor) -> tuple[tuple[int, int], int]:
    """(rows, tiles of a row), and the tile."""
    size = tile(x.shape[1], MOST)
    return (x.shape[0], triton.cdiv(x.shape[1], size)), size
