"""NF4: four-bit codes that are quantiles of a normal distribution, in blocks of neighbours that share a scale.

    Ŵ = CODES[code] · absmax,   code = the value of CODES nearest to W / absmax,   absmax = max |W| of the block

(Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E.) The blocks run over the weight row by row,
flattened; the last one may be short. Nested ("double") quantisation keeps absmax − offset as 8-bit codes, in blocks of
256 with a scale each; offset is the mean of absmax. Everything is as bitsandbytes has it on the CPU, bit for bit: the
order of the codes, the rounding, what a block of zeros becomes; so its files can be read and written.
"""

import functools
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float, Int, UInt8
from deltalab.quant import strips

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED_BLOCK = 256
LEAST = 1e-38
"""The least absmax that is divided by."""
CHUNK = 1 << 18
"""Entries quantised or dequantised at a time: what is made on the way stays in the cache."""


class NF4(NamedTuple):
    """A quantised tensor. codes: two a byte, the first in the high half; of an odd number the last half is empty.

    absmax: one a block, fp32; where it is nested, 8-bit codes, whose values are
    nested_map[absmax] · nested_absmax + offset.
    """

    codes: UInt8[Tensor, "bytes 1"]
    absmax: Float[Tensor, " blocks"] | UInt8[Tensor, " blocks"]
    nested_absmax: Float[Tensor, " nested"] | None
    nested_map: Float[Tensor, "256"] | None
    offset: Float[Tensor, ""] | None
    blocksize: int
    shape: tuple[int, ...]

    def scales(self) -> Float[Tensor, " blocks"]:
        """absmax, one a block, in fp32."""
        if self.nested_absmax is None or self.nested_map is None or self.offset is None:
            return self.absmax
        values = self.nested_map.index_select(0, self.absmax.int())
        return _scaled(values, self.nested_absmax, NESTED_BLOCK) + self.offset

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "..."]:
        """Ŵ: the product in fp32, rounded to `dtype`."""
        return dequantise(self.codes, self.scales(), self.blocksize, self.shape, dtype)

    def strips(self, height: int, dtype: torch.dtype) -> Iterator[Float[Tensor, "rows in"]]:
        """Ŵ, of a matrix, so many rows at a time; whole where blocks go over the end of a row."""
        out, in_ = self.shape
        if in_ % self.blocksize:
            yield self.weight(dtype)
            return
        codes, scales = self.codes.view(out, -1), self.scales().view(out, -1)
        for i in range(0, out, height):
            part = codes[i : i + height]
            yield dequantise(part, scales[i : i + height].reshape(-1), self.blocksize, (len(part), in_), dtype)

    def product(self, x: Float[Tensor, "*lead in"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "*lead out"]:
        """Ŵ x + b of a matrix, by strips."""
        return strips.product(x, self.strips(strips.height(x), x.dtype), bias)


def quantise(W: Float[Tensor, "..."], blocksize: int = 64, double_quant: bool = True) -> NF4:
    """The codes of W, which is fp32 or 16-bit; what is wider is rounded to fp32 first.

    Raises: UserError for a blocksize that bitsandbytes does not have, or an entry that is not finite.
    """
    if W.device.type == "meta":
        return empty(tuple(W.shape), blocksize, double_quant, W.device)
    codes, absmax, *_ = empty(tuple(W.shape), blocksize, False, W.device)
    flat = W.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].float()
        into = codes[start // 2 : (start + part.numel() + 1) // 2, 0]
        _quantise(part, blocksize, into, absmax[start // blocksize :])
    if not double_quant:
        return NF4(codes, absmax, None, None, None, blocksize, tuple(W.shape))
    offset = absmax.mean()
    if absmax.numel() and not bool(offset.isfinite()):
        raise UserError("the scales of the blocks are too large for their mean to be taken.", found=f"a tensor {tuple(W.shape)}",
                        next="double_quant=False")  # fmt: skip
    nested, nested_absmax = quantise_scales(absmax - offset)
    return NF4(codes, nested, nested_absmax, nested_map(W.device), offset, blocksize, tuple(W.shape))


def empty(shape: tuple[int, ...], blocksize: int, double_quant: bool, device: torch.device) -> NF4:
    """What `quantise` gives for a tensor of this shape, its values not set yet.

    Raises: UserError for a blocksize that bitsandbytes does not have.
    """
    require_blocksize(blocksize)
    size = torch.Size(shape).numel()
    blocks = -(-size // blocksize)
    codes = torch.empty(-(-size // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device)
    if not double_quant:
        return NF4(codes, absmax, None, None, None, blocksize, shape)
    scales, offset = torch.empty(-(-blocks // NESTED_BLOCK), device=device), torch.empty((), device=device)
    return NF4(codes, absmax, scales, nested_map(device), offset, blocksize, shape)


def dequantise(
    codes: UInt8[Tensor, "..."], absmax: Float[Tensor, " blocks"], blocksize: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Float[Tensor, "..."]:  # fmt: skip
    """Ŵ in `dtype`, by bitsandbytes' kernel where it is there and right, else `dequantise_plainly`: the same bits, except
    that the kernel may give 0 for a bfloat16 below the least normal float, 2⁻¹²⁶.
    """
    kernel = _kernel()
    # On AVX-512 its blocks may not go over the end of a row, and it falls back to what is slower from 2048 on.
    right = shape and shape[-1] % blocksize == 0 and blocksize <= 1024 and dtype.itemsize <= 4
    if kernel is None or not right or codes.device.type not in ("cpu", "cuda"):
        return dequantise_plainly(codes, absmax, blocksize, shape, dtype)
    W: Tensor = kernel.dequantize_4bit.default(codes, absmax, blocksize, "nf4", shape, dtype)
    return W


def dequantise_plainly(
    codes: UInt8[Tensor, "..."], absmax: Float[Tensor, " blocks"], blocksize: int, shape: tuple[int, ...],
    dtype: torch.dtype, values: Float[Tensor, "16"] | None = None,
) -> Float[Tensor, "..."]:  # fmt: skip
    """Ŵ in `dtype`, in torch alone: a byte is looked up in a table of the pairs that it may stand for.

    values: what the codes stand for, if it is not `CODES`.
    """
    size = torch.Size(shape).numel()
    W = torch.empty(size, dtype=dtype, device=codes.device)
    table = _nf4_pairs(codes.device) if values is None else _pairs(values)
    flat = codes.reshape(-1)
    for start in range(0, size, CHUNK):
        pairs = table.index_select(0, flat[start // 2 : (start + CHUNK) // 2].int())
        part = pairs.view(torch.float32)[: size - start]
        W[start : start + CHUNK] = _scaled(part, absmax[start // blocksize :], blocksize)
    return W.view(shape)


def quantise_scales(values: Float[Tensor, " n"]) -> tuple[UInt8[Tensor, " n"], Float[Tensor, " blocks"]]:
    """Codes of `nested_map`, and the absmax of each block of 256: bitsandbytes' `quantize_blockwise`.

    It rounds to one of 65536 even steps first, and takes the code that is nearest to the step.
    """
    absmax = torch.stack([part.abs().amax() for part in values.split(NESTED_BLOCK)]) if values.numel() else values
    scaled = _scaled(values, 1 / absmax, NESTED_BLOCK).clamp(-1, 1)
    steps = ((scaled + 1) * 32767.5 + 0.5).nan_to_num(0)  # 0 / 0 in a block of zeros
    return _nearest(values.device).index_select(0, steps.int()), absmax


def require_blocksize(blocksize: int) -> None:
    """Raises: UserError for one that is not of `BLOCKSIZES`."""
    if blocksize not in BLOCKSIZES:
        raise UserError(f"NF4 has no blocks of {blocksize}.", nearest=[str(size) for size in BLOCKSIZES])


@functools.cache
def nested_map(device: torch.device) -> Float[Tensor, "256"]:
    """The 256 values of the nested codes, ascending: signed, of seven decades, each cut finer than the one below.

    Dettmers 2015, arXiv:1511.04561: 2^i values in decade i, the middles of even parts of 0.1 … 1; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _quantise(values: Tensor, blocksize: int, codes: Tensor, absmax: Tensor) -> None:
    """Write the codes and the absmax of whole blocks and, at the end, of one that may be short."""
    whole = values.numel() // blocksize * blocksize
    blocks = values[:whole].view(-1, blocksize)
    largest = blocks.abs().amax(-1)
    absmax[: len(largest)] = largest
    scaled = (blocks * (1 / largest.clamp(min=LEAST)).unsqueeze(-1)).view(-1)
    if whole < values.numel():  # bitsandbytes divides here, and keeps what it divides by
        least = values[whole:].abs().amax().clamp(min=LEAST)
        absmax[len(largest)] = least
        scaled = torch.cat([scaled, values[whole:] / least, values.new_zeros(values.numel() % 2)])
        largest = torch.cat([largest, least.view(1)])
    if not bool(largest.isfinite().all()):
        raise UserError("a weight that is not finite cannot be quantised.", found="an infinity or NaN in it")
    found = _codes(scaled).view(torch.int16)
    high, low = (4, 8) if _LITTLE_ENDIAN else (12, 0)
    codes.copy_(found << high & 0xF0 | found >> low & 0x0F)


def _codes(scaled: Float[Tensor, " n"]) -> UInt8[Tensor, " n"]:
    """The number of middles between neighbouring codes that are below each value.

    A bin of the table holds at most one middle, so one comparison decides. The bin is a function that does not fall,
    applied to middles and values alike: rounding cannot put a value on the wrong side.
    """
    below, middle = _bins(scaled.device)
    bins = _bin(scaled)
    return below.index_select(0, bins) + (scaled > middle.index_select(0, bins))


def _bin(scaled: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    return scaled.mul(2040.0).add_(2048.0).int()


@functools.cache
def _bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each of 4096 bins: how many middles are in those below, and the middle in it, if any."""
    values = torch.tensor(CODES)
    middles = (values[:-1] + values[1:]) / 2
    at = _bin(middles)
    below = torch.bucketize(torch.arange(4096, dtype=torch.int32), at)
    middle = torch.full((4096,), torch.inf)
    middle[at] = middles
    return below.to(device, torch.uint8), middle.to(device)


@functools.cache
def _nearest(device: torch.device) -> Tensor:
    """Of each of 65536 even steps from −1 to 1 the nearest code of `nested_map`."""
    values = nested_map(torch.device("cpu"))
    steps = 2 * torch.arange(65536, dtype=torch.float32) / 65535 - 1
    return torch.bucketize(steps, (values[:-1] + values[1:]) / 2).to(device, torch.uint8)


def _pairs(values: Float[Tensor, "16"]) -> Tensor:
    """The two values of each byte, as one int64."""
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], -1).view(torch.int64).view(-1)


@functools.cache
def _nf4_pairs(device: torch.device) -> Tensor:
    return _pairs(torch.tensor(CODES)).to(device)


def _scaled(values: Float[Tensor, " n"], scales: Float[Tensor, " blocks"], blocksize: int) -> Float[Tensor, " n"]:
    """Each value times the scale of its block; there may be more scales than blocks."""
    whole = len(values) // blocksize * blocksize
    made = values[:whole].view(-1, blocksize) * scales[: whole // blocksize].unsqueeze(-1)
    if whole == len(values):
        return made.view(-1)
    return torch.cat([made.view(-1), values[whole:] * scales[whole // blocksize]])


_LITTLE_ENDIAN = int(torch.tensor([1, 0], dtype=torch.uint8).view(torch.int16)) == 1


@functools.cache
def _kernel() -> "ModuleType | torch._ops._OpNamespace | None":
    """The operators of bitsandbytes; None where it is not installed, or does not run here."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of another package that it would like
    try:
        import bitsandbytes  # noqa: F401

        return torch.ops.bitsandbytes
    except Exception:
        return None
    finally:
        log.setLevel(level)
