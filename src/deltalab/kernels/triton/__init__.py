"""Twins of some kernels in Triton, for tensors on CUDA; each computes what the kernel of its name beside this folder does.

Nothing here is imported before a tensor on CUDA asks for it, and Triton need not be installed. One pass over memory in
place of several is all that they win; the products stay cuBLAS's. Tests run them on the CPU by Triton's interpreter.
"""

import contextlib
import functools
import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What they compute, in fp32 inside; wider numbers are left to torch."""
ROW = 1 << 15
"""Entries of the longest row that a program of a norm takes."""
RANK = 64
"""The largest rank whose products with a tile of rows stay in a program's registers."""


@functools.cache
def installed() -> bool:
    """Whether there is a Triton to compile them."""
    return importlib.util.find_spec("triton") is not None


def available(tensor: Tensor) -> bool:
    """Whether a tensor's work goes to the kernels of this folder."""
    return tensor.is_cuda and tensor.dtype in DTYPES and installed() and not torch.compiler.is_compiling()


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch where the tensor is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def rows(x: Tensor) -> Tensor:
    """x as (m, n), each row without gaps."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def tile(n: int, most: int) -> int:
    """The power of two that holds n, at most `most`."""
    return min(1 << max(n - 1, 0).bit_length(), most)
