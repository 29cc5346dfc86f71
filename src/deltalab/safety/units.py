"""Structured units of a model's weights: output rows, input columns, units of an MLP, attention heads.

    row       one output row of one matrix            column    one input column of one matrix
    mlp-unit  intermediate unit j: row j of gate and up (or of the one matrix that goes in), column j of down
    head      query head h: its rows of q and its columns of o; its rows of k and v too where each head owns its own

Under grouped-query attention several query heads share k and v rows, which are then part of no head (`Units.note`).

Units come in families, which rank among themselves: one a matrix for rows and columns, one an MLP or attention for the
others. A family is a list of parts: unit u of it owns, in each part's matrix, the `block` rows (axis 0) or columns
(axis 1) from `start + u · block` on. Fused query-key-value matrices are several parts of one matrix. Shapes are (out,
in), also where a Conv1D stores the transpose. What cannot be parted so is refused by name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.shapes import Float, Int
from deltalab.deltas.base import weight_of
from deltalab.deltas.select import in_attention, layers_of, model_name
from deltalab.deltas.sites import linears
from deltalab.safety.group import Group

Kind = Literal["entry", "row", "column", "mlp-unit", "head"]

ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("wq", "wk", "wv", "wo"),
)
"""Names of query, key, value and output, one matrix each."""

FUSED_ATTENTION = {
    "gpt2": ("c_attn", "c_proj", "stacked"),
    "phi3": ("qkv_proj", "o_proj", "stacked"),
    "gpt_neox": ("query_key_value", "dense", "interleaved"),
    "bloom": ("query_key_value", "dense", "interleaved"),
}
"""By model type, as one name has many orders: the fused matrix, the output, and whether the former holds all queries,
then all keys, then all values (stacked), or query, key and value of one head, then of the next (interleaved)."""

MLP = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
"""Names of what goes into an MLP's intermediate units, and last of what comes out of them."""


class Part(NamedTuple):
    """What each unit of a family owns of one matrix: `block` rows (axis 0) or columns (axis 1) from start + u · block."""

    path: str
    axis: int
    block: int = 1
    start: int = 0


class Family(NamedTuple):
    """Units that rank among themselves. name: of the matrix or module. size: how many units. parts: what each owns."""

    name: str
    size: int
    parts: tuple[Part, ...]


class Units:
    """The units of one kind in a model. shapes: path → (out, in) of every matrix looked at. note: what they leave out."""

    def __init__(
        self, kind: str, families: Sequence[Family], shapes: Mapping[str, tuple[int, int]], note: str = ""
    ) -> None:
        self.kind, self.shapes, self.note = kind, dict(shapes), note
        self.families = {family.name: family for family in families}
        self.owner = {part.path: family for family in families for part in family.parts}

    @property
    def counts(self) -> dict[str, int]:
        """Family → number of units."""
        return {name: family.size for name, family in self.families.items()}

    def means(self, values: Mapping[str, Tensor], absolute: bool = False) -> dict[str, Float[Tensor, " units"]]:
        """Family → each unit's mean of `values` (`absolute`: of their absolute values) over all its entries, in fp64.

        values: path → (out, in), scores or weights. Raises: UserError if a matrix has none.
        """
        out = {}
        for family in self.families.values():
            total, entries = torch.zeros(family.size, dtype=torch.float64), 0
            for part in family.parts:
                if part.path not in values:
                    raise UserError(
                        f"the {self.kind} units of '{family.name}' need '{part.path}', which has no score.",
                        nearest=nearest(part.path, values),
                        next="score every linear of the blocks",
                    )
                value = values[part.path].detach()
                owned = value.narrow(part.axis, part.start, part.block * family.size)
                owned = owned.abs() if absolute else owned
                sums = owned.sum(1 - part.axis, dtype=torch.float64).view(family.size, part.block).sum(1)
                total += sums.cpu()
                entries += part.block * value.shape[1 - part.axis]
            out[family.name] = total / entries
        return out

    def entries(self, path: str, units: Int[Tensor, " n"]) -> Int[Tensor, " k"]:
        """Flat indices of what these units of the matrix's family own in it, ascending where `units` are."""
        out, in_ = self.shapes[path]
        lines: dict[int, list[Tensor]] = {0: [], 1: []}
        family = self.owner.get(path)
        for part in family.parts if family else ():
            if part.path == path:
                first = part.start + units * part.block
                lines[part.axis].append((first[:, None] + torch.arange(part.block)).flatten())
        if lines[0]:
            return (torch.cat(lines[0])[:, None] * in_ + torch.arange(in_)).flatten()
        columns = torch.cat(lines[1]) if lines[1] else torch.zeros(0, dtype=torch.int64)
        return (torch.arange(out)[:, None] * in_ + columns).flatten()

    def group(self, name: str, chosen: Mapping[str, Int[Tensor, " n"]], info: Mapping[str, Any]) -> Group:
        """The group of these units. chosen: family → units, ascending."""
        indices = {path: self.entries(path, chosen[family.name]) for path, family in self.owner.items()}
        taken, of = sum(len(units) for units in chosen.values()), sum(self.counts.values())
        return Group.of_indices(name, self.shapes, indices, {**info, "unit": self.kind, "units": taken, "of_units": of})

    def of_group(self, group: Group) -> dict[str, Int[Tensor, " n"]]:
        """Family → the units that a group is made of, ascending.

        Raises: UserError if it holds a part of a unit, or entries that belong to none.
        """
        chosen = {}
        for family in self.families.values():
            part = family.parts[0]
            lines = group.mask(part.path).narrow(part.axis, part.start, part.block * family.size).any(1 - part.axis)
            chosen[family.name] = lines.view(family.size, part.block).any(1).nonzero()[:, 0]
        for path in group:
            owner = self.owner.get(path)
            mine = self.entries(path, chosen[owner.name]) if owner else torch.zeros(0, dtype=torch.int64)
            if not torch.equal(mine, group[path]):
                raise UserError(
                    f"group '{group.name}' is not made of whole {self.kind} units.",
                    found=f"its entries in '{path}' are {len(group[path])}, those of the units there {len(mine)}",
                    next="give the units that it was chosen by",
                )
        return chosen

    def __str__(self) -> str:
        counts = sorted(set(self.counts.values()))
        each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "no"
        text = f"{self.kind}: {sum(self.counts.values())} units in {len(self.families)} families of {each}"
        return f"{text}\n  {self.note}" if self.note else text


