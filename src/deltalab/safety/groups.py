"""Groups of weight entries: chosen by score, by set difference, at random, or at random but matched.

A group is a mapping, module path → flat indices (row · in + column), so whatever measures groups needs nothing of this
file. Counts are exact: the share asked for, rounded to whole entries per row, per matrix or over all matrices, with ties
going to the lower index (and, over all matrices, to the earlier one).
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import read_json, replacing, write_json
from deltalab.core.shapes import Bool, Int
from deltalab.safety.topk import top_of_all, top_of_rows

Per = Literal["row", "matrix", "global"]
BINS = 20
"""Quantile bins of |W| in a matrix that a matched draw keeps to."""


class Group(Mapping[str, Tensor]):
    """A named set of entries, module path → flat indices, stored as bits or as indices, whichever is smaller.

    name: for tables and figures. info: how it was made (kind, per, what was asked, seed). shapes: path → (out, in) of
    every matrix looked at, those without entries included.
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
        return (
            data.long()
            if data.dtype != torch.uint8
            else torch.from_numpy(np.flatnonzero(np.unpackbits(data.numpy(), count=out * in_).view(bool)))
        )

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
    def nbytes(self) -> int:
        """Bytes of the stored bits and indices."""
        return sum(data.numel() * data.element_size() for data in self._data.values())

    def sizes(self) -> dict[str, Any]:
        """JSON for a record: entries, fraction, what was asked, bytes, and the share in each matrix."""
        share = {path: self.counts[path] / (out * in_) for path, (out, in_) in self.shapes.items()}
        return {
            "entries": self.count,
            "of": self.total,
            "fraction": self.fraction,
            "bytes": self.nbytes,
            **self.info,
            "per_matrix": share,
        }

    def __str__(self) -> str:
        asked = ", ".join(f"{key} {value}" for key, value in self.info.items())
        lines = [f"{self.name}: {self.count} of {self.total} entries, {100 * self.fraction:.3f} %  ({asked})"]
        return "\n".join(
            lines
            + [
                f"  {path}  {n}  {100 * n / (o * i):.3f} %"
                for (path, n), (o, i) in zip(self.counts.items(), self.shapes.values(), strict=True)
            ]
        )

    def save(self, folder: str | Path) -> None:
        """Write the group as a folder, whole or not at all: `entries.safetensors` and `group.json`."""
        with replacing(folder) as tmp:
            tmp.mkdir()
            (tmp / "entries.safetensors").write_bytes(save(self._data))  # not save_file: a full disk is an OSError here
            write_json(tmp / "group.json", {"name": self.name, "entries": self.count, "fraction": self.fraction, "info": self.info,
                                            "shapes": self.shapes, "counts": self.counts})  # fmt: skip

    @classmethod
    def load(cls, folder: str | Path) -> "Group":
        """A group that `save` wrote.

        Raises: UserError if it is missing, damaged, or holds another number of entries than it says.
        """
        folder = Path(folder)
        head = read_json(folder / "group.json", "group")
        try:
            data = load_file(folder / "entries.safetensors")
            group = cls(
                head["name"], {path: (out, in_) for path, (out, in_) in head["shapes"].items()}, data, head["info"]
            )
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"group '{folder}' is damaged.", found=str(error), next="make the groups again") from None
        if group.counts != head["counts"]:
            raise UserError(f"group '{folder}' is damaged: it holds {group.count} entries.", found=f"group.json says {head['entries']}",
                            next="make the groups again")  # fmt: skip
        return group

    def _stored(self, path: str) -> Tensor:
        if path not in self._data:
            raise UserError(f"group '{self.name}' does not cover '{path}'.", nearest=nearest(path, self.shapes))
        return self._data[path]


# ---- chosen by score ----------------------------------------------------------------------------------------------


def top(scores: Mapping[str, Tensor], q: float, per: Per = "row", name: str = "top") -> Group:
    """The entries with the largest scores: the share `q` of each row, of each matrix, or of all matrices together.

    scores: path → (out, in), read once (per row, per matrix) or a few times (global), one matrix at a time.
    Raises: UserError unless 0 < q ≤ 1, if q is less than half an entry, or if a score is not finite.
    """
    if not 0 < q <= 1:
        raise UserError(f"a share of {q} cannot be chosen.", next="give a fraction: 0.01 is one per cent")
    masks: dict[str, Tensor] = {}
    checked = _Checked(scores)
    if per == "global":
        masks |= top_of_all(checked, _rounded(q * sum(scores[path].numel() for path in scores)))
    else:
        for path in scores:
            score = checked[path]
            rows = score if per == "row" else score.reshape(1, -1)
            masks[path] = top_of_rows(rows, _rounded(q * rows.shape[1])).reshape(score.shape)
    group = Group.of_masks(name, masks, {"kind": "top", "per": per, "q": q})
    return _some(group, f"the top {100 * q:g} % per {per} is less than one entry", "a larger share, or per matrix")


