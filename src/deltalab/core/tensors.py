"""Many small tensors to a safetensors file and back, fast: the library makes five Python objects of each.

The bytes are those that `safetensors.torch.save` writes. Reading leaves the checks to the library and the tensors on the
mapped file, so nothing is copied before it is used.
"""

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64", torch.int64: "I64", torch.complex64: "C64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}
ORDER = {name: rank for rank, name in enumerate(("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "C64", "F64", "I64"))}  # fmt: skip
"""Rank of a dtype in a file: the widest come first, so that each tensor starts at a multiple of its width."""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors of the CPU as one file. One after the other: there is no second copy of them."""
    names = {key: NAMES[tensor.dtype] for key, tensor in tensors.items()}
    order = sorted(tensors, key=lambda key: (-ORDER[names[key]], key.encode()))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key in order:
        start, end = end, end + tensors[key].nbytes
        header[key] = {"dtype": names[key], "shape": list(tensors[key].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=1 << 20) as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = tensors[key].detach()
            in_numpy = tensor.dtype is not torch.bfloat16 and tensor.ndim
            handle.write((tensor if in_numpy else tensor.flatten().view(torch.uint8)).numpy().data)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by key in the order of the file. They live on the file, written to or not.

    Raises: safetensors.SafetensorError for a damaged file.
    """
    with safetensors.safe_open(path, framework="pt") as file:  # it checks the header against the length
        keys = file.keys()
        header = _header(path)
        if any(info["dtype"] not in DTYPES or info["data_offsets"][0] % 8 % _width(info) for info in header.values()):
            return {key: file.get_tensor(key) for key in keys}
    if not header:
        return {}
    with open(path, "rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
        mapped = mmap.mmap(
            handle.fileno(), 0, access=mmap.ACCESS_COPY
        )  # pages that are written to become the process's own
    return {key: _tensor(mapped, start, info) for key, info in header.items()}


def _header(path: str | Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        header: dict[str, Any] = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _width(info: Mapping[str, Any]) -> int:
    return DTYPES[info["dtype"]].itemsize


def _tensor(mapped: mmap.mmap, start: int, info: Mapping[str, Any]) -> Tensor:
    shape, dtype = info["shape"], DTYPES[info["dtype"]]
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    found = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + info["data_offsets"][0])
    return found if len(shape) == 1 else found.view(shape)