def units_of(model: nn.Module, kind: str) -> Units:
    """The units of one kind over the linears of the model's decoder blocks.

    `entry` has no structure and so no families. Raises: UserError for an unknown kind, or, naming the module, a layout
    that cannot be parted into such units.
    """
    if kind not in get_args(Kind):
        raise UserError(f"'{kind}' is no unit.", nearest=nearest(kind, get_args(Kind)), next=", ".join(get_args(Kind)))
    found = linears(model)
    inside = {name: found[name] for name, layer in layers_of(model, found).items() if layer is not None}
    shapes = {name: (int(weight_of(m).shape[0]), int(weight_of(m).shape[1])) for name, m in inside.items()}
    if kind == "row":
        return Units(kind, [Family(path, out, (Part(path, 0),)) for path, (out, _) in shapes.items()], shapes)
    if kind == "column":
        return Units(kind, [Family(path, in_, (Part(path, 1),)) for path, (_, in_) in shapes.items()], shapes)
    if kind == "mlp-unit":
        return Units(kind, _mlps(model, shapes), shapes)
    return _heads(model, shapes) if kind == "head" else Units(kind, [], shapes)


def _mlps(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> list[Family]:
    families = []
    for parent, names in _by_parent(path for path in shapes if not in_attention(path)).items():
        layout = next((layout for layout in MLP if set(layout) == set(names)), None)
        if layout is None:
            raise _unparted(model, "mlp-unit", parent, names)
        *into, out = (f"{parent}.{name}" for name in layout)
        count = shapes[out][1]
        if any(shapes[path][0] != count for path in into):
            raise _unparted(model, "mlp-unit", parent, names)
        families.append(Family(parent, count, (*(Part(path, 0) for path in into), Part(out, 1))))
    return families


def _heads(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> Units:
    config: Any = model.config
    config = config.get_text_config()
    heads = int(config.num_attention_heads)
    owners = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    families = []
    for parent, names in _by_parent(path for path in shapes if in_attention(path)).items():
        rows, parts = _attention(config.model_type, parent, set(names), heads, owners, size)
        if not parts or any(shapes[path][0] != count for path, count in rows.items()):
            raise _unparted(model, "head", parent, names)
        if shapes[parts[-1].path][1] != heads * size:
            raise _unparted(model, "head", parent, names)
        families.append(Family(parent, heads, parts))
    shared = (
        f"{heads // owners} query heads share each key and value (grouped queries): rows of k and v belong to no head"
    )
    return Units("head", families, shapes, shared if owners < heads else "")


def _attention(
    model_type: str, parent: str, names: set[str], heads: int, owners: int, size: int
) -> tuple[dict[str, int], tuple[Part, ...]]:
    """How many rows each matrix must have, and the parts of a head, its columns of the output last; none if unknown."""
    own = owners == heads
    separate = next((layout for layout in ATTENTION if set(layout) == names), None)
    if separate is not None:
        q, k, v, o = (f"{parent}.{name}" for name in separate)
        rows = {q: heads * size, k: owners * size, v: owners * size}
        return rows, (*(Part(path, 0, size) for path in ((q, k, v) if own else (q,))), Part(o, 1, size))
    fused, out, order = FUSED_ATTENTION.get(model_type, ("", "", ""))
    if names != {fused, out}:
        return {}, ()
    qkv, last = f"{parent}.{fused}", Part(f"{parent}.{out}", 1, size)
    if order == "interleaved":
        return {qkv: 3 * heads * size}, (Part(qkv, 0, 3 * size), last)
    starts = (0, heads * size, 2 * heads * size) if own else (0,)
    return {qkv: (heads + 2 * owners) * size}, (*(Part(qkv, 0, size, start) for start in starts), last)


def _by_parent(paths: Iterable[str]) -> dict[str, list[str]]:
    """Module → the names of its linears."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        found.setdefault(parent, []).append(name)
    return found


def _unparted(model: nn.Module, kind: str, parent: str, names: Sequence[str]) -> UserError:
    return UserError(
        f"'{parent}' of {model_name(model)} cannot be parted into {kind} units.",
        found=f"its linears: {', '.join(names)}",
        nearest=("row", "column"),
        next="choose rows, columns or entries",
    )