def difference(
    safety: Mapping[str, Tensor],
    utility: Mapping[str, Tensor],
    p: float,
    q: float,
    per: Per = "row",
    name: str = "set difference",
) -> Group:
    """S(p, q): the top `q` of the safety score without the top `p` of the utility score (Wei et al. 2024, §3.2).

    Raises: UserError if the two cover different matrices, or nothing is left.
    """
    if list(safety) != list(utility):
        raise UserError(
            "the two scores cover different matrices.",
            found=f"{len(safety)} and {len(utility)}",
            next="score both on one model",
        )
    safe, useful = top(safety, q, per), top(utility, p, per)
    masks = {path: safe.mask(path) & ~useful.mask(path) for path in safe}
    group = Group.of_masks(name, masks, {"kind": "difference", "per": per, "q": q, "p": p})
    return _some(
        group,
        f"the top {100 * q:g} % for safety lies within the top {100 * p:g} % for utility",
        "a larger q or a smaller p",
    )


# ---- drawn at random ----------------------------------------------------------------------------------------------


def random_like(group: Group, seed: int, name: str = "random") -> Group:
    """As many entries of each matrix as `group` has there, drawn uniformly from all of the matrix."""
    return random_groups(group, 1, seed, name=name)[0]


def matched_random(
    group: Group, weights: Mapping[str, Tensor], seed: int, bins: int = BINS, name: str = "matched random"
) -> Group:
    """As many entries of each matrix *and of each quantile of |weights| in it* as `group` has, drawn uniformly.

    weights: path → (out, in), the weights, or another value to match on (the utility score, say).
    """
    return random_groups(group, 1, seed, weights, bins, name)[0]


def random_groups(
    group: Group,
    n: int,
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
    bins: int = BINS,
    name: str | None = None,
) -> list[Group]:
    """`n` independent draws, with or without matching: a null band. Draw i is the single draw with seed + i.

    Draws come from the whole matrix, the group's own entries included: under the null they are like any other.
    """
    kind = "random" if weights is None else "matched"
    masks: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for path, (out, in_) in group.shapes.items():
        own = group.indices(path).numpy()
        if weights is None:
            order, counts = None, np.array([len(own)])
        else:
            order = np.argsort(weights[path].detach().abs().float().flatten().cpu().numpy(), kind="stable")
            rank = np.empty_like(order)
            rank[order] = np.arange(len(order))
            counts = np.bincount(rank[own] * bins // len(order), minlength=bins)
        for i in range(n):
            rng = np.random.default_rng([seed + i, zlib.crc32(path.encode())])
            masks[i][path] = _pack_indices(_draw(rng, out * in_, counts, order), out * in_)
    info = {"kind": kind, "like": group.name, **({"bins": bins} if weights is not None else {})}
    return [Group(name or f"{kind} {i}", group.shapes, masks[i], {**info, "seed": seed + i}) for i in range(n)]


def _draw(rng: np.random.Generator, size: int, counts: np.ndarray, order: np.ndarray | None) -> Tensor:
    """Flat indices, ascending: counts[b] of the b-th of equal parts of `order` (of all entries if None)."""
    edges = -(-np.arange(len(counts) + 1) * size // len(counts))  # part b holds the ranks r with r · parts // size == b
    picks = [
        lo + rng.choice(hi - lo, c, replace=False, shuffle=False)
        for lo, hi, c in zip(edges, edges[1:], counts, strict=False)
        if c
    ]
    flat = np.concatenate(picks) if picks else np.zeros(0, np.int64)
    return torch.from_numpy(np.sort(flat if order is None else order[flat]))


def jaccard(a: Group, b: Group) -> float:
    """|A ∩ B| / |A ∪ B| over the matrices of both."""
    paths = [path for path in a if path in b.shapes]
    both = sum(int((a.mask(path) & b.mask(path)).sum()) for path in paths)
    either = sum(a.counts[path] + b.counts[path] for path in paths) - both
    return both / either if either else 0.0


# ---- storage ------------------------------------------------------------------------------------------------------


def _pack(mask: Tensor) -> Tensor:
    flat = mask.flatten().cpu()
    return _pack_indices(flat.nonzero()[:, 0], flat.numel())


def _pack_indices(index: Tensor, size: int) -> Tensor:
    """Indices, or bits where those are smaller: above one entry in 32 (in 64 for matrices of 2³¹ entries)."""
    index = index.to(torch.int32 if size < 2**31 else torch.int64)
    if index.numel() * index.element_size() <= -(-size // 8):
        return index
    flat = np.zeros(size, dtype=bool)
    flat[index.numpy()] = True
    return torch.from_numpy(np.packbits(flat))


def _stored_count(data: Tensor) -> int:
    return data.numel() if data.dtype != torch.uint8 else int(np.unpackbits(data.numpy()).sum(dtype=np.int64))


def _rounded(value: float) -> int:
    """The nearest whole number, halves up."""
    return int(value + 0.5)


class _Checked(Mapping[str, Tensor]):
    """Scores that are read one at a time, and refused if one is not finite."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self.scores = scores

    def __getitem__(self, path: str) -> Tensor:
        score = self.scores[path]
        if not torch.isfinite(score).all():
            raise UserError(
                f"the score of '{path}' holds values that are not finite.",
                next="compute the scores again in a wider dtype",
            )
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


def _some(group: Group, why: str, then: str) -> Group:
    if group.count == 0:
        raise UserError(f"group '{group.name}' is empty: {why}.", next=f"choose {then}")
    return group


def union(groups: Iterable[Group], name: str) -> Group:
    """Entries that are in any of the groups, which must cover the same matrices."""
    first, *rest = groups
    masks = first.masks()
    for group in rest:
        masks = {path: mask | group.mask(path) for path, mask in masks.items()}
    return Group.of_masks(name, masks, {"kind": "union", "of": [first.name, *(g.name for g in rest)]})
