"""A group of weight entries as a value: stored in few bytes, counted, printed, saved.

A group is a mapping, module path → flat indices (row · in + column), so whatever measures groups needs nothing of this
file. How groups are chosen is in `groups.py`, how they are drawn at random in `nulls.py`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import read_json, replacing, write_json
from deltalab.core.shapes import Bool, Int
from deltalab.deltas.select import leaf


class Group(Mapping[str, Tensor]):
    """A named set of entries, module path → flat indices, stored as bits or as indices, whichever is smaller.

    name: for tables and figures. info: how it was made (kind, unit, per, what was asked, seed). shapes: path → (out, in)
    of every matrix looked at, those without entries included.
    """

    def __init__(
        self, name: str, shapes: Mapping[str, tuple[int, int]], data: dict[str, Tensor], info: Mapping[str, Any]
    ) -> None:
        self.name, self.shapes, self.info, self._data = name, dict(shapes), dict(info), data
        self.counts = {path: _stored_count(data[path]) for path in self.shapes}

    @classmethod
    def of_masks(cls, name: str, masks: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> "Group":
        """From path → bool mask, (out, in), True where the group is."""
        shapes = {path: (int(mask.shape[0]), int(mask.shape[1])) for path, mask in masks.items()}
        return cls(name, shapes, {path: _pack(mask) for path, mask in masks.items()}, info or {"kind": "given"})

    @classmethod
    def of_indices(
        cls,
        name: str,
        shapes: Mapping[str, tuple[int, int]],
        indices: Mapping[str, Tensor],
        info: Mapping[str, Any] | None = None,
    ) -> "Group":
        """From path → flat indices, ascending; matrices of `shapes` without any are empty."""
        none = torch.zeros(0, dtype=torch.int64)
        data = {path: pack(indices.get(path, none), out * in_) for path, (out, in_) in shapes.items()}
        return cls(name, shapes, data, info or {"kind": "given"})

    def __getitem__(self, path: str) -> Int[Tensor, " k"]:
        return self.indices(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, path: object) -> bool:  # a mapping's own would unpack the entries to find out
        return path in self.shapes

    def indices(self, path: str) -> Int[Tensor, " k"]:
        """Flat indices of the entries in one matrix, ascending, int64."""
        data, (out, in_) = self._stored(path), self.shapes[path]
        if data.dtype != torch.uint8:
            return data.long()
        return torch.from_numpy(np.flatnonzero(np.unpackbits(data.numpy(), count=out * in_).view(bool)))

    def mask(self, path: str) -> Bool[Tensor, "out in"]:
        """True where the group is, in one matrix."""
        data, (out, in_) = self._stored(path), self.shapes[path]
        if data.dtype == torch.uint8:
            flat = torch.from_numpy(np.unpackbits(data.numpy(), count=out * in_)).bool()
        else:
            flat = torch.zeros(out * in_, dtype=torch.bool)
            flat[data.long()] = True
        return flat.view(out, in_)

    def masks(self) -> dict[str, Tensor]:
        """path → mask, of every matrix: what `freeze` takes."""
        return {path: self.mask(path) for path in self}

    @property
    def count(self) -> int:
        """Entries in the group."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Entries in all matrices looked at."""
        return sum(out * in_ for out, in_ in self.shapes.values())

    @property
    def fraction(self) -> float:
        """The share that the group really is."""
        return self.count / self.total

    @property
    def asked(self) -> float | None:
        """The share that was asked for; None where none was (set operations, given masks)."""
        return self.info.get("q")

    @property
    def unit(self) -> str:
        """The kind of unit that the group is made of: `entry`, `row`, `column`, `mlp-unit` or `head`."""
        return self.info.get("unit", "entry")

    @property
    def nbytes(self) -> int:
        """Bytes of the stored bits and indices."""
        return sum(data.numel() * data.element_size() for data in self._data.values())

    def sizes(self) -> dict[str, Any]:
        """JSON for a record: entries, share asked for and actual, bytes, how it was made, and the share in each matrix."""
        share = {path: self.counts[path] / (out * in_) for path, (out, in_) in self.shapes.items()}
        return {
            "entries": self.count,
            "of": self.total,
            "asked": self.asked,
            "fraction": self.fraction,
            "bytes": self.nbytes,
            **self.info,
            "per_matrix": share,
        }

    def by(self, name_of: Callable[[str], str]) -> dict[str, tuple[int, int]]:
        """Name of a part → entries of the group, of all, for matrices that `name_of` their paths puts together."""
        parts: dict[str, tuple[int, int]] = {}
        for path, (out, in_) in self.shapes.items():
            taken, of = parts.get(name_of(path), (0, 0))
            parts[name_of(path)] = taken + self.counts[path], of + out * in_
        return parts

    def table(self) -> str:
        """Its size, asked and actual, by layer and by kind of matrix."""
        parts = {f"layer {layer}": size for layer, size in self.by(layer_in).items()} | self.by(leaf)
        return _printed(self._title(), parts)

    def __str__(self) -> str:
        return _printed(self._title(), self.by(str))

    def _title(self) -> str:
        made = ", ".join(f"{key} {value}" for key, value in self.info.items())
        asked = "" if self.asked is None else f"asked {100 * self.asked:g} %, "
        return f"{self.name}: {self.count} of {self.total} entries, {asked}actual {100 * self.fraction:.3f} %  ({made})"

    def save(self, folder: str | Path) -> None:
        """Write the group as a folder, whole or not at all: `entries.safetensors` and `group.json`."""
        head = {
            "name": self.name,
            "entries": self.count,
            "fraction": self.fraction,
            "info": self.info,
            "shapes": self.shapes,
            "counts": self.counts,
        }
        with replacing(folder) as tmp:
            tmp.mkdir()
            (tmp / "entries.safetensors").write_bytes(save(self._data))  # not save_file: a full disk is an OSError here
            write_json(tmp / "group.json", head)

    @classmethod
    def load(cls, folder: str | Path) -> "Group":
        """A group that `save` wrote.

        Raises: UserError if it is missing, damaged, or holds another number of entries than it says.
        """
        folder = Path(folder)
        head = read_json(folder / "group.json", "group")
        try:
            data = load_file(folder / "entries.safetensors")
            shapes = {path: (out, in_) for path, (out, in_) in head["shapes"].items()}
            group = cls(head["name"], shapes, data, head["info"])
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"group '{folder}' is damaged.", found=str(error), next="make the groups again") from None
        if group.counts != head["counts"]:
            raise UserError(
                f"group '{folder}' is damaged: it holds {group.count} entries.",
                found=f"group.json says {head['entries']}",
                next="make the groups again",
            )
        return group

    def _stored(self, path: str) -> Tensor:
        if path not in self._data:
            raise UserError(f"group '{self.name}' does not cover '{path}'.", nearest=nearest(path, self.shapes))
        return self._data[path]


