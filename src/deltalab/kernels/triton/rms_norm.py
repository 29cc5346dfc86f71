"""RMS norm of rows in one reading, and its gradients in another.

    y = x̂ ⊙ (w + c),   x̂ = ρ x,   ρ = 1 / √(mean x² + ε)
    ∂x = ρ (∂x̂ − x̂ · mean(∂x̂ ⊙ x̂)),   ∂x̂ = ∂y ⊙ (w + c),   ∂w = Σ ∂y ⊙ x̂ over the rows

ρ is kept, one fp32 number a row; y can be made again from it.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltalab.core.shapes import Float
from deltalab.kernels.triton import ROW, on, tile

PARTS = 256
"""Programs of the backward: each goes through its share of the rows and has one sum for ∂w."""


@triton.jit
@no_type_check
def _ahead(x, w, y, scale, n, x_row, y_row, eps, plus,
           WEIGHED: tl.constexpr, AGAIN: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILE)
    v = tl.load(x + row * x_row + i, mask=i < n, other=0.0).to(tl.float32)
    if AGAIN:
        rho = tl.load(scale + row)
    else:
        rho = 1 / tl.sqrt(tl.sum(v * v, 0) / n + eps)
        tl.store(scale + row, rho)
    v *= rho
    if WEIGHED:
        v *= tl.load(w + i, mask=i < n, other=0.0).to(tl.float32) + plus
    tl.store(y + row * y_row + i, v.to(y.dtype.element_ty), mask=i < n)


@triton.jit
@no_type_check
def _back(dy, x, w, scale, dx, dw, m, n, dy_row, x_row, dx_row, plus,
          WEIGHED: tl.constexpr, TRAINED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILE)
    if WEIGHED:
        weight = tl.load(w + i, mask=i < n, other=0.0).to(tl.float32) + plus
    total = tl.zeros([TILE], dtype=tl.float32)
    for _ in range(tl.program_id(0), m, tl.num_programs(0)):
        rho = tl.load(scale + row)
        straight = tl.load(x + row * x_row + i, mask=i < n, other=0.0).to(tl.float32) * rho
        grad = tl.load(dy + row * dy_row + i, mask=i < n, other=0.0).to(tl.float32)
        if TRAINED:
            total += grad * straight
        if WEIGHED:
            grad *= weight
        along = tl.sum(grad * straight, 0) / n
        tl.store(dx + row * dx_row + i, (rho * (grad - straight * along)).to(dx.dtype.element_ty), mask=i < n)
        row += tl.num_programs(0)
    if TRAINED:
        tl.store(dw + tl.program_id(0).to(tl.int64) * n + i, total, mask=i < n)


def rms_norm(
    x: Float[Tensor, "m n"], w: Float[Tensor, " n"] | None, eps: float, plus: float = 0.0
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m 1"]]:
    """(y of x's dtype, ρ in fp32). plus: c, 1 in the models of gemma. n: at most `ROW`."""
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    return _applied(x, w, scale, eps, plus, again=False), scale


def rms_norm_again(
    x: Float[Tensor, "m n"], w: Float[Tensor, " n"] | None, scale: Float[Tensor, "m 1"], plus: float = 0.0
) -> Float[Tensor, "m n"]:
    """y from the ρ that was kept."""
    return _applied(x, w, scale, 0.0, plus, again=True)


def _applied(x: Tensor, w: Tensor | None, scale: Tensor, eps: float, plus: float, again: bool) -> Tensor:
    m, n = x.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel():
        size = tile(n, ROW)
        with on(x):
            _ahead[(m,)](
                x, x if w is None else w.contiguous(), y, scale, n, x.stride(0), y.stride(0), float(eps), float(plus),
                WEIGHED=w is not None, AGAIN=again, TILE=size, num_warps=_warps(size),
            )  # fmt: skip
    return y


def rms_norm_back(
    dy: Float[Tensor, "m n"], x: Float[Tensor, "m n"], w: Float[Tensor, " n"] | None, scale: Float[Tensor, "m 1"],
    plus: float = 0.0, trained: bool = False,
) -> tuple[Float[Tensor, "m n"], Float[Tensor, " n"] | None]:  # fmt: skip
    """(∂x of x's dtype, ∂w in fp32 where w is `trained`)."""
    m, n = x.shape
    dx = torch.empty(m, n, dtype=x.dtype, device=x.device)
    parts = max(1, min(m, PARTS))
    dw = torch.zeros(parts, n, dtype=torch.float32, device=x.device) if trained else None
    if dx.numel():
        size = tile(n, ROW)
        with on(x):
            _back[(parts,)](
                dy, x, x if w is None else w.contiguous(), scale, dx, scale if dw is None else dw,
                m, n, dy.stride(0), x.stride(0), dx.stride(0), float(plus),
                WEIGHED=w is not None, TRAINED=trained, TILE=size, num_warps=_warps(size),
            )  # fmt: skip
    return dx, None if dw is None else dw.sum(0)


def _warps(size: int) -> int:
    return max(1, min(16, size // 256))