def layer_in(path: str) -> str:
    """The number of the block in a module path, or `other`."""
    found = re.search(r"\.(\d+)\.", path)
    return found[1] if found else "other"


def _printed(title: str, parts: Mapping[str, tuple[int, int]]) -> str:
    width, digits = max(map(len, parts)), len(str(max(taken for taken, _ in parts.values())))
    lines = [f"  {name:<{width}}  {taken:>{digits}}  {100 * taken / of:7.3f} %" for name, (taken, of) in parts.items()]
    return "\n".join([title, *lines])


def pack(index: Tensor, size: int) -> Tensor:
    """Indices, or bits where those are smaller: above one entry in 32 (in 64 for matrices of 2³¹ entries)."""
    if not _as_indices(index.numel(), size):
        flat = np.zeros(size, dtype=bool)
        flat[index.numpy()] = True
        return torch.from_numpy(np.packbits(flat))
    return index.to(_index_dtype(size))


def _pack(mask: Tensor) -> Tensor:
    flat = mask.flatten().cpu().numpy()
    if not _as_indices(int(np.count_nonzero(flat)), flat.size):
        return torch.from_numpy(np.packbits(flat))
    return torch.from_numpy(np.flatnonzero(flat)).to(_index_dtype(flat.size))


def _as_indices(count: int, size: int) -> bool:
    return count * _index_dtype(size).itemsize <= -(-size // 8)


def _index_dtype(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64


def _stored_count(data: Tensor) -> int:
    return data.numel() if data.dtype != torch.uint8 else int(np.unpackbits(data.numpy()).sum(dtype=np.int64))
